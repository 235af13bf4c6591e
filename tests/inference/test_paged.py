"""The paged engine on real models: steps, and every way in which a request can end. `test_identity` has the tokens of all families."""

import asyncio
import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.inference.conftest import answer, collect, endless, engine_of, request, run, text_of, tokens_of
from tests.inference.families import Reference
from tidepool.errors import EngineBusyError, ModelError, RequestError
from tidepool.inference.paged import PagedEngine

PROMPTS = [[40, 41, 42], [7] * 30, [100], list(range(60, 77)), [50, 3, 50, 3, 50], list(range(200, 160, -1))]


class Gate:
    """Holds the model's forward passes back: each one waits for a permit, and the test for it to be there."""

    def __init__(self, model: Any) -> None:
        self._permits, self._arrivals = threading.Semaphore(0), threading.Semaphore(0)
        self.lengths: list[int] = []
        model.register_forward_pre_hook(self._wait, with_kwargs=True)

    def _wait(self, _model: Any, _inputs: Any, named: dict[str, Any]) -> None:
        self.lengths.append(named["input_ids"].shape[1])
        self._arrivals.release()
        self._permits.acquire()

    async def arrival(self) -> None:
        await asyncio.to_thread(self._arrivals.acquire)

    def open(self) -> None:
        self._permits.release(10_000)


def test_a_request_that_joins_late_changes_nothing_and_does_not_wait_for_a_long_one(model: Any, tokenizer: Any) -> None:
    endless(model, tokenizer)
    reference = Reference(model)
    expected = [reference.answer(PROMPTS[2], 80), reference.answer(PROMPTS[5], 4), reference.answer(PROMPTS[0], 4)]

    async def late(engine: PagedEngine) -> None:
        first = engine.submit(request(PROMPTS[2], 80, "long"))
        start = [await anext(first) for _ in range(5)]
        short = [await answer(engine, request(PROMPTS[5], 4, "s1")), await answer(engine, request(PROMPTS[0], 4, "s2"))]
        assert engine.stats().num_running == 1
        assert [tokens_of(start) + tokens_of(await collect(first)), *short] == expected

    run(model, tokenizer, late)


def test_a_step_has_a_token_of_each_who_answers_and_pieces_of_prompts(llama: Any, tokenizer: Any) -> None:
    gate = Gate(endless(llama, tokenizer))
    gate.open()

    async def three(engine: PagedEngine) -> None:
        await asyncio.gather(*(answer(engine, request([9, *range(20, 28)], length, f"r{length}")) for length in (4, 2, 5)))
        assert engine.stats().num_chunks == 2

    run(llama, tokenizer, three, max_batch_size=4, max_step_tokens=10)
    # 9 + 1, 1 + 8 + 1, 1 + 1 + 8: the second one answers twice, the others go on.
    assert gate.lengths == [10, 10, 10, 2, 1, 1, 1]


# --- How a request ends ----------------------------------------------------------------------------------------------


class Scripted(torch.nn.Module):
    """Put in the place of a model's head, it makes the model say these tokens, one a forward pass, and then the last again."""

    def __init__(self, tokens: list[int], num_tokens: int) -> None:
        super().__init__()
        self._left, self._num_tokens = list(tokens), num_tokens

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        token = self._left.pop(0) if len(self._left) > 1 else self._left[0]
        return torch.nn.functional.one_hot(torch.full(hidden.shape[:2], token), self._num_tokens).float()


def say(model: Any, tokenizer: Any, text: str, max_tokens: int = 100, stop: tuple[str, ...] = ()) -> list[Any]:
    tokens = tokenizer(text)["input_ids"]
    model.lm_head = Scripted(tokens, len(tokenizer))
    found: list[Any] = []

    async def ask(engine: PagedEngine) -> None:
        found.extend(await collect(engine.submit(request([5, 6], max_tokens, stop=stop))))

    run(model, tokenizer, ask)
    assert all(output.finish_reason is None for output in found[:-1])
    return found


@pytest.mark.parametrize("end", ["<|endoftext|>", "<|im_end|>"])
def test_an_end_token_stops_and_is_no_text(llama: Any, tokenizer: Any, end: str) -> None:
    outputs = say(llama, tokenizer, f"the tide 🌊{end}and more")
    assert text_of(outputs) == "the tide 🌊"
    assert outputs[-1].finish_reason == "stop"
    assert tokens_of(outputs)[-1] == tokenizer.convert_tokens_to_ids(end)


def test_end_tokens_are_the_models_the_tokenizers_and_the_end_of_a_turn(llama: Any, tokenizer: Any) -> None:
    bang = tokenizer("!")["input_ids"][0]
    for of_model, end in [(bang, "!"), ([3, bang], "!"), (None, "<|endoftext|>"), (None, "<|im_end|>")]:
        llama.generation_config.eos_token_id = of_model
        outputs = say(llama, tokenizer, f"pool{end} more", 20)
        assert (text_of(outputs), outputs[-1].finish_reason) == ("pool", "stop")


def test_a_stop_string_cuts_the_text(llama: Any, tokenizer: Any) -> None:
    outputs = say(llama, tokenizer, "the tide comes in; the pool fills;", stop=("ool", "; the pole"))
    assert (text_of(outputs), outputs[-1].finish_reason) == ("the tide comes in; the p", "stop")


def test_text_that_did_not_become_a_stop_string_comes_with_the_end(llama: Any, tokenizer: Any) -> None:
    for text, reason in [("the poo", "length"), ("the poo<|endoftext|>", "stop")]:
        num_tokens = len(tokenizer(text)["input_ids"])
        outputs = say(llama, tokenizer, text, num_tokens, stop=("pool",))
        assert (text_of(outputs), outputs[-1].finish_reason) == ("the poo", reason)


def test_an_answer_cut_within_a_character_is_still_valid_text(llama: Any, tokenizer: Any) -> None:
    outputs = say(llama, tokenizer, "a🌊", max_tokens=3)
    assert [(output.text, output.finish_reason) for output in outputs] == [("a", None), ("", None), ("\ufffd", "length")]


def test_the_context_bounds_prompt_and_answer_together(model: Any, tokenizer: Any) -> None:
    endless(model, tokenizer)

    async def fill(engine: PagedEngine) -> None:
        outputs = await collect(engine.submit(request([5] * 100, 1000)))
        assert (len(outputs), outputs[-1].finish_reason) == (28, "length")
        assert len(await collect(engine.submit(request([5] * 127, 1000)))) == 1

    run(model, tokenizer, fill)
    run(model, tokenizer, fill, max_sequence_length=4096)


def test_a_cancelled_request_ends_at_once_and_frees_its_place(llama: Any, tokenizer: Any) -> None:
    gate = Gate(endless(llama, tokenizer))

    async def scene(engine: PagedEngine) -> None:
        running, waiting = (engine.submit(request([5], 1000, name)) for name in ("a", "b"))
        await gate.arrival()
        assert (engine.stats().num_running, engine.stats().num_queued) == (1, 1)
        engine.cancel("a")
        engine.cancel("nobody")
        assert [output.finish_reason for output in await collect(running)] == ["cancelled"]
        assert (engine.stats().num_running, engine.stats().num_queued) == (0, 1)
        again = engine.submit(request([6], 3, "a"))
        engine.cancel("b")
        assert (await collect(waiting))[-1].finish_reason == "cancelled"
        gate.open()
        assert [output.finish_reason for output in await collect(again)] == [None, None, "length"]

    run(llama, tokenizer, scene, max_batch_size=1)


@pytest.mark.parametrize("way", ["aclose", "task cancelled", "forgotten", "timeout"])
def test_a_client_that_leaves_frees_its_place(llama: Any, tokenizer: Any, way: str) -> None:
    endless(llama, tokenizer)

    async def leave(engine: PagedEngine) -> None:
        stream = engine.submit(request([5], 100, "left"))
        await anext(stream)
        if way == "aclose":
            await stream.aclose()
        elif way == "task cancelled":
            task = asyncio.create_task(collect(stream))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif way == "timeout":
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await collect(stream)
        else:
            del stream
            gc.collect()
        assert tokens_of(await collect(engine.submit(request([6], 3, "next"))))
        assert engine.stats().num_generated_tokens < 20
        if way != "forgotten":
            assert await collect(stream) == []

    run(llama, tokenizer, leave, max_batch_size=1)


def test_closing_ends_what_goes_on(llama: Any, tokenizer: Any) -> None:
    endless(llama, tokenizer)

    async def scene() -> None:
        async with engine_of(llama, tokenizer, max_batch_size=1) as engine:
            streams = [engine.submit(request([5], 100, name)) for name in "ab"]
            await anext(streams[0])
            await engine.close()
            assert [(await collect(stream))[-1].finish_reason for stream in streams] == ["cancelled"] * 2

    asyncio.run(scene())


# --- Failures --------------------------------------------------------------------------------------------------------


def fail_once(model: Any, when: Any) -> None:
    """Let the first forward pass with such input ids fail."""
    failed = []

    def hook(_model: Any, _inputs: Any, named: dict[str, Any]) -> None:
        if not failed and when(named["input_ids"]):
            failed.append(True)
            raise RuntimeError("the device is on fire")

    model.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("phase", ["start", "layer"])
def test_a_failure_ends_what_was_computed_with_it_and_nothing_else(
    llama: Any, tokenizer: Any, adapters: dict[str, Path], phase: str
) -> None:
    endless(llama, tokenizer)
    reference = Reference(llama)
    expected = [reference.answer(PROMPTS[0], 12), reference.answer(PROMPTS[3], 12)]
    one = next(iter(adapters))
    if phase == "layer":  # after the first layer's keys and values have been written
        calls = []
        original = llama.model.layers[1].forward

        def forward(hidden: torch.Tensor, *rest: Any, **named: Any) -> Any:
            if hidden.shape[:2] == (1, 41) and not calls:
                calls.append(True)
                raise RuntimeError("the device is on fire")
            return original(hidden, *rest, **named)

        llama.model.layers[1].forward = forward
    else:
        fail_once(llama, lambda ids: ids.shape == (1, 41))

    async def scene(engine: PagedEngine) -> None:
        await engine.load_adapter(one, adapters[one])
        expected_of_one = await answer(engine, request(PROMPTS[3], 12, "alone", one))
        first = engine.submit(request(PROMPTS[0], 12, "a"))
        begun = await anext(first)
        other = engine.submit(request(PROMPTS[3], 12, "o", one))
        second = engine.submit(request([*PROMPTS[0], *range(20, 56)], 12, "b"))
        late = engine.submit(request(PROMPTS[3], 12, "c"))
        for stream in (second, first, other):
            with pytest.raises(RuntimeError, match="on fire"):
                await collect(stream)
        assert await answer(engine, request(PROMPTS[3], 12, "o", one)) == expected_of_one
        assert tokens_of([begun]) == expected[0][:1]
        assert tokens_of(await collect(late)) == expected[1]
        # Nothing of what failed is found again.
        again = [*PROMPTS[0], *range(20, 56)]
        reference.check(again, 12, await answer(engine, request(again)))

    run(
        llama, tokenizer, scene, max_batch_size=8, max_step_tokens=41
    )  # a token of the first, the other's prompt, the start of the second's


def test_who_found_what_a_step_did_not_compute_fails_with_it_though_it_was_launched_after_it(llama: Any, tokenizer: Any) -> None:
    prompt = list(range(20, 60))
    reference = Reference(endless(llama, tokenizer))
    fail_once(llama, lambda ids: ids.shape == (1, 40))

    async def scene(engine: PagedEngine) -> None:
        first, second = engine.submit(request(prompt, 12, "a")), engine.submit(request([*prompt, 5], 12, "b"))
        other = engine.submit(request(PROMPTS[0], 12, "c"))
        for stream in (first, second):
            with pytest.raises(RuntimeError, match="on fire"):
                await collect(stream)
        assert engine.stats().num_prefix_hits == 1
        reference.check(PROMPTS[0], 12, tokens_of(await collect(other)))
        reference.check(prompt, 12, await answer(engine, request(prompt)))

    run(llama, tokenizer, scene, max_batch_size=8, max_step_tokens=40, is_ahead=True)


def test_a_fault_of_the_engine_leaves_nobody_waiting(llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with engine_of(endless(llama, tokenizer), tokenizer, max_batch_size=1) as engine:
            streams = [engine.submit(request([5], 50, name)) for name in "ab"]
            await anext(streams[0])
            monkeypatch.setattr(engine._scheduler, "complete", lambda *_: 1 / 0)
            for stream in streams:
                with pytest.raises(ZeroDivisionError):
                    await collect(stream)
            monkeypatch.undo()
            assert engine.stats().has_failed
            with pytest.raises(ModelError, match="has failed and takes no more requests"):
                engine.submit(request([5], 5, "c"))
            for sequence in [*engine._scheduler._running, *engine._scheduler._clients[None, ""].waiting]:
                engine._scheduler.remove(sequence)  # so that the engine counts as idle for `engine_of`

    asyncio.run(scene())


def test_a_model_that_makes_no_numbers_is_an_error(llama: Any, tokenizer: Any) -> None:
    llama.lm_head.weight.data.fill_(torch.nan)

    async def scene(engine: PagedEngine) -> None:
        with pytest.raises(ModelError, match="not finite"):
            await answer(engine, request([5]))

    run(llama, tokenizer, scene)


# --- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (request([]), "prompt is empty"),
        (request([5] * 20), "20 tokens, and the context of 20"),
        (request([5, 300]), "no token 300: its tokens are 0 to 299"),
        (request([-1]), "no token -1"),
        (request([5], adapter="ad" * 32), "adapter adadadadadad is not loaded: load it"),
        (request([5], max_tokens=0), "max_tokens is 0"),
        (request([5], temperature=-0.1), "temperature is -0.1"),
        (request([5], temperature=float("nan")), "temperature is nan"),
        (request([5], top_p=0), "top_p is 0"),
        (request([5], top_p=1.1), "top_p is 1.1"),
        (request([5], stop=("a", "")), "stop string is empty"),
    ],
)
def test_what_can_never_be_served_is_refused_at_once(llama: Any, tokenizer: Any, asked: Any, message: str) -> None:
    async def scene(engine: PagedEngine) -> None:
        with pytest.raises(RequestError, match=message):
            engine.submit(asked)

    run(llama, tokenizer, scene, max_sequence_length=20)


def test_an_id_in_use_is_refused_until_its_request_has_ended(llama: Any, tokenizer: Any) -> None:
    async def scene(engine: PagedEngine) -> None:
        stream = engine.submit(request([5], 2))
        with pytest.raises(RequestError, match="id r is in flight"):
            engine.submit(request([6]))
        await collect(stream)
        await answer(engine, request([6]))

    run(llama, tokenizer, scene)


def test_a_full_queue_is_busy(llama: Any, tokenizer: Any) -> None:
    gate = Gate(llama)

    async def scene(engine: PagedEngine) -> None:
        streams = [engine.submit(request([5], 2, f"r{index}")) for index in range(5)]
        await gate.arrival()
        assert (engine.stats().num_running, engine.stats().num_queued) == (2, 3)
        with pytest.raises(EngineBusyError, match="2 answers are running and 3 waiting, and this engine takes 5 at most"):
            engine.submit(request([5], 2, "more"))
        gate.open()
        for stream in streams:
            await collect(stream)
        await answer(engine, request([5], 2, "more"))

    run(llama, tokenizer, scene, max_batch_size=2, max_queued_requests=3)


def test_the_event_loop_goes_on_while_the_model_computes(llama: Any, tokenizer: Any) -> None:
    gate = Gate(llama)

    async def scene(engine: PagedEngine) -> None:
        stream = engine.submit(request([5], 2))
        await gate.arrival()  # this runs while the forward pass stands still
        assert engine.stats().num_running == 1
        gate.open()
        await collect(stream)

    run(llama, tokenizer, scene)
