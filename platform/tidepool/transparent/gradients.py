"""Backward passes and optimizers: each is left out as a whole in a replay, and its new memory made empty.

Leaves are what gradients gather in: the parameters of modules and of optimizers, and what `requires_grad_()` was called of, in
the order in which they were first seen. A
pass may give some of them a new gradient; an optimizer's step may make new tensors of its state. Both are named by place, so the
same ones are made again.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from tidepool.errors import ScriptError
from tidepool.transparent.journal import Descriptor
from tidepool.transparent.modules import Modules, is_of_a_library
from tidepool.transparent.outline import OpaqueError, empty, outline, tensors_in
from tidepool.transparent.session import Session

_PASSES_LOOKED_AT = 8
"""So many backward passes are looked at for what a replay would not do; walking a graph has its price."""


class Gradients:
    """The script's leaves and optimizers."""

    def __init__(self, session: Session, modules: Modules) -> None:
        self._session, self._modules = session, modules
        self._leaves: dict[int, Callable[[], Tensor | None]] = {}
        self._num_leaves = 0
        self._by_id: dict[int, int] = {}
        self._optimizers: list[Callable[[], Optimizer | None]] = []
        self._num_passes = 0
        self.left_out: set[int] = set()
        """The optimizers a step of which is left out in a replay."""

    def seen(self, parameter: Any) -> None:
        """A tensor that gradients may gather in."""
        if not isinstance(parameter, Tensor):
            return
        number = self._by_id.get(id(parameter))
        if number is not None and self._is_leaf(number, parameter):
            return
        number = self._num_leaves
        self._num_leaves += 1
        self._by_id[id(parameter)] = number
        self._leaves[number] = ref(parameter, lambda _: self._leaves.pop(number))

    def _is_leaf(self, number: int, tensor: Tensor) -> bool:
        return number in self._leaves and self._leaves[number]() is tensor

    def made(self, optimizer: Optimizer) -> None:
        """An optimizer was made."""
        self._optimizers.append(ref(optimizer))

    def backward(self, original: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """What `torch.autograd.backward` does."""
        session = self._session
        if not session.is_watching:
            original(*arguments, **options)
            return
        if not session.is_replaying and self._num_passes < _PASSES_LOOKED_AT:
            self._num_passes += 1
            self._look_at(tensors_in([arguments[0] if arguments else options.get("tensors")]))
        session.closed(("backward",), lambda: original(*arguments, **options), tensors_in([*arguments[:2], *options.values()]))
        if session.is_replaying:
            (_, forms), payload = session.expect("gradients")
            for number, form in zip(json.loads(payload), forms, strict=True):
                leaf = self._leaves[number]()
                assert leaf is not None, "a leaf that was in use"
                with session.outside():
                    leaf.grad = empty(*form[1:])
                session.ledger.add(leaf.grad)
            return
        numbers, forms = [], []
        for number, known in list(self._leaves.items()):
            leaf = known()
            if leaf is not None and leaf.grad is not None and (leaf.grad.layout != torch.strided or not session.ledger.holds(leaf.grad)):
                numbers.append(number)
                forms.append(self._outline(leaf.grad))
                session.ledger.add(leaf.grad)
        session.journal.note(("gradients", tuple(forms)), json.dumps(numbers).encode())

    def grad(self, original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """What `torch.autograd.grad` does."""
        if not self._session.is_watching:
            return original(*arguments, **options)
        return self._session.closed(("grad",), lambda: original(*arguments, **options), tensors_in([*arguments, *options.values()]))

    def step(self, original: Callable[..., Any], optimizer: Optimizer, *arguments: Any, **options: Any) -> Any:
        """What the `step` of an optimizer's class does."""
        session = self._session
        if not session.is_watching:
            session.refuse_threads()
            return original(optimizer, *arguments, **options)
        has_closure = any(one is not None for one in [*arguments, *options.values()])
        number = next(number for number, one in self.optimizers() if one is optimizer)
        is_closed = is_of_a_library(type(optimizer)) and not has_closure
        return session.step(
            ("step", number) if is_closed else None,
            lambda: original(optimizer, *arguments, **options),
            lambda: self._note_state(optimizer, number),
        )

    def optimizers(self) -> Iterator[tuple[int, Optimizer]]:
        """The optimizers in use, by number."""
        for number, known in enumerate(self._optimizers):
            optimizer = known()
            if optimizer is not None:
                yield number, optimizer

    def _note_state(self, optimizer: Optimizer, number: int) -> None:
        session = self._session
        self.left_out.add(number)
        parameters = parameters_of(optimizer)
        for parameter in parameters:
            session.ledger.add(parameter)
        if session.is_replaying:
            for position, key, form in session.expect("state", number)[0][2]:
                with session.outside():
                    made = optimizer.state[parameters[position]][key] = empty(*form[1:])
                session.ledger.add(made)
            return
        made_now = []
        for position, parameter in enumerate(parameters):
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and not session.ledger.holds(value):
                    made_now.append((position, key, self._outline(value)))
                    session.ledger.add(value)
        session.journal.note(("state", number, tuple(made_now)))

    def _outline(self, tensor: Tensor) -> Descriptor:
        try:
            return outline(tensor, [], [])
        except OpaqueError as error:
            raise ScriptError(
                f"A gradient or a part of an optimizer's state is {error}: it cannot be made resumable. Use dense ones (sparse=False)."
            ) from error

    def _look_at(self, roots: list[Tensor]) -> None:
        """Raise `ScriptError` if a backward pass does what a replay would not."""
        self._modules.refuse_backward_hooks()
        for leaf in _leaves_of(roots):
            number = self._by_id.get(id(leaf))
            if number is None or not self._is_leaf(number, leaf):
                raise ScriptError(
                    f"backward() gives a gradient to a tensor of the shape {tuple(leaf.shape)} that is in no module and no optimizer: a "
                    "replay would not find it. Call requires_grad_() of it, make it a torch.nn.Parameter, or use torch.autograd.grad()."
                )
            if leaf._backward_hooks or getattr(leaf, "_post_accumulate_grad_hooks", None):
                raise ScriptError(
                    f"A parameter of the shape {tuple(leaf.shape)} has a hook on its gradient (register_hook): a replay leaves the "
                    "backward pass out, so the script cannot be made resumable. Change gradients between backward() and step() instead."
                )


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """What an optimizer optimizes, in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _leaves_of(roots: list[Tensor]) -> list[Tensor]:
    found, seen, waiting = [], set(), [root.grad_fn for root in roots if root.grad_fn is not None]
    while waiting:
        node: Any = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting += [function for function, _ in node.next_functions if function is not None]
    return found
