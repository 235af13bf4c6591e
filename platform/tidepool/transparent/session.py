"""Runs a script's Python so that it can be run again without computing: the heart of `tidepool.run`.

While *recording*, everything is computed and what the script learns from it goes into a journal. While *replaying*, the script runs
from its top again: its Python really runs, and what was computed after anything that is skipped is not computed but made empty,
in the form that the journal tells; what the script reads from such a tensor (`item`, `tolist`, `if loss > 3`) is given from the
journal. Replaying ends where the journal does, at an optimizer step; there the snapshot's bytes are put into the memory that is in
use, and recording goes on.

Two grains, one rule. Most of what PyTorch is asked for is one event for each operation (`_Operations`). What runs no code of the
script's is one event as a whole (`closed`): a call of a module of an installed library, a backward pass, an optimizer's step, a
batch.

Invariants:
- A tensor that depends on anything skipped is in the ledger; one that is not was really computed, in a replay as well.
- Numbers in the ledger, and all decisions here, follow from the script's Python and the journal alone.
- An event that is taken is compared with what the script does. If they differ, `ReplayError` ends the script before anything of it
  is lost: nothing was computed and nothing committed.
"""

import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from tidepool.errors import ReplayError, ScriptError
from tidepool.transparent.host_random import HostRandom, set_changes
from tidepool.transparent.journal import Descriptor, Journal
from tidepool.transparent.ledger import Ledger
from tidepool.transparent.operations import Operation, operation
from tidepool.transparent.outline import OpaqueError, empty, outline, rebuild, tensors_in

_SAME = (
    "Something that it depends on is not the same in every start (the time, a file that has changed, the order of a folder). Make it "
    "so, or start anew under another --run."
)


class Session:
    """One execution of a script. With a journal that has events left it replays; `arrive` is called where that ends.

    `on_step` is called after each optimizer step that was computed, where a snapshot may be taken.
    """

    def __init__(self, journal: Journal, arrive: Callable[[], None], on_step: Callable[[], None]) -> None:
        self.journal, self.ledger = journal, Ledger()
        self.is_replaying = journal.num_left > 0
        self.num_steps = 0
        self.generators: list[torch.Generator] = []  # those whose state a replay does not bring back
        self._arrive, self._on_step = arrive, on_step
        self._thread = threading.get_ident()
        self._mode = _Operations(self)
        # No backward pass frees the graphs of a replay, so they must not hold on to memory that was free.
        self._graphs_keep_nothing = torch.autograd.graph.saved_tensors_hooks(_keep_nothing, _give_nothing)
        self._is_running = False
        self._num_closed = 0
        self._num_in_step = 0
        self._not_skipped = 0  # a checksum of the operations that are no events
        self._failure: ScriptError | None = None
        self.has_skipped = False  # the default generators are not where they would be

    @property
    def is_watching(self) -> bool:
        """Whether what runs now is the script's own Python, in the thread that runs the script."""
        return self._is_running and self._num_closed == 0 and threading.get_ident() == self._thread

    def refuse_threads(self) -> None:
        """What computes now is not the script's thread: let the script end at its next step, with the reason."""
        if self._is_running and self._num_closed == 0 and threading.get_ident() != self._thread:
            self._failure = ScriptError(
                f"The script computes in a thread of its own ({threading.current_thread().name}), in an order that no replay can keep: "
                "it cannot be made resumable. Compute in the main thread, or run it without tidepool.run."
            )

    @contextmanager
    def running(self) -> Iterator[None]:
        """The script runs in here."""
        self._is_running = True
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        if self.is_replaying:
            self._graphs_keep_nothing.__enter__()
        try:
            yield
        finally:
            if self.is_replaying:
                self._graphs_keep_nothing.__exit__()
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._is_running = False

    def stop(self) -> None:
        """Watch nothing any more (a forked process)."""
        self._is_running = False

    @contextmanager
    def outside(self) -> Iterator[None]:
        """What runs in here is no event."""
        if _get_current_dispatch_mode() is not self._mode:
            raise ScriptError(
                "The script watches PyTorch's operations itself (a TorchDispatchMode, a profiler of FLOPs): it cannot be made resumable "
                "meanwhile. Take that out, or run it without tidepool.run."
            )
        self._num_closed += 1
        self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            self._mode.__enter__()  # type: ignore[no-untyped-call]
            self._num_closed -= 1

    @contextmanager
    def inside(self) -> Iterator[None]:
        """What runs in here, below `outside`, is the script's Python again."""
        if not self._is_running or self._num_closed == 0 or threading.get_ident() != self._thread:
            yield
            return
        num_closed, self._num_closed = self._num_closed, 0
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._num_closed = num_closed

    def skips(self) -> None:
        """Something is left out in a replay from here on, so PyTorch's default generators will not be where they are now."""
        self.has_skipped = True

    def closed(
        self,
        what: Descriptor,
        run: Callable[[], Any],
        arguments: Sequence[Tensor],
        more: Callable[[], Sequence[Tensor]] = tuple,
        changed: Callable[[], Sequence[Tensor]] = tuple,
        may_draw: bool = True,
    ) -> Any:
        """Run something as one event. It may change `arguments`, and `changed()`; its result may be memory of `more()`, too.

        `may_draw` says that it may use the random states of Python or NumPy. Raises `OpaqueError`.
        """
        self.skips()
        if not self.is_replaying:
            versions = [_version(one) for one in arguments]
            before = HostRandom.now() if may_draw else None
            with self.outside():
                result = run()
            new: list[Tensor] = []
            form = outline(result, arguments, new)
            if any(self.ledger.holds(one) for one in new):
                new.clear()
                form = outline(result, [*arguments, *more()], new)
            if any(self.ledger.holds(one) for one in new):
                raise OpaqueError("memory that something else holds, too")
            touched = tuple(position for position, one in enumerate(arguments) if _version(one) != versions[position])
            self.journal.note(("closed", what, form, touched), HostRandom.now().changes(before) if before else b"")
        else:
            (_, _, form, touched), payload = self.expect("closed", what)
            with self.outside():
                new = []
                result = rebuild(form, _Concatenated(arguments, more), new, _empty_with_history)
            set_changes(payload)
        for one in [*(arguments[position] for position in touched), *changed(), *new]:
            self.ledger.add(one)
        return result

    def expect(self, kind: str, *details: Any) -> tuple[Descriptor, bytes]:
        """The next event, which must be of this kind and begin with these details."""
        assert self.is_replaying
        descriptor, payload = self.journal.take()
        wanted = (kind, *details)
        if descriptor[: len(wanted)] != wanted:
            raise ReplayError(
                f"Between steps {self.num_steps} and {self.num_steps + 1} the script did not do again what it did before: "
                f"{_short(wanted)} where it was {_short(descriptor)}. {_SAME}"
            )
        return descriptor, payload

    def step(self, what: Descriptor | None, run: Callable[[], Any], changes: Callable[[], None]) -> Any:
        """An optimizer's step: closed if `what` names it, with its effects noted or made by `changes`; then a boundary."""
        if self._num_in_step:
            return run()
        self._num_in_step += 1
        try:
            if what is None:
                result = run()
            else:
                result = self.closed(what, run, [], may_draw=False)
                changes()
        finally:
            self._num_in_step -= 1
        self._end_step()
        return result

    def _end_step(self) -> None:
        if self._failure is not None:
            raise self._failure
        self.num_steps += 1
        if not self.is_replaying:
            self.journal.note(("step",), self._not_skipped.to_bytes(4, "little"))
            self._on_step()
            return
        if self.expect("step")[1] != self._not_skipped.to_bytes(4, "little"):
            raise ReplayError(
                f"Up to step {self.num_steps} the script did not do again what it did before: operations that depend on nothing computed, "
                f"such as the preparation of data, were others. {_SAME}"
            )
        if self.journal.num_left == 0:
            self.is_replaying = False  # first: a SIGTERM from here on waits for the next step
            self._graphs_keep_nothing.__exit__()
            with self.outside():
                self._arrive()

    def read(self, tensor: Tensor, run: Callable[[], Any]) -> Any:
        """Python looks at the numbers of a tensor by way of `run`, which is no operation."""
        if self.ledger.holds(tensor):
            with self.outside():
                if not self.is_replaying:
                    self.journal.note(("read", tuple(tensor.shape), str(tensor.dtype)), _bytes_of(tensor))
                else:
                    _, payload = self.expect("read", tuple(tensor.shape), str(tensor.dtype))
                    _fill(tensor, payload)
        with self.outside():
            return run()

    def operate(self, function: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        """One operation of the script's Python."""
        about = operation(function)
        tensors = tensors_in([*arguments, *options.values()])
        generator = about.generator_of(arguments, options)
        if about.is_view:
            return function(*arguments, **options)
        if not self._is_skippable(about, tensors, generator):
            shapes = ",".join(str(tuple(one.shape)) for one in tensors)
            self._not_skipped = zlib.crc32(f"{about.name}{shapes}".encode(), self._not_skipped)
            return function(*arguments, **options)
        if about.is_random:
            self.skips()
            self._keep(generator)
        if not self.is_replaying:
            result = function(*arguments, **options)
            new: list[Tensor] = []
            if about.gives_value:
                self.journal.note(("value", about.name), about.encode(result))
                return result
            form = outline(result, tensors, new)
            if any(self.ledger.holds(one) for one in new):
                raise ScriptError(f"{about.name} returns memory that it does not say: it cannot be made resumable. Please report it.")
            self.journal.note(("operation", about.name, form))
        elif about.gives_value:
            return about.decode(self.expect("value", about.name)[1])
        else:
            new = []
            form = self.expect("operation", about.name)[0][2]
            result = rebuild(form, tensors, new, empty)
        for one in [*about.written(arguments, options), *new]:
            self.ledger.add(one)
        return result

    def _is_skippable(self, about: Operation, tensors: Sequence[Tensor], generator: torch.Generator | None) -> bool:
        if any(self.ledger.holds(one) for one in tensors):
            return True
        if not about.is_random:
            return False
        return self.has_skipped if generator is None else any(one is generator for one in self.generators)

    def _keep(self, generator: torch.Generator | None) -> None:
        if generator is not None and not any(one is generator for one in self.generators):
            self.generators.append(generator)


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives each operation to the session."""

    def __init__(self, session: Session) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._session = session

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if not self._session.is_watching:
            return func(*args, **(kwargs or {}))
        return self._session.operate(func, args, kwargs or {})


class _Concatenated(Sequence[Tensor]):
    """Arguments, and `more` where an index is beyond them."""

    def __init__(self, first: Sequence[Tensor], more: Callable[[], Sequence[Tensor]]) -> None:
        self._first, self._more = first, more

    def __len__(self) -> int:
        return len(self._first) + len(self._more())

    def __getitem__(self, position: Any) -> Any:
        return self._first[position] if position < len(self._first) else self._more()[position - len(self._first)]


class _History(torch.autograd.Function):
    """Stands where a result came from that was not computed: it asks for a gradient and cannot give one."""

    @staticmethod
    def forward(_context: Any, _anchor: Tensor, form: tuple[Any, ...]) -> Tensor:
        return empty(*form)

    @staticmethod
    def backward(_context: Any, *_gradients: Tensor) -> Any:
        raise ReplayError(
            "A gradient was asked for through something that was computed before the last commit. Commits wait for such graphs to be used, "
            "for some steps; this one was kept for longer. Call backward() within the same step, or compute under torch.no_grad()."
        )


def _keep_nothing(_tensor: Tensor) -> None:
    return None


def _give_nothing(_nothing: None) -> Tensor:
    raise RuntimeError("Trying to backward through the graph a second time, or through what was computed before the last commit.")


def _empty_with_history(*form: Any) -> Tensor:
    if not form[-1]:
        return empty(*form)
    with torch.enable_grad():
        made: Tensor = _History.apply(torch.zeros((), requires_grad=True), form)  # type: ignore[no-untyped-call]
    return made


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _bytes_of(tensor: Tensor) -> bytes:
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def _fill(tensor: Tensor, payload: bytes) -> None:
    if payload:
        with torch.no_grad():
            value = torch.frombuffer(bytearray(payload), dtype=tensor.dtype).reshape(tensor.shape)
            tensor.detach().copy_(value)


def _short(descriptor: Descriptor) -> str:
    text = " ".join(str(one) for one in descriptor[:2])
    return text if len(text) < 120 else f"{text[:117]}..."
