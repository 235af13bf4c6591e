"""The resolved spec beside a run, `runs/<run>/spec.json`: as it was written, what its names meant, and its numerics.

Names move (`base: chat` is another version tomorrow), so a run keeps what they meant when it began: resuming uses that.

Invariants:
- The document is written once, by the first worker that has the numerics to put in it, and never changed.
- A run is continued only with a spec that gives the same result: what decides the result must be equal; the rest (the
  number of workers, how often to commit, where to publish) may change between incarnations.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from tidepool.errors import NumericsError, ObjectExistsError, SpecChangedError
from tidepool.models import ModelSource
from tidepool.registry import Registry
from tidepool.specs import RunSpec, differences
from tidepool.storage import ObjectStore, find_json, get_json, put_json
from tidepool.training.task import Pins

Fingerprint = dict[str, str | int]
"""What `numerics.fingerprint` makes; drivers compare it without torch."""
_DECIDES_RESULT = ("run", "model", "dataset", "seed", "training")


def read_pins(spec: RunSpec, store: ObjectStore) -> Pins | None:
    """The pins of a run that has begun, None for a new one. Raises `SpecChangedError` if it began with another spec."""
    document = find_json(store, _key(spec.run))
    if document is None:
        return None
    if lines := differences(_deciding(document["spec"]), _deciding(spec.model_dump(mode="json"))):
        raise SpecChangedError(
            f"Run {spec.run} began with another spec; what changed:\n  "
            + "\n  ".join(lines)
            + "\nGive the old values to continue it, or another `run` name to begin a new one."
        )
    return Pins(**document["pins"])


def write_document(spec: RunSpec, pins: Pins, store: ObjectStore, numerics: Fingerprint) -> None:
    """Write the run's document unless it has one. What stands there then is what `check_worker` compares with."""
    document = {"spec": spec.model_dump(mode="json"), "pins": vars(pins), "numerics": numerics, "spec_digest": spec.digest}
    with suppress(ObjectExistsError):
        put_json(store, _key(spec.run), document)


def check_worker(spec: RunSpec, pins: Pins, store: ObjectStore, numerics: Fingerprint) -> None:
    """Check this worker against the run's document. Raises `NumericsError`, `SpecChangedError`."""
    if read_pins(spec, store) != pins:
        raise SpecChangedError(
            f"Run {spec.run} is being begun by another driver at the same moment, with other data or another base. "
            "Choose another `run` name."
        )
    if lines := differences(get_json(store, _key(spec.run))["numerics"], numerics):
        raise NumericsError(
            f"This worker cannot continue run {spec.run} with the same bits; run -> worker:\n  "
            + "\n  ".join(lines)
            + "\nUse workers like those that the run began on, or begin a new run from its last published model."
        )


def base_source(pins: Pins, store: ObjectStore) -> ModelSource | None:
    """The base that the pins name, as `find_model` gave it."""
    if pins.base is None or pins.base_digest is None:
        return None
    is_version = "/" not in pins.base
    return ModelSource(pins.base, pins.base_digest, Registry(store).resolve(pins.base) if is_version else None)


def _key(run: str) -> str:
    return f"runs/{run}/spec.json"


def _deciding(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a written spec that decide the result's bits."""
    return {key: spec[key] for key in _DECIDES_RESULT} | {"threads_per_worker": spec["workers"]["threads_per_worker"]}
