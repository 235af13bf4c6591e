"""Which replica gets a request: one that holds what it needs, unless it has so much more to do than another. Pure.

Each replica has a price, counted in answers that run or wait there; the lowest one wins. What would have to be fetched or computed
again costs some answers, so that a request goes where its adapter and the beginning of its prompt are, until that replica has
that many more to do than the others: then the next one gets it, holds it from then on too, and so what is hot spreads.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

ADAPTER_PRICE = 4.0
"""An adapter that is not there: it is fetched and loaded."""
PREFIX_PRICE = 3.0
"""A prompt of which nothing is in the cache; less where a part of it is."""
CACHE_PRICE = 8.0
"""A cache without a free block: answers give way to each other and are computed again. Nothing while a quarter is free."""
_FREE_ENOUGH = 0.25


@dataclass(frozen=True)
class ReplicaState:
    """What a replica says of itself. `adapters`: digests; `prefixes`: those of `serving.prefixes`."""

    adapters: frozenset[str] = frozenset()
    prefixes: frozenset[str] = frozenset()
    num_running: int = 0
    num_queued: int = 0
    num_free_blocks: int = 0
    num_blocks: int = 0
    is_leaving: bool = False
    """It finishes what it has, and takes nothing more."""


@dataclass(frozen=True)
class Need:
    """What a request needs: an adapter's digest, or None; and digests of its prompt's pieces, from the beginning."""

    adapter: str | None = None
    prefixes: tuple[str, ...] = ()


def choose(replicas: Mapping[str, ReplicaState], need: Need, but: Iterable[str] = ()) -> str | None:
    """The replica for a request, by its id, leaving some out; None if there is none. Of equals, the first in the mapping."""
    left_out = set(but)
    able = [name for name, state in replicas.items() if not state.is_leaving and name not in left_out]
    return min(able, key=lambda name: price(replicas[name], need), default=None)


def price(state: ReplicaState, need: Need) -> float:
    """What a request costs at a replica, in answers."""
    cost = float(state.num_running + state.num_queued)
    if need.adapter is not None and need.adapter not in state.adapters:
        cost += ADAPTER_PRICE
    if need.prefixes:
        cost += PREFIX_PRICE * (1 - _num_held(state, need) / len(need.prefixes))
    if state.num_blocks:
        free = state.num_free_blocks / state.num_blocks
        cost += CACHE_PRICE * max(0.0, 1 - free / _FREE_ENOUGH)
    return cost


def _num_held(state: ReplicaState, need: Need) -> int:
    return next((number for number, digest in enumerate(need.prefixes) if digest not in state.prefixes), len(need.prefixes))
