"""Grammars: what is sampled fits them, whatever the model says; what they cannot do is refused, in bounded time."""

import asyncio
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.models.conftest import CONFIGS, TEXT
from tidepool.errors import EngineBusyError, RequestError
from tidepool.inference import grammar as grammar_module
from tidepool.inference.grammar import CompiledGrammar, Grammars
from tidepool.inference.sampler import Sampler, SamplingState
from tidepool.inference.sampling_parameters import SamplingParameters
from tidepool.models import build_model, train_tokenizer

ENDS = frozenset([0, 2])
PADDING = 20  # rows of the embedding beyond the tokenizer's tokens


@pytest.fixture(scope="module")
def byte_level() -> Any:
    return train_tokenizer([TEXT, '{"name": "tide", "height": 3.5, "tags": [true, null]} '] * 4, vocab_size=320)


@pytest.fixture(scope="module")
def grammars(byte_level: Any) -> Grammars:
    return Grammars(byte_level, ENDS, len(byte_level) + PADDING)


def asked(**parameters: Any) -> SamplingParameters:
    return SamplingParameters(**{"max_tokens": 1, "seed": 0, **parameters})


def schema(**keywords: Any) -> str:
    return json.dumps(keywords)


def compiled(grammars: Grammars, **parameters: Any) -> CompiledGrammar:
    found = grammars.compile_now(asked(**parameters))
    assert found is not None
    return found


def noise(num_tokens: int) -> Callable[[list[SamplingState]], torch.Tensor]:
    """Logits of a model that knows nothing."""
    generator = torch.Generator().manual_seed(1)
    return lambda states: torch.randn(len(states), num_tokens, generator=generator) * 2


def answers(
    logits_of: Callable[[list[SamplingState]], torch.Tensor], states: list[SamplingState], max_tokens: int
) -> list[tuple[list[int], bool]]:
    """The tokens of each sequence, sampled in one batch, and whether it has ended."""
    sampler = Sampler()
    found: list[tuple[list[int], bool]] = [([], False) for _ in states]
    running = list(range(len(states)))
    for _ in range(max_tokens):
        batch = [states[index] for index in running]
        sampled = sampler.sample(logits_of(batch), batch)
        assert not sampled.errors
        for index, token in zip(running, sampled.tokens, strict=True):
            states[index].append(token)
            if token in ENDS:
                found[index] = found[index][0], True
            else:
                found[index][0].append(token)
        running = [index for index in running if not found[index][1]]
        if not running:
            break
    return found


# --- What is sampled fits --------------------------------------------------------------------------------------------


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Person(Strict):
    name: str = Field(min_length=1, max_length=12)
    age: int = Field(ge=0, le=150)


class Reading(Strict):
    kind: str = Field(pattern="^(high|low)$")
    height: float
    tags: list[bool | None] = Field(max_length=3)
    person: Person | None = None


class Tree(Strict):
    value: int = Field(ge=-99, le=99)
    children: list["Tree"] = Field(max_length=2)


def _is_even_list(text: str) -> None:
    found = json.loads(text)
    assert isinstance(found, list)
    assert 1 <= len(found) <= 4
    assert all(isinstance(number, int) and number % 7 == 0 and 0 <= number <= 700 for number in found)


def _is_either(text: str) -> None:
    found = json.loads(text)
    assert found in ("a", "ключ", None, 3) or (set(found) == {"x"} and isinstance(found["x"], bool))


CHECKED: dict[str, tuple[str, Callable[[str], Any]]] = {
    "person": (json.dumps(Person.model_json_schema()), Person.model_validate_json),
    "reading": (json.dumps(Reading.model_json_schema()), Reading.model_validate_json),
    "tree": (json.dumps(Tree.model_json_schema()), Tree.model_validate_json),
    "numbers": (
        schema(type="array", items={"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 700}, minItems=1, maxItems=4),
        _is_even_list,
    ),
    "either": (
        schema(
            anyOf=[
                {"enum": ["a", "ключ", None, 3]},
                {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"], "additionalProperties": False},
            ]
        ),
        _is_either,
    ),
    "object": (schema(type="object", maxProperties=3), TypeAdapter(dict[str, Any]).validate_json),
}


@pytest.fixture(scope="module")
def tiny(byte_level: Any) -> Callable[[list[SamplingState]], torch.Tensor]:
    """The next logits of a tiny model with random weights, from the last four tokens that the states have been given."""
    model = build_model(CONFIGS["llama"], len(byte_level), 1, byte_level)

    @torch.inference_mode()
    def logits(states: list[Any]) -> torch.Tensor:
        tokens = torch.tensor([[5, 5, 5, 5, *state.tokens][-4:] for state in states])
        padding = torch.full((len(states), PADDING), 9.0)  # what no grammar may let through
        return torch.cat([model(input_ids=tokens).logits[:, -1], padding], dim=1)

    return logits


class Recorded(SamplingState):
    """A state that a model can read the tokens of."""

    def __init__(self, parameters: SamplingParameters, grammar: CompiledGrammar) -> None:
        super().__init__(parameters, (5,), grammar=grammar)
        self.tokens: list[int] = []

    def append(self, token: int) -> None:
        super().append(token)
        self.tokens.append(token)


@pytest.mark.parametrize("name", CHECKED)
def test_two_hundred_random_answers_fulfil_their_schema(grammars: Grammars, byte_level: Any, tiny: Any, name: str) -> None:
    text, check = CHECKED[name]
    grammar = compiled(grammars, json_schema=text)
    states: list[SamplingState] = [Recorded(asked(temperature=1.5, seed=seed), grammar) for seed in range(200)]
    ended = [tokens for tokens, has_ended in answers(tiny, states, 110) if has_ended]
    assert len(ended) >= 100
    texts = [byte_level.decode(tokens) for tokens in ended]
    for found in texts:
        check(found)
    assert len(set(texts)) > 10


EXPRESSIONS = [
    r"[a-z]{3,5}-\d+",
    r"(tide|pool)s?( and (tide|pool)s?)*",
    r"[^\"\\]{1,20}",
    r"(\+|-)?[0-9]+(\.[0-9]{2})?",
    r".{2,9}x",
    r"(a|é|🌊){4}",
    r"(?i)high|low",
    r"\w{1,4}@[^\d\s]\S{1,4}\.(com|org)",
    r"a/b\\/?\n\x41",
    r"",
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_two_hundred_random_answers_match_their_expression(grammars: Grammars, byte_level: Any, tiny: Any, expression: str) -> None:
    grammar = compiled(grammars, regex=expression)
    states: list[SamplingState] = [Recorded(asked(temperature=1.5, seed=seed), grammar) for seed in range(200)]
    found = answers(tiny, states, 80)
    assert sum(has_ended for _, has_ended in found) >= 100
    for tokens, has_ended in found:
        text = byte_level.decode(tokens)
        assert not has_ended or re.fullmatch(expression, text, re.ASCII), text


def test_every_text_of_a_schema_can_be_written(grammars: Grammars, byte_level: Any) -> None:
    """A model that wants to write this very text is not kept from it."""
    grammar = compiled(grammars, json_schema=CHECKED["reading"][0])
    text = '{"kind": "low", "height": -3.25e2,\n  "tags": [true, null],\t"person": {"name": "Ada é\\n\\" 🌊", "age": 36}}'
    Reading.model_validate_json(text)
    state = SamplingState(asked(temperature=0), (5,), grammar=grammar)
    for token in [*byte_level(text)["input_ids"], 2]:
        logits = torch.zeros(1, len(byte_level) + PADDING)
        logits[0, token] = 1
        sampled = Sampler().sample(logits, [state])
        assert (sampled.tokens, sampled.errors) == ([token], {})
        state.append(token)


def test_white_space_comes_to_an_end(grammars: Grammars, byte_level: Any) -> None:
    state = SamplingState(asked(), (5,), grammar=compiled(grammars, json_schema=schema(type="object")))
    space = byte_level(" ")["input_ids"][0]
    state.append(byte_level("{")["input_ids"][0])
    for _ in range(16):
        assert space in allowed(state, len(byte_level) + PADDING)
        state.append(space)
    assert space not in allowed(state, len(byte_level) + PADDING)


def test_a_finished_answer_may_only_end(grammars: Grammars, byte_level: Any) -> None:
    state = SamplingState(asked(), (5,), grammar=compiled(grammars, regex="ab"))
    for token in byte_level("ab")["input_ids"]:
        state.append(token)
    assert allowed(state, len(byte_level) + PADDING) == ENDS
    open_state = SamplingState(asked(), (5,), grammar=compiled(grammars, regex="ab*"))
    for token in byte_level("ab")["input_ids"]:
        open_state.append(token)
    assert allowed(open_state, len(byte_level) + PADDING) > ENDS


def test_tokens_with_a_meaning_of_their_own_are_no_text(grammars: Grammars, byte_level: Any) -> None:
    state = SamplingState(asked(), (5,), grammar=compiled(grammars, regex="[\\s\\S]*"))
    beyond = set(range(len(byte_level), len(byte_level) + PADDING))
    assert allowed(state, len(byte_level) + PADDING).isdisjoint(beyond | {1})
    assert allowed(state, len(byte_level) + PADDING) >= ENDS


def allowed(state: SamplingState, num_tokens: int) -> set[int]:
    """The tokens that can be drawn."""
    logits = torch.full((num_tokens, num_tokens), -50.0)
    logits.fill_diagonal_(50.0)
    sampled = Sampler().sample(logits, [state] * num_tokens, ahead=[0] * num_tokens)
    return {token for row, token in enumerate(sampled.tokens) if token == row}


# --- Tokenizers ------------------------------------------------------------------------------------------------------


def with_byte_fallback() -> Any:
    """As SentencePiece makes them for Llama 2, Mistral and Gemma."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁a",
        "a",
        "b",
        "{",
        "}",
        '"',
        ":",
        "1",
        "▁b",
        '{"',
        "é",
    ]
    raw = Tokenizer(
        models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_a_tokenizer_of_pieces_and_single_bytes_works_too() -> None:
    tokenizer = with_byte_fallback()
    grammars = Grammars(tokenizer, frozenset([2]), len(tokenizer))
    grammar = compiled(grammars, regex="(a b|é|🌊){3}")
    states = [SamplingState(asked(temperature=1.5, seed=seed), (1,), grammar=grammar) for seed in range(50)]
    found = answers(noise(len(tokenizer)), states, 60)
    texts = [tokenizer.decode(tokens) for tokens, _ in found]
    assert all(has_ended for _, has_ended in found)
    assert all(re.fullmatch("(a b|é|🌊){3}", text) for text in texts), texts
    grammars.close()


def test_a_tokenizer_that_is_not_fast_and_a_text_without_end_are_refused(byte_level: Any) -> None:
    for tokenizer, ends, message in [(object(), ENDS, "no fast version"), (byte_level, frozenset(), "no token that ends")]:
        grammars = Grammars(tokenizer, ends, 300)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match=message):
            grammars.compile_now(asked(regex="a"))
        grammars.close()


# --- The batch -------------------------------------------------------------------------------------------------------


def test_a_grammar_changes_nothing_for_its_neighbours_and_nothing_changes_it(grammars: Grammars, byte_level: Any) -> None:
    num_tokens = len(byte_level) + PADDING
    steps = torch.randn(20, 6, num_tokens, generator=torch.Generator().manual_seed(3)) * 3
    one, other = compiled(grammars, json_schema=CHECKED["tree"][0]), compiled(grammars, regex="[ab]{100}")
    kinds: list[tuple[CompiledGrammar | None, dict[str, Any]]] = [
        (one, {}),
        (None, {"temperature": 0}),
        (other, {"temperature": 0}),
        (one, {"top_p": 0.7, "logprobs": 1}),
        (None, {"top_k": 9}),
        (None, {}),
    ]

    def states() -> list[SamplingState]:
        return [SamplingState(asked(**{"seed": row, **each}), (5,), grammar=grammar) for row, (grammar, each) in enumerate(kinds)]

    together, alone, sampler = states(), states(), Sampler()
    answered: list[list[int]] = [[] for _ in kinds]
    for step in range(20):
        if step == 10:  # as after a preemption, or on another replica
            together = states()
            for made, tokens in zip(together, answered, strict=True):
                for token in tokens:
                    made.append(token)
        found = sampler.sample(steps[step].clone(), together)
        assert not found.errors
        for row, token in enumerate(found.tokens):
            single = Sampler().sample(steps[step, row : row + 1].clone(), [alone[row]])
            assert (single.tokens[0], single.logprobs.get(0)) == (token, found.logprobs.get(row))
            for state in (alone[row], together[row]):
                state.append(token)
            answered[row].append(token)


def test_a_token_that_does_not_fit_ends_that_answer_alone(grammars: Grammars, byte_level: Any) -> None:
    grammar = compiled(grammars, regex="[0-9]+")
    states = [SamplingState(asked(temperature=0), (5,), grammar=grammar) for _ in range(2)]
    states[0].append(byte_level("x")["input_ids"][0])  # as by a replay of another request's tokens
    sampled = Sampler().sample(torch.zeros(2, len(byte_level) + PADDING), states)
    assert set(sampled.errors) == {0}
    assert isinstance(sampled.errors[0], RequestError)
    assert byte_level.decode([sampled.tokens[1]]) in "0123456789"


# --- What is refused -------------------------------------------------------------------------------------------------

REFUSED = {
    "no JSON": (schema()[:-1], "no JSON: "),
    "no object": ("3", "no JSON object"),
    "not": (schema(**{"not": {"type": "string"}}), 'Unimplemented keys: \\["not"\\]'),
    "uniqueItems": (schema(type="array", uniqueItems=True), "uniqueItems"),
    "dependentRequired": (schema(type="object", dependentRequired={"a": ["b"]}), "dependentRequired"),
    "contains": (schema(type="array", contains={"type": "integer"}), "contains"),
    "propertyNames": (schema(type="object", propertyNames={"pattern": "^a"}), "propertyNames"),
    "if": (schema(**{"if": {"type": "string"}}), '"if"'),
    "made lenient by itself": (schema(**{"x-guidance": {"lenient": True}, "not": {}}), '"not"'),
    "an unknown format": (schema(type="string", format="tide-table"), "Unknown format: tide-table"),
    "an unknown type": (schema(type="strng"), "Invalid type: strng"),
    "a file": (schema(**{"$ref": "file:///etc/hostname"}), "not present"),
    "a missing definition": (schema(**{"$ref": "#/$defs/x"}), "does not exist"),
    "nothing fulfils it": (schema(type="integer", minimum=5, maximum=3), "minimum"),
    "itself for ever": (schema(**{"$ref": "#"}), "no text fulfils it"),
    "a look-ahead in a pattern": (schema(type="string", pattern="(?=a)"), "look-around"),
    "deep text": ('{"items":' * 5000 + "true" + "}" * 5000, "nested too deeply"),
    "deep": ('{"items":' * 200 + "true" + "}" * 200, "recursion limit"),
    "long": (schema(enum=[f"value {number}" for number in range(10_000)]), "65536 are the most"),
    "many repetitions": (schema(properties={"x": {"patternProperties": {"a{3,99999}": True}}}), "10,000 times"),
    "a product": (
        schema(allOf=[{"anyOf": [{"properties": {f"k{i}{j}": {"const": i}}} for i in range(10)]} for j in range(10)]),
        "too large|to compile",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_schema_that_cannot_be_followed_is_refused(grammars: Grammars, name: str) -> None:
    text, message = REFUSED[name]
    with pytest.raises(RequestError, match=message) as caught:
        grammars.compile_now(asked(json_schema=text))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("(", "unclosed group"),
        ("(?=a)b", "look-around"),
        (r"\bfoo\b", "lookarounds not supported"),
        (r"(a)\1", "backreferences are not supported"),
        ("a$b", "not supported"),
        ("a{100000}", "10,000 times"),
        ("a{10000,}", "10,000 times"),
        ("(" * 5000 + "a" + ")" * 5000, "nested parentheses"),
        ("a" * 70_000, "65536 are the most"),
    ],
)
def test_an_expression_that_cannot_be_followed_is_refused(grammars: Grammars, expression: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        grammars.compile_now(asked(regex=expression))
    assert len(str(caught.value)) < 400


def test_a_compilation_that_takes_too_long_or_too_much_is_stopped(byte_level: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = Grammars(byte_level, ENDS, 400)
    monkeypatch.setattr(grammar_module, "_TRIAL_CPU_S", 1)
    with pytest.raises(RequestError, match="more than 1 s to compile"):
        grammars.compile_now(asked(json_schema=schema(type="integer", multipleOf=1_000_003)))
    monkeypatch.setattr(grammar_module, "_TRIAL_CPU_S", 60)
    monkeypatch.setattr(grammar_module, "_TRIAL_MEMORY_BYTES", 2**28)
    with pytest.raises(RequestError, match="more than 256 MiB to compile"):
        grammars.compile_now(asked(json_schema=schema(type="integer", multipleOf=1_000_033)))
    grammars.close()


def test_what_failed_through_no_fault_of_the_request_is_tried_again(byte_level: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = Grammars(byte_level, ENDS, 400)
    with monkeypatch.context() as patch:
        patch.setattr(grammar_module, "_TRIAL_TIMEOUT_S", 0.0)
        with pytest.raises(EngineBusyError, match="too busy"):
            grammars.compile_now(asked(regex="a"))
    with monkeypatch.context() as patch:
        patch.setattr(grammar_module, "_TRIAL", "raise SystemExit('no such library')")
        with pytest.raises(RuntimeError, match="no such library"):
            grammars.compile_now(asked(regex="a"))
    assert grammars.compile_now(asked(regex="a")) is not None
    grammars.close()


def test_an_expression_that_explodes_in_a_step_ends_its_answer_alone(grammars: Grammars, byte_level: Any) -> None:
    bad = SamplingState(asked(), (5,), grammar=compiled(grammars, regex="(?:a?){1000}a{1000}"))
    good = SamplingState(asked(), (5,), grammar=compiled(grammars, regex="a*"))
    sampler, failed = Sampler(), {}
    for _ in range(3):
        started = time.process_time()
        sampled = sampler.sample(torch.zeros(2, len(byte_level) + PADDING), [bad, good])
        assert time.process_time() - started < 2
        failed |= sampled.errors
        bad.append(byte_level("a")["input_ids"][0])
        good.append(byte_level("a")["input_ids"][0])
    assert set(failed) == {0}
    assert isinstance(failed[0], RequestError)


# --- Compilation -----------------------------------------------------------------------------------------------------


@dataclass
class Trials:
    """Stands before the trial of a grammar, counts, and holds it back until the test lets it go."""

    original: Callable[[str, str], None]
    grammars: list[str] = field(default_factory=list)
    may_go: threading.Event = field(default_factory=threading.Event)

    def __call__(self, kind: str, grammar: str) -> None:
        self.grammars.append(grammar)
        self.may_go.wait()
        self.original(kind, grammar)


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trials]:
    made = Trials(grammar_module._try)
    monkeypatch.setattr(grammar_module, "_try", made)
    yield made
    made.may_go.set()  # also for a test that failed, whose thread would keep the process


def test_the_event_loop_goes_on_while_a_grammar_is_compiled_once_for_all(byte_level: Any, trials: Trials) -> None:
    grammars = Grammars(byte_level, ENDS, 400)

    async def scene() -> None:
        assert await grammars.compile(asked()) is None
        before = asyncio.create_task(grammars.compile(asked(regex="b")))  # so that the next one has not begun when a client leaves
        waiting = [asyncio.create_task(grammars.compile(asked(regex="a+", seed=seed))) for seed in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.gather(waiting[0], return_exceptions=True)
        assert not waiting[1].done()
        trials.may_go.set()
        _, *found = await asyncio.gather(before, *waiting[1:])
        assert found[0] is found[1]
        assert await grammars.compile(asked(regex="a+")) is found[0]
        with pytest.raises(RequestError):
            await grammars.compile(asked(regex="("))
        with pytest.raises(RequestError):
            await grammars.compile(asked(regex="("))

    asyncio.run(scene())
    assert len(trials.grammars) == 3
    grammars.close()


def test_only_the_latest_grammars_are_kept(byte_level: Any, trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "_MAX_CACHED", 2)
    trials.may_go.set()
    grammars = Grammars(byte_level, ENDS, 400)
    for expression in ["a", "b", "a", "c", "a", "b"]:
        grammars.compile_now(asked(regex=expression))
    assert len(trials.grammars) == 4
    grammars.close()
