"""Calls of tools in the text of an answer, in the forms that models commonly write:

- `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them (Hermes, Qwen);
- `[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`, or `[TOOL_CALLS]name[ARGS]{...}`, any number of them (Mistral);
- a text that is nothing but `{"name": ..., "parameters": {...}}`, or several with `;` between them (Llama 3).

Invariants:
- What comes out does not depend on how the text was cut into pieces.
- What is no call in such a form stays text, as it was written; so does all that a leading `<think>` holds.
- A text with calls loses the white space around them, and nothing else.
- JSON without a mark is a call only if it names one of the tools that the request offers: it may as well be the answer.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

_THINK, _THOUGHT = "<think>", "</think>"
_HERMES, _HERMES_END = "<tool_call>", "</tool_call>"
_MISTRAL = "[TOOL_CALLS]"
_PYTHON = "<|python_tag|>"
_MARKS = (_HERMES, _MISTRAL)
_MISTRAL_CALL = re.compile(r"\s*([^\s\[\]{}]+)(?:\[CALL_ID\]([^\s\[\]{}]+))?\s*(?:\[ARGS\])?\s*(?=\{)")
_FIRST_KEY = re.compile(r'\s*\{\s*"([^"\\]*)"')
_CALL_KEYS = {"name", "arguments", "parameters", "type", "id"}


@dataclass(frozen=True)
class FoundCall:
    """`arguments` is the text of a JSON object. `is_mistral`: its model takes ids of nine letters and digits alone."""

    name: str
    arguments: str
    is_mistral: bool = False


Found = str | FoundCall


class ToolCallParser:
    """Of one answer to a request that offers tools of these names."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._held = self._space = ""
        self._state = "start"
        self._has_calls = False

    def push(self, text: str) -> list[Found]:
        """What is certain with some more text."""
        self._held += text
        found: list[Found] = []
        while (step := self._step()) is not None:
            found += step
        return _merged(found)

    def finish(self) -> list[Found]:
        """The rest, when the answer is over."""
        held, state, self._held = self._held, self._state, ""
        if state == "hermes":
            found = self._hermes(held.removeprefix(_HERMES), held)
        elif state == "mistral":
            found = self._calls(_mistral_calls(held), held)
        elif state == "json":
            found = self._calls(_bare_calls(held.strip().removeprefix(_PYTHON), self._names), held)
        else:
            found = [] if self._has_calls and not held.strip() else [held]
        return _merged(found)

    def _step(self) -> list[Found] | None:
        """Go on as far as what is held decides; None if more text is needed."""
        match self._state:
            case "start":
                return self._start()
            case "thinking":
                return self._think()
            case "text":
                return self._text()
            case "hermes":
                end = self._held.find(_HERMES_END)
                if end < 0:
                    return None
                whole, self._held = self._held[: end + len(_HERMES_END)], self._held[end + len(_HERMES_END) :]
                self._state = "text"
                return self._hermes(whole.removeprefix(_HERMES).removesuffix(_HERMES_END), whole)
            case "json" if (key := _FIRST_KEY.match(self._held)) and key[1] not in _CALL_KEYS:
                self._state = "text"
                return []
            case _:
                return None  # Mistral's and bare JSON are whole at the end alone

    def _start(self) -> list[Found] | None:
        begun = self._held.lstrip()
        if any(mark.startswith(begun) for mark in (_THINK, _PYTHON)):
            return None
        if begun.startswith(_THINK):
            self._state = "thinking"
        else:
            self._state = "json" if begun.startswith(("{", _PYTHON)) else "text"
        return []

    def _think(self) -> list[Found] | None:
        end = self._held.find(_THOUGHT)
        if end >= 0:
            end += len(_THOUGHT)
            thought, self._held, self._state = self._held[:end], self._held[end:], "start"
            return [thought]
        return self._pass_on(len(self._held) - _overlap(self._held, _THOUGHT))

    def _text(self) -> list[Found] | None:
        marks = [(index, mark) for mark in _MARKS if (index := self._held.find(mark)) >= 0]
        if marks:
            index, mark = min(marks)
            before, self._held = self._held[:index], self._held[index:]
            self._space = before[len(before.rstrip()) :]
            self._state = "hermes" if mark == _HERMES else "mistral"
            return [before.rstrip()]
        cut = len(self._held) - max(_overlap(self._held, mark) for mark in _MARKS)
        return self._pass_on(len(self._held[:cut].rstrip()))

    def _pass_on(self, length: int) -> list[Found] | None:
        text, self._held = self._held[:length], self._held[length:]
        return [text] if text else None

    def _hermes(self, body: str, whole: str) -> list[Found]:
        return self._calls(_calls_of([_decoded(body)]), whole)

    def _calls(self, calls: list[FoundCall], otherwise: str) -> list[Found]:
        self._has_calls |= bool(calls)
        space, self._space = self._space, ""
        return [*calls] if calls else [space + otherwise]


class ForcedCall:
    """Of one answer that was held to a call: of a function by its name, or of any (None). Cut short, it is what there is of it."""

    def __init__(self, name: str | None) -> None:
        self._name, self._text = name, ""

    def push(self, text: str) -> list[Found]:
        """Nothing is certain before the end."""
        self._text += text
        return []

    def finish(self) -> list[Found]:
        if self._name is not None:
            return [FoundCall(self._name, self._text)]
        return [*_calls_of([_decoded(self._text)])] or [self._text]


# --- From text to calls ----------------------------------------------------------------------------------------------


def _bare_calls(text: str, names: frozenset[str]) -> list[FoundCall]:
    values, rest = _decoded_all(text)
    calls = _calls_of(values)
    has_arguments = all(isinstance(value, dict) and value.keys() & {"arguments", "parameters"} for value in values)
    return calls if not rest and has_arguments and all(call.name in names for call in calls) else []


def _mistral_calls(text: str) -> list[FoundCall]:
    calls: list[FoundCall] = []
    for part in text.split(_MISTRAL)[1:]:
        if named := _MISTRAL_CALL.match(part):
            values, rest = _decoded_all(part[named.end() :])
            found = _calls_of([{"name": named[1], "arguments": values[0]}]) if len(values) == 1 and not rest else []
        else:
            value = _decoded(part)
            found = _calls_of(value if isinstance(value, list) else [value])
        if not found:
            return []
        calls += [FoundCall(call.name, call.arguments, is_mistral=True) for call in found]
    return calls


def _calls_of(values: list[Any]) -> list[FoundCall]:
    """All of them as calls; none if one of them is none."""
    calls = []
    for value in values:
        if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
            return []
        arguments = value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):  # as OpenAI writes them, which some models copy
            arguments = _decoded(arguments)
        if not isinstance(arguments, dict):
            return []
        calls.append(FoundCall(value["name"], json.dumps(arguments, ensure_ascii=False)))
    return calls


def _decoded(text: str) -> Any:
    values, rest = _decoded_all(text)
    return values[0] if len(values) == 1 and not rest else None


def _decoded_all(text: str) -> tuple[list[Any], str]:
    """JSON values with `;` or white space between them, and what follows the last one."""
    values = []
    text = text.strip()
    while text:
        try:
            value, end = _DECODER.raw_decode(text)
        except (ValueError, RecursionError):
            break
        values.append(value)
        text = text[end:].lstrip(" \t\r\n;")
    return values, text


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _overlap(text: str, mark: str) -> int:
    """The length of the longest end of the text that begins the mark, and is not the whole of it."""
    return next((length for length in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:length])), 0)


def _merged(found: list[Found]) -> list[Found]:
    """Texts that follow one another as one, and no empty one."""
    merged: list[Found] = []
    for one in found:
        if isinstance(one, str) and merged and isinstance(merged[-1], str):
            merged[-1] += one
        elif one != "":
            merged.append(one)
    return merged
