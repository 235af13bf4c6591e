"""Killed, stalled, or behind a bad network: at every step of what a writer does to the store, nothing committed is lost.

What holds after each death, stall and fault: every visible checkpoint verifies; committed steps never go backwards; of two
incarnations only the newer one advances.
"""

import multiprocessing
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.writer import STEPS, state, write, write_and_die
from tests.stores.proxy import Fault, Proxy, Request, no_faults, proxy, random_faults
from tests.stores.s3 import S3Server
from tidepool.checkpoint import Checkpoints, Commit, RunLog, claim_incarnation, verify
from tidepool.errors import StoreError, SupersededError
from tidepool.storage import ObjectStore, open_store, require_fit

pytestmark = pytest.mark.chaos
_TIMEOUT_S = 60
_processes = multiprocessing.get_context("forkserver")  # forks of one process that has imported all and opened nothing
_processes.set_forkserver_preload(["tests.checkpoint.writer"])


@pytest.fixture
def direct(s3_url: str) -> ObjectStore:
    """A store at the S3 server, without the proxy; opened before the environment names the proxy."""
    store = open_store(s3_url)
    require_fit(store)
    return store


@pytest.fixture
def between(direct: ObjectStore, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy in front of the store; what is opened from now on goes through it."""
    with proxy(s3_server.endpoint_url) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.url)
        require_fit(open_store(direct.url))
        between.num_requests = 0
        yield between


def start(function: Callable[..., None], *arguments: Any) -> tuple[BaseProcess, Connection]:
    receiver, sender = _processes.Pipe(duplex=False)
    process = _processes.Process(target=function, args=(*arguments, sender))
    process.start()
    sender.close()
    return process, receiver


def finish(process: BaseProcess, receiver: Connection) -> tuple[int | None, list[str]]:
    """The exit status of a writer, and what it said before it ended."""
    said: list[str] = []
    try:
        while receiver.poll(_TIMEOUT_S):
            said.append(receiver.recv())
    except EOFError:
        pass
    process.join(_TIMEOUT_S)
    status = process.exitcode
    process.close()
    receiver.close()
    return status, said


def check_after_death(store: ObjectStore, run: str, said: list[str]) -> None:
    """The invariants of the module's docstring, for a run whose writer is dead and said what it knew."""
    committed = max((int(line.split()[1]) for line in said if line.startswith("committed")), default=0)
    visible = RunLog(store, run).visible_commits()
    steps = [commit.step for commit in visible]
    assert steps == sorted(set(steps), reverse=True)
    assert max(steps, default=0) in (committed, committed + 1), "no step is lost, and none counts that was not written whole"
    for commit in visible:
        verify(store, run, commit)
    incarnation = claim_incarnation(store, run, {})
    assert (incarnation.base.step if incarnation.base else 0) == max(steps, default=0)
    after = Checkpoints(store, run, incarnation).save(max(steps, default=0) + 1, state(9), {})
    assert RunLog(store, run).visible_commits()[0] == after
    verify(store, run, after)


class At:
    """Does `act` when the proxy sees its `number`th request, before the server does (`moment`) or after it has answered."""

    def __init__(self, between: Proxy, number: int, moment: str, act: Callable[[], Fault]) -> None:
        between.num_requests = 0
        between.before, between.after = (self._act, _nothing) if moment == "before" else (no_faults, self._act)
        self._number, self._do = number, act

    def _act(self, request: Request) -> Fault:
        return self._do() if request.number == self._number else Fault.NONE


def _nothing(_request: Request) -> Fault:
    return Fault.NONE


class Victim:
    """A writer that can be killed as soon as it is known."""

    def __init__(self) -> None:
        self._known = threading.Event()
        self._pid: int | None = None

    def start(self, *arguments: Any) -> tuple[int | None, list[str]]:
        process, receiver = start(*arguments)
        self._pid = process.pid
        self._known.set()
        return finish(process, receiver)

    def kill(self) -> Fault:
        assert self._known.wait(_TIMEOUT_S)
        assert self._pid is not None
        os.kill(self._pid, signal.SIGKILL)
        return Fault.DROP_BEFORE


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_writer_killed_at_any_request_loses_nothing(
    direct: ObjectStore, between: Proxy, moment: str, record_property: Callable[[str, object], None]
) -> None:
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    status, said = Victim().start(write, direct.url, "whole", environment)
    assert (status, said) == (0, [*(f"committed {step}" for step in STEPS), "retained"])
    num_requests, found = between.num_requests, set[int]()
    for number in range(num_requests):
        run, victim = f"{moment}-{number}", Victim()
        At(between, number, moment, victim.kill)
        status, said = victim.start(write, direct.url, run, environment)
        assert status == -signal.SIGKILL
        check_after_death(direct, run, said)
        found.add(len(said))
    assert found == set(range(len(STEPS) + 1)), "it died before, between and after its commits"
    record_property("kill_points", num_requests)


@pytest.mark.slow
def test_a_writer_killed_at_any_operation_on_a_local_directory_loses_nothing(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    _, said = Victim().start(write_and_die, (tmp_path / "whole").as_uri(), "r", 10**9)
    num_operations, found = int(said[-1].split()[1]), set[int]()
    assert num_operations > 50
    for number in range(num_operations):
        url = (tmp_path / str(number)).as_uri()
        status, said = Victim().start(write_and_die, url, "r", number)
        assert status == -signal.SIGKILL
        check_after_death(open_store(url), "r", said)
        found.add(len(said))
    assert found == set(range(len(STEPS) + 1))
    record_property("kill_points", num_operations)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_writer_that_stalls_at_any_request_and_wakes_after_it_was_taken_over_does_no_harm(
    direct: ObjectStore, between: Proxy, moment: str
) -> None:
    """As a machine that sleeps, or a network that delivers late: the other driver believes it dead, and goes on."""
    is_over, number = False, 0
    while not is_over:
        run = f"stalled-{moment}-{number}"
        old = Checkpoints(open_store(direct.url), run, claim_incarnation(direct, run, {}))
        first = old.save(1, state(1), {})
        stall = Stall()
        At(between, number, moment, stall)
        with ThreadPoolExecutor(1) as pool:
            saving = pool.submit(old.save, 2, state(2), {})
            saving.add_done_callback(lambda _, stall=stall: stall.begun.set())  # type: ignore[misc]
            assert stall.begun.wait(_TIMEOUT_S)
            is_over = saving.done()  # it has no such request any more
            incarnation = claim_incarnation(direct, run, {})
            new = Checkpoints(direct, run, incarnation).save(5, state(5), {})
            stall.over.set()
            try:
                reported: Commit | None = saving.result()
            except SupersededError:
                reported = None
        visible = RunLog(direct, run).visible_commits()
        assert visible == [new, *([incarnation.base] if incarnation.base != first else []), first]
        assert reported is None or reported in visible, "what was reported as committed is in the history of the newer driver"
        assert reported is not None or incarnation.base == first
        for commit in visible:
            verify(direct, run, commit)
        number += 1
    assert number > 6


class Stall:
    """Says that it has begun, and ends when it is told."""

    def __init__(self) -> None:
        self.begun, self.over = threading.Event(), threading.Event()

    def __call__(self) -> Fault:
        self.begun.set()
        assert self.over.wait(_TIMEOUT_S)
        return Fault.NONE


@pytest.mark.parametrize("seed", range(3))
def test_a_run_on_a_bad_network_loses_nothing_and_comes_to_its_end(direct: ObjectStore, between: Proxy, seed: int) -> None:
    """A third of all requests fail somehow. A driver whose commit raises starts over from the newest commit, as Ray's restart does."""
    between.before, reported, num_failures = random_faults(seed, 0.33), list[Commit](), 0
    run, store = f"bad-{uuid.uuid4().hex}", open_store(direct.url, deadline_s=20)
    step = 0
    while step < 6:
        try:
            incarnation = claim_incarnation(store, run, {})
            step = incarnation.base.step if incarnation.base else 0
            assert step >= max((commit.step for commit in reported), default=0), "a commit that was reported is gone"
            checkpoints = Checkpoints(store, run, incarnation)
            while step < 6:
                reported.append(checkpoints.save(step + 1, _state(step + 1), {}))
                step += 1
                checkpoints.retain(2)
        except StoreError:
            num_failures += 1
        for commit in RunLog(direct, run).visible_commits():
            verify(direct, run, commit)
    assert num_failures < 20, "most faults are borne without a new start"
    assert between.num_requests > 60
    assert [commit.step for commit in RunLog(direct, run).visible_commits()][:1] == [6]


def _state(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """As `state`, and at step 3 so large that it goes up in parts."""
    return state(step) | ({"large": {"w": torch.full((3 * 2**20,), 1.0)}} if step == 3 else {})
