"""From a row of JSONL or Parquet to a document, or to the reason why there is none. Pure.

A row has one of these; its other keys are ignored, and a key whose value is null is absent:

    text                  every token is learned
    prompt, completion    two strings, joined as they stand; the completion is learned
    messages              a chat, [{"role", "content"}, ...]; what the assistant says is learned

A message may have a `weight` of 0 or 1, as in OpenAI's format for fine-tuning; only the assistant's may. What has weight 0 is
read and not learned. Any other key of a message makes the row unusable: dropping it would change what the message says.

Which of these tokens count is the input's `loss`: `assistant` (as above), `completion` (of a chat, its last message alone, which
must be the assistant's), or `all`.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tidepool.specs import Loss, canonical_json

COLUMNS = ("text", "messages", "prompt", "completion")
EXPECTED = 'expected {"text": ...}, {"messages": [...]} or {"prompt": ..., "completion": ...}'
_SHAPES = ({"text"}, {"messages"}, {"prompt", "completion"})


@dataclass(frozen=True)
class Document:
    """One of text, a prompt and its completion, or the messages of a chat (each with `role` and `content`); and where it stands.

    `muted` are the numbers of messages with weight 0; `loss` and `weight` are those of its input; `copy` counts how often it was
    read before in this epoch.
    """

    place: str
    text: str | None = None
    messages: tuple[dict[str, str], ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    muted: tuple[int, ...] = ()
    loss: Loss = "assistant"
    weight: float = 1.0
    copy: int = 0

    @cached_property
    def content_hash(self) -> bytes:
        """sha256 of what the document says, wherever it stands and whatever of it is learned."""
        return hashlib.sha256(canonical_json([self.text, self.messages, self.prompt, self.completion])).digest()

    @property
    def plain_text(self) -> str:
        """All of its words, for training a tokenizer."""
        if self.messages is not None:
            return "\n".join(message["content"] for message in self.messages)
        return self.text if self.text is not None else f"{self.prompt}{self.completion}"


def parse_row(row: Any, place: str, loss: Loss, weight: float) -> Document | str:
    """The document of a row, or the reason why there is none."""
    if not isinstance(row, Mapping):
        return EXPECTED
    values = {key: row[key] for key in COLUMNS if row.get(key) is not None}
    if values.keys() not in _SHAPES:
        return EXPECTED
    if "messages" in values:
        return _parse_messages(values["messages"], place, loss, weight)
    for key, value in values.items():
        if not isinstance(value, str) or (key != "prompt" and not value.strip()):
            return f"`{key}` is not a string" + ("" if key == "prompt" else " with something in it")
        if not _is_unicode(value):
            return "not valid Unicode"
    return Document(place, **values, loss=loss, weight=weight)


def _parse_messages(messages: Any, place: str, loss: Loss, weight: float) -> Document | str:
    if not isinstance(messages, list) or not messages:
        return "`messages` is not a list with something in it"
    for number, message in enumerate(messages, start=1):
        if reason := _why_unusable(message, number):
            return reason
    muted = tuple(number for number, message in enumerate(messages) if message.get("weight") == 0)
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        return "no message of role `assistant` to learn from"
    if loss == "completion" and answers[-1] != len(messages) - 1:
        return "the last message is not the assistant's, and `loss: completion` learns that one alone"
    if loss != "all" and not set(answers[-1:] if loss == "completion" else answers) - set(muted):
        return "every message to learn from has weight 0"
    said = tuple({"role": message["role"], "content": message["content"]} for message in messages)
    return Document(place, messages=said, muted=muted, loss=loss, weight=weight)


def _why_unusable(message: Any, number: int) -> str | None:
    if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
        return f"message {number} needs `role` and `content`, both strings"
    if unknown := sorted(key for key in message.keys() - {"role", "content", "weight"} if message[key] is not None):
        return f"message {number} has keys that are not supported: {', '.join(unknown)}"
    if (weight := message.get("weight")) is not None and (weight not in (0, 1) or message["role"] != "assistant"):
        return f"message {number} has a weight of {weight!r}: it can be 0 or 1, and only the assistant's messages have one"
    return None if _is_unicode(message["role"] + message["content"]) else "not valid Unicode"


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which JSON can spell and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
