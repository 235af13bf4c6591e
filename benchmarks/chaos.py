"""A run that everything happens to: random kills, hangs, resizes, pauses and store faults, and the run that was left alone.

    python benchmarks/chaos.py [--minutes 10] [--seed 1] [--json FILE] [--quick]

Three replica groups of one worker of one CPU train a small model on a Ray cluster on loopback, with commits every ten steps to an
S3 server (moto) behind a proxy. Every `--every-s` seconds one of these happens, in an order drawn from the seed, none again before
all have been: SIGKILL of a worker; SIGSTOP of one, and SIGCONT seconds later; another number of groups; a pause and a new
submission; a store that answers 503 to all, or to a third of what is asked. After so many minutes the run is stopped. Then the
same run is trained again to the step that it had come to, with nothing happening to it.

`bits_equal`: weights and moments of both. `samples_lost`, `samples_repeated`: digests of (step, shard) that are missing in the
record of the run, or are not those of the samples which belong there. `goodput`: steps a second of the first, from its first
step with all groups to when it takes steps after the last fault, over those of the second, from its first step with all groups.
`faults`: how many happened.
Groups that are started again take the processor from those that train: on a machine with few cores goodput says more
about these than about the protocol.
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import ray
import yaml
from recovery_cluster import Cluster, end
from recovery_sides import MODEL, is_alive

from tests.stores.moto import moto
from tests.stores.proxy import Fault, no_faults, proxy, random_faults
from tests.training.conftest import prepare_dataset
from tidepool.checkpoint import Checkpoints, Incarnation, RunLog
from tidepool.data import Dataset, find_dataset
from tidepool.local_cluster import LocalCluster
from tidepool.messages import NAMESPACE, Pause, Request, Resize, Stop
from tidepool.specs import RunSpec, load_spec
from tidepool.storage import ObjectStore, open_store
from tidepool.training.batch import shard_samples
from tidepool.training.membership import coordinator_name
from tidepool.training.sample_record import read_record, samples_digest
from tidepool.training.state import tensors_digest

NUM_GROUPS = 3
KINDS = ("kill", "hang", "resize", "pause", "store away", "store bad")
_TIMEOUT_S = 300.0
_STORE_FAULT_S = (2.0, 8.0)
_HANG_S = (1.0, 8.0)
Row = dict[str, Any]


class Run:
    """A run on the cluster, as often as it is submitted."""

    def __init__(
        self,
        cluster: Cluster | LocalCluster,
        folder: Path,
        store_url: str,
        name: str,
        steps: int,
        num_shards: int = 6,
        max_groups: int = NUM_GROUPS,
    ) -> None:
        self.name, self._cluster, self._folder = name, cluster, folder
        training = {
            "steps": steps,
            "global_batch_size": 2 * num_shards,
            "num_shards": num_shards,
            "micro_batch_size": 2,
            "precision": "fp32",
        }
        training |= {"evaluate_every_steps": 10**6, "evaluate_num_samples": 1}
        training |= {"optimizer": {"learning_rate": 1e-4, "schedule": "constant"}}
        spec = {"store": store_url, "run": name, "dataset": "tides", "seed": 3, "model": {"config": MODEL}, "training": training}
        spec |= {"checkpoint": {"every_steps": 10, "keep": 3}, "elastic": {"min": 1, "max": max_groups}, "workers": {"max_restarts": 1000}}
        self.path = folder / f"{name}.yaml"
        self.path.write_text(yaml.safe_dump(spec))
        self.spec = load_spec(self.path, RunSpec)
        self.num_submitted = 0

    def submit(self) -> None:
        """Start the driver."""
        self.num_submitted += 1
        with (self._folder / f"{self.name}-{self.num_submitted}.log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "jobs/train.py", str(self.path)],
                cwd=ROOT,
                env=self._cluster.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def ask(self, request: Request) -> int | None:
        """Ask the run; None if it is not in the cluster now."""
        return self._call(lambda coordinator: coordinator.ask.remote(request))

    def status(self) -> Mapping[str, Any] | None:
        """What the run says of itself; None if it is not in the cluster now."""
        return self._call(lambda coordinator: coordinator.status.remote())

    def _call(self, call: Callable[[Any], Any]) -> Any:
        try:
            return ray.get(call(ray.get_actor(coordinator_name(self.name))), timeout=30)
        except (ValueError, ray.exceptions.RayActorError):
            return None

    def wait(self, condition: Callable[[Mapping[str, Any]], bool]) -> Mapping[str, Any]:
        """The status once it meets a condition."""
        deadline = time.monotonic() + _TIMEOUT_S
        while (status := self.status()) is None or not condition(status):
            self._check(deadline)
            time.sleep(0.05)
        found: Mapping[str, Any] = status
        return found

    def wait_for_end(self, exit_status: int) -> None:
        """Until the driver ends, and as it should."""
        found = self.process.wait(_TIMEOUT_S)
        if found != exit_status:
            raise RuntimeError(f"The driver ended with {found}, not {exit_status}:\n{self.output[-4000:]}")

    def _check(self, deadline: float) -> None:
        if self.process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"Run {self.name} does not come so far:\n{self.output[-4000:]}")

    @property
    def output(self) -> str:
        return (self._folder / f"{self.name}-{self.num_submitted}.log").read_text(errors="replace")


class Chaos:
    """What happens to a run."""

    def __init__(self, run: Run, store: Any, seed: int) -> None:
        self.run, self.store, self.chance = run, store, random.Random(seed)
        self._kinds: list[str] = []

    def strike(self) -> str:
        """Let one thing happen, once the run takes steps; returns its name."""
        self.run.wait(steps_on)
        if not self._kinds:
            self._kinds = self.chance.sample(KINDS, len(KINDS))
        name = self._kinds.pop()
        getattr(self, "_" + name.replace(" ", "_"))()
        return name

    def _worker(self) -> int:
        def living(status: Mapping[str, Any]) -> list[int]:
            return sorted(one["pid"] for one in status["workers"] if one["rank"] is not None and is_alive(one["pid"]))

        return self.chance.choice(living(self.run.wait(lambda status: steps_on(status) and bool(living(status)))))

    def _kill(self) -> None:
        os.kill(self._worker(), signal.SIGKILL)

    def _hang(self) -> None:
        pid = self._worker()
        os.kill(pid, signal.SIGSTOP)
        time.sleep(self.chance.uniform(*_HANG_S))
        if is_alive(pid):
            os.kill(pid, signal.SIGCONT)

    def _resize(self) -> None:
        now = self.run.wait(steps_on)["wanted_groups"]
        others = [number for number in range(1, NUM_GROUPS + 1) if number != now]
        self.run.ask(Resize(self.run.name, self.chance.choice(others)))

    def _pause(self) -> None:
        self.run.ask(Pause(self.run.name))
        self.run.wait_for_end(0)
        self.run.submit()

    def _store_away(self) -> None:
        self._with_store(lambda _: Fault.ERROR_BEFORE)

    def _store_bad(self) -> None:
        self._with_store(random_faults(self.chance.randint(0, 10**6), 0.33))

    def _with_store(self, faults: Callable[[Any], Fault]) -> None:
        self.store.before = faults
        time.sleep(self.chance.uniform(*_STORE_FAULT_S))
        self.store.before = no_faults


def together(status: Mapping[str, Any]) -> bool:
    """All groups take steps."""
    return bool(status["is_stepping"]) and len(status["groups"]) == NUM_GROUPS


def digests(store: ObjectStore, run: str) -> tuple[int, list[str]]:
    """The step of the newest commit, and the digests of weights and moments in it."""
    newest = RunLog(store, run).visible_commits()[0]
    checkpoints = Checkpoints(store, run, Incarnation(newest.incarnation, newest))
    return newest.step, [tensors_digest(checkpoints.restore(newest, name)) for name in ("model", "optimizer")]


def samples(store: ObjectStore, spec: RunSpec, num_steps: int) -> tuple[int, int]:
    """How many (step, shard) of a run lack a digest in its record, and how many have another than they should."""
    layout = Dataset(store, find_dataset(store, spec.dataset), "train", 1).layout
    record, shards = read_record(store, spec.run), range(spec.training.num_shards)
    lost = wrong = 0
    for step in range(1, num_steps + 1):
        expected = [samples_digest(shard_samples(step - 1, shard, spec.training, spec.seed, layout)) for shard in shards]
        lost += 0 if step in record else len(shards)
        wrong += sum(one != other for stored in record.get(step, []) for one, other in zip(stored, expected, strict=True))
    return lost, wrong


def steps_on(status: Mapping[str, Any]) -> bool:
    """It takes steps, and its members have said what they hold."""
    return bool(status["is_stepping"]) and status["step"] >= max(1, status["committed"])


def disturb(run: Run, store: Any, seconds: float, num_faults: int | None, every_s: float, seed: int) -> tuple[float, Counter[str]]:
    """Train through the chaos and stop, after so many seconds or faults; returns steps a second, and what happened."""
    chaos, happened = Chaos(run, store, seed), Counter[str]()
    run.submit()
    first = run.wait(together)["step"]
    started = time.monotonic()
    while (passed := time.monotonic() - started) < seconds and happened.total() != num_faults:
        time.sleep(max(0.0, every_s * (1 + happened.total()) - passed))
        if time.monotonic() - started < seconds:
            name = chaos.strike()
            happened[name] += 1
            print(f"{time.monotonic() - started:6.0f} s  {name}", flush=True)
    last, elapsed_s = run.wait(steps_on)["step"], time.monotonic() - started
    run.ask(Stop(run.name))
    run.wait_for_end(143)
    return (last - first) / elapsed_s, happened


def leave_alone(run: Run, steps: int) -> float:
    """Train to the end; returns steps a second with all groups."""
    run.submit()
    first, started = run.wait(together)["step"], time.monotonic()
    newest, newest_at = first, started
    while run.process.poll() is None:
        if (status := run.status()) is not None and status["step"] > newest:
            newest, newest_at = status["step"], time.monotonic()
        time.sleep(0.05)
    run.wait_for_end(0)
    assert newest >= steps - 5, (newest, steps)
    return (newest - first) / (newest_at - started)


def measure(folder: Path, minutes: float, num_faults: int | None, every_s: float, seed: int) -> list[Row]:
    """The rows."""
    with moto(folder / "moto.log") as server, proxy(server.endpoint_url) as between:
        server.create_bucket("chaos")
        variables = {**server.environment, "AWS_ENDPOINT_URL": between.url}
        os.environ.update(variables)
        store_url = "s3://chaos/store"
        prepare_dataset(store_url, folder / "texts")
        store = open_store(store_url)
        cluster = Cluster(store_url, NUM_GROUPS, variables)
        try:
            handler = signal.getsignal(signal.SIGTERM)
            ray.init(cluster.address, namespace=NAMESPACE, logging_level="ERROR", log_to_driver=False)
            signal.signal(signal.SIGTERM, handler)
            run = Run(cluster, folder, store_url, "chaos", 10**6)
            try:
                rate, happened = disturb(run, between, minutes * 60, num_faults, every_s, seed)
            finally:
                end(run.process)
            steps, disturbed = digests(store, run.name)
            alone = Run(cluster, folder, store_url, "alone", steps)
            try:
                undisturbed_rate = leave_alone(alone, steps)
            finally:
                end(alone.process)
            lost, wrong = samples(store, run.spec, steps)
            equal = digests(store, alone.name) == (steps, disturbed)
        finally:
            ray.shutdown()
            cluster.stop()
    return [
        row("goodput", "of the undisturbed run", rate / undisturbed_rate, 0.85, rate / undisturbed_rate >= 0.85)
        | {"steps_per_s": round(rate, 3), "undisturbed_steps_per_s": round(undisturbed_rate, 3), "steps": steps},
        row("bits_equal", "", int(equal), 1, equal),
        row("samples_lost", "shards", lost, 0, lost == 0),
        row("samples_repeated", "shards", wrong, 0, wrong == 0),
        row("faults", "", sum(happened.values()), None, None) | {"by_kind": dict(happened), "seed": seed, "every_s": every_s},
    ]


def row(metric: str, unit: str, ours: float, target: float | None, reached: bool | None) -> Row:
    """One line of the results."""
    value = round(ours, 4)
    return {
        "metric": metric, "unit": unit, "ours": value, "peer": None, "peer_name": None, "ratio": None, "target": target, "reached": reached
    }  # fmt: skip


def main() -> int:
    """Measure, print, and write the JSON; the exit status tells whether bits and samples are as they should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--faults", type=int, metavar="N", help="stop after so many, if that is sooner")
    parser.add_argument("--every-s", type=float, default=20.0, help="seconds between two faults (default: 20)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two minutes")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    head: Row = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Linux; all workers, the store and the proxy on the same cores",
        "date": datetime.now(UTC).isoformat("T", "seconds"),
        "commit": commit,
        "load_average": [round(one, 1) for one in os.getloadavg()],
    }
    with tempfile.TemporaryDirectory(prefix="tp-chaos-") as folder:
        rows = measure(Path(folder), 2.0 if options.quick else options.minutes, options.faults, options.every_s, options.seed)
    for one in rows:
        print(f"{one['metric']:<18} {one['ours']:>10} {one['unit']:<24} target {one['target']}  reached {one['reached']}")
    if options.json:
        options.json.write_text(json.dumps([head, *rows], indent=1) + "\n")
    return 0 if all(one["reached"] is not False for one in rows if one["metric"] != "goodput") else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    sys.exit(main())
