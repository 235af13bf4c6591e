"""A replica on a real store and real models: prompts, adapters that come when they are asked for, and requests that end early."""

import asyncio
import copy
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serving.models import Published
from tidepool.errors import BaseMismatchError, EngineBusyError, ModelError, RequestError
from tidepool.inference.engine import EngineStats, GenerationRequest, Output
from tidepool.inference.sampling_parameters import SamplingParameters
from tidepool.models import ModelSource
from tidepool.registry import FileEntry, ModelVersion, Registry, files_digest
from tidepool.serving.backend import Call, Chat, ContextLengthError, Frame, Message, Prompt, Started
from tidepool.serving.replica import Replica, load_replica
from tidepool.specs import EngineSpec
from tidepool.storage import open_store

CONTEXT = 24


class FakeEngine:
    """Answers with one word per request, or waits at `gate`."""

    def __init__(self) -> None:
        self.requests: list[GenerationRequest] = []
        self.cancelled: list[str] = []
        self.loads: list[str] = []
        self.adapters: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.load_error: Exception | None = None
        self.submit_error: Exception | None = None
        self.push_out_next = self.has_failed = False

    def submit(self, request: GenerationRequest) -> AsyncIterator[Output]:
        if self.submit_error:
            raise self.submit_error
        assert request.adapter is None or request.adapter in self.adapters
        self.requests.append(request)
        return self._outputs()

    async def _outputs(self) -> AsyncGenerator[Output, None]:
        yield Output((1,), "some")
        await self.gate.wait()
        yield Output((2,), "thing", "stop")

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    async def load_adapter(self, digest: str, folder: Path) -> None:
        assert (folder / "adapter_model.safetensors").is_file()
        self.loads.append(digest)
        await asyncio.sleep(0)
        if self.load_error:
            raise self.load_error
        if self.push_out_next:
            self.push_out_next = False
        else:
            self.adapters.append(digest)

    async def drop_adapter(self, digest: str) -> None:
        self.adapters.remove(digest)

    def stats(self) -> EngineStats:
        return EngineStats(0, 0, 0, tuple(self.adapters), has_failed=self.has_failed)


def replica_of(engine: FakeEngine, published: Published, cache: Path, tokenizer: Any = None) -> Replica:
    registry = Registry(open_store(published.store_url))
    tokenizer = tokenizer or published.tokenizer
    return Replica(engine, tokenizer, published.base.digest, registry, cache, CONTEXT)


def call_of(published: Published, prompt: Prompt = "the tide", adapter: ModelVersion | None = None, **fields: Any) -> Call:
    request_id = fields.pop("request_id", "r1")
    return Call(request_id, published.base.digest, adapter, prompt, SamplingParameters(**{"max_tokens": 4} | fields))


async def frames_of(replica: Replica, call: Call) -> list[Frame]:
    return [frame async for frame in replica.generate(call)]


def test_a_replica_whose_engine_has_failed_says_so_to_whoever_runs_it(published: Published, tmp_path: Path) -> None:
    engine = FakeEngine()
    replica = replica_of(engine, published, tmp_path)
    replica.check()
    engine.has_failed = True
    with pytest.raises(ModelError, match="has failed"):
        replica.check()


# --- Prompts ---------------------------------------------------------------------------------------------------------


def test_a_text_a_list_of_tokens_and_a_chat_become_tokens(published: Published, tmp_path: Path) -> None:
    engine = FakeEngine()
    tokenizer = published.tokenizer
    chat = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"

    async def run() -> None:
        replica = replica_of(engine, published, tmp_path)
        for prompt in ("the tide", (3, 4, 5), Chat((Message("user", "hi"),))):
            frames = await frames_of(replica, call_of(published, prompt, temperature=0.5, top_p=0.9, seed=1, stop=("x",)))
            assert frames == [Started(len(engine.requests[-1].prompt_tokens)), Output((1,), "some"), Output((2,), "thing", "stop")]

    asyncio.run(run())
    assert [request.prompt_tokens for request in engine.requests] == [
        tuple(tokenizer("the tide")["input_ids"]),
        (3, 4, 5),
        tuple(tokenizer(chat)["input_ids"]),
    ]
    sampling = engine.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed, sampling.stop) == (4, 0.5, 0.9, 1, ("x",))


def test_without_a_limit_the_answer_may_fill_the_context(published: Published, tmp_path: Path) -> None:
    engine = FakeEngine()
    asyncio.run(frames_of(replica_of(engine, published, tmp_path), call_of(published, (1,) * 10, max_tokens=None)))
    asyncio.run(frames_of(replica_of(engine, published, tmp_path), call_of(published, (1,) * 10, max_tokens=14)))
    assert [request.sampling.max_tokens for request in engine.requests] == [None, CONTEXT - 10]


@pytest.mark.parametrize(("num_prompt", "max_tokens"), [(24, None), (30, None), (10, 15), (24, 1)])
def test_what_does_not_fit_the_context_is_refused(published: Published, tmp_path: Path, num_prompt: int, max_tokens: int | None) -> None:
    engine = FakeEngine()
    with pytest.raises(ContextLengthError, match=f"context is 24 tokens; the prompt has {num_prompt}"):
        asyncio.run(frames_of(replica_of(engine, published, tmp_path), call_of(published, (1,) * num_prompt, max_tokens=max_tokens)))
    assert engine.requests == []


def test_a_template_that_is_not_there_or_refuses_is_the_clients_to_know(published: Published, tmp_path: Path) -> None:
    bare, strict = copy.deepcopy(published.tokenizer), copy.deepcopy(published.tokenizer)
    bare.chat_template = None
    strict.chat_template = "{{ raise_exception('no system turns') }}"
    chat = call_of(published, Chat((Message("system", "hi"),)))
    with pytest.raises(RequestError, match="no chat template"):
        asyncio.run(frames_of(replica_of(FakeEngine(), published, tmp_path, bare), chat))
    with pytest.raises(RequestError, match="no system turns"):
        asyncio.run(frames_of(replica_of(FakeEngine(), published, tmp_path, strict), chat))


# --- Requests that end early -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [1, 2])
def test_a_stream_that_is_closed_cancels_its_request(published: Published, tmp_path: Path, num_frames: int) -> None:
    engine = FakeEngine()

    async def run() -> None:
        frames = replica_of(engine, published, tmp_path).generate(call_of(published))
        for _ in range(num_frames):
            await anext(frames)
        await frames.aclose()

    asyncio.run(run())
    assert engine.cancelled == ["r1"]


def test_a_task_that_is_cancelled_cancels_its_request(published: Published, tmp_path: Path) -> None:
    engine = FakeEngine()

    async def run() -> None:
        engine.gate.clear()
        frames = replica_of(engine, published, tmp_path).generate(call_of(published))
        assert [type(await anext(frames)) for _ in range(2)] == [Started, Output]
        task = asyncio.ensure_future(anext(frames))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert engine.cancelled == ["r1"]


def test_a_busy_engine_is_reported_as_such(published: Published, tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.submit_error = EngineBusyError("full")
    with pytest.raises(EngineBusyError):
        asyncio.run(frames_of(replica_of(engine, published, tmp_path), call_of(published)))


# --- Adapters --------------------------------------------------------------------------------------------------------


def test_requests_at_one_time_share_one_load(published: Published, tmp_path: Path) -> None:
    engine, adapter = FakeEngine(), published.adapters[0]

    async def run() -> None:
        replica = replica_of(engine, published, tmp_path)
        calls = [call_of(published, request_id=f"r{index}", adapter=adapter) for index in range(4)]
        leaving = asyncio.create_task(frames_of(replica, call_of(published, request_id="leaves", adapter=adapter)))
        staying = [asyncio.create_task(frames_of(replica, call)) for call in calls]
        while not replica._loads:
            await asyncio.sleep(0)
        leaving.cancel()
        assert all(len(frames) == 3 for frames in await asyncio.gather(*staying))
        assert len(await frames_of(replica, calls[0])) == 3

    asyncio.run(run())
    assert engine.loads == [adapter.digest]
    assert {request.adapter for request in engine.requests} == {adapter.digest}
    assert "leaves" not in {request.request_id for request in engine.requests}


def test_an_adapter_that_is_loaded_holds_no_place_in_the_nodes_cache(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEPOOL_CACHE_GB", "1e-9")  # one byte: what nobody uses goes as soon as something else comes
    engine = FakeEngine()
    replica = replica_of(engine, published, tmp_path / "cache")

    async def ask_for_both() -> None:
        for adapter in published.adapters:
            assert [frame async for frame in replica.generate(call_of(published, adapter=adapter))]

    asyncio.run(ask_for_both())
    assert engine.loads == [adapter.digest for adapter in published.adapters]
    assert [path.name for path in (tmp_path / "cache").glob("[!.]*")] == engine.loads[-1:]


def test_a_load_that_failed_is_tried_again(published: Published, tmp_path: Path) -> None:
    engine, adapter = FakeEngine(), published.adapters[0]

    async def run() -> None:
        replica = replica_of(engine, published, tmp_path)
        engine.load_error = ModelError("bad day")
        with pytest.raises(ModelError, match="bad day"):
            await frames_of(replica, call_of(published, adapter=adapter))
        engine.load_error = None
        assert len(await frames_of(replica, call_of(published, adapter=adapter))) == 3

    asyncio.run(run())
    assert engine.loads == [adapter.digest] * 2


def test_an_adapter_that_was_pushed_out_meanwhile_is_loaded_again(published: Published, tmp_path: Path) -> None:
    engine, adapter = FakeEngine(), published.adapters[0]

    async def run() -> None:
        engine.push_out_next = True
        assert len(await frames_of(replica_of(engine, published, tmp_path), call_of(published, adapter=adapter))) == 3

    asyncio.run(run())
    assert engine.loads == [adapter.digest] * 2


def test_an_adapter_of_another_base_or_without_its_files_is_an_error(published: Published, tmp_path: Path) -> None:
    engine, adapter = FakeEngine(), published.adapters[0]
    other = ModelVersion.from_json("other", 1, adapter.to_json() | {"base_digest": "0f" * 32})
    lost: dict[str, Any] = {"path": "adapter_model.safetensors", "size_bytes": 5, "sha256": "0f" * 32}
    absent = ModelVersion.from_json("absent", 1, adapter.to_json() | {"files": [lost], "digest": files_digest([FileEntry(**lost)])})
    replica = replica_of(engine, published, tmp_path)
    with pytest.raises(BaseMismatchError, match="other@1 was trained on"):
        asyncio.run(frames_of(replica, call_of(published, adapter=other)))
    with pytest.raises(ModelError, match=r"absent@1 cannot be fetched: .*missing from the store"):
        asyncio.run(frames_of(replica, call_of(published, adapter=absent)))
    assert (engine.loads, engine.requests) == ([], [])


# --- The real engine -------------------------------------------------------------------------------------------------


@pytest.fixture
def load(published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Replica]:
    monkeypatch.setenv("TIDEPOOL_CACHE", str(tmp_path))
    base = ModelSource(published.base.ref, published.base.digest, published.base)
    return lambda: load_replica(published.store_url, base, EngineSpec(max_adapters=1), "cpu")


def test_the_real_engine_answers_for_the_base_and_for_each_adapter(published: Published, load: Callable[[], Replica]) -> None:
    async def tokens(replica: Replica, adapter: ModelVersion | None) -> tuple[int, ...]:
        frames = await frames_of(replica, call_of(published, request_id=str(adapter), adapter=adapter, max_tokens=6, temperature=0.0))
        assert frames[0] == Started(2)
        return tuple(token for frame in frames if isinstance(frame, Output) for token in frame.token_ids)

    async def run() -> list[tuple[int, ...]]:
        replica = load()
        together = await asyncio.gather(tokens(replica, None), tokens(replica, published.adapters[0]))
        return [*together, await tokens(replica, published.adapters[1]), await tokens(replica, None)]  # one pushes the other out

    first, one, other, last = asyncio.run(run())
    prompt = torch.tensor([published.tokenizer("the tide")["input_ids"]])
    with torch.no_grad():
        expected = published.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    assert first == last == tuple(expected[0, prompt.shape[1] :].tolist())
    assert len({first, one, other}) == 3


@pytest.mark.parametrize(("prompt", "match"), [("", "empty"), ((1, 999_999), "no token 999999"), ((1,) * 128, "context is 128 tokens")])
def test_prompts_that_the_model_cannot_read_are_refused(
    published: Published, load: Callable[[], Replica], prompt: Prompt, match: str
) -> None:
    async def run() -> None:
        await frames_of(load(), call_of(published, prompt))

    with pytest.raises(RequestError, match=match):
        asyncio.run(run())
