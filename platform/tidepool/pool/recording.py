"""Snapshots as JSON values, for recording, explaining and what-if. Pure: values in, values out.

Invariants:
- What is written reads back as the same snapshot; defaults are left out.
- Reading is strict: every unknown key (with the nearest valid one), wrong type and impossible value is named, all at once.
"""

import dataclasses
import difflib
import types
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tidepool.errors import SpecError
from tidepool.messages import Snapshot


def snapshot_to_json(snapshot: Snapshot) -> dict[str, Any]:
    """The snapshot as JSON objects, lists, strings and numbers."""
    written: dict[str, Any] = _write(snapshot)
    return written


def snapshot_from_json(value: object, source: str) -> Snapshot:
    """Check and read a recorded snapshot. Raises `SpecError` with every problem found, a line each."""
    problems: list[str] = []
    snapshot = _read(Snapshot, value, "", problems)
    if not problems:
        problems = _impossible(snapshot)
    if problems:
        raise SpecError(f"{source} is not a snapshot of a pool:\n" + "\n".join(f"  {problem}" for problem in problems))
    assert isinstance(snapshot, Snapshot)
    return snapshot


def _write(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {field.name: _write(getattr(value, field.name)) for field in fields if getattr(value, field.name) != field.default}
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, tuple):
        return [_write(item) for item in value]
    return value


def _read(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    """The value as the annotated kind; what is wrong with it is added to `problems`."""
    if dataclasses.is_dataclass(kind):
        return _read_object(kind, value, where, problems)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in {Union, types.UnionType}:
        inner = next(argument for argument in arguments if argument is not type(None))
        return None if value is None else _read(inner, value, where, problems)
    if origin is Literal:
        if value in arguments:
            return value
        problems.append(f"{where}: must be one of {', '.join(arguments)} (got {value!r})")
        return None
    if origin in {tuple, frozenset}:
        return _read_list(kind, value, where, problems)
    is_right = isinstance(value, int | float if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not is_right:
        problems.append(f"{where}: must be {_NAMES[kind]} (got {value!r})")
    return value


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _read_list(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if not isinstance(value, list):
        problems.append(f"{where}: must be a list (got {value!r})")
        return ()
    if origin is frozenset or arguments[-1] is Ellipsis:
        items = [_read(arguments[0], item, f"{where}[{position}]", problems) for position, item in enumerate(value)]
        return frozenset(items) if origin is frozenset else tuple(items)
    if len(value) != len(arguments):
        problems.append(f"{where}: must have {len(arguments)} entries (got {value!r})")
        return ()
    return tuple(_read(argument, item, where, problems) for argument, item in zip(arguments, value, strict=True))


def _read_object(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(value, Mapping):
        problems.append(f"{where or '(whole file)'}: must hold keys and values (got {type(value).__name__})")
        return None
    prefix = f"{where}." if where else ""
    hints = get_type_hints(kind)
    for key in value.keys() - hints.keys():
        near = difflib.get_close_matches(str(key), hints, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"valid keys are {', '.join(hints)}"
        problems.append(f"{prefix}{key}: unknown key; {hint}")
    needed = {field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
    problems += [f"{prefix}{key}: missing, and it has no default" for key in sorted(needed - value.keys())]
    read = {key: _read(hints[key], item, f"{prefix}{key}", problems) for key, item in value.items() if key in hints}
    return None if problems else kind(**read)


def _impossible(snapshot: Snapshot) -> list[str]:
    """What no pool can be, though it is written well."""
    problems = [
        f"{what}: the name {name!r} stands {count} times"
        for what in ("nodes", "runs", "deployments", "templates")
        for name, count in Counter(item.name for item in getattr(snapshot, what)).items()
        if count > 1
    ]
    for run in snapshot.runs:
        if not 1 <= run.min_groups <= run.max_groups:
            problems.append(f"runs.{run.name}: needs 1 <= min_groups <= max_groups (got {run.min_groups} and {run.max_groups})")
        if run.shards < 1 or run.workers_per_group < 1:
            problems.append(f"runs.{run.name}: shards and workers_per_group must be at least 1")
        if any(speed <= 0 or groups < 1 for groups, speed in run.speeds):
            problems.append(f"runs.{run.name}: speeds must be pairs of at least one group and a positive speed")
    problems += [f"deployments.{d.name}: wanted must not be negative (got {d.wanted})" for d in snapshot.deployments if d.wanted < 0]
    places = [(node.name, node.gpus, node.cpus) for node in snapshot.nodes] + [(one.name, one.gpus, one.cpus) for one in snapshot.templates]
    problems += [f"{name}: gpus and cpus must not be negative" for name, gpus, cpus in places if gpus < 0 or cpus < 0]
    for resources, owner in [(run.worker, run.name) for run in snapshot.runs] + [(d.replica, d.name) for d in snapshot.deployments]:
        if resources.gpus < 0 or resources.cpus < 0 or resources.gpus + resources.cpus == 0:
            problems.append(f"{owner}: needs some GPUs or CPUs, and not fewer than none")
    return problems
