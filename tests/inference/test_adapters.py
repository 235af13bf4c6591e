"""Adapters of one engine: beside each other and the base, loaded and dropped while requests go on."""

import asyncio
import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.inference.conftest import BASE, NAMES, answer, collect, endless, read, request, run, tokens_of
from tidepool.errors import BaseMismatchError, EngineBusyError, ModelError, RequestError
from tidepool.inference.lora import pack
from tidepool.inference.lora_layers import LoraLayers
from tidepool.inference.paged import PagedEngine
from tidepool.models import attach_adapter

ONE, TWO, THREE = NAMES.values()
PROMPT = [60, 61, 62, 63]


@torch.no_grad()
def generate(model: Any, max_tokens: int = 12) -> tuple[int, ...]:
    tokens = torch.tensor([PROMPT])
    answered = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=max_tokens, do_sample=False)
    return tuple(answered[0, len(PROMPT) :].tolist())


@pytest.fixture
def expected(llama: Any, adapters: dict[str, Path]) -> dict[str | None, tuple[int, ...]]:
    """What transformers and peft make of the prompt with each adapter, computed on a copy."""
    found: dict[str | None, tuple[int, ...]] = {None: generate(copy.deepcopy(llama))}
    for digest, folder in adapters.items():
        found[digest] = generate(attach_adapter(copy.deepcopy(llama), folder, "default", BASE.digest))
    assert len(set(found.values())) == 4
    return found


def layers_of(model: Any) -> tuple[dict[str, tuple[int, int]], str | None]:
    """What an engine tells whoever reads an adapter."""
    layers = LoraLayers(model, 1)
    return layers.sizes, layers.output_layer


def greedy(name: str, adapter: str | None, max_tokens: int = 12) -> Any:
    return request(PROMPT, max_tokens, name, adapter)


def test_base_and_adapters_in_flight_at_once_answer_as_alone(
    llama: Any, tokenizer: Any, adapters: dict[str, Path], expected: dict[str | None, tuple[int, ...]]
) -> None:
    async def scene(engine: PagedEngine) -> None:
        assert await answer(engine, greedy("base", None)) == expected[None]
        for digest, folder in adapters.items():
            await engine.load_adapter(digest, folder)
            assert await answer(engine, greedy("alone", digest)) == expected[digest]
        assert engine.stats().adapters == (ONE, TWO, THREE)
        names = [*expected, *expected]
        together = await asyncio.gather(*(answer(engine, greedy(f"r{index}", digest)) for index, digest in enumerate(names)))
        assert dict(zip(names, together, strict=True)) == expected
        assert together[:4] == together[4:]

    run(llama, tokenizer, scene)


def test_the_base_computes_the_same_bits_whatever_was_loaded(llama: Any, tokenizer: Any, adapters: dict[str, Path]) -> None:
    seen: list[torch.Tensor] = []
    llama.register_forward_hook(lambda _model, _inputs, output: seen.append(output.logits.clone()))

    async def base_logits(engine: PagedEngine) -> torch.Tensor:
        seen.clear()
        await answer(engine, greedy("base", None))
        return torch.cat(seen)

    async def scene(engine: PagedEngine) -> None:
        before = await base_logits(engine)
        await engine.load_adapter(ONE, adapters[ONE])
        assert (await base_logits(engine)).equal(before)
        await answer(engine, greedy("one", ONE))
        assert (await base_logits(engine)).equal(before)
        await engine.load_adapter(TWO, adapters[TWO])
        await engine.drop_adapter(ONE)
        assert (await base_logits(engine)).equal(before)
        await engine.drop_adapter(TWO)
        assert (await base_logits(engine)).equal(before)

    run(llama, tokenizer, scene)


def test_adapters_come_and_go_while_requests_go_on(
    llama: Any, tokenizer: Any, adapters: dict[str, Path], expected: dict[str | None, tuple[int, ...]]
) -> None:
    async def scene(engine: PagedEngine) -> None:
        base = engine.submit(greedy("base", None))
        found = [await anext(base)]
        await engine.load_adapter(ONE, adapters[ONE])
        one = engine.submit(greedy("one", ONE))
        found_one = [await anext(one)]
        found.append(await anext(base))
        await engine.load_adapter(TWO, adapters[TWO])
        assert await answer(engine, greedy("two", TWO)) == expected[TWO]
        await engine.drop_adapter(TWO)
        assert tokens_of(found) + tokens_of(await collect(base)) == expected[None]
        assert tokens_of(found_one) + tokens_of(await collect(one)) == expected[ONE]
        await engine.drop_adapter(ONE)
        await engine.drop_adapter(ONE)
        await engine.load_adapter(ONE, adapters[ONE])
        assert await answer(engine, greedy("one", ONE)) == expected[ONE]

    run(llama, tokenizer, scene)


def test_dropping_waits_for_requests_in_flight_and_takes_no_new_ones(llama: Any, tokenizer: Any, adapters: dict[str, Path]) -> None:
    endless(llama, tokenizer)

    async def scene(engine: PagedEngine) -> None:
        await engine.load_adapter(ONE, adapters[ONE])
        stream = engine.submit(greedy("one", ONE, 30))
        await anext(stream)
        drop = asyncio.create_task(engine.drop_adapter(ONE))
        await asyncio.sleep(0)
        assert engine.stats().adapters == ()
        with pytest.raises(RequestError, match="not loaded"):
            engine.submit(greedy("new", ONE))
        for _ in range(20):
            await anext(stream)
        assert not drop.done()
        assert len(await collect(stream)) == 9
        await drop
        assert engine._scheduler.slots.adapters == ()

    run(llama, tokenizer, scene)


def test_an_adapter_loaded_again_while_it_is_being_dropped_stays(llama: Any, tokenizer: Any, adapters: dict[str, Path]) -> None:
    endless(llama, tokenizer)

    async def scene(engine: PagedEngine) -> None:
        await engine.load_adapter(ONE, adapters[ONE])
        stream = engine.submit(greedy("one", ONE, 10))
        drop = asyncio.create_task(engine.drop_adapter(ONE))
        await asyncio.sleep(0)
        await engine.load_adapter(ONE, adapters[ONE])
        await collect(stream)
        await drop
        assert engine.stats().adapters == (ONE,)
        assert len(await answer(engine, greedy("again", ONE))) == 12

    run(llama, tokenizer, scene)


def test_an_adapter_dropped_loaded_and_dropped_again_outlives_its_last_request(
    llama: Any, tokenizer: Any, adapters: dict[str, Path]
) -> None:
    endless(llama, tokenizer)

    async def scene(engine: PagedEngine) -> None:
        await engine.load_adapter(ONE, adapters[ONE])
        first = engine.submit(greedy("first", ONE, 5))
        drops = [asyncio.create_task(engine.drop_adapter(ONE))]
        await asyncio.sleep(0)
        await engine.load_adapter(ONE, adapters[ONE])
        second = engine.submit(greedy("second", ONE, 30))
        drops.append(asyncio.create_task(engine.drop_adapter(ONE)))
        assert [len(await collect(stream)) for stream in (first, second)] == [5, 30]
        await asyncio.gather(*drops)
        assert engine._scheduler.slots.adapters == ()

    run(llama, tokenizer, scene)


def test_more_adapters_than_slots_take_turns_and_nobody_else_waits_for_them(
    llama: Any, tokenizer: Any, adapters: dict[str, Path], expected: dict[str | None, tuple[int, ...]]
) -> None:
    async def scene(engine: PagedEngine) -> None:
        for digest, folder in adapters.items():
            await engine.load_adapter(digest, folder)
        assert engine.stats().adapters == (ONE, TWO, THREE)
        names = [None, ONE, TWO, THREE] * 3
        found = await asyncio.gather(*(answer(engine, greedy(f"r{index}", name)) for index, name in enumerate(names)))
        assert dict(zip(names, found, strict=True)) == expected
        assert found == found[:4] * 3
        assert engine.stats().num_placements >= 3

    run(llama, tokenizer, scene, max_adapters=1)


def test_a_folder_that_is_slow_to_read_holds_up_no_other_adapter_and_no_request(
    llama: Any, tokenizer: Any, adapters: dict[str, Path], expected: dict[str | None, tuple[int, ...]]
) -> None:
    started, go_on = threading.Event(), threading.Event()

    def slow_read(folder: Path, *rest: Any) -> Any:
        if folder == adapters[ONE]:
            started.set()
            go_on.wait()
        return read(folder, *rest)

    async def scene(engine: PagedEngine) -> None:
        load = asyncio.create_task(engine.load_adapter(ONE, adapters[ONE]))
        await asyncio.to_thread(started.wait)
        await engine.load_adapter(TWO, adapters[TWO])
        assert await answer(engine, greedy("base", None)) == expected[None]
        assert await answer(engine, greedy("two", TWO)) == expected[TWO]
        assert engine.stats().adapters == (TWO,)
        go_on.set()
        await load
        assert await answer(engine, greedy("one", ONE)) == expected[ONE]

    run(llama, tokenizer, scene, read=slow_read)


def test_the_least_recently_used_idle_adapter_makes_room_in_memory(llama: Any, tokenizer: Any, adapters: dict[str, Path]) -> None:
    endless(llama, tokenizer)

    async def scene(engine: PagedEngine) -> None:
        await engine.load_adapter(ONE, adapters[ONE])
        await engine.load_adapter(THREE, adapters[THREE])
        await answer(engine, greedy("one", ONE))
        await engine.load_adapter(TWO, adapters[TWO])
        assert engine.stats().adapters == (ONE, TWO)
        assert THREE not in engine._scheduler.slots.adapters
        busy, also_busy = engine.submit(greedy("one", ONE, 30)), engine.submit(greedy("two", TWO, 30))
        with pytest.raises(EngineBusyError, match=r"The 2 adapters of this engine are in use and fill .*engine\.adapters_gb"):
            await engine.load_adapter(THREE, adapters[THREE])
        assert len(await collect(busy)) == len(await collect(also_busy)) == 30
        await engine.load_adapter(THREE, adapters[THREE])
        assert engine.stats().adapters == (TWO, THREE)

    sizes = {digest: pack(read(folder, *layers_of(llama)), torch.float32).size_bytes for digest, folder in adapters.items()}
    assert sizes[TWO] > sizes[THREE] > sizes[ONE]
    run(llama, tokenizer, scene, adapters_gb=(sizes[TWO] + sizes[THREE]) / 1e9)


def test_an_adapter_larger_than_all_the_memory_for_adapters_is_refused(llama: Any, tokenizer: Any, adapters: dict[str, Path]) -> None:
    async def scene(engine: PagedEngine) -> None:
        with pytest.raises(ModelError, match=r"raise engine\.adapters_gb"):
            await engine.load_adapter(ONE, adapters[ONE])

    run(llama, tokenizer, scene, adapters_gb=1e-6)


def test_an_adapter_that_cannot_be_loaded_changes_nothing(
    llama: Any, tokenizer: Any, adapters: dict[str, Path], tmp_path: Path, expected: dict[str | None, tuple[int, ...]]
) -> None:
    async def scene(engine: PagedEngine) -> None:
        with pytest.raises(ModelError):
            await engine.load_adapter(TWO, tmp_path)
        await engine.load_adapter(ONE, adapters[ONE])
        foreign = tmp_path / "foreign"
        foreign.mkdir()
        for file in adapters[TWO].iterdir():
            (foreign / file.name).write_bytes(file.read_bytes())
        (foreign / "tidepool.json").write_text('{"base": "other@1", "base_digest": "cd"}')
        with pytest.raises(BaseMismatchError, match="other@1"):
            await engine.load_adapter(TWO, foreign)
        assert engine.stats().adapters == (ONE,)
        assert await answer(engine, greedy("one", ONE)) == expected[ONE]
        assert await answer(engine, greedy("base", None)) == expected[None]
        await engine.load_adapter(TWO, adapters[TWO])
        assert await answer(engine, greedy("two", TWO)) == expected[TWO]

    run(llama, tokenizer, scene, max_adapters=2)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an old name
def test_an_adapter_that_reads_the_weights_of_its_base_is_refused(
    llama: Any, tokenizer: Any, adapters: dict[str, Path], tmp_path: Path, expected: dict[str | None, tuple[int, ...]]
) -> None:
    """As it is at import. DoRA's norms are those of the base's weights and the adapter's together."""
    dora = get_peft_model(copy.deepcopy(llama), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], use_dora=True))
    dora.save_pretrained(tmp_path)
    (tmp_path / "tidepool.json").write_bytes((adapters[ONE] / "tidepool.json").read_bytes())

    async def scene(engine: PagedEngine) -> None:
        with pytest.raises(ModelError, match=r"does more than LoRA \(use_dora: True\).*merge it where it was trained"):
            await engine.load_adapter(TWO, tmp_path)
        assert engine.stats().adapters == ()
        assert await answer(engine, greedy("base", None)) == expected[None]

    run(llama, tokenizer, scene)


def test_a_load_that_fails_pushes_no_other_adapter_out(llama: Any, tokenizer: Any, adapters: dict[str, Path], tmp_path: Path) -> None:
    async def scene(engine: PagedEngine) -> None:
        await engine.load_adapter(ONE, adapters[ONE])
        with pytest.raises(ModelError):
            await engine.load_adapter(TWO, tmp_path)
        assert engine.stats().adapters == (ONE,)
        assert await answer(engine, greedy("one", ONE))

    run(llama, tokenizer, scene, adapters_gb=1e-4)


def test_a_load_whose_caller_leaves_is_finished(llama: Any, tokenizer: Any, adapters: dict[str, Path]) -> None:
    started, go_on = threading.Event(), threading.Event()

    def slow_read(*given: Any) -> Any:
        started.set()
        go_on.wait()
        return read(*given)

    async def scene(engine: PagedEngine) -> None:
        load = asyncio.create_task(engine.load_adapter(ONE, adapters[ONE]))
        await asyncio.to_thread(started.wait)
        load.cancel()
        await asyncio.gather(load, return_exceptions=True)
        again = asyncio.gather(*(engine.load_adapter(ONE, adapters[ONE]) for _ in range(3)))
        go_on.set()
        await again
        assert engine.stats().adapters == (ONE,)
        assert await answer(engine, greedy("one", ONE))

    run(llama, tokenizer, scene, read=slow_read)
