"""What a snapshot of a running script holds, and how it is put back where a replay arrives.

    memory    the bytes of every storage that holds something computed, by its number
    journal   the journal, the random states, and `details`: as JSON what else is set or compared

Invariants:
- What is put back has the size that it had. What is in use and not in the snapshot was left by nobody but Python's garbage
  collector, which is run on both sides; anything else raises `ReplayError`.
- Schedulers and the positions of parameter groups are the script's Python: they are compared, so that a replay that went another way
  is found before anything is computed.
"""

import gc
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tidepool.errors import ReplayError, ScriptError
from tidepool.transparent import attributes
from tidepool.transparent.gradients import Gradients, parameters_of
from tidepool.transparent.host_random import HostRandom
from tidepool.transparent.identity import refuse_changed_sources, sources_beside
from tidepool.transparent.journal import Journal
from tidepool.transparent.loaders import Loaders
from tidepool.transparent.modules import Modules
from tidepool.transparent.patches import Schedulers
from tidepool.transparent.session import Session

_DATASET_DEPTH = 4


class Script:
    """All that is known of the running script, as one thing to take snapshots of."""

    def __init__(
        self, folder: Path, session: Session, modules: Modules, gradients: Gradients, loaders: Loaders, schedulers: Schedulers
    ) -> None:
        self._folder = folder
        self.session, self.modules, self.gradients = session, modules, gradients
        self.loaders, self.schedulers = loaders, schedulers

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """A snapshot: groups of named tensors, which change when the script goes on. Raises `ScriptError`."""
        gc.collect()
        journal = {name: _as_tensor(data) for name, data in self.session.journal.export().items()}
        journal |= _random_states()
        journal |= {f"generator-{number}": one.get_state() for number, one in enumerate(self.session.generators)}
        journal["details"] = _as_tensor(_to_json(self._details()))
        return {"memory": {str(number): data for number, data in self.session.ledger.live()}, "journal": journal}

    def put_back(self, memory: dict[str, Tensor], journal: dict[str, Tensor]) -> None:
        """The inverse of `parts`, where a replay arrives. Raises `ReplayError`."""
        details = json.loads(bytes(journal["details"].numpy()))
        refuse_changed_sources(details["sources"], sources_beside(self._folder))
        gc.collect()
        self._put_memory_back(memory)
        if len(self.session.generators) != sum(name.startswith("generator-") for name in journal):
            raise ReplayError("The script drew from other random generators than before.")
        for number, generator in enumerate(self.session.generators):
            generator.set_state(journal[f"generator-{number}"])
        self._put_details_back(details)
        HostRandom.from_json(details["random"]).set()
        _set_random_states(journal)

    def _put_memory_back(self, memory: dict[str, Tensor]) -> None:
        missing = []
        for number, data in self.session.ledger.live():
            saved = memory.get(str(number))
            if saved is None:
                missing.append(number)
            elif saved.numel() != data.numel():
                raise ReplayError(f"Memory {number} has {data.numel()} bytes where it had {saved.numel()}: the script went another way.")
            else:
                data.copy_(saved)
        if missing:
            raise ReplayError(
                f"The script holds {len(missing)} computed tensors that it did not hold before: it went another way. "
                "Something that it depends on is not the same in every start."
            )

    def _details(self) -> dict[str, Any]:
        return {
            "random": HostRandom.now().to_json(),
            "sources": sources_beside(self._folder),
            "iterators": self.loaders.really(),
            "modules": [attributes.describe(one) for one in self.modules.live()],
            "datasets": {str(number): attributes.describe(one, _DATASET_DEPTH) for number, one in self.loaders.datasets()},
            "optimizers": {
                str(number): _describe_optimizer(one, number in self.gradients.left_out) for number, one in self.gradients.optimizers()
            },
            "schedulers": {str(number): _plain(one.state_dict()) for number, one in self.schedulers.live()},
        }

    def _put_details_back(self, details: dict[str, Any]) -> None:
        for number, scheduler in self.schedulers.live():
            now = json.loads(_to_json(_plain(scheduler.state_dict())))
            if now != details["schedulers"].get(str(number)):
                raise ReplayError(
                    f"{type(scheduler).__name__} is not where it was: {now} and not {details['schedulers'].get(str(number))}."
                )
        modules = list(self.modules.live())
        if len(modules) != len(details["modules"]):
            raise ReplayError(f"The script has {len(modules)} modules where it had {len(details['modules'])}: it went another way.")
        for module, described in zip(modules, details["modules"], strict=True):
            attributes.restore(module, described)
        for number, dataset in self.loaders.datasets():
            attributes.restore(dataset, details["datasets"][str(number)])
        for number, optimizer in self.gradients.optimizers():
            _restore_optimizer(optimizer, details["optimizers"][str(number)])


def _describe_optimizer(optimizer: Optimizer, is_left_out: bool) -> dict[str, Any]:
    values = []
    for position, parameter in enumerate(parameters_of(optimizer) if is_left_out else []):
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is None or isinstance(value, bool | int | float | str):
                values.append([position, key, value])
            elif not isinstance(value, Tensor):
                raise ScriptError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} in its state ({key}), which is no tensor and no number: "
                    "the script cannot be made resumable with it."
                )
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return {"state": values, "groups": [_plain(group) for group in groups], "attributes": attributes.describe(optimizer)}


def _restore_optimizer(optimizer: Optimizer, described: dict[str, Any]) -> None:
    parameters = parameters_of(optimizer)
    for position, key, value in described["state"]:
        optimizer.state[parameters[position]][key] = value
    groups = json.loads(_to_json([_plain({k: v for k, v in group.items() if k != "params"}) for group in optimizer.param_groups]))
    if groups != described["groups"]:
        raise ReplayError(f"The groups of {type(optimizer).__name__} are not what they were: {groups} and not {described['groups']}.")
    attributes.restore(optimizer, described["attributes"])


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """What is plain in a state, to compare."""
    return {key: value for key, value in values.items() if value is None or isinstance(value, bool | int | float | str | list | tuple)}


def _to_json(value: Any) -> bytes:
    try:
        return json.dumps(value, default=_encode).encode()
    except TypeError as error:
        raise ScriptError(f"The script's state holds what is no tensor and no plain value, so it cannot be kept: {error}.") from error


def _encode(value: Any) -> Any:
    if isinstance(value, Tensor):
        return f"a tensor of {tuple(value.shape)}"
    raise TypeError(f"a {type(value).__module__}.{type(value).__qualname__}")


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _random_states() -> dict[str, Tensor]:
    states = {"random-cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states |= {f"random-cuda-{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _set_random_states(journal: dict[str, Tensor]) -> None:
    torch.set_rng_state(journal["random-cpu"])
    for name, state in journal.items():
        if name.startswith("random-cuda-"):
            torch.cuda.set_rng_state(state, int(name.rsplit("-", 1)[1]))


def journal_of(saved: dict[str, Tensor]) -> Journal:
    """The journal of a snapshot, a new one where there is none."""
    return Journal.load({name: bytes(saved[name].numpy()) for name in ("table", "ids", "payloads")}) if saved else Journal()


def iterators_of(saved: dict[str, Tensor]) -> frozenset[int]:
    """The loaders' iterators that a replay must not replace."""
    return frozenset(json.loads(bytes(saved["details"].numpy()))["iterators"]) if saved else frozenset()
