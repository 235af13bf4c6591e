"""How a run ended, as the driver, the coordinator and the workers tell one another. Light: the coordinator imports no torch for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tidepool.storage import ObjectStore, find_json


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `finished`, or stopped on request after `step` steps, maybe to be resumed. `result` is `result.json`."""

    finished: bool
    step: int
    result: Mapping[str, Any] | None
    is_paused: bool = False


def read_result(store: ObjectStore, run: str) -> dict[str, Any] | None:
    """The result of a finished run, None for any other."""
    return find_json(store, result_key(run))


def result_key(run: str) -> str:
    """Where the result of a run is."""
    return f"runs/{run}/result.json"
