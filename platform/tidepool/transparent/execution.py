"""One start of a script: claim, replay to the last commit, go on, finish.

Invariants:
- Nothing of the script runs before its run's identity and everything that can be seen from outside is checked.
- A run that has finished is not run again.
"""

import logging
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from torch import Tensor

from tidepool.checkpoint import Checkpoints, Incarnation, claim_incarnation
from tidepool.errors import ObjectExistsError, ReplayError, SpecError
from tidepool.storage import find_json, open_store, put_json
from tidepool.transparent.commits import STOPPED, Commits
from tidepool.transparent.gradients import Gradients
from tidepool.transparent.identity import identify, refuse_several_processes, seed_everything, settle_identity, warn_of_cuda
from tidepool.transparent.loaders import Loaders
from tidepool.transparent.modules import Modules
from tidepool.transparent.patches import Schedulers, patched
from tidepool.transparent.session import Session
from tidepool.transparent.state import Script, iterators_of, journal_of

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What to run, and where to keep it."""

    script: Path
    arguments: Sequence[str]
    run: str
    store_url: str
    every_s: float = 60.0
    every_steps: int | None = None
    keep: int = 3


def execute(options: Options) -> None:
    """Run the script to its end, from the last commit if there is one. Raises `TidepoolError`, `SystemExit`, and what the script does."""
    if not options.script.is_file():
        raise SpecError(f"{options.script} is no file: give the path of a Python script.")
    if "/" in options.run:
        raise SpecError(f"{options.run!r} cannot name a run: leave out the slash.")
    refuse_several_processes(os.environ)
    store = open_store(options.store_url)
    identity = settle_identity(store, options.run, identify(options.script, options.arguments))
    finished = find_json(store, _result_key(options.run))
    if finished is not None:
        _logger.warning(
            "run %s is finished, after step %d; to run the script again choose another --run", options.run, finished["num_steps"]
        )
        return
    if (warning := warn_of_cuda()) is not None:
        _logger.warning(warning)
    incarnation = claim_incarnation(store, options.run, {"script": options.script.name})
    seed_everything(identity["seed"])
    num_steps = _Start(options, Checkpoints(store, options.run, incarnation), incarnation).run()
    if num_steps == 0:
        _logger.warning("the script made no optimizer step: nothing was committed")
    with suppress(ObjectExistsError):  # by an incarnation that came to its end before
        put_json(store, _result_key(options.run), {"num_steps": num_steps})


class _Start:
    """The parts of one start, wired."""

    def __init__(self, options: Options, checkpoints: Checkpoints, incarnation: Incarnation) -> None:
        self._options, self._base = options, incarnation.base
        saved: dict[str, Tensor] = {}
        self._memory: dict[str, Tensor] = {}
        if incarnation.base is not None:
            saved = checkpoints.restore(incarnation.base, "journal")
            self._memory = checkpoints.restore(incarnation.base, "memory")
        self._saved = saved
        self._session = Session(journal_of(saved), self._arrive, self._after_step)
        modules = Modules(self._session)
        gradients = Gradients(self._session, modules)
        loaders = Loaders(self._session, iterators_of(saved))
        self._script = Script(options.script.resolve().parent, self._session, modules, gradients, loaders, Schedulers())
        self._commits = Commits(checkpoints, self._script.parts, options.every_s, options.every_steps, options.keep)

    def run(self) -> int:
        """Run the script; returns the number of its steps."""
        session, script = self._session, self._script
        os.register_at_fork(after_in_child=session.stop)
        if self._base is not None:
            _logger.warning("going on from step %d: the script runs again up to there without computing", self._base.step)
        signal.signal(signal.SIGTERM, self._stop)
        path = str(self._options.script)
        sys.argv = [path, *self._options.arguments]
        sys.path.insert(0, str(self._options.script.resolve().parent))
        try:
            with patched(session, script.modules, script.gradients, script.loaders, script.schedulers), session.running():
                _run_to_end(path)
        finally:
            self._commits.close()  # what is on its way counts, however the script ends
        if session.is_replaying:
            raise ReplayError(f"The script ended before step {self._base.step if self._base else 0}, which it had made before.")
        return session.num_steps

    def _arrive(self) -> None:
        self._script.put_back(self._memory, self._saved)
        self._memory, self._saved = {}, {}
        self._commits.arrived(self._session.num_steps)
        _logger.warning("arrived at step %d, computing again", self._session.num_steps)

    def _after_step(self) -> None:
        with self._session.outside():
            self._commits.after_step(self._session.num_steps)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._commits.is_stop_wished = True
        if self._session.is_replaying:  # nothing is new
            sys.exit(STOPPED)


def _run_to_end(path: str) -> None:
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise


def _result_key(run: str) -> str:
    return f"runs/{run}/finished.json"
