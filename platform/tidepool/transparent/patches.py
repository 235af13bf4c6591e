"""What is changed in PyTorch while a script runs under `tidepool.run`: all of it, each with its reason.

PyTorch's own global hooks are used where there is one. They cannot leave a call out, which a replay must, nor see a loader; so there
a function is put in the place of PyTorch's, and put back at the end.
"""

import functools
import io
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import safetensors.torch
import torch
import torch.distributed
from torch import Tensor
from torch.nn.modules import module as hooks
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

from tidepool.errors import ScriptError
from tidepool.transparent.gradients import Gradients
from tidepool.transparent.loaders import Loaders
from tidepool.transparent.modules import Modules
from tidepool.transparent.outline import tensors_in
from tidepool.transparent.session import Session

_READS = ("numpy", "tolist", "__repr__", "__format__", "__array__")
"""How Python looks at a tensor without an operation. `item`, `float()`, `if` and comparisons are operations."""
_REFUSED = {
    (torch, "compile"): "uses torch.compile, whose kernels cannot be left out in a replay",
    (torch.distributed, "init_process_group"): "is one of several processes",
}


class Schedulers:
    """The learning rate schedulers of the script; they are its Python, so they are compared after a replay, not set."""

    def __init__(self) -> None:
        self._all: list[Callable[[], LRScheduler | None]] = []

    def made(self, scheduler: LRScheduler) -> None:
        """A scheduler was made."""
        self._all.append(weakref.ref(scheduler))

    def live(self) -> Iterator[tuple[int, LRScheduler]]:
        """Those in use, by number."""
        for number, known in enumerate(self._all):
            scheduler = known()
            if scheduler is not None:
                yield number, scheduler


@contextmanager
def patched(session: Session, modules: Modules, gradients: Gradients, loaders: Loaders, schedulers: Schedulers) -> Iterator[None]:
    """PyTorch tells the session what the script does in this context."""
    with ExitStack() as stack:
        _add_hooks(stack, modules, gradients)
        put = functools.partial(_put, stack)
        # A module's call, a backward pass, an optimizer's step, a batch: left out in a replay.
        put(torch.nn.Module, "__call__", modules.call)
        put(torch.autograd, "backward", gradients.backward)
        put(torch.autograd, "grad", gradients.grad)
        put(_BaseDataLoaderIter, "__next__", loaders.next)
        put(DataLoader, "_get_iterator", loaders.make)
        # Within a batch, the sampler is the script's Python.
        put(_BaseDataLoaderIter, "_next_index", functools.partial(_inside, session))
        # PyTorch wraps the step of an optimizer's class in its hooks when the first one is made; this wraps it before.
        put(Optimizer, "_patch_step_function", functools.partial(_wrap_step, stack, gradients))
        # A group may be added at any time, and its parameters are leaves.
        put(Optimizer, "add_param_group", functools.partial(_add_group, gradients))
        # So may a tensor that is no parameter be.
        put(Tensor, "requires_grad_", functools.partial(_ask_gradient, gradients))
        put(LRScheduler, "__init__", functools.partial(_make_scheduler, schedulers))
        # Numbers leave tensors in these ways, too.
        for name in _READS:
            put(Tensor, name, functools.partial(_read, session))
        # In a replay there is nothing to write, and what was written is there.
        put(torch, "save", functools.partial(_write, session))
        put(safetensors.torch, "save_file", functools.partial(_write, session))
        put(torch, "load", functools.partial(_load, session))
        for (owner, name), reason in _REFUSED.items():
            put(owner, name, functools.partial(_refuse, reason))
        yield


def _add_hooks(stack: ExitStack, modules: Modules, gradients: Gradients) -> None:
    def parameter_seen(module: torch.nn.Module, _name: str, parameter: Any) -> None:
        modules.seen(module)
        gradients.seen(parameter)

    for handle in (
        hooks.register_module_module_registration_hook(modules.seen),
        hooks.register_module_buffer_registration_hook(modules.seen),
        hooks.register_module_parameter_registration_hook(parameter_seen),
    ):
        stack.callback(handle.remove)


def _put(stack: ExitStack, owner: Any, name: str, function: Callable[..., Any]) -> None:
    """Let `owner.name(...)` be `function(original, ...)`."""
    original = getattr(owner, name)
    is_own = name in vars(owner)

    @functools.wraps(original)
    def instead(*arguments: Any, **options: Any) -> Any:
        return function(original, *arguments, **options)

    setattr(owner, name, instead)
    stack.callback(setattr, owner, name, original) if is_own else stack.callback(delattr, owner, name)


def _inside(session: Session, original: Callable[[Any], Any], iterator: Any) -> Any:
    with session.inside():
        return original(iterator)


def _wrap_step(stack: ExitStack, gradients: Gradients, original: Callable[[Optimizer], None], optimizer: Optimizer) -> None:
    kind = type(optimizer)
    if not getattr(kind.step, "hooked", None):
        _put(stack, kind, "step", gradients.step)
    gradients.made(optimizer)
    original(optimizer)


def _add_group(gradients: Gradients, original: Callable[..., None], optimizer: Optimizer, group: dict[str, Any]) -> None:
    original(optimizer, group)
    for parameter in optimizer.param_groups[-1]["params"]:
        gradients.seen(parameter)


def _ask_gradient(gradients: Gradients, original: Callable[..., Tensor], tensor: Tensor, *given: Any, **named: Any) -> Tensor:
    result = original(tensor, *given, **named)
    if tensor.requires_grad and tensor.is_leaf and not isinstance(tensor, torch.nn.Parameter):
        gradients.seen(tensor)
    return result


def _make_scheduler(schedulers: Schedulers, original: Callable[..., None], scheduler: LRScheduler, *given: Any, **named: Any) -> None:
    original(scheduler, *given, **named)
    schedulers.made(scheduler)


def _read(session: Session, original: Callable[..., Any], tensor: Tensor, *arguments: Any, **options: Any) -> Any:
    if not session.is_watching:
        return original(tensor, *arguments, **options)
    return session.read(tensor, lambda: original(tensor, *arguments, **options))


def _write(session: Session, original: Callable[..., Any], content: Any, target: Any, *arguments: Any, **options: Any) -> Any:
    if not session.is_watching:
        return original(content, target, *arguments, **options)
    if isinstance(target, str | os.PathLike):
        if session.is_replaying:
            return None
    elif hasattr(target, "fileno") and not isinstance(target, io.BytesIO):
        raise ScriptError(
            "The script gives torch.save an open file, which a replay would empty: give it the path of the file, and it is left as it is."
        )
    with session.outside():
        return original(content, target, *arguments, **options)


def _load(session: Session, original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    if not session.is_watching:
        return original(*arguments, **options)
    with session.outside():
        loaded = original(*arguments, **options)
    if session.has_skipped:  # it may have been written by what is left out
        for one in tensors_in(loaded):
            session.ledger.add(one)
    return loaded


def _refuse(reason: str, *_arguments: Any, **_options: Any) -> NoReturn:
    raise ScriptError(f"The script {reason}: it cannot be made resumable. Take that out, or run it without tidepool.run.")
