"""From tokens, one at a time, to text that is certain.

Invariants: the texts put together are what the tokenizer makes of all the tokens at once (special tokens skipped, no
clean-up of spaces); no text ends within a character whose bytes are spread over tokens. The work a token takes does not
grow with the answer.
"""

import codecs
import weakref

from tokenizers import decoders, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """The text of one answer; of special tokens `shown` alone are part of it, as they are written."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, shown: frozenset[int] = frozenset()) -> None:
        self._tokenizer, self._shown = tokenizer, shown
        self._way = self._begin()

    def push(self, token: int) -> str:
        """The text that is certain with one more token."""
        if token in self._shown:
            rest, self._way = self._way.finish(), self._begin()
            return rest + str(self._tokenizer.convert_ids_to_tokens(token))
        return self._way.push(token)

    def finish(self) -> str:
        """The rest, in which bytes that make no character have become U+FFFD."""
        return self._way.finish()

    def _begin(self) -> "_Bytes | _Window":
        return _Bytes(self._tokenizer) if is_byte_level(self._tokenizer) else _Window(self._tokenizer)


class _Window:
    """Decodes a window at the end of the tokens: a few known ones, since a decoder may treat the first one differently."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._num_known = 0  # tokens of the window whose text is out
        self._known = ""

    def push(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT):  # perhaps the first bytes of a character: what comes next decides
            return ""
        new = text[len(self._known) :]
        latest = self._window[self._num_known :]
        if latest_text := self._decode(latest):  # else special tokens only, which would leave no context
            self._window, self._known = latest, latest_text
        else:
            self._known = text
        self._num_known = len(self._window)
        return new

    def finish(self) -> str:
        return self._decode(self._window)[len(self._known) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class _Bytes:
    """For byte-level tokenizers (GPT-2's, and most since), whose tokens are bytes whatever stands beside them: ten times faster."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        table = _tables.get(tokenizer)
        self._table = _tables[tokenizer] = _Table(tokenizer) if table is None else table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._table[token])

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Table(dict[int, bytes]):
    """The bytes of each token that has been asked for; none for special tokens and for numbers that are no token."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self._raw = tokenizer.backend_tokenizer
        self._special = {number for number, token in self._raw.get_added_tokens_decoder().items() if token.special}

    def __missing__(self, token: int) -> bytes:
        piece = self._raw.id_to_token(token)
        if piece is None or token in self._special:
            found = b""
        elif all(character in BYTES for character in piece):
            found = bytes(BYTES[character] for character in piece)
        else:  # added to the vocabulary as it is written
            found = piece.encode()
        self[token] = found
        return found


def is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's tokens are bytes, each written as a character of `BYTES`."""
    return isinstance(tokenizer, PreTrainedTokenizerFast) and isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel)


def _byte_characters() -> dict[str, int]:
    """Which byte each character of the alphabet of byte-level tokens stands for: printable ones for themselves, the rest in order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    themselves = [character for character in alphabet if ord(character) < 256]
    others = [byte for byte in range(256) if chr(byte) not in themselves]
    return {character: ord(character) for character in themselves} | dict(zip(alphabet[len(themselves) :], others, strict=True))


BYTES = _byte_characters()
_tables: weakref.WeakKeyDictionary[PreTrainedTokenizerFast, _Table] = weakref.WeakKeyDictionary()
