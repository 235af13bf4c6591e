"""Which samples each shard of each step read, as digests: the proof that every sample was read exactly once.

    runs/<run>/samples/<first>-<last>.json     {"first_step", "digests"}: for each of these completed steps, one digest per shard

The digests ride in the step's own exchange, so every worker knows all of them; whoever commits a step has them stored
first, from the commit before on. A step that is computed again gives the same digests.
"""

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from tidepool.errors import ObjectExistsError
from tidepool.storage import ObjectStore, get_json, put_json


@dataclass
class SampleRecord:
    """Digests by completed step (the first is step 1), of the steps that are not known to be committed."""

    steps: dict[int, list[int]] = field(default_factory=dict)

    def note(self, step: int, digests: list[int], committed_step: int) -> None:
        """Note a step that was completed, and forget what is committed."""
        self.steps = {one: known for one, known in self.steps.items() if one > committed_step}
        self.steps[step] = digests

    def to_numbers(self) -> dict[str, list[float]]:
        """As lists of float64, which hold the digests exactly."""
        return {"record_step": list(self.steps), "record": [float(digest) for digests in self.steps.values() for digest in digests]}

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, list[float]]) -> "SampleRecord":
        steps, digests = [int(step) for step in numbers["record_step"]], [int(digest) for digest in numbers["record"]]
        size = len(digests) // len(steps) if steps else 0
        return cls({step: digests[i * size : (i + 1) * size] for i, step in enumerate(steps)})

    def store(self, store: ObjectStore, run: str) -> None:
        """Put what is not committed yet into the store. Called before the commit that covers it."""
        if not self.steps:
            return
        first, last = min(self.steps), max(self.steps)
        value = {"first_step": first, "digests": [self.steps[step] for step in range(first, last + 1)]}
        with suppress(ObjectExistsError):  # these very steps, by somebody who did not live to commit them
            put_json(store, f"{_prefix(run)}{first:09d}-{last:09d}.json", value)


def samples_digest(samples: Iterable[int]) -> int:
    """52 bits of a digest of sample numbers, in order: exact in a float64."""
    text = " ".join(map(str, samples)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"tidepool.samples").digest(), "big") >> 12


def read_record(store: ObjectStore, run: str) -> dict[int, list[list[int]]]:
    """All that is recorded for each completed step: one list of digests for each time that it was stored."""
    found: dict[int, list[list[int]]] = {}
    for info in store.list(_prefix(run)):
        value = get_json(store, info.key)
        for step, digests in enumerate(value["digests"], value["first_step"]):
            found.setdefault(step, []).append(digests)
    return found


def _prefix(run: str) -> str:
    return f"runs/{run}/samples/"
