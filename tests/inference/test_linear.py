"""Swapped linear layers compute what the model's own did; C and torch compute the same."""

import asyncio
import copy
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch

from tests.inference.conftest import INT8, answer, needs_exact_int8, request, run
from tests.inference.families import FAMILIES
from tidepool.errors import ModelError
from tidepool.inference import attention, fused, linear, native
from tidepool.inference.fused import fuse
from tidepool.inference.linear import swap_linear_layers, weights_dtype
from tidepool.inference.paged import PagedEngine
from tidepool.inference.scheduler import Chunk
from tidepool.inference.sequence import Sequence
from tidepool.models import build_model

TOKENS = torch.arange(40, 60)[None]

needs_avx512 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512" or native.linear_library() is None, reason="no AVX-512, or no C compiler"
)


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    return build_model(FAMILIES[request.param], len(tokenizer), 1, tokenizer)


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS, use_cache=False).logits[0].float()


def swapped(model: Any, weights: Any) -> Any:
    changed = copy.deepcopy(model)
    swap_linear_layers(changed, weights)
    return changed


@pytest.mark.parametrize(
    ("kind", "has_avx512", "is_amd"),
    [("_Packed", False, True), ("", False, False), pytest.param("_Banded", True, False, marks=needs_avx512)],
)
def test_float32_by_any_library_is_the_model_s_own(
    family: Any, monkeypatch: pytest.MonkeyPatch, kind: str, has_avx512: bool, is_amd: bool
) -> None:
    monkeypatch.setattr(linear, "_has_avx512", lambda: has_avx512)
    monkeypatch.setattr(linear, "_is_amd", lambda: is_amd)
    changed = swapped(family, "fp32")
    assert kinds(changed) == ({kind} if kind and has_linear_layers(family) else set())
    torch.testing.assert_close(logits(changed), logits(family), rtol=1e-4, atol=1e-4)


def kinds(model: Any) -> set[str]:
    """Of the layers that multiply with something else than torch."""
    return {type(module).__name__ for module in model.modules()} & {"_Packed", "_Banded"}


def has_linear_layers(model: Any) -> bool:
    return any(type(module) is torch.nn.Linear for module in model.modules())


def test_float32_is_exact_but_for_the_order_of_additions(family: Any) -> None:
    assert torch.allclose(logits(swapped(family, "auto")), logits(family), rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            "_Packed", marks=pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16")
        ),
        pytest.param("_Banded", marks=needs_avx512),
    ],
)
def test_bfloat16_is_as_far_from_float32_as_it_is_in_transformers(family: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(linear, "_multiplies_bf16", lambda: kind == "_Packed")
    exact, rounded = logits(family), family.bfloat16()
    own = (logits(rounded) - exact).abs()
    changed = swapped(rounded, "bf16")
    assert kinds(changed) == ({kind} if has_linear_layers(family) else set())
    ours = (logits(changed) - exact).abs()
    assert ours.mean() < 1.3 * own.mean()


@needs_avx512
@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(1, 1), (36, 70), (300, 64), (9, 33)])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_in_bands_are_right_and_the_same_in_any_company(
    num_inputs: int, num_outputs: int, has_bias: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    layer = torch.nn.Linear(num_inputs, num_outputs, has_bias, dtype=dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    found = linear._Banded(layer)
    inputs = torch.randn(2, 30, num_inputs, generator=generator).to(dtype)
    exact = torch.nn.functional.linear(inputs.double(), layer.weight.double(), layer.bias.double() if has_bias else None)
    # Half a unit in the last place of bfloat16, and what float32 sums lose where they cancel.
    torch.testing.assert_close(found(inputs).double(), exact, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=2e-5)
    for num in (1, 2, 5, 11, 12, 13, 29):
        assert found(inputs[1, :num]).equal(found(inputs)[1, :num])


@needs_exact_int8
def test_int8_is_near_and_changes_something(family: Any) -> None:
    exact, found = logits(family), logits(swapped(family, "int8"))
    error = (found - exact).abs().mean() / exact.std()
    assert 1e-4 < error < 0.05


@needs_exact_int8
def test_a_token_in_int8_has_the_same_bits_in_any_company(llama: Any) -> None:
    changed = swapped(llama, "int8")
    inputs = torch.randn(9, 32, generator=torch.Generator().manual_seed(1))
    layer = changed.lm_head
    assert layer(inputs)[3:4].equal(layer(inputs[3:4]))


@pytest.mark.parametrize("weights", ["bf16", INT8])
def test_an_engine_answers_with_rounded_weights_and_an_adapter(llama: Any, tokenizer: Any, adapters: Any, weights: str) -> None:
    model = llama.to(weights_dtype(weights, "cpu"))
    one = next(iter(adapters))

    async def play(engine: PagedEngine) -> None:
        await engine.load_adapter(one, adapters[one])
        asked = [request(range(60, 70), 8, f"r{digest}", digest) for digest in (None, one)]
        found = await asyncio.gather(*(answer(engine, each) for each in asked))
        assert all(found)
        assert found[0] != found[1]

    run(model, tokenizer, play, weights=weights)


def test_int8_is_for_cpus() -> None:
    assert weights_dtype("auto", "cpu") == weights_dtype("fp32", "cuda") == torch.float32
    assert weights_dtype("auto", "cuda") == weights_dtype("bf16", "cpu") == weights_dtype("int8", "cpu") == torch.bfloat16
    with pytest.raises(ModelError, match="int8 is for CPUs"):
        weights_dtype("int8", "cuda")


def test_int8_is_refused_where_it_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = linear._Int8.forward
    monkeypatch.setattr(linear._Int8, "forward", lambda layer, input: plain(layer, input).clamp(max=40.0))  # as 16 bits would
    with pytest.raises(ModelError, match="does not multiply int8 exactly"):
        linear._check_int8()


# --- C ---------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(native.library() is None, reason="there is no C compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 5])
def test_attention_in_c_is_that_of_torch_in_float64(dtype: torch.dtype, window: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(80, 2, 24, generator=generator).to(dtype), torch.randn(80, 2, 16, generator=generator).to(dtype)
    query = torch.randn(3, 6, 24, generator=generator).to(dtype)
    table = torch.tensor([[3, 1, 0], [4, 0, 0], [2, 4, 1]], dtype=torch.int32)
    lengths = torch.tensor([20, 1, 48], dtype=torch.int32)
    found = native.attend(query, keys, values, table, lengths, 16, 0.3, window)
    for row, length in enumerate(lengths.tolist()):
        places = [int(table[row, index // 16]) * 16 + index % 16 for index in range(length)][-(window or length) :]
        for head in range(6):
            scores = keys[places, head // 3].double() @ query[row, head].double() * 0.3
            expected = scores.softmax(0) @ values[places, head // 3].double()
            assert torch.allclose(found[row, head].double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
    alone = native.attend(query[2:], keys, values, table[2:], lengths[2:], 16, 0.3, window)
    assert alone[0].equal(found[2])


@pytest.mark.skipif(native.library() is None, reason="there is no C compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantizing_in_c_is_that_of_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.randn(5, 33, generator=torch.Generator().manual_seed(1)).to(dtype)
    inputs[4] = 0
    numbers, scale = native.quantize(inputs)
    assert torch.allclose((numbers.float() - 128) * scale[:, None], inputs.float(), atol=float(scale.max()) * 0.51)
    sums, bias = torch.randn(5, 7) * 1000, torch.rand(7)
    out = native.scale(sums, scale, bias, dtype)
    monkeypatch.setattr(native, "library", lambda: None)
    expected_numbers, expected_scale = native.quantize(inputs)
    assert torch.allclose(scale, expected_scale)
    assert (numbers.int() - expected_numbers.int()).abs().max() <= 1
    assert torch.allclose(out.float(), native.scale(sums, scale, bias, dtype).float(), rtol=1e-2, atol=1e-5)


@pytest.mark.skipif(native.library() is None, reason="there is no C compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_gated_mlps_and_rotations_are_computed_in_c_and_alike(family: Any, dtype: torch.dtype) -> None:
    with torch.no_grad():
        for name, parameter in family.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    exact, model = logits(family), family.to(dtype)
    own, changed = logits(model), swapped(model, "auto")
    num_norms = sum("RMSNorm" in type(module).__name__ for module in changed.modules())
    assert fuse(changed) == (num_norms + 2 + 2 if num_norms else 0)  # GPT-2 has none of them
    if dtype == torch.float32:
        assert torch.allclose(logits(changed), own, rtol=1e-5, atol=5e-4)
    else:
        assert (logits(changed) - exact).abs().mean() < 1.3 * (own - exact).abs().mean()


@pytest.mark.skipif(native.library() is None, reason="there is no C compiler")
def test_a_module_that_computes_something_else_keeps_its_own_code(llama: Any) -> None:
    changed = swapped(llama, "auto")
    own = type(changed.model.norm)
    changed.model.norm.__class__ = type("OddRMSNorm", (own,), {"forward": lambda self, input: own.forward(self, input) + 0.01})
    assert fuse(changed) == 4 + 2 + 2
    assert "forward" not in vars(changed.model.norm)


@pytest.mark.skipif(native.library() is None, reason="there is no C compiler")
def test_an_attention_that_rotates_otherwise_keeps_its_own_function(llama: Any) -> None:
    own = type(llama.model.layers[0].self_attn).forward
    rotation = own.__globals__["apply_rotary_pos_emb"]

    def otherwise(query: Any, key: Any, cosine: Any, sine: Any) -> Any:
        return rotation(query, key, cosine, -sine)

    def with_rotation(function: Any) -> Any:
        return FunctionType(own.__code__, {**own.__globals__, "apply_rotary_pos_emb": function}, "forward", own.__defaults__)

    assert fused._with_our_rotation(with_rotation(rotation), torch.float32) is not None
    assert fused._with_our_rotation(with_rotation(otherwise), torch.float32) is None
    assert fused._with_our_rotation(with_rotation(lambda query: query), torch.float32) is None
    assert fused._with_our_rotation(with_rotation(lambda query, key, _cosine, _sine: (query @ key, key)), torch.float32) is None
    assert fused._with_our_rotation(with_rotation(lambda query, key, _cosine, _sine: (query[..., :4], key)), torch.float32) is None


@pytest.mark.skipif(native.library() is None, reason="there is no C compiler")
def test_what_our_rotation_does_not_know_goes_to_the_model_s_own(llama: Any) -> None:
    own = type(llama.model.layers[0].self_attn).forward
    rotate = fused._with_our_rotation(own, torch.float32).__globals__["apply_rotary_pos_emb"]  # type: ignore[union-attr]
    rotation = own.__globals__["apply_rotary_pos_emb"]
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 4, 5, 8, generator=generator), torch.randn(2, 2, 5, 8, generator=generator)
    cosine, sine = torch.randn(2, 5, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)
    apart = torch.randn(1, 4, 8, 5, generator=generator).transpose(2, 3)  # heads that are no rows
    for given in ((query, key, cosine, sine), (apart, key[:1], cosine[:1], sine[:1]), (query[:1].double(), key[:1], cosine[:1], sine[:1])):
        for found, expected in zip(rotate(*given), rotation(*given), strict=True):
            assert found.equal(expected)
    swapped_axes = query[:1].transpose(1, 2), key[:1].transpose(1, 2), cosine[:1], sine[:1]
    for named in ({"unsqueeze_dim": 2}, {}):
        more = () if named else (2,)
        for found, expected in zip(rotate(*swapped_axes, *more, **named), rotation(*swapped_axes, 2), strict=True):
            assert found.equal(expected)


@pytest.mark.skipif(native.library() is None, reason="there is no C compiler")
def test_a_library_that_was_torn_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEPOOL_CACHE", str(tmp_path))
    path, is_new = native._compiled(native._SOURCE, [*native._FLAGS, *native._REORDERING])
    assert is_new
    path.write_bytes(b"")
    native.library.cache_clear()
    try:
        assert native.library() is not None
        assert path.stat().st_size > 0
    finally:
        native.library.cache_clear()


@pytest.mark.parametrize("window", [None, 5])
def test_what_a_row_does_not_see_cannot_spoil_it(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without C: blocks that another's failure left full of NaN pad the shorter rows, and their own ends."""
    monkeypatch.setattr(native, "library", lambda: None)
    cache = attention.Cache([attention.LayerShape(2, 8, 8)], 4, 16, torch.float32, torch.device("cpu"))
    for one in (cache.keys[0], cache.values[0]):
        one.fill_(torch.nan)
        one[16 : 16 + 20] = 1.0
        one[48 : 48 + 3] = 1.0
    chunks = [Chunk(Sequence(list(range(length))), length - 1, length, True, blocks) for length, blocks in ((20, [1, 2]), (3, [3]))]
    paged = attention.pack(chunks, cache, torch.device("cpu"))
    found = attention._decode(torch.ones(2, 4, 8), cache.keys[0], cache.values[0], paged, 1.0, window)
    assert torch.equal(found, torch.ones_like(found))
