"""A run of three processes, without Ray, one of which is throttled: it is found by its score, and no other."""

import asyncio
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.conftest import make_run, prepare_dataset, publish_base
from tests.training.throttling import throttled
from tidepool.checkpoint import claim_incarnation
from tidepool.specs import RunSpec
from tidepool.storage import open_store
from tidepool.training.coordinator import Beginning, Coordinator
from tidepool.training.member import Member
from tidepool.training.membership import Directive, Process, Report, WorkerId
from tidepool.training.process_group import MeetingPoint
from tidepool.training.quorum import Rules
from tidepool.training.quorum_events import Claimed
from tidepool.training.resolution import resolve
from tidepool.training.straggling import Rules as StragglingRules
from tidepool.training.straggling import Straggling
from tidepool.training.task import Task
from tidepool.training.worker import run_task

pytestmark = [pytest.mark.elastic, pytest.mark.chaos]
TIMEOUT_S = 200
NUM_WORKERS = 3


def work(line: Connection, task: Task, group: int) -> None:
    """One worker, in a process of its own; its coordinator is at the other end of the line."""

    def call(report: Report) -> Directive:
        line.send(report)
        directive: Directive = line.recv()
        return directive

    point = MeetingPoint("127.0.0.1")
    process = Process(os.getpid(), f"node-{group}", "127.0.0.1", "")
    hello = Report(WorkerId(group, 0), 0, 1, point.address, session=task.session, process=process)
    with Member(hello, point, torch.device("cpu"), call, Rules()) as member:
        run_task(task, member, torch.device("cpu"), [])


@contextmanager
def a_run(spec: RunSpec) -> Iterator[Callable[[Any], Any]]:
    """A run under way; gives a way to ask its coordinator."""
    store = open_store(spec.store)
    claimed = claim_incarnation(store, spec.run, {"spec_digest": spec.digest})
    task = Task(spec, resolve(spec, store), claimed.number)
    coordinator, loop, over = Coordinator(), asyncio.new_event_loop(), threading.Event()
    coordinator._straggling = Straggling(StragglingRules(lasting_s=5.0))
    looping = threading.Thread(target=loop.run_forever)
    looping.start()

    def ask(question: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(question, loop).result(TIMEOUT_S)

    heard = [ask(coordinator.begin(Beginning(claimed.number, Claimed(claimed.number, None, 0), 0, NUM_WORKERS, 3, 0, {}, Rules())))]

    def drive() -> None:
        while not over.wait(0.5):
            heard[0] = ask(coordinator.driver_is_here(heard[0]))

    def answer(line: Connection) -> None:
        try:
            while True:
                line.send(ask(coordinator.report(line.recv())))
        except (EOFError, OSError):
            return  # the worker has ended

    driver = threading.Thread(target=drive)
    driver.start()
    context, workers = multiprocessing.get_context("spawn"), []
    for group in range(1, NUM_WORKERS + 1):
        ours, theirs = context.Pipe()
        workers.append(context.Process(target=work, args=(theirs, task, group)))
        workers[-1].start()
        theirs.close()
        threading.Thread(target=answer, args=(ours,), daemon=True).start()
    try:
        yield lambda name: ask(getattr(coordinator, name)(*([0.0] if name == "orders" else [])))
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
        over.set()
        driver.join()
        loop.call_soon_threadsafe(_end, loop)
        looping.join()
        loop.close()


def _end(loop: asyncio.AbstractEventLoop) -> None:
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.call_soon(loop.stop)


def test_a_throttled_worker_is_found_by_its_score_and_no_other(tmp_path: Path) -> None:
    url = (tmp_path / "store").as_uri()
    publish_base(url, prepare_dataset(url, tmp_path / "prepared"), tmp_path)
    training = {"steps": 100_000, "num_shards": 6, "global_batch_size": 12, "evaluate_every_steps": 100_000}
    spec = make_run(url, "throttled", training=training, checkpoint={"every_steps": 100_000}, elastic={"min": 3, "max": 3})
    with a_run(spec) as ask:

        def wait_for(condition: Callable[[dict[int, float | None]], bool]) -> dict[int, float | None]:
            """The scores of all workers, by group, once they meet a condition."""
            deadline = time.monotonic() + TIMEOUT_S
            while True:
                status = ask("status")
                scores = {worker["group"]: worker["score"] for worker in status["workers"]}
                if len(scores) == NUM_WORKERS and condition(scores):
                    return scores
                assert time.monotonic() < deadline, status
                time.sleep(0.1)

        wait_for(lambda scores: all(score is not None for score in scores.values()))
        pids = {worker["group"]: worker["pid"] for worker in ask("status")["workers"]}
        with throttled(pids[2]):
            wait_for(lambda _: bool(ask("orders").stragglers))
            [straggler] = ask("orders").stragglers
            assert (straggler.worker, straggler.node) == ("2.0", "node-2")
            assert straggler.score < 0.7
        wait_for(lambda _: not ask("orders").stragglers)
