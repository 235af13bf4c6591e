"""Plain values that objects carry: what code that was skipped may have left in a module, a dataset or an optimizer.

Numbers, texts, short lists and dicts of them, and random generators. They are part of a snapshot and are set where they differ.
Anything else that a skipped call changes in an object is not seen; `docs/transparent.md` says so.
"""

import base64
import random
from typing import Any

import numpy as np
import torch

_MAX_ENTRIES = 1000
_SKIPPED = frozenset({"_parameters", "_buffers", "_modules", "state", "param_groups", "defaults"})


def describe(owner: Any, depth: int = 0) -> dict[str, Any]:
    """The plain attributes of `owner` as JSON; with a depth, those of the objects that it holds, too."""
    return _describe(owner, depth, {id(owner)})


def _describe(owner: Any, depth: int, seen: set[int]) -> dict[str, Any]:
    found = {}
    for name, value in sorted(vars(owner).items()) if hasattr(owner, "__dict__") else []:
        if name in _SKIPPED or name.endswith("_hooks"):
            continue
        described = _describe_value(value, depth, seen)
        if described is not None:
            found[name] = described
    return found


def _describe_value(value: Any, depth: int, seen: set[int]) -> list[Any] | None:
    if _is_plain(value):
        return ["plain", value]
    if isinstance(value, random.Random):
        return ["python", value.getstate()]
    if isinstance(value, np.random.Generator):
        return ["numpy", _plain_state(value.bit_generator.state)]
    if isinstance(value, torch.Generator):
        return ["torch", base64.b64encode(bytes(value.get_state().tolist())).decode()]
    parts = _parts(value)
    if depth == 0 or not parts or id(value) in seen or isinstance(value, torch.nn.Module | torch.Tensor | type):
        return None
    seen.add(id(value))
    inner = {key: found for key, part in parts.items() if (found := _describe_value(part, depth - 1, seen)) is not None}
    return ["parts", inner] if inner else None


def restore(owner: Any, described: dict[str, Any]) -> None:
    """Set what differs from `described`."""
    for name, (kind, value) in described.items():
        held = vars(owner).get(name)
        if kind == "plain":
            if name not in vars(owner) or held != value:
                vars(owner)[name] = _like(held, value)
        else:
            _restore_value(held, kind, value)


def _restore_value(held: Any, kind: str, value: Any) -> None:
    if kind == "python":
        held.setstate((value[0], tuple(value[1]), value[2]))
    elif kind == "numpy":
        held.bit_generator.state = _array_state(value)
    elif kind == "torch":
        held.set_state(torch.tensor(list(base64.b64decode(value)), dtype=torch.uint8))
    elif kind == "parts" and isinstance(held, list | tuple | dict):
        parts = _parts(held)
        for key, (inner_kind, inner) in value.items():
            if inner_kind != "plain":
                _restore_value(parts[key], inner_kind, inner)
    elif kind == "parts":
        restore(held, value)


def _parts(value: Any) -> dict[str, Any]:
    if isinstance(value, list | tuple) and len(value) <= _MAX_ENTRIES:
        return {str(position): part for position, part in enumerate(value)}
    if isinstance(value, dict) and len(value) <= _MAX_ENTRIES:
        return {str(key): part for key, part in value.items()}
    return dict(vars(value)) if hasattr(value, "__dict__") and not callable(getattr(value, "__get__", None)) else {}


def _is_plain(value: Any) -> bool:
    if value is None or type(value) in (bool, int, float, str):
        return True
    if type(value) in (list, tuple) and len(value) <= _MAX_ENTRIES:
        return all(map(_is_plain, value))
    return type(value) is dict and len(value) <= _MAX_ENTRIES and all(type(key) is str and _is_plain(one) for key, one in value.items())


def _like(held: Any, value: Any) -> Any:
    """`value`, which came through JSON, with tuples where `held` has them."""
    if isinstance(held, tuple) and isinstance(value, list):
        return tuple(_like(held[position] if position < len(held) else None, one) for position, one in enumerate(value))
    return value


def _plain_state(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _plain_state(value) for key, value in state.items()}
    return ["array", str(state.dtype), state.tolist()] if isinstance(state, np.ndarray) else state


def _array_state(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _array_state(value) for key, value in state.items()}
    return np.array(state[2], state[1]) if isinstance(state, list) else state
