"""Adapters of peft's making in one batch: what each row gets is what peft computes for its adapter alone, and the same bits always."""

import asyncio
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from tests.inference.conftest import INT8, answer, request, run, tokens_of
from tests.inference.families import FAMILIES, TIE
from tidepool.inference import native
from tidepool.inference.engine import GenerationRequest, Output
from tidepool.inference.limits import BLOCK_SIZE
from tidepool.inference.linear import Part, swap_linear_layers, weights_dtype
from tidepool.inference.lora import pack
from tidepool.inference.lora_layers import NO_SLOT, LoraLayers, Rows
from tidepool.inference.paged import PagedEngine
from tidepool.inference.runner import ModelRunner
from tidepool.models import build_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # peft asks transformers by an old name
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

needs_compiler = pytest.mark.skipif(native.lora_library() is None, reason="there is no C compiler")


def configs(family: str) -> dict[str, dict[str, Any]]:
    """Adapters that differ in rank, scale and layers, by digest."""
    first, last = (["c_attn"], ["c_proj"]) if family == "gpt2" else (["q_proj", "v_proj"], ["o_proj", "down_proj"])
    return {
        "08" * 32: {"r": 8, "target_modules": first, "layers_to_transform": [1]},
        "16" * 32: {"r": 16, "lora_alpha": 24, "target_modules": "all-linear"},
        "64" * 32: {"r": 64, "lora_alpha": 16, "target_modules": "all-linear", "use_rslora": True},
        "05" * 32: {"r": 5, "target_modules": [*first, *last], "rank_pattern": {last[0]: 3}, "alpha_pattern": {first[0]: 40}},
        "01" * 32: {"r": 1, "target_modules": [*last, "lm_head"]},
    }


def train(model: Any, seed: int, config: dict[str, Any], folder: Path) -> Path:
    """Write an adapter whose two matrices are both random, as peft does."""
    is_conv = model.config.model_type == "gpt2"
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=is_conv, **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    return build_model(FAMILIES[request.param], len(tokenizer), 1, tokenizer)


@pytest.fixture
def folders(family: Any, tmp_path: Path) -> dict[str, Path]:
    made = configs(family.config.model_type)
    return {digest: train(family, seed, config, tmp_path / digest) for seed, (digest, config) in enumerate(made.items())}


class Peft:
    """Peft's model of an adapter, or the base; what it makes of a text that an engine has answered."""

    def __init__(self, base: Any, folder: Path | None) -> None:
        self._model = copy.deepcopy(base) if folder is None else PeftModel.from_pretrained(copy.deepcopy(base), folder)

    @torch.no_grad()
    def check(self, asked: GenerationRequest, outputs: Sequence[Output]) -> None:
        """Assert that each token was the likeliest, and that all log-probabilities are peft's."""
        tokens = [*asked.prompt_tokens, *tokens_of(outputs)]
        logprobs = self._model(torch.tensor([tokens])).logits[0].log_softmax(dim=-1)
        expected = logprobs[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        of_prompt = [one.logprob for one in outputs[0].prompt_logprobs if one is not None]
        found = torch.tensor([*of_prompt, *(one.logprob for output in outputs for one in output.logprobs)])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
        num_prompt = len(asked.prompt_tokens)
        assert (logprobs[num_prompt - 1 : -1].amax(dim=1) - expected[num_prompt - 1 :]).max() < TIE


def asked_of(digests: Sequence[str | None], **rest: Any) -> list[GenerationRequest]:
    """Prompts of several lengths for each adapter and the base."""
    generator = torch.Generator().manual_seed(3)
    return [
        request(torch.randint(3, 300, (length,), generator=generator).tolist(), 9, f"{digest}-{length}", digest, logprobs=0, **rest)
        for length in (2, 19, 37)
        for digest in digests
    ]


async def outputs_of(engine: PagedEngine, asked: GenerationRequest) -> list[Output]:
    return [output async for output in engine.submit(asked)]


def check_mixed(model: Any, tokenizer: Any, folders: dict[str, Path], device: torch.device | str = "cpu") -> None:
    """Ask the base and all adapters at once in float32, there, and compare with peft on a CPU."""
    peft: dict[str | None, Peft] = {None: Peft(model, None)} | {digest: Peft(model, folder) for digest, folder in folders.items()}
    asked = asked_of([*peft], prompt_logprobs=0)

    async def play(engine: PagedEngine) -> None:
        await asyncio.gather(*(engine.load_adapter(digest, folder) for digest, folder in folders.items()))
        for one, outputs in zip(asked, await asyncio.gather(*(outputs_of(engine, one) for one in asked)), strict=True):
            peft[one.adapter].check(one, outputs)

    run(copy.deepcopy(model).to(device), tokenizer, play, weights="fp32", max_step_tokens=48)


@pytest.mark.parametrize(
    ("family", "way"), [*((one, "c") for one in sorted(FAMILIES)), ("gpt2", "torch"), ("llama", "torch")], indirect=["family"]
)
def test_mixed_adapters_are_exactly_those_of_peft(
    family: Any, tokenizer: Any, folders: dict[str, Path], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "torch":
        monkeypatch.setattr("tidepool.inference.native.lora_library", lambda: None)
    check_mixed(family, tokenizer, folders)


@needs_compiler
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"], indirect=True)
@pytest.mark.parametrize("weights", ["fp32", "bf16", INT8])
def test_a_row_has_the_same_bits_alone_and_among_others(family: Any, tokenizer: Any, folders: dict[str, Path], weights: Any) -> None:
    """In an engine that holds to it for the base's products too."""
    asked = asked_of([None, *folders], temperature=0.0)

    async def logprobs(engine: PagedEngine, one: GenerationRequest) -> list[float]:
        return [entry.logprob for output in await outputs_of(engine, one) for entry in output.logprobs]

    async def play(engine: PagedEngine) -> None:
        for digest, folder in folders.items():
            await engine.load_adapter(digest, folder)
        alone = [await logprobs(engine, one) for one in asked]
        assert len({tuple(one) for one in alone}) == len(asked)
        assert await asyncio.gather(*(logprobs(engine, one) for one in asked)) == alone
        assert engine.stats().num_chunks > 0

    model = family.to(weights_dtype(weights, "cpu"))
    run(model, tokenizer, play, weights=weights, batch_invariant=True, max_step_tokens=24, max_batch_size=18, max_adapters=3)


def test_nothing_is_computed_where_no_adapter_is_in_use(
    llama: Any, tokenizer: Any, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    added: list[str] = []
    plain = LoraLayers._add
    monkeypatch.setattr(LoraLayers, "_add", lambda self, layer, *rest: added.extend([layer.parts[0].name]) or plain(self, layer, *rest))
    one = next(iter(adapters))  # of q and v

    async def play(engine: PagedEngine) -> None:
        await answer(engine, request([5, 6], 4))
        assert not any("lora" in forward.__qualname__.lower() for forward in forwards(llama))
        await engine.load_adapter(one, adapters[one])
        await answer(engine, request([5, 6], 4))
        assert not added
        await answer(engine, request([5, 6], 4, adapter=one))
        assert len(added) == 4 * 2  # in each step once for each layer of two
        await answer(engine, request([5, 6], 4))
        assert len(added) == 4 * 2

    run(llama, tokenizer, play)


def forwards(model: nn.Module) -> list[Any]:
    """What has been put in the place of a module's own `forward`, also in those that parts are computed by."""
    modules = [part.product.layer if isinstance(part, Part) else part for part in model.modules()]
    return [vars(module)["forward"] for module in modules if "forward" in vars(module)]


@pytest.mark.parametrize("way", [{}, {"is_ahead": True}, {"speculative_tokens": 3}])
def test_keys_and_values_are_shared_within_an_adapter_and_never_between_two(
    llama: Any, tokenizer: Any, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch, way: dict[str, Any]
) -> None:
    """Whoever reads a block finds there what was computed with its own adapter: counted over all that is read."""
    writer: dict[tuple[int, int], str | None] = {}
    num_read = {"own": 0, "found": 0, "of others": 0}
    plain, size = ModelRunner.launch, BLOCK_SIZE

    def counting(runner: ModelRunner, chunks: Any, placements: Any = ()) -> Any:
        for chunk in chunks:
            for position in range(chunk.start, chunk.start + len(chunk.tokens)):
                writer[chunk.blocks[position // size], position % size] = chunk.sequence.adapter
        for chunk in chunks:
            for position in range(chunk.end):
                is_own = writer[chunk.blocks[position // size], position % size] == chunk.sequence.adapter
                num_read["own" if is_own else "of others"] += 1
            num_read["found"] += chunk.start if chunk.end - chunk.start > 1 else 0
        return plain(runner, chunks, placements)

    monkeypatch.setattr(ModelRunner, "launch", counting)
    prompts = [list(range(60, 60 + length)) for length in (20, 40, 40, 41)]

    async def play(engine: PagedEngine) -> None:
        for digest, folder in adapters.items():
            await engine.load_adapter(digest, folder)
        names = [None, *adapters] * 3
        asked = [request(prompt, 60, f"{turn}-{index}", name) for turn, prompt in enumerate(prompts) for index, name in enumerate(names)]
        await asyncio.gather(*(answer(engine, one) for one in asked))
        assert engine.stats().num_prefix_hits > 0
        assert engine.stats().num_preemptions > 0

    run(llama, tokenizer, play, max_adapters=2, max_batch_size=6, max_step_tokens=64, cache_gb=7e-5, **way)
    assert num_read["of others"] == 0
    assert num_read["own"] > 1000


# --- Kernels ---------------------------------------------------------------------------------------------------------


def layers_with(model: Any, ranks: Sequence[int], dtype: torch.dtype) -> tuple[LoraLayers, list[dict[str, Any]]]:
    """Slots with adapters of these ranks, each on every other layer, and their matrices."""
    layers = LoraLayers(model, len(ranks))
    generator = torch.Generator().manual_seed(1)
    made = []
    for slot, rank in enumerate(ranks):
        names = [name for index, name in enumerate(layers.sizes) if (index + slot) % 3]
        made.append(
            {
                name: (
                    (torch.randn(rank, layers.sizes[name][0], generator=generator)).to(dtype),
                    (torch.randn(layers.sizes[name][1], rank, generator=generator)).to(dtype),
                    0.5 + slot,
                )
                for name in names
            }
        )
        layers.put(slot, pack(made[-1], dtype))
    return layers, made


@pytest.mark.parametrize("way", [pytest.param("c", marks=needs_compiler), "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_what_is_added_is_right_for_any_size_rank_and_order_of_rows(dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "torch":
        monkeypatch.setattr("tidepool.inference.native.lora_library", lambda: None)
    config = {"hidden_size": 36, "intermediate_size": 70, "num_attention_heads": 2, "head_dim": 18, "num_key_value_heads": 1}
    model = build_model(FAMILIES["llama"] | config, 300, 1).to(dtype)
    swap_linear_layers(model, "fp32")
    layers, made = layers_with(model, [1, 5, 8, 33], dtype)
    runs = [(2, 1), (NO_SLOT, 2), (0, 3), (2, 5), (3, 9), (1, 1), (NO_SLOT, 1)]
    slots = [slot for slot, num_rows in runs for _ in range(num_rows)]
    for name, (size, _) in layers.sizes.items():
        if name == layers.output_layer:
            continue
        layer = model.get_submodule(name)
        inputs = torch.randn(1, len(slots), size, generator=torch.Generator().manual_seed(2)).to(dtype)
        base = layer(inputs)[0].clone()
        with layers.rows(runs, []):
            found = layer(inputs.clone())[0]
        for row, slot in enumerate(slots):
            a_b_scale = made[slot].get(name) if slot != NO_SLOT else None
            if a_b_scale is None:
                assert found[row].equal(base[row])
                continue
            a, b, scale = a_b_scale
            expected = base[row].double() + scale * (b.double() @ (a.double() @ inputs[0, row].double()))
            error = (found[row].double() - expected).abs().max() / expected.abs().max()
            assert error < (1e-6 if dtype == torch.float32 else 5e-3), (name, row, slot)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_row_in_c_has_the_same_bits_in_any_group(dtype: torch.dtype) -> None:
    model = build_model(FAMILIES["llama"] | {"hidden_size": 48, "intermediate_size": 200}, 300, 1).to(dtype)
    layers, _ = layers_with(model, [7, 64], dtype)
    name = "model.layers.0.mlp.gate_proj"
    layer, _ = layers._layer_of[name]
    inputs = torch.randn(9, 48, generator=torch.Generator().manual_seed(2)).to(dtype)
    base = layer.module(inputs)

    def added(runs: Any, rows: slice) -> torch.Tensor:
        output = base[rows].clone()
        layers._add(layer, Rows.of(runs, torch.device("cpu")), inputs[rows], output)
        return output

    together = added([(0, 3), (1, 5), (0, 1)], slice(0, 9))
    for row, slot in enumerate([0, 0, 0, 1, 1, 1, 1, 1, 0]):
        assert together[row].equal(added([(slot, 1)], slice(row, row + 1))[0])
    assert together[1:3].equal(added([(0, 2)], slice(1, 3)))
