"""The demo: from a folder of text to a served model and an adapter, with a replica group killed on the way, and one added;
then a new version of the adapter, published while the first one is being asked; and a rush of questions, for which serving takes a part
of the pool from a run and gives it back.

    make demo

It starts a Ray cluster and an object store (a directory) of its own below `.tidepool/`, and ends them. Everything it
prints was computed in this run; the same figures are in `.tidepool/demo/summary.json`.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "platform"))

import httpx
import psutil
import ray
import yaml
from asking import Asking
from corpus import write_chats, write_source

from tidepool import local_cluster
from tidepool.errors import TidepoolError
from tidepool.local_cluster import LocalCluster
from tidepool.messages import ARBITER, NAMESPACE, Stop
from tidepool.registry import Registry
from tidepool.specs import RunSpec, load_spec
from tidepool.storage import open_store
from tidepool.training.membership import coordinator_name
from tidepool.training.outcome import read_result

FOLDER = Path(".tidepool/demo")
# Chosen before any run, in nats per held-out token. An untrained model knows nothing (ln 2048 = 7.6); these are modest.
BASE_MARGIN = 1.5
"""The base must be better than the same model untrained by at least this, on source code it has not seen."""
ADAPTER_MARGIN = 0.5
"""The adapter must be better than its base by at least this, on docstrings it has not seen."""
_TIMEOUT_S = 900
_POLL_S = 0.05
_SCALE = {"min": 1, "max": 2, "up_after_s": 0.5, "down_after_s": 3.0}
_NUM_CLIENTS = 24
"""More than one replica can answer at a time."""
_SAMPLING = {"temperature": 0.6, "seed": 1}  # a model this small, asked for the likeliest token each time, repeats itself


class DemoError(Exception):
    """The demo did not do what it promises."""


@dataclass(frozen=True)
class Kill:
    """What the death of one replica group cost the run, and the coming of the one in its place."""

    group: int
    pid: int
    at_step: int
    steps_redone: int
    seconds_to_next_step: float
    added_group: int
    seconds_to_start_it: float
    longest_pause_as_it_joined_s: float


@dataclass(frozen=True)
class Tide:
    """What a rush of questions took from a run, and when the run had it again. All counted from the beginning or the end of the rush."""

    groups_before: int
    groups_during: int
    seconds_to_give: float
    seconds_to_serve: float
    seconds_to_have_it_again: float
    answers: int
    failed: int


def main() -> int:
    """Run the demo; returns the exit status."""
    started = time.monotonic()
    os.chdir(ROOT)
    store_url = (FOLDER / "store").absolute().as_uri()
    os.environ["TIDEPOOL_CACHE"] = str((FOLDER / "cache").absolute())
    try:
        _clear(store_url)
        with _cluster(store_url) as cluster:
            summary = _run(cluster)
    except (DemoError, TidepoolError, TimeoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    summary["seconds"] = round(time.monotonic() - started, 1)
    (FOLDER / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _print_table(summary)
    return 0


def _clear(store_url: str) -> None:
    """Remove what an earlier demo left. Raises `DemoError` if it is in use; what is not the demo's own is kept, elsewhere."""
    if local_cluster.load(Path(".tidepool/cluster.json")) is not None:
        raise DemoError("a cluster of `make up` runs, perhaps on the demo's store: stop it first (make down).")
    others = set(Registry(open_store(store_url)).names()) - {"stdlib-base", "stdlib-docs"}
    if others:
        kept = FOLDER.with_name(f"demo-{int(time.time())}")
        FOLDER.rename(kept)
        _say(f"The demo's store held {', '.join(sorted(others))} too: it was moved to {kept}/store")
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)


@contextmanager
def _cluster(store_url: str) -> Iterator[LocalCluster]:
    _say(f"Starting a local Ray cluster; the object store is {FOLDER}/store")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a stop from outside ends the cluster too
    cluster = local_cluster.start(store_url, num_cpus=4, log=FOLDER / "ray.log")
    try:
        os.environ.update(cluster.environment)
        ray.init(cluster.address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
        yield cluster
    finally:
        ray.shutdown()
        local_cluster.stop(cluster)


def _run(cluster: LocalCluster) -> dict[str, Any]:
    _prepare()
    base, kill = _train(cluster, "base", with_a_kill=True)
    adapter, _ = _train(cluster, "adapter", with_a_kill=False)
    assert kill is not None
    _check_margin("base", base, BASE_MARGIN)
    _check_margin("adapter", adapter, ADAPTER_MARGIN)
    names = [result["published"].partition("@")[0] for result in (base, adapter)]
    _say(f"Serving {' and '.join(names)}")
    local_cluster.serve(cluster, names, replicas={"scale": _SCALE}, engine={"max_batch_size": _NUM_CLIENTS // 3})
    answers = [_complete(cluster, names[0]), _chat(cluster, names[1])]
    update = _publish_while_asked(cluster, adapter["published"])
    tide = _tide(cluster, names[1])
    return {
        "python": sys.version.split()[0],
        "base": base,
        "adapter": adapter,
        "kill": asdict(kill),
        "margins": {"base": BASE_MARGIN, "adapter": ADAPTER_MARGIN},
        "answers": answers,
        "update": update,
        "tide": asdict(tide),
        "api_url": cluster.api_url,
        "dashboard_url": cluster.dashboard_url,
    }


# --- Data ------------------------------------------------------------------------------------------------------------


def _prepare() -> None:
    num_files = write_source(FOLDER / "source")
    num_chats = write_chats(FOLDER / "docs.jsonl")
    _say(f"Preparing {num_files} modules of Python's standard library, and {num_chats} questions about their functions")
    source = {"path": str((FOLDER / "source").absolute()), "glob": "**/*.py", "format": "text"}
    chats = {"path": str((FOLDER / "docs.jsonl").absolute()), "format": "jsonl"}
    common = {"sequence_length": 256, "held_out_fraction": 0.02}
    # The tokenizer is trained once, on the source; the chats use the base model's, so they are prepared after its training.
    tokenizer = {"train": {"vocab_size": 2048, "max_bytes": 4_000_000}}
    _write_spec("source", {"dataset": "stdlib-source", "inputs": [source], "tokenizer": tokenizer, **common})
    _write_spec("docs", {"dataset": "stdlib-docs", "inputs": [chats], "tokenizer": {"of": "stdlib-base"}, **common})
    _job(["jobs/prepare.py", str(FOLDER / "source.yaml")], FOLDER / "prepare-source.log")


def _write_spec(name: str, spec: dict[str, Any]) -> None:
    (FOLDER / f"{name}.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))


def _job(arguments: Sequence[str], log: Path) -> None:
    """Run an entrypoint on this machine and show its last line."""
    with log.open("wb") as output:
        status = subprocess.run([sys.executable, *arguments], stdout=output, stderr=subprocess.STDOUT, timeout=_TIMEOUT_S, check=False)
    lines = log.read_text(errors="replace").strip().splitlines() or [""]
    if status.returncode:
        raise DemoError(f"{' '.join(arguments)} failed: {lines[-1]} (see {log})")
    print(f"  {lines[-1]}", flush=True)


# --- Training --------------------------------------------------------------------------------------------------------


def _train(cluster: LocalCluster, name: str, with_a_kill: bool) -> tuple[dict[str, Any], Kill | None]:
    """Submit a run as a Ray job and follow it to its end."""
    if name == "adapter":
        _job(["jobs/prepare.py", str(FOLDER / "docs.yaml")], FOLDER / "prepare-docs.log")
    spec = load_spec(f"demo/{name}.yaml", RunSpec)
    with _submitted(cluster, spec, name) as (job, log):
        watch = _follow(spec, job, with_a_kill)
    result = read_result(open_store(cluster.store_url), spec.run)
    if result is None:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise DemoError(f"Run {spec.run} did not finish; the end of {log}:\n{end}")
    print(f"  published {result['published']}; held-out loss {result['held_out_loss_before']:.3f} -> {result['held_out_loss_after']:.3f}")
    return result, watch.cost(result) if with_a_kill else None


@contextmanager
def _submitted(cluster: LocalCluster, spec: RunSpec, name: str) -> Iterator[tuple["subprocess.Popen[bytes]", Path]]:
    """A run as a Ray job, and its log; at the end it is told to go, if it has not ended."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", ".", "--", "python", "jobs/train.py"]
    command.append(f"demo/{name}.yaml")
    _say(f"Training {spec.run} on up to {spec.elastic.max} replica groups: ray {' '.join(command[3:])}")
    log = FOLDER / f"{spec.run}.log"
    with log.open("wb") as output:
        job = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=cluster.environment | _quiet())
        try:
            yield job, log
        finally:
            job.terminate()
            job.wait()


def _quiet() -> dict[str, str]:
    return {"RAY_LOG_TO_DRIVER_EVENT_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}


class _Watch:
    """What was seen of a run: when each step was first known to be completed, and what happened to its groups."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, int]] = []
        self.killed: tuple[float, dict[str, Any]] | None = None
        self.added: tuple[float, int] | None = None
        self._first_groups: set[int] = set()

    @property
    def step(self) -> int:
        """The newest step."""
        return self.seen[-1][1] if self.seen else 0

    def note(self, status: dict[str, Any]) -> None:
        """Take in what the run says of itself."""
        now = time.monotonic()
        if status["step"] > self.step:
            self.seen.append((now, status["step"]))
        groups = set(status["groups"])
        if self.killed is None:
            self._first_groups |= groups
        elif self.added is None and status["is_stepping"] and (new := groups - self._first_groups):
            self.added = now, min(new)
            print(f"  group {min(new)} joined at step {status['step']}", flush=True)

    def kill_newest_group(self, status: dict[str, Any]) -> None:
        """SIGKILL to every worker of the group that came last."""
        victims = [worker for worker in status["workers"] if worker["group"] == max(status["groups"])]
        for victim in victims:
            psutil.Process(victim["pid"]).kill()
        self.killed = time.monotonic(), victims[0] | {"step": self.step}
        print(f"  killed group {victims[0]['group']} (pid {victims[0]['pid']}) at step {self.step}", flush=True)

    def cost(self, result: dict[str, Any]) -> Kill:
        """Raises `DemoError` if nothing was killed, or nothing was added in its place."""
        if self.killed is None or self.added is None:
            raise DemoError("No replica group was killed and replaced while the run went on: this shows nothing.")
        (killed_at, victim), (added_at, added) = self.killed, self.added
        next_at = next(at for at, step in self.seen if at > killed_at and step > victim["step"])
        around = [at for at, _ in self.seen if abs(at - added_at) < 5]
        pause_s = max((after - before for before, after in pairwise(around)), default=0.0)
        return Kill(
            group=victim["group"],
            pid=victim["pid"],
            at_step=victim["step"],
            steps_redone=result["recomputed_steps"],
            seconds_to_next_step=round(next_at - killed_at, 1),
            added_group=added,
            seconds_to_start_it=round(added_at - killed_at, 1),
            longest_pause_as_it_joined_s=round(pause_s, 1),
        )


def _follow(spec: RunSpec, job: "subprocess.Popen[bytes]", with_a_kill: bool) -> _Watch:
    """Show the run's progress until its job ends; if asked to, kill a group once, after a third of the steps and away from a commit."""
    deadline, shown, watch = time.monotonic() + _TIMEOUT_S, "", _Watch()
    while job.poll() is None:
        if time.monotonic() > deadline:
            raise DemoError(f"Run {spec.run} took more than {_TIMEOUT_S} s.")
        status = _status(spec.run)
        if status is not None and status["workers"]:
            watch.note(status)
            shown = _show_progress(shown, f"  step {watch.step} of {spec.training.steps}, {len(status['groups'])} groups", watch.step)
            if with_a_kill and watch.killed is None and watch.step >= spec.training.steps // 3 + 5 and len(status["groups"]) > 1:
                watch.kill_newest_group(status)
        time.sleep(_POLL_S)
    return watch


def _status(run: str) -> dict[str, Any] | None:
    """What a run says of itself, None while it has no driver."""
    try:
        actor = ray.get_actor(coordinator_name(run), NAMESPACE)
        status: dict[str, Any] = ray.get(actor.status.remote(), timeout=30)
    except (ValueError, ray.exceptions.RayActorError):
        return None
    return status


def _show_progress(before: str, line: str, step: int) -> str:
    """Print a line when the step is a multiple of ten that was not shown yet."""
    if step % 10 or line == before:
        return before
    print(line, flush=True)
    return line


def _check_margin(name: str, result: dict[str, Any], margin: float) -> None:
    gain = result["held_out_loss_before"] - result["held_out_loss_after"]
    if not (math.isfinite(gain) and gain >= margin):
        raise DemoError(f"The {name} gained {gain:.3f} nats on held-out tokens; it should be at least {margin}.")


# --- Asking ----------------------------------------------------------------------------------------------------------


def _complete(cluster: LocalCluster, model: str) -> dict[str, str]:
    prompt = "def read(self, size=-1):\n"
    return _ask(f"{cluster.api_url}/completions", {"model": model, "prompt": prompt, "max_tokens": 48, **_SAMPLING}, prompt)


def _chat(cluster: LocalCluster, model: str) -> dict[str, str]:
    question = "def close(self)"
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 48, **_SAMPLING}
    return _ask(f"{cluster.api_url}/chat/completions", body, question)


def _ask(url: str, body: dict[str, Any], question: str) -> dict[str, str]:
    """Ask with streaming and print the answer as it comes."""
    _say(f"Asking {body['model']}: {question!r}")
    print("  ", end="")
    answer = ""
    with httpx.stream("POST", url, json=body | {"stream": True}, timeout=120) as response:
        if response.status_code != 200:
            raise DemoError(f"{url} answered {response.status_code}: {response.read().decode()}")
        for line in response.iter_lines():
            data = line.removeprefix("data: ")
            if not line or data == "[DONE]":
                continue
            choice = json.loads(data)["choices"][0]
            piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
            answer += piece
            print(piece, end="", flush=True)
    print()
    if not answer:
        raise DemoError(f"{body['model']} gave an empty answer.")
    return {"model": body["model"], "question": question, "answer": answer}


def _publish_while_asked(cluster: LocalCluster, before: str) -> dict[str, Any]:
    """Train another version of the adapter while the one before is asked without a pause. Raises `DemoError` if an answer fails."""
    model = before.partition("@")[0]
    _say(f"Asking {model} again and again, while a second run trains its next version on the same cluster")
    with Asking(cluster.api_url, model) as asking:
        asking.wait_for(before)
        result, _ = _train(cluster, "again", with_a_kill=False)
        asking.wait_for(result["published"])
    counted = ", then ".join(f"{number} answers by {version}" for version, number in asking.answers.items())
    print(f"  {counted}; {asking.num_failed} failed", flush=True)
    if asking.num_failed or list(asking.answers) != [before, result["published"]]:
        raise DemoError("A new version takes over without a failed answer, and for good: here it did not.")
    return {"before": before, "after": result["published"], "answers": dict(asking.answers), "failed": asking.num_failed}


# --- One pool --------------------------------------------------------------------------------------------------------


def _tide(cluster: LocalCluster, model: str) -> Tide:
    """Have a long run take the rest of the pool, let many ask at once, and see who has what. Raises `DemoError` if an answer fails."""
    spec = load_spec("demo/tide.yaml", RunSpec)
    with _submitted(cluster, spec, "tide") as (job, log):
        full = _wait_for_groups(spec.run, job, log, lambda number: number == spec.elastic.max)
        print(f"  it has the rest of the pool: {full} groups. Now {_NUM_CLIENTS} clients ask {model} at once", flush=True)
        begun = time.monotonic()
        with Asking(cluster.api_url, model, _NUM_CLIENTS, max_tokens=64) as rush:
            fewer = _wait_for_groups(spec.run, job, log, lambda number: number < full)
            gave_s = time.monotonic() - begun
            print(f"  serving wanted a place: {gave_s:.1f} s after the first question the run goes on with {fewer} groups", flush=True)
            _wait_for_replicas(2)
            served_s = time.monotonic() - begun
            print(f"  a second replica answers after {served_s:.1f} s; the clients stop", flush=True)
        ended = time.monotonic()
        _wait_for_groups(spec.run, job, log, lambda number: number == full)
        again_s = time.monotonic() - ended
        print(f"  {again_s:.1f} s later the run has its {full} groups again", flush=True)
        ray.get(ray.get_actor(coordinator_name(spec.run), NAMESPACE).ask.remote(Stop(spec.run)))
        job.wait(_TIMEOUT_S)
    answers = rush.answers.total()
    if rush.num_failed or not answers:
        raise DemoError(f"Serving gets its place without a failed answer: here {rush.num_failed} failed, and {answers} did not.")
    return Tide(full, fewer, round(gave_s, 1), round(served_s, 1), round(again_s, 1), answers, rush.num_failed)


def _wait_for_groups(run: str, job: "subprocess.Popen[bytes]", log: Path, condition: Callable[[int], bool]) -> int:
    """How many groups take steps, once it meets a condition. Raises `DemoError` if that does not happen."""
    deadline = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline and job.poll() is None:
        status = _status(run)
        if status is not None and status["is_stepping"] and condition(len(status["groups"])):
            return len(status["groups"])
        time.sleep(_POLL_S)
    end = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    raise DemoError(f"Run {run} did not get or give its place; the end of {log}:\n{end}")


def _wait_for_replicas(number: int) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    arbiter = ray.get_actor(ARBITER, NAMESPACE)
    while _num_running(ray.get(arbiter.snapshot.remote())) < number:
        if time.monotonic() > deadline:
            raise DemoError(f"No {number} replicas answer within {_TIMEOUT_S} s.")
        time.sleep(_POLL_S)


def _num_running(snapshot: dict[str, Any]) -> int:
    """Replicas that answer, in what the pool was decided on last (defaults are left out)."""
    replicas = [replica for one in snapshot.get("deployments", ()) for replica in one.get("replicas", ())]
    return sum(replica.get("state", "running") == "running" for replica in replicas)


# --- Telling ---------------------------------------------------------------------------------------------------------


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)


def _print_table(summary: dict[str, Any]) -> None:
    kill = summary["kill"]
    print(f"\n{'run':<14}{'steps':>6}{'samples':>9}{'held-out before':>17}{'after':>8}   published")
    for name in ("base", "adapter"):
        row = summary[name]
        losses = f"{row['held_out_loss_before']:>17.3f}{row['held_out_loss_after']:>8.3f}"
        print(f"{row['run']:<14}{row['steps']:>6}{row['samples']:>9}{losses}   {row['published']}")
    print("(held-out loss in nats per token; before: an untrained model for the base, the base itself for the adapter)")
    print(
        f"\nthe kill       group {kill['group']} died at step {kill['at_step']}: {kill['steps_redone']} steps redone, the next step "
        f"{kill['seconds_to_next_step']} s later, nobody else restarted"
    )
    print(
        f"the addition   group {kill['added_group']} came {kill['seconds_to_start_it']} s after the kill; no step took longer than "
        f"{kill['longest_pause_as_it_joined_s']} s as it joined"
    )
    for answer in summary["answers"]:
        print(f"{answer['model']:<14} {answer['question']!r} -> {answer['answer']!r}")
    update = summary["update"]
    counted = ", then ".join(f"{number} answers by {version}" for version, number in update["answers"].items())
    print(f"the update     {counted}; {update['failed']} failed")
    print(
        "the tide       {groups_before} groups; while many asked {groups_during}; {groups_before} again".format(**summary["tide"]), end=" "
    )
    print("({seconds_to_give} s after the first question, {seconds_to_have_it_again} s after the last)".format(**summary["tide"]), end="; ")
    print("{answers} answers, {failed} failed".format(**summary["tide"]))
    print(f"\nAPI            {summary['api_url']} (ended with the demo)\ndashboard      {summary['dashboard_url']} (ended with the demo)")
    print(f"took           {summary['seconds']} s; all figures: {FOLDER}/summary.json")
    print("go on          make up      serve these two again, with the dashboard, until `make down`")
    print("               make models  list what is published;  jobs/README.md: train on your own text")


if __name__ == "__main__":
    sys.exit(main())
