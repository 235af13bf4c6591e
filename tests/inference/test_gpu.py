"""What only a GPU shows of the engine; skipped where there is none: kernels, graphs, steps launched ahead, adapters, against the CPU."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.inference.conftest import answer, request, run
from tests.inference.families import FAMILIES
from tests.inference.test_identity import all_at_once, traffic
from tests.inference.test_lora import check_mixed, configs, layers_with, train
from tidepool.inference.engine import GenerationRequest
from tidepool.inference.limits import BLOCK_SIZE
from tidepool.inference.linear import swap_linear_layers
from tidepool.inference.lora_layers import NO_SLOT
from tidepool.inference.paged import PagedEngine
from tidepool.models import build_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # peft asks transformers by an old name
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]
GPU = torch.device("cuda", 0)
LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}


@pytest.fixture
def llama(tokenizer: Any) -> Any:
    return build_model(LLAMA, len(tokenizer), 1, tokenizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize(("window", "splits"), [(None, 1), (None, 8), (100, 1), (100, 4), (None, None)])
def test_the_kernel_attends(dtype: torch.dtype, size: int, window: int | None, splits: int | None) -> None:
    from tests.inference.interpreted_kernels import dense
    from tidepool.inference.paged_attention import attend

    lengths = [1, 16, 17, 900, 4000]
    generator = torch.Generator(GPU).manual_seed(size)
    blocks_DN = torch.randperm(5 * 250, device=GPU, generator=generator).int().view(5, 250)
    keys, values = (torch.randn(5 * 250 * BLOCK_SIZE, 2, size, device=GPU, generator=generator).to(dtype) for _ in range(2))
    query_DHK = torch.randn(5, 8, size, device=GPU, generator=generator).to(dtype)
    found = attend(query_DHK, keys, values, blocks_DN, torch.tensor(lengths, device=GPU).int(), BLOCK_SIZE, 0.1, window, splits)
    places_DL = (blocks_DN.long()[:, :, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=GPU)).flatten(1)
    for row, length in enumerate(lengths):
        mine = places_DL[row, :length]
        expected = dense(query_DHK[row], keys[mine], values[mine], 0.1, window)
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found[row].double(), expected, rtol=tolerance, atol=tolerance)


def greedy_or_drawn(temperature: float) -> list[GenerationRequest]:
    return [
        request(prompt, length, f"r{index}", temperature=temperature, seed=index)
        for index, (prompt, length) in enumerate(traffic(random.Random(8)))
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_answers_are_those_of_the_cpu_and_do_not_depend_on_graphs_or_company(llama: Any, tokenizer: Any, temperature: float) -> None:
    """In float32 without TF32: a difference is an error, but where two tokens are nearly as good."""
    asked, found = greedy_or_drawn(temperature), []

    async def play(engine: PagedEngine) -> None:
        found.append(await all_at_once(engine, asked))
        if engine._runner._graphs is not None:
            found.append([await answer(engine, one) for one in asked])
            engine._runner._graphs = None
            found.append(await all_at_once(engine, asked))

    for device in ("cpu", GPU):
        run(copy.deepcopy(llama).to(device), tokenizer, play, weights="fp32", max_batch_size=8, max_step_tokens=24)
    on_cpu, *on_gpu = found
    assert len(on_gpu) == 3
    for one in on_gpu:
        num_same = sum(mine == theirs for mine, theirs in zip(one, on_cpu, strict=True))
        assert num_same >= len(asked) - 1, "one may differ by a tie"


def test_waiting_for_no_token_and_guessing_change_none(llama: Any, tokenizer: Any) -> None:
    asked, found = greedy_or_drawn(0.0), []

    async def play(engine: PagedEngine) -> None:
        found.append(await all_at_once(engine, asked))

    for more in ({"is_ahead": False}, {"is_ahead": True}, {"speculative_tokens": 3}):
        run(copy.deepcopy(llama).to(GPU), tokenizer, play, weights="fp32", max_batch_size=8, max_step_tokens=24, **more)
    for one in found[1:]:
        assert sum(mine == theirs for mine, theirs in zip(one, found[0], strict=True)) >= len(asked) - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_each_row_gets_what_its_adapter_has_for_it_in_any_company(dtype: torch.dtype) -> None:
    from tidepool.inference.lora_triton import add

    slots = [2, NO_SLOT, 0, 0, 2, *[3] * 40, 1, NO_SLOT, *[1] * 25, 0, 2]
    model = build_model(LLAMA | {"num_hidden_layers": 1}, 300, 1).to(GPU, dtype)
    swap_linear_layers(model, "fp32" if dtype == torch.float32 else "bf16")
    layers, made = layers_with(model, [1, 5, 8, 64], dtype)
    for layer in layers._layers:

        def added(inputs: torch.Tensor, of: list[int], base: torch.Tensor, layer: Any = layer) -> torch.Tensor:
            output = base.clone()
            add(inputs, output, torch.tensor(of, dtype=torch.int32, device=GPU), *layers._tables.of(layer), layers._most_ranks)
            return output

        size = layers.sizes[layer.parts[0].name][0]
        inputs = torch.randn(len(slots), size, device=GPU, generator=torch.Generator(GPU).manual_seed(2)).to(dtype)
        base = layer.module(inputs)
        found = added(inputs, slots, base)
        for row, slot in enumerate(slots):
            expected = base[row].double()
            for part in layer.parts:
                if slot != NO_SLOT and (held := made[slot].get(part.name)) is not None:
                    a, b, scale = (one.to(GPU).double() if isinstance(one, torch.Tensor) else one for one in held)
                    expected[part.first : part.first + part.size] += scale * (b @ (a @ inputs[row].double()))
            error = (found[row].double() - expected).abs().max() / expected.abs().max()
            assert error < (1e-5 if dtype == torch.float32 else 1e-2), (layer.parts[0].name, row, slot)
            assert found[row].equal(added(inputs[row : row + 1], [slot], base[row : row + 1])[0]), (layer.parts[0].name, row, slot)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_mixed_adapters_of_each_family_are_those_of_peft(family: str, tokenizer: Any, tmp_path: Path) -> None:
    model = build_model(FAMILIES[family], len(tokenizer), 1, tokenizer)
    made = configs(model.config.model_type)
    folders = {digest: train(model, seed, config, tmp_path / digest) for seed, (digest, config) in enumerate(made.items())}
    check_mixed(model, tokenizer, folders, GPU)
