"""Log-probabilities in OpenAI's two shapes, from tokens and their bytes.

A token that is no whole text by itself (part of a character) is told as `bytes:\\xe2\\x82`, as OpenAI does.
"""

import codecs
from collections.abc import Iterable
from typing import Any

from tidepool.inference.engine import TokenLogprobs
from tidepool.serving.backend import Spelling


class Vocabulary:
    """What has been spelled of a model's tokens so far."""

    def __init__(self) -> None:
        self._bytes: dict[int, bytes] = {}
        self._special: set[int] = set()

    def learn(self, spelling: Spelling) -> None:
        self._bytes.update(spelling.of_tokens)
        self._special |= spelling.special

    def bytes_of(self, token: int) -> bytes:
        return self._bytes[token]

    def in_text(self, token: int) -> bytes:
        """What the token adds to a text: nothing, if it is a special one."""
        return b"" if token in self._special else self._bytes[token]

    def name(self, token: int) -> str:
        found = self._bytes[token]
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


class CompletionLogprobs:
    """Those of /v1/completions for one choice. `text_offset` counts characters of the text from its beginning, piece by piece."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def prompt(self, tokens: tuple[int, ...], logprobs: tuple[TokenLogprobs | None, ...]) -> dict[str, Any]:
        """Of a prompt, whose first token has none."""
        assert len(tokens) == len(logprobs)
        return self._table(zip(tokens, logprobs, strict=True))

    def answer(self, logprobs: tuple[TokenLogprobs, ...]) -> dict[str, Any]:
        return self._table((one.token_id, one) for one in logprobs)

    def _table(self, told: Iterable[tuple[int, TokenLogprobs | None]]) -> dict[str, Any]:
        table: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for token, one in told:
            table["text_offset"].append(self._offset)
            table["token_logprobs"].append(None if one is None else one.logprob)
            table["tokens"].append(self._vocabulary.name(token))
            table["top_logprobs"].append(None if one is None else self._top(one))
            self._offset += len(self._decoder.decode(self._vocabulary.in_text(token)))
        return table

    def _top(self, one: TokenLogprobs) -> dict[str, float]:
        """By name, the likeliest first, and the chosen one in any case; of tokens with the same name the likelier counts."""
        found: dict[str, float] = {}
        for token, logprob in (*one.top, (one.token_id, one.logprob)):
            found.setdefault(self._vocabulary.name(token), logprob)
        return found


def joined(tables: list[dict[str, Any]]) -> dict[str, Any]:
    """Tables of /v1/completions as one."""
    return {key: [item for table in tables for item in table[key]] for key in ("text_offset", "token_logprobs", "tokens", "top_logprobs")}


def chat_logprobs(vocabulary: Vocabulary, logprobs: tuple[TokenLogprobs, ...]) -> list[dict[str, Any]]:
    """Those of /v1/chat/completions."""

    def told(token: int, logprob: float) -> dict[str, Any]:
        return {"token": vocabulary.name(token), "logprob": logprob, "bytes": list(vocabulary.bytes_of(token))}

    return [told(one.token_id, one.logprob) | {"top_logprobs": [told(*other) for other in one.top]} for one in logprobs]
