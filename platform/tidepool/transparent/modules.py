"""Which calls of modules run no code of the script's, so that a replay may leave them out as a whole.

A module and all those in it have to be of installed libraries and carry no hooks. Its first call is recorded operation by
operation all the same: if it gives something that cannot be made again from an outline, or keeps tensors aside from its parameters and
buffers, all its calls are.
"""

import functools
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

from torch import Tensor, nn
from torch.nn.modules import module as hooks

from tidepool.errors import ScriptError
from tidepool.transparent.outline import OpaqueError, outline, tensors_in
from tidepool.transparent.session import Session

_LIBRARIES = tuple(str(Path(sysconfig.get_path(name)).resolve()) for name in ("purelib", "platlib", "stdlib"))
_DRAWS_NOTHING = ("torch.nn.modules.",)


def is_of_a_library(kind: type) -> bool:
    """Whether a class is of an installed library, rather than of the script or what lies beside it."""
    return _is_library(kind.__module__)


@functools.cache
def _is_library(module: str) -> bool:
    file = getattr(sys.modules.get(module), "__file__", None)
    return module != "__main__" and file is not None and str(Path(file).resolve()).startswith(_LIBRARIES)


class Modules:
    """The script's modules: who they are, and how each is called."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()
        self._all: WeakSet[nn.Module] = WeakSet()
        self._version = 0

    def seen(self, module: nn.Module, *_: Any) -> None:
        """A hook of PyTorch's: something was registered in `module`."""
        self._all.add(module)
        self._version += 1

    def call(self, original: Callable[..., Any], module: nn.Module, *arguments: Any, **options: Any) -> Any:
        """What `module(*arguments, **options)` does."""
        if not self._session.is_watching:
            self._session.refuse_threads()
            return original(module, *arguments, **options)
        known = self._known.get(module)
        if known is None or known.version != self._version:
            known = self._known[module] = _Known(module, self._version, known)
        if not known.is_closed or known.has_hooks():
            if not known.is_library or known.is_tried:
                return original(module, *arguments, **options)
            return self._try(known, original, module, arguments, options)
        run = functools.partial(original, module, *arguments, **options)
        tensors = tensors_in([arguments, options])
        try:
            return self._session.closed(known.what, run, tensors, known.tensors, known.tensors_once(), known.may_draw)
        except OpaqueError as error:
            raise ScriptError(
                f"A call of {known.what[1]} returned {error} where it did not at its first call: the script cannot be made resumable."
            ) from error

    def _try(
        self, known: "_Known", original: Callable[..., Any], module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        """The first call, operation by operation; says how the next ones are made."""
        before = known.kept_aside()
        result = original(module, *arguments, **options)
        known.is_tried = True
        try:
            outline(result, [], [])
        except OpaqueError:
            return result
        known.is_closed = known.kept_aside() == before
        return result

    def live(self) -> Iterator[nn.Module]:
        """Every module in use whose calls are left out as a whole, with those in it."""
        seen = set()
        for known in list(self._known.values()):
            for module in known.tree:
                if known.is_closed and id(module) not in seen:
                    seen.add(id(module))
                    yield module

    def refuse_backward_hooks(self) -> None:
        """Raise `ScriptError` if a module has a hook in the backward pass: a replay would not run it."""
        for module in self._all:
            if module._backward_hooks or module._backward_pre_hooks:
                raise ScriptError(
                    f"{type(module).__name__} has a hook in the backward pass (register_full_backward_hook): a replay leaves that pass "
                    "out, so the script cannot be made resumable. Read the gradients after backward() instead."
                )


class _Known:
    def __init__(self, module: nn.Module, version: int, before: "_Known | None") -> None:
        self.version = version
        self.tree = [one for one in module.modules() if one is not module]
        self._module_of = ref(module)
        self.is_library = all(is_of_a_library(type(one)) for one in [module, *self.tree])
        self.is_tried: bool = before is not None and before.is_tried
        self.is_closed: bool = self.is_library and before is not None and before.is_closed
        self.may_draw = not all(type(one).__module__.startswith(_DRAWS_NOTHING) for one in [module, *self.tree])
        self.what = ("call", f"{type(module).__module__}.{type(module).__qualname__}")
        self._is_noted = False

    def has_hooks(self) -> bool:
        if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
            return True
        return any(one._forward_hooks or one._forward_pre_hooks for one in self._modules())

    def tensors(self) -> list[Tensor]:
        """Parameters and buffers."""
        return [one for module in self._modules() for one in [*module._parameters.values(), *module._buffers.values()] if one is not None]

    def tensors_once(self) -> Callable[[], list[Tensor]]:
        """The buffers, which a call may change: they are noted once."""
        if self._is_noted:
            return list
        self._is_noted = True
        return lambda: [one for module in self._modules() for one in module._buffers.values() if one is not None]

    def kept_aside(self) -> set[tuple[int, str, int]]:
        """The tensors among the attributes of its modules that are no parameters or buffers."""
        return {
            (id(module), name, id(value))
            for module in self._modules()
            for name, values in vars(module).items()
            if name not in ("_parameters", "_buffers", "_modules")
            for value in tensors_in(values)
        }

    def _modules(self) -> list[nn.Module]:
        module = self._module_of()
        return [module, *self.tree] if module is not None else self.tree
