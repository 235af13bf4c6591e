"""What only a GPU shows of the engine; skipped where there is none: the kernel, graphs, and steps launched ahead, against the CPU."""

import copy
import random
from typing import Any

import pytest
import torch

from tests.inference.conftest import answer, request, run
from tests.inference.test_identity import all_at_once, traffic
from tidepool.inference.engine import GenerationRequest
from tidepool.inference.limits import BLOCK_SIZE
from tidepool.inference.paged import PagedEngine
from tidepool.models import build_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
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


def asked_of(temperature: float) -> list[GenerationRequest]:
    return [
        request(prompt, length, f"r{index}", temperature=temperature, seed=index)
        for index, (prompt, length) in enumerate(traffic(random.Random(8)))
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_answers_are_those_of_the_cpu_and_do_not_depend_on_graphs_or_company(llama: Any, tokenizer: Any, temperature: float) -> None:
    """In float32 without TF32: a difference is an error, but where two tokens are nearly as good."""
    asked, found = asked_of(temperature), []

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
    asked, found = asked_of(0.0), []

    async def play(engine: PagedEngine) -> None:
        found.append(await all_at_once(engine, asked))

    for more in ({"is_ahead": False}, {"is_ahead": True}, {"speculative_tokens": 3}):
        run(copy.deepcopy(llama).to(GPU), tokenizer, play, weights="fp32", max_batch_size=8, max_step_tokens=24, **more)
    for one in found[1:]:
        assert sum(mine == theirs for mine, theirs in zip(one, found[0], strict=True)) >= len(asked) - 1
