"""How long a new version of an adapter takes to answer, under steady traffic, and what that costs the traffic.

    python benchmarks/publish.py [--json FILE] [--quick] [--replicas N] [--polled]

A Llama of 4 million parameters with random weights is served by two replicas on a local Ray cluster. Sixteen clients ask `bot` for
completions, one after the other, over HTTP; meanwhile 20 versions of `bot` are published, one every two seconds, and announced as a run
announces them (with `--polled` not, so that the gateway finds them by asking the store). `publish_s` is from the moment when the alias
has moved to the first text of an answer by the new version, as its `system_fingerprint` says. An answer is mixed if its text is not
the one that its version gives alone (`bot@N`, greedy, in float32). Everything runs on the same cores, the clients too.
"""

import argparse
import asyncio
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import torch

from benchmarks.engine import MODELS, export
from benchmarks.http_load import Answered, complete, percentile
from tidepool import local_cluster
from tidepool.announcement import announce
from tidepool.models import ModelSource, add_lora, export_adapter, load_model, load_tokenizer
from tidepool.registry import ModelVersion, Registry
from tidepool.scratch import ScratchFolder
from tidepool.specs import LoraSpec
from tidepool.storage import open_store

Row = dict[str, Any]
NUM_CLIENTS, NUM_TOKENS, EVERY_S, WAIT_S = 16, 16, 2.0, 60.0
PROMPTS = [f"def tide_{index}(water):\n    return" for index in range(8)]


def main() -> int:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="five publications")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--polled", action="store_true", help="do not announce what is published")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    head = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Linux, torch {torch.__version__}",
        "date": datetime.now(UTC).isoformat("T", "seconds"),
        "commit": commit,
        "load_average": [round(one, 1) for one in os.getloadavg()],
        "model": MODELS["4m"],
        "replicas": options.replicas,
        "announced": not options.polled,
    }
    with ScratchFolder("publish") as scratch:
        rows = measure(Path(scratch), 5 if options.quick else 20, options.replicas, not options.polled)
    for row in rows:
        mark = {True: "reached", False: "missed", None: ""}[row["reached"]]
        print(f"{row['metric']:<24} {row['ours']:>10} {row['unit']:<12} (target {row['target']}) {mark}")
    if options.json:
        options.json.write_text(json.dumps([head, *rows], indent=1) + "\n")
    return 0


def measure(folder: Path, num_publications: int, num_replicas: int, is_announced: bool) -> list[Row]:
    """The rows, from a cluster of this measurement's own."""
    store_url = (folder / "store").as_uri()
    versions = Versions(store_url, folder)
    versions.publish()
    cluster = local_cluster.start(store_url, num_cpus=8, log=folder / "ray.log")
    try:
        replicas = {"num_replicas": num_replicas, "cpus_per_replica": 0.5}
        local_cluster.serve(cluster, ["base", "bot"], replicas=replicas, engine={"weights": "fp32"})
        if is_announced:
            import ray

            ray.init(cluster.address, log_to_driver=False)
        scene = Scene(cluster.http_port, versions, is_announced)
        return asyncio.run(scene.play(num_publications))
    finally:
        local_cluster.stop(cluster)


class Versions:
    """Versions of an adapter that differ in their weights, published as a run does."""

    def __init__(self, store_url: str, folder: Path) -> None:
        self._folder, self._registry = folder, Registry(open_store(store_url))
        path = export("4m", folder)
        version = self._registry.publish("base", "full", path, lineage={"benchmark": "publish"}, metrics={})
        self._base = ModelSource(version.ref, version.digest, version)
        self._model, self._tokenizer = load_model(path, torch.float32), load_tokenizer(path)
        self._num = 0

    def publish(self) -> ModelVersion:
        """The next version of `bot`; its alias points to it when this returns."""
        self._num += 1
        adapted = add_lora(copy.deepcopy(self._model), LoraSpec(rank=8), self._num, self._base.ref)
        generator = torch.Generator().manual_seed(self._num)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        folder = self._folder / f"adapter-{self._num}"
        export_adapter(adapted, self._tokenizer, folder, self._base)
        lineage = {"benchmark": "publish", "step": self._num}
        return self._registry.publish(
            "bot", "adapter", folder, base=self._base.ref, base_digest=self._base.digest, lineage=lineage, metrics={}
        )


class Scene:
    """Clients that ask without a pause, and a publisher."""

    def __init__(self, port: int, versions: Versions, is_announced: bool) -> None:
        self._port, self._versions, self._is_announced = port, versions, is_announced
        self._answers: list[tuple[str, Answered]] = []
        self._first_seen: dict[str, float] = {}
        self._seen = asyncio.Event()
        self._is_over = False

    async def play(self, num_publications: int) -> list[Row]:
        """Publish under traffic, then compare all answers with those of their versions alone."""
        clients = [asyncio.create_task(self._ask_on(index)) for index in range(NUM_CLIENTS)]
        took_s: list[float] = []
        refs = ["bot@1"]
        for _ in range(num_publications):
            await asyncio.sleep(EVERY_S)
            version = await asyncio.to_thread(self._versions.publish)
            moved_at = time.perf_counter()
            if self._is_announced:
                await asyncio.to_thread(announce, version.name)
            refs.append(version.ref)
            took_s.append(await self._first_answer_of(version.ref) - moved_at)
            print(f"{version.ref} answers after {took_s[-1]:.2f} s", file=sys.stderr, flush=True)
        await asyncio.sleep(EVERY_S)
        self._is_over = True
        await asyncio.gather(*clients)
        alone = {(ref, prompt): await self._text_alone(ref, prompt) for ref in refs for prompt in PROMPTS}
        failures = [one for _, one in self._answers if one.is_failure]
        for one in failures[:5]:
            print(f"failed: {one.status} {one.error}", file=sys.stderr)
        mixed = [
            one
            for prompt, one in self._answers
            if not one.is_failure and "".join(one.texts) != alone[one.fingerprint.rpartition("-")[0], prompt]
        ]
        num_versions = len({one.fingerprint for _, one in self._answers if not one.is_failure})
        print(f"{len(self._answers)} answers by {num_versions} versions", file=sys.stderr)
        assert num_versions == num_publications + 1, "a version never answered"
        return [
            _row("publish_s", "s", statistics.median(took_s), 2.0, took_s),
            _row("publish_p99_s", "s", percentile(took_s, 0.99), 2.0, took_s),
            _row("failures", "answers", len(failures), 0, []),
            _row("mixed", "answers", len(mixed), 0, []),
            _row("answers", "answers", len(self._answers), None, []),
        ]

    async def _ask_on(self, index: int) -> None:
        prompt = PROMPTS[index % len(PROMPTS)]
        while not self._is_over:
            answered = await complete("127.0.0.1", self._port, _body("bot", prompt))
            self._answers.append((prompt, answered))
            ref = answered.fingerprint.rpartition("-")[0]
            if answered.times and ref not in self._first_seen:
                self._first_seen[ref] = answered.times[0]
                self._seen.set()

    async def _first_answer_of(self, ref: str) -> float:
        async with asyncio.timeout(WAIT_S):
            while ref not in self._first_seen:
                self._seen.clear()
                await self._seen.wait()
        return self._first_seen[ref]

    async def _text_alone(self, ref: str, prompt: str) -> str:
        answered = await complete("127.0.0.1", self._port, _body(ref, prompt))
        assert not answered.is_failure, (answered.status, answered.error)
        assert answered.fingerprint.rpartition("-")[0] == ref
        return "".join(answered.texts)


def _body(model: str, prompt: str) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0}


def _row(metric: str, unit: str, ours: float, target: float | None, runs: list[float]) -> Row:
    return {
        "metric": metric,
        "unit": unit,
        "ours": round(ours, 3),
        "peer": None,
        "peer_name": None,
        "ratio": None,
        "target": target,
        "reached": None if target is None else ours <= target,
        "ours_runs": [round(one, 3) for one in runs],
        "peer_runs": [],
    }


if __name__ == "__main__":
    sys.exit(main())
