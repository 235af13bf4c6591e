"""How a run ended, as the driver, the coordinator and the workers tell one another. Light: the coordinator imports no torch for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `finished`, or stopped on request after `step` steps, maybe to be resumed. `result` is `result.json`."""

    finished: bool
    step: int
    result: Mapping[str, Any] | None
    is_paused: bool = False
