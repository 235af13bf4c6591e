"""How prompts begin, as digests that gateways can compute without a tokenizer, and those that a replica has computed lately. Pure.

A prompt is cut into pieces of equal length; the digest of a piece is chained to those before it and to the adapter, as the keys of
the engine's blocks are (`inference.blocks`). A replica says which pieces it holds: the newest ones, as many as its cache has room
for. That is close to what the cache holds, which also goes by last use, and need not be more: a wrong guess costs a prefill.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice

from tidepool.serving.backend import Call, Chat, Prompt
from tidepool.specs import canonical_json

PIECE_CHARACTERS, PIECE_TOKENS = 256, 64
MAX_PIECES = 64
"""A prompt's later pieces are not looked at."""
MAX_HELD = 2048


def prefix_digests(call: Call) -> tuple[str, ...]:
    """A digest for each whole piece of a call's prompt, from its beginning."""
    adapter = call.adapter.digest if call.adapter else ""
    chain, found = hashlib.blake2b(adapter.encode(), digest_size=8), []
    for piece in islice(_pieces(call.prompt), MAX_PIECES):
        chain.update(piece)
        found.append(chain.hexdigest())
    return tuple(found)


class HeldPrefixes:
    """The pieces that a cache of so many tokens is likely to hold, by last use."""

    def __init__(self, num_cache_tokens: int) -> None:
        self._room = min(MAX_HELD, num_cache_tokens // PIECE_TOKENS)
        self._held: OrderedDict[str, None] = OrderedDict()
        self.num_changes = 0

    def add(self, digests: Iterable[str]) -> None:
        """A prompt of these pieces is computed."""
        for digest in digests:
            self.num_changes += digest not in self._held
            self._held[digest] = None
            self._held.move_to_end(digest)
        while len(self._held) > self._room:
            self._held.popitem(last=False)

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(self._held)


def _pieces(prompt: Prompt) -> Iterator[bytes]:
    """The whole pieces of a text, of token ids, or of a chat."""
    if isinstance(prompt, str):
        return _cut(prompt.encode(), PIECE_CHARACTERS)
    if isinstance(prompt, Chat):
        return _cut(canonical_json(asdict(prompt)), PIECE_CHARACTERS)
    return _cut(array("q", prompt).tobytes(), 8 * PIECE_TOKENS)


def _cut(content: bytes, size: int) -> Iterator[bytes]:
    return (content[start : start + size] for start in range(0, len(content) - size + 1, size))
