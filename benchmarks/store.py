"""Our store against raw obstore and s3fs on a real Ceph RGW, and how much of the commit protocol its tests have tried.

    python benchmarks/store.py [--json FILE] [--quick]

Root only: it starts a Ceph of its own on loopback (see tests/stores/ceph.py). Every figure is a median over runs in which
ours and the peers alternate; each run has keys of its own. Ours also promises what the peers do not: a put creates or fails.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import obstore
import s3fs
from obstore.store import S3Store

from tests.stores.ceph import CephError, ceph
from tests.stores.s3 import S3Server
from tidepool.storage import ObjectStore, open_store

_CHUNK_BYTES = 16 * 2**20
"""What a checkpoint is read back in."""
_TESTS = ("tests/checkpoint/test_faults.py", "tests/checkpoint/test_model.py")
Call = Callable[[str], None]
Row = dict[str, Any]


class Work:
    """The same work for ours and the peers: a large file up and down, and many small objects, one after the other."""

    def __init__(self, server: S3Server, folder: Path, is_quick: bool) -> None:
        self.large_bytes, self.num_small = (32 * 2**20, 50) if is_quick else (200 * 2**20, 300)
        self.file, self._small = folder / "large", random.Random(1).randbytes(1024)
        self.file.write_bytes(random.Random(2).randbytes(self.large_bytes))
        server.create_bucket("bench")
        self._ours: ObjectStore = open_store("s3://bench")
        self._obstore = S3Store("bench", client_options={"allow_http": True})
        self._s3fs = s3fs.S3FileSystem(
            key=server.access_key,
            secret=server.secret_key,
            endpoint_url=server.endpoint_url,
            skip_instance_cache=True,
            use_listings_cache=False,
        )

    def metrics(self) -> dict[tuple[str, str], tuple[float, dict[str, Call]]]:
        """Metric and unit: how much of it one run does, and the calls that do it under a key of their own."""
        mib, many = self.large_bytes / 2**20, float(self.num_small)
        return {
            ("put of one large file", "MiB/s"): (mib, {
                "ours": lambda key: self._ours.put_if_absent(key, self.file),
                "obstore": lambda key: void(obstore.put(self._obstore, key, self.file)),
                "s3fs": lambda key: self._s3fs.put_file(str(self.file), f"bench/{key}"),
            }),
            ("get of one large object", "MiB/s"): (mib, {
                "ours": self._get_in_chunks,
                "obstore": lambda key: void(bytes(obstore.get(self._obstore, key).bytes())),
                "s3fs": lambda key: void(self._s3fs.cat_file(f"bench/{key}")),
            }),
            ("puts of 1 KiB", "puts/s"): (many, {
                "ours": lambda key: self._repeat(lambda one: self._ours.put_if_absent(one, self._small), key),
                "obstore": lambda key: self._repeat(lambda one: void(obstore.put(self._obstore, one, self._small)), key),
                "s3fs": lambda key: self._repeat(lambda one: self._s3fs.pipe_file(f"bench/{one}", self._small), key),
            }),
            ("gets of 1 KiB", "gets/s"): (many, {
                "ours": lambda key: self._repeat(lambda one: void(self._ours.get(one)), key),
                "obstore": lambda key: self._repeat(lambda one: void(bytes(obstore.get(self._obstore, one).bytes())), key),
                "s3fs": lambda key: self._repeat(lambda one: void(self._s3fs.cat_file(f"bench/{one}")), key),
            }),
        }  # fmt: skip

    def _repeat(self, call: Call, key: str) -> None:
        for number in range(self.num_small):
            call(f"{key}/{number}")

    def _get_in_chunks(self, key: str) -> None:
        for start in range(0, self.large_bytes, _CHUNK_BYTES):
            self._ours.get(key, start, _CHUNK_BYTES)


def void(_value: object) -> None:
    """Drop a value."""


def measure(work: Work, num_runs: int) -> list[Row]:
    """Alternate ours and the peers; each reads what it has put itself."""
    rates: dict[tuple[str, str], dict[str, list[float]]] = {}
    for run in range(-1, num_runs):  # the first one warms up
        names = ["ours", "obstore", "s3fs"]
        random.Random(run).shuffle(names)
        for name in names:
            keys = {"large": f"{name}-{run}-large", "small": f"{name}-{run}-small"}
            for metric, (amount, calls) in work.metrics().items():
                started = time.perf_counter()
                calls[name](keys["small" if "1 KiB" in metric[0] else "large"])
                if run >= 0:
                    rates.setdefault(metric, {}).setdefault(name, []).append(amount / (time.perf_counter() - started))
    return [
        row(metric, unit, rates[metric, unit]["ours"], peer, rates[metric, unit][peer])
        for metric, unit in rates
        for peer in ("obstore", "s3fs")
    ]


def row(metric: str, unit: str, ours: list[float], peer_name: str | None, peer: list[float] | None) -> Row:
    """One line of the results."""
    mine, theirs = statistics.median(ours), statistics.median(peer) if peer else None
    return {
        "metric": metric,
        "unit": unit,
        "ours": round(mine, 1),
        "peer": round(theirs, 1) if theirs else None,
        "peer_name": peer_name,
        "ratio": round(mine / theirs, 2) if theirs else None,
        "target": None,
        "reached": None,
        "ours_runs": [round(one, 1) for one in ours],
        "peer_runs": [round(one, 1) for one in peer] if peer else None,
    }


def count_what_tests_tried(folder: Path, environment: dict[str, str]) -> list[Row]:
    """Run the tests of the commit protocol on this Ceph's twin and add up what they say they tried."""
    report = folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "--s3", "ceph", "-o", "junit_family=xunit1", f"--junit-xml={report}", *_TESTS]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    rows = []
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        for one in case.iter("property"):
            unit = {"kill_points": "kill points", "states": "states"}[str(one.get("name"))]
            rows.append(row(f"{case.get('name')}", unit, [float(str(one.get("value")))], None, None))
    return rows


def show(rows: list[Row]) -> None:
    """Print the table."""
    for one in rows:
        against = f"  {one['peer']:>8} {one['peer_name']:<8} x{one['ratio']}" if one["peer"] else ""
        print(f"{one['metric'][:70]:<70} {one['ours']:>9} {one['unit']:<12}{against}")


def main() -> int:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="small files, two runs, and no tests")
    options = parser.parse_args()
    before = dict(os.environ)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    head = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Linux; Ceph RGW and its OSD on the same cores, loopback",
        "date": datetime.now(UTC).isoformat("T", "seconds"),
        "commit": commit,
        "load_average": [round(one, 1) for one in os.getloadavg()],  # what else the machine did meanwhile
    }
    try:
        with ceph() as cluster, tempfile.TemporaryDirectory() as folder:
            os.environ.update(cluster.server.environment)
            rows = measure(Work(cluster.server, Path(folder), options.quick), 2 if options.quick else 5)
    except CephError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not options.quick:
        with tempfile.TemporaryDirectory() as folder:
            rows += count_what_tests_tried(Path(folder), before)
    show(rows)
    if options.json:
        options.json.write_text(json.dumps([head, *rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
