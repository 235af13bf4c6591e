"""Tiny models, adapters on disk, and engines that are closed."""

import asyncio
import copy
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.conftest import CONFIGS, TEXT
from tidepool.errors import ModelError
from tidepool.inference import GenerationRequest, Output, SamplingParameters, linear
from tidepool.inference.paged import PagedEngine
from tidepool.models import ModelSource, add_lora, build_model, export_adapter, read_lora, train_tokenizer
from tidepool.specs import EngineSpec, LoraSpec

BASE = ModelSource("tides@3", "ab" * 32)
MISTRAL = {**CONFIGS["llama"], "model_type": "mistral", "sliding_window": 8}
NAMES = {"one": "01" * 32, "two": "02" * 32, "three": "03" * 32}


def _is_int8_exact() -> bool:
    try:
        linear._check_int8()
    except ModelError:
        return False
    return True


needs_exact_int8 = pytest.mark.skipif(not _is_int8_exact(), reason="this processor does not multiply int8 exactly, so that int8 is refused")
INT8 = pytest.param("int8", marks=needs_exact_int8)

Play = Callable[[PagedEngine], Awaitable[None]]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return train_tokenizer([TEXT] * 4, vocab_size=300)


@pytest.fixture(scope="session")
def _models(tokenizer: Any) -> dict[str, Any]:
    return {kind: build_model(config, len(tokenizer), 1, tokenizer) for kind, config in {**CONFIGS, "mistral": MISTRAL}.items()}


@pytest.fixture(params=["gpt2", "llama", "mistral"])
def model(request: pytest.FixtureRequest, _models: dict[str, Any]) -> Any:
    """A model of each kind (one with learned positions, one with rotary ones, one with a sliding window), the test's own."""
    return copy.deepcopy(_models[request.param])


@pytest.fixture
def llama(_models: dict[str, Any]) -> Any:
    return copy.deepcopy(_models["llama"])


@pytest.fixture(scope="session")
def adapters(_models: dict[str, Any], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of three adapters of the llama, by digest; each changes other layers."""
    folders = {}
    targets: list[Any] = [["q_proj", "v_proj"], "all-linear", ["o_proj", "down_proj"]]
    for seed, digest in enumerate(NAMES.values()):
        folders[digest] = tmp_path_factory.mktemp("adapter")
        trained = add_lora(copy.deepcopy(_models["llama"]), LoraSpec(rank=4, target_modules=targets[seed]), seed, BASE.ref)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in trained.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        export_adapter(trained, tokenizer, folders[digest], BASE)
    return folders


read = partial(read_lora, base_digest=BASE.digest)


@asynccontextmanager
async def engine_of(
    model: Any, tokenizer: Any, read: Any = read, is_ahead: bool | None = None, **limits: Any
) -> AsyncIterator[PagedEngine]:
    """An engine, which at the end must have forgotten all of its requests."""
    engine = PagedEngine(model, tokenizer, EngineSpec(**limits), read, is_ahead)
    try:
        yield engine
        stats = engine.stats()
        assert (stats.num_running, stats.num_queued) == (0, 0)
    finally:
        await engine.close()


def run(model: Any, tokenizer: Any, play: Play, **limits: Any) -> None:
    """Play a scene with an engine in an event loop."""

    async def scene() -> None:
        async with engine_of(model, tokenizer, **limits) as engine:
            await play(engine)

    asyncio.run(scene())


def request(
    prompt: Iterable[int], max_tokens: int = 12, request_id: str = "r", adapter: str | None = None, temperature: float = 0, **rest: Any
) -> GenerationRequest:
    return GenerationRequest(request_id, tuple(prompt), SamplingParameters(max_tokens, temperature, **rest), adapter)


async def collect(stream: AsyncIterator[Output]) -> list[Output]:
    return [output async for output in stream]


async def answer(engine: PagedEngine, asked: GenerationRequest) -> tuple[int, ...]:
    """The tokens of a whole answer."""
    return tokens_of(await collect(engine.submit(asked)))


def tokens_of(outputs: Iterable[Output]) -> tuple[int, ...]:
    return tuple(token for output in outputs for token in output.token_ids)


def text_of(outputs: Iterable[Output]) -> str:
    return "".join(output.text for output in outputs)


def endless(model: Any, tokenizer: Any) -> Any:
    """The model, made never to end a text by itself: an end token's logit is the lowest."""
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]

    def without_ends(_module: Any, _inputs: Any, output: Any) -> Any:
        output.logits[..., ends] = -1e4
        return output

    model.register_forward_hook(without_ends)
    return model
