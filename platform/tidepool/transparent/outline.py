"""What a result looks like without its numbers: enough to make one of the same form again, empty.

`outline` writes it as a descriptor for the journal, `rebuild` makes a result from it. Tensors are told by their memory: new, that of an
argument, that of an earlier tensor of the same result. Lists, tuples, dicts, named tuples and the outputs of transformers keep
their form; anything else raises `OpaqueError`.
"""

import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tidepool.errors import RunError
from tidepool.transparent.journal import Descriptor


class OpaqueError(RunError):
    """A result with something in it that cannot be made again from its outline."""


def outline(value: Any, arguments: Sequence[Tensor], new: list[Tensor]) -> Descriptor:
    """The outline of `value`; tensors in it with memory of their own are appended to `new`, in order. Raises `OpaqueError`."""
    return _Outliner(arguments, new).outline(value)


class _Outliner:
    def __init__(self, arguments: Sequence[Tensor], new: list[Tensor]) -> None:
        self._new = new
        self._same = {id(one): position for position, one in enumerate(arguments)}
        self._held = {one.untyped_storage()._cdata: ("argument", position) for position, one in enumerate(arguments)}

    def outline(self, value: Any) -> Descriptor:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if value is None or isinstance(value, bool | int | float | str):
            return "value", value
        kind = type(value)
        if kind in (list, tuple):
            return (kind.__name__, *map(self.outline, value))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return ("named", _name(kind), *map(self.outline, value))
        if kind is dict or isinstance(value, OrderedDict):
            if not all(isinstance(key, str | int) for key in value):
                raise OpaqueError("a dict whose keys are no texts or numbers")
            return ("dict" if kind is dict else _name(kind), "keys", tuple(value), *map(self.outline, value.values()))
        raise OpaqueError(f"a {kind.__module__}.{kind.__qualname__}")

    def _tensor(self, tensor: Tensor) -> Descriptor:
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise OpaqueError(f"a tensor of the layout {tensor.layout}")
        storage = tensor.untyped_storage()
        view = (tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), str(tensor.dtype)[6:])
        if id(tensor) in self._same:
            return ("argument", self._same[id(tensor)], True, *view)
        if storage._cdata in self._held:
            kind, position = self._held[storage._cdata]
            return (kind, position, kind == "earlier" and self._new[position] is tensor, *view)
        self._held[storage._cdata] = "earlier", len(self._new)
        self._new.append(tensor)
        return ("new", *view, str(tensor.device), storage.nbytes(), tensor.requires_grad)


def rebuild(descriptor: Descriptor, arguments: Sequence[Tensor], new: list[Tensor], make: Callable[..., Tensor]) -> Any:
    """A result of this outline: `make(size, stride, offset, dtype, device, num_bytes, requires_grad)` makes each new tensor."""
    kind = descriptor[0]
    if kind == "value":
        return descriptor[1]
    if kind == "new":
        tensor = make(*descriptor[1:])
        new.append(tensor)
        return tensor
    if kind in ("argument", "earlier"):
        source = (arguments if kind == "argument" else new)[descriptor[1]]
        return source if descriptor[2] else _view(source, *descriptor[3:])
    if kind in ("list", "tuple"):
        parts = [rebuild(one, arguments, new, make) for one in descriptor[1:]]
        return parts if kind == "list" else tuple(parts)
    if kind == "named":
        return _find(descriptor[1])(*(rebuild(one, arguments, new, make) for one in descriptor[2:]))
    parts = [rebuild(one, arguments, new, make) for one in descriptor[3:]]
    entries = dict(zip(descriptor[2], parts, strict=True))
    if kind == "dict":
        return entries
    return _find(kind)(entries) if _find(kind) is OrderedDict else _find(kind)(**entries)


def tensors_in(value: Any, found: list[Tensor] | None = None) -> list[Tensor]:
    """The tensors of nested lists, tuples and dicts, in order."""
    found = [] if found is None else found
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, list | tuple):
        for one in value:
            tensors_in(one, found)
    elif isinstance(value, dict):
        for one in value.values():
            tensors_in(one, found)
    return found


def _view(source: Tensor, size: Sequence[int], stride: Sequence[int], offset: int, dtype: str) -> Tensor:
    if _dtype(dtype) == source.dtype:
        return torch.as_strided(source, size, stride, offset)  # with the history that a gradient needs
    return torch.empty(0, dtype=_dtype(dtype), device=source.device).set_(source.untyped_storage(), offset, size, stride)


def empty(
    size: Sequence[int], stride: Sequence[int], offset: int, dtype: str, device: str, num_bytes: int, _asks_gradient: bool = False
) -> Tensor:
    """A tensor with memory of its own that holds nothing yet."""
    storage = torch.UntypedStorage(num_bytes, device=device)  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=_dtype(dtype), device=device).set_(storage, offset, size, stride)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def _name(kind: type) -> str:
    if "<locals>" in kind.__qualname__:
        raise OpaqueError(f"a {kind.__qualname__}")
    return f"{kind.__module__}:{kind.__qualname__}"


def _find(name: str) -> Any:
    module, _, path = name.partition(":")
    found: Any = sys.modules[module]
    for part in path.split("."):
        found = getattr(found, part)
    return found
