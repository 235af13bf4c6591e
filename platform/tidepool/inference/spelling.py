"""The bytes of single tokens, for log-probabilities: a token may be part of a character, so that it has no text of its own.

A special token is spelled as it is written in the vocabulary, though it is no part of a text. The bytes of a text's tokens put together
are the text, but for the space that SentencePiece's tokenizers put before it.
"""

import re

from transformers import PreTrainedTokenizerBase

from tidepool.inference.detokenizer import BYTES, is_byte_level

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"


class TokenBytes(dict[int, bytes]):
    """The bytes of each token that has been asked for; none for a number that is no token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self._tokenizer, self._is_byte_level = tokenizer, is_byte_level(tokenizer)
        self.special = frozenset(tokenizer.all_special_ids) | {
            number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }

    def __missing__(self, token: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        self[token] = found = b"" if piece is None else piece.encode() if token in self.special else self._bytes(piece)
        return found

    def _bytes(self, piece: str) -> bytes:
        if self._is_byte_level:
            return bytes(BYTES[character] for character in piece) if all(one in BYTES for one in piece) else piece.encode()
        byte = _BYTE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace(_SPACE, " ").encode()
