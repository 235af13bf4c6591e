"""Calls of tools in the text of an answer: each form that models write, what is none, and that no cut changes anything."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidepool.serving.api.tool_calls import ForcedCall, Found, FoundCall, ToolCallParser

NAMES = frozenset(["tide", "moon"])
TIDE = FoundCall("tide", '{"at": "Brest"}')
MOON = FoundCall("moon", "{}")
HERMES_TIDE = '<tool_call>\n{"name": "tide", "arguments": {"at": "Brest"}}\n</tool_call>'
HERMES_MOON = '<tool_call>{"name": "moon", "arguments": {}}</tool_call>'


def mistral(call: FoundCall) -> FoundCall:
    return FoundCall(call.name, call.arguments, is_mistral=True)


def merged(found: list[Found]) -> list[Found]:
    together: list[Found] = []
    for one in found:
        if isinstance(one, str) and together and isinstance(together[-1], str):
            together[-1] += one
        else:
            together.append(one)
    return together


def read(*pieces: str) -> list[Found]:
    parser = ToolCallParser(NAMES)
    return merged([one for piece in pieces for one in parser.push(piece)] + parser.finish())


CASES: list[tuple[str, list[Found]]] = [
    ("", []),
    ("Just words.\n", ["Just words.\n"]),
    (HERMES_TIDE, [TIDE]),
    (f"Let me see.\n\n{HERMES_TIDE}\n{HERMES_MOON}\n", ["Let me see.", TIDE, MOON]),
    (f"{HERMES_TIDE}\nand so on", [TIDE, "\nand so on"]),
    ('<tool_call>{"name": "tide", "arguments": "{\\"at\\": \\"Brest\\"}"}</tool_call>', [TIDE]),
    ('<tool_call>{"name": "moon"}</tool_call>', [MOON]),
    ('<tool_call>{"name": "tide", "arguments": {"at": "Brest"}}', [TIDE]),
    ('A <tool_call>{"name": "tide"</tool_call> B', ['A <tool_call>{"name": "tide"</tool_call> B']),
    (
        '<tool_call>{"name": "tide", "arguments": {"at": NaN}}</tool_call>',
        ['<tool_call>{"name": "tide", "arguments": {"at": NaN}}</tool_call>'],
    ),
    ("<tool_call>[1]</tool_call>", ["<tool_call>[1]</tool_call>"]),
    ("a <tool_cal> b <tool", ["a <tool_cal> b <tool"]),
    (f"<think>\nperhaps {HERMES_MOON}?\n</think>\n\n{HERMES_TIDE}", [f"<think>\nperhaps {HERMES_MOON}?\n</think>", TIDE]),
    ("<think>endless", ["<think>endless"]),
    ('[TOOL_CALLS] [{"name": "tide", "arguments": {"at": "Brest"}}, {"name": "moon", "arguments": {}}]', [mistral(TIDE), mistral(MOON)]),
    ('Yes. [TOOL_CALLS]tide[ARGS]{"at": "Brest"}[TOOL_CALLS]moon[CALL_ID]abcdefghi[ARGS]{}', ["Yes.", mistral(TIDE), mistral(MOON)]),
    ('[TOOL_CALLS]tide{"at": "Brest"}', [mistral(TIDE)]),
    ("[TOOL_CALLS] [oh", ["[TOOL_CALLS] [oh"]),
    ('{"name": "tide", "parameters": {"at": "Brest"}}', [TIDE]),
    (
        '\n<|python_tag|>{"type": "function", "name": "tide", "parameters": {"at": "Brest"}}; {"name": "moon", "parameters": {}}',
        [TIDE, MOON],
    ),
    ('{"name": "Ada", "parameters": {}}', ['{"name": "Ada", "parameters": {}}']),
    ('{"name": "tide"}', ['{"name": "tide"}']),
    ('{"tide": {"name": "moon"}}', ['{"tide": {"name": "moon"}}']),
    (
        '{"name": "tide", "parameters": {"at": "Brest"}} is what I would call',
        ['{"name": "tide", "parameters": {"at": "Brest"}} is what I would call'],
    ),
    ('In short: {"name": "tide", "parameters": {}}', ['In short: {"name": "tide", "parameters": {}}']),
    ("{", ["{"]),
]


@pytest.mark.parametrize(("text", "expected"), CASES)
def test_each_form_however_it_is_cut(text: str, expected: list[Found]) -> None:
    assert read(text) == expected
    assert read(*text) == expected
    for cut in range(len(text)):
        assert read(text[:cut], text[cut:]) == expected


PARTS = [
    HERMES_TIDE,
    HERMES_MOON,
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
    "[TOOL_CALLS]",
    "[ARGS]",
    '{"name": "tide"',
    "}",
    " ",
    "\n",
    "x",
    "<",
    "{",
]


@given(st.lists(st.sampled_from(PARTS), max_size=8).map("".join), st.lists(st.integers(0, 60)))
def test_no_cut_changes_anything_and_no_text_is_lost(text: str, cuts: list[int]) -> None:
    found = read(text)
    ends = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    assert read(*(text[first:last] for first, last in itertools.pairwise(ends))) == found
    if not any(isinstance(one, FoundCall) for one in found):
        assert "".join(one for one in found if isinstance(one, str)) == text


def test_what_streams_is_not_held_back_longer_than_it_must_be() -> None:
    parser = ToolCallParser(NAMES)
    assert parser.push("The tide") == ["The tide"]
    assert parser.push(" is in. <tool") == [" is in."]
    assert parser.push("ing>") == [" <tooling>"]
    assert parser.push(HERMES_TIDE) == [TIDE]
    answer = ToolCallParser(NAMES)
    assert answer.push('{"high') == []
    assert answer.push('": 1') == ['{"high": 1'], "JSON that can be no call any more streams"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("tide", '{"at": "Brest"}', [TIDE]),
        ("tide", '{"at": "Br', [FoundCall("tide", '{"at": "Br')]),
        (None, json.dumps({"name": "tide", "arguments": {"at": "Brest"}}), [TIDE]),
        (None, '{"name": "tide", "argum', ['{"name": "tide", "argum']),
    ],
)
def test_an_answer_that_was_held_to_a_call(name: str | None, text: str, expected: list[Found]) -> None:
    forced = ForcedCall(name)
    assert [found for character in text for found in forced.push(character)] == []
    assert forced.finish() == expected
