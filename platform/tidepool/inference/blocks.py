"""Blocks of the KV cache: who holds which, and which hold something that a later request can use again. Pure: no tensors.

A block has room for the keys and values of `block_size` tokens in every layer. A full block can be published under a key, a digest
of the adapter and of all tokens up to its end, so that equal keys mean equal content.

Invariants:
- Each block is either held (by at least one sequence) or free, never both; `num_free` counts the free ones.
- The content of a held block never changes once it is published. A free block keeps its content, and can be taken again by its key,
  until it is given out as an empty one; those are given out in the order in which they became free.
- Of two blocks with the same content only the first one is published.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full block from the key of the one before it. The first one's parent is `root_key`."""
    content = b"".join(token.to_bytes(4, "little") for token in tokens)
    return hashlib.blake2b(content, key=parent, digest_size=16).digest()


def root_key(adapter: str | None) -> bytes:
    """What the first block's key is chained to: the adapter, since it changes every key and value."""
    return hashlib.blake2b((adapter or "").encode(), digest_size=16).digest()


class Blocks:
    """`num_blocks` blocks, all of them free and empty."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks, self.block_size = num_blocks, block_size
        self._num_holders = [0] * num_blocks
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._published: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # the next one to be given out first

    @property
    def num_free(self) -> int:
        return len(self._free)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The published blocks of these keys, up to the first one that there is not."""
        found: list[int] = []
        for key in keys:
            if (block := self._published.get(key)) is None:
                break
            found.append(block)
        return found

    def num_free_without(self, blocks: Iterable[int]) -> int:
        """How many blocks are free besides these."""
        return len(self._free) - sum(block in self._free for block in blocks)

    def hold(self, blocks: Iterable[int]) -> None:
        """Hold blocks that were found."""
        for block in blocks:
            self._num_holders[block] += 1
            self._free.pop(block, None)

    def give_out(self) -> int:
        """An empty block, held; what it held before is forgotten. One must be free."""
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._num_holders[block] = 1
        return block

    def publish(self, block: int, key: bytes) -> None:
        """From now on a held block that is full can be found by its key."""
        assert self._num_holders[block] > 0
        if self._key_of[block] is None and key not in self._published:
            self._key_of[block] = key
            self._published[key] = block

    def release(self, blocks: Sequence[int]) -> None:
        """A sequence holds its blocks, in order, no longer. The last ones are given out first: what begins alike is used again."""
        for block in reversed(blocks):
            assert self._num_holders[block] > 0
            self._num_holders[block] -= 1
            if not self._num_holders[block]:
                self._free[block] = None
                if self._key_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def forget(self, blocks: Iterable[int]) -> None:
        """Publish these no longer: their content was never computed."""
        for block in blocks:
            self._forget(block)

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Assert the invariants, given the blocks of all sequences."""
        num_holders = [0] * self.num_blocks
        for blocks in held:
            assert len(set(blocks)) == len(blocks)
            for block in blocks:
                num_holders[block] += 1
        assert num_holders == self._num_holders
        assert set(self._free) == {block for block, num in enumerate(num_holders) if not num}
        assert self._published == {key: block for block, key in enumerate(self._key_of) if key is not None}

    def _forget(self, block: int) -> None:
        key = self._key_of[block]
        if key is not None:
            del self._published[key]
            self._key_of[block] = None
