"""What the gateway costs: 1,000 streams at a time on one gateway, before a model that costs nothing.

    python benchmarks/load.py [--json FILE] [--quick] [--connections N]

The gateway (`build_gateway`) runs behind uvicorn in a process of its own (`load_sides.py`). The peers are two applications that send the
very bytes which the gateway sends, in the same pieces, when the same model has made their tokens: one of a few lines with nothing
between it and uvicorn, and one by Starlette's responses. The clients are a process of their own, too (`load_clients.py`), and read every
answer: one that is not the expected one is a failure.

- `requests_per_s`: streamed chats of 16 tokens, 1,000 connections that ask again as soon as they are answered; `..._whole`: the same, not
  streamed; `events_per_s`: streamed chats of 128 tokens. `cpu_us_...` is the processor time of the server's process for each of them: on
  two cores the clients' process is the other one.
- `first_event_s`, `end_s`: the 50th and 99th percentile over the streams of `requests_per_s`, from the request on.
- `least_progress`: 1,000 streams go on at once from the middle; how far the last of them is when the first one is done.
- `bytes_per_stream`: how much larger the process is while 1,000 streams are open and have got half of their tokens, in a process that has
  had 50 before. `leaked_bytes_per_stream`, `leaked_objects_per_stream`: how much larger it is, and how many more of Python's objects it
  holds, after six such rounds than after two; every second time half of the clients leave in the middle.
- `failures`: answers that were not the expected one, of all of these.

All sides are alive together and take turns, in an order that changes; each turn of memory has new processes. `ratio` is the median of the
turns' ratios.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import httpx

ROOT = Path(__file__).resolve().parents[1]
WORD = " tide"
PEERS = {"uvicorn": "bare uvicorn", "starlette": "bare Starlette"}
SIDES = ["ours", *PEERS]
_END_TIMEOUT_S = 30
_SETTLE_TIMEOUT_S = 60.0
_NUM_MEMORY_ROUNDS, _FIRST_ROUND = 6, 2
Row = dict[str, Any]
Found = dict[str, list[float]]


@dataclass(frozen=True)
class Work:
    """What each connection asks for, and how often."""

    num_tokens: int
    is_streamed: bool = True
    num_each: int = 4

    @property
    def question(self) -> dict[str, Any]:
        """For `load_clients`."""
        messages = [{"role": "user", "content": "What do the tides do?"}]
        body = {"model": "tides", "messages": messages, "max_tokens": self.num_tokens, "stream": self.is_streamed}
        return {"body": body, "expected": WORD * self.num_tokens}


@dataclass(frozen=True)
class Rate:
    """One kind of work, and how many of what is counted stand in one request."""

    metric: str
    cpu_metric: str
    work: Work
    num_counted: int = 1


SHORT, LONG = Work(16), Work(128, num_each=1)
RATES = [
    Rate("requests_per_s", "cpu_us_per_request", SHORT),
    Rate("requests_per_s_whole", "cpu_us_per_request_whole", Work(16, is_streamed=False)),
    Rate("events_per_s", "cpu_us_per_event", LONG, LONG.num_tokens),
]
UNITS = {
    **{rate.metric: f"{rate.metric.partition('_')[0]}/s" for rate in RATES},
    **{rate.cpu_metric: "us" for rate in RATES},
    **{f"{name}_{percentile}": "s" for name in ("first_event_s", "end_s") for percentile in ("p50", "p99")},
    "least_progress": "of an answer",
    "bytes_per_stream": "bytes",
    "leaked_bytes_per_stream": "bytes",
    "leaked_objects_per_stream": "objects",
    "failures": "answers",
}
TARGETS = {"failures": 0.0, "leaked_objects_per_stream": 0.01}
"""Of ours alone: at most so much."""


# --- Processes -------------------------------------------------------------------------------------------------------


class LineProcess:
    """A process that answers a JSON object a line; it ends when it is left."""

    def __init__(self, *command: str) -> None:
        self._process = subprocess.Popen([sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._questions, self._answers = self._process.stdin, self._process.stdout

    def ask(self, **question: Any) -> Any:
        """One line out, one line in. Raises `RuntimeError` or `BrokenPipeError` if the process has ended."""
        self._questions.write(json.dumps(question) + "\n")
        self._questions.flush()
        return self.read()

    def read(self) -> Any:
        """The next line. Raises `RuntimeError` if the process has ended."""
        line = self._answers.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} ended with {self._process.wait()}: what it said stands above.")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._questions.close()
        try:
            self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()


class Clients(LineProcess):
    """All clients."""

    def __init__(self) -> None:
        super().__init__(str(ROOT / "benchmarks" / "load_clients.py"))


class Server(LineProcess):
    """One side, and what its clients do."""

    def __init__(self, side: str, clients: Clients) -> None:
        super().__init__(str(ROOT / "benchmarks" / "load_sides.py"), side)
        self._clients = clients
        self._port = self.read()["port"]
        self._num_tasks = self.look()["num_tasks"]

    def look(self) -> dict[str, Any]:
        """What the process holds now; see `load_sides.look`."""
        found: dict[str, Any] = self.ask(do="look")
        return found

    def settled(self) -> dict[str, Any]:
        """The same, once the last connection is closed and what it began has ended. Raises `TimeoutError`."""
        deadline = time.monotonic() + _SETTLE_TIMEOUT_S
        while (found := self.look())["num_connections"] > 0 or found["num_tasks"] > self._num_tasks:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{_SETTLE_TIMEOUT_S:g} s after its last client the server holds {found}.")
            time.sleep(0.05)
        return found

    def load(self, work: Work, num_connections: int) -> dict[str, Any]:
        """Requests one after another on each connection: what `load_clients` tells, and the server's processor time."""
        used_s = self.ask(do="account")["cpu_s"]
        num_requests = num_connections * work.num_each
        found = self._clients.ask(do="ask", num_requests=num_requests, **self._common(work, num_connections))
        return {**found, "cpu_s": self.ask(do="account")["cpu_s"] - used_s}

    @contextmanager
    def held(self, work: Work, num_connections: int, at: int, num_leaving: int = 0) -> Iterator[dict[str, Any]]:
        """Inside, each connection has a stream that has got its first `at` tokens; what came of them stands in the result afterwards.

        The first ones of them leave before the others go on.
        """
        self.ask(do="hold", at=at)
        num_events = at + 1  # the first one of a chat has no token
        self._clients.ask(do="begin", num_requests=num_connections, num_events=num_events, **self._common(work, num_connections))
        found: dict[str, Any] = {}
        yield found
        self._clients.ask(do="leave", num_connections=num_leaving)
        self.ask(do="release")
        found.update(self._clients.ask(do="finish"))
        found.update(self.ask(do="forget"))

    def copy(self, other: "Server", work: Work) -> None:
        """Send from now on what another one sends."""
        stream, whole = (other.answer(Work(work.num_tokens, is_streamed)) for is_streamed in (True, False))
        self.ask(do="copy", stream=[f"{event}\n\n" for event in stream.split("\n\n")[:-1]], whole=whole)

    def answer(self, work: Work) -> str:
        """One answer as it comes."""
        return httpx.post(f"http://127.0.0.1:{self._port}/v1/chat/completions", json=work.question["body"]).text

    def _common(self, work: Work, num_connections: int) -> dict[str, Any]:
        return {"port": self._port, "num_connections": num_connections, **work.question}


# --- Turns -----------------------------------------------------------------------------------------------------------


def measure_rates(clients: Clients, num_connections: int, num_rounds: int) -> dict[str, Found]:
    """Rates, latency and fairness of all sides, by metric."""
    found: dict[str, Found] = {side: defaultdict(list) for side in SIDES}
    with ExitStack() as stack:
        servers = {side: stack.enter_context(Server(side, clients)) for side in SIDES}
        for number in range(-1, num_rounds):  # the first one warms up
            noted = found if number >= 0 else {side: defaultdict(list) for side in SIDES}
            order = random.Random(number).sample(SIDES, len(SIDES))
            for rate in RATES:
                for peer in PEERS:
                    servers[peer].copy(servers["ours"], rate.work)
                for side in order:
                    note_rate(noted[side], rate, servers[side].load(rate.work, num_connections))
            for side in order:  # with the last work, which the peers have copied
                with servers[side].held(LONG, num_connections, LONG.num_tokens // 2) as turn:
                    pass
                noted[side]["least_progress"].append(turn["least_progress"])
                noted[side]["failures"].append(turn["num_failures"])
    return found


def note_rate(found: Found, rate: Rate, turn: dict[str, Any]) -> None:
    """What one turn adds to the figures of its side."""
    num_counted = turn["num_answers"] * rate.num_counted
    found[rate.metric].append(num_counted / turn["elapsed_s"])
    found[rate.cpu_metric].append(1e6 * turn["cpu_s"] / num_counted)
    found["failures"].append(turn["num_failures"])
    if rate.metric == "requests_per_s":
        for name in ("first_event_s", "end_s"):
            percentiles = statistics.quantiles(turn[name], n=100)
            found[f"{name}_p50"].append(percentiles[49])
            found[f"{name}_p99"].append(percentiles[98])


def measure_memory(clients: Clients, num_connections: int, num_rounds: int) -> dict[str, Found]:
    """Of all sides, in new processes each time."""
    found: dict[str, Found] = {side: defaultdict(list) for side in SIDES}
    for _ in range(num_rounds):
        with ExitStack() as stack:
            servers = {side: stack.enter_context(Server(side, clients)) for side in SIDES}
            for side in SIDES:
                if side in PEERS:
                    servers[side].copy(servers["ours"], SHORT)
                note_memory(found[side], servers[side], num_connections)
    return found


def note_memory(found: Found, server: Server, num_connections: int) -> None:
    """Hold many streams, some of which leave, and see what is left of them."""
    with server.held(SHORT, 50, SHORT.num_tokens // 2):
        pass
    at_rest = [server.settled()]
    for number in range(_NUM_MEMORY_ROUNDS):
        with server.held(SHORT, num_connections, SHORT.num_tokens // 2, num_connections // 2 if number % 2 else 0) as turn:
            if number == 0:
                found["bytes_per_stream"].append((server.look()["rss_bytes"] - at_rest[0]["rss_bytes"]) / num_connections)
        found["failures"].append(turn["num_failures"])
        at_rest.append(server.settled())
    num_streams = num_connections * (_NUM_MEMORY_ROUNDS - _FIRST_ROUND)
    for metric, name in (("leaked_bytes_per_stream", "rss_bytes"), ("leaked_objects_per_stream", "num_objects")):
        found[metric].append((at_rest[-1][name] - at_rest[_FIRST_ROUND][name]) / num_streams)


# --- Rows ------------------------------------------------------------------------------------------------------------


def rows_of(found: dict[str, Found]) -> list[Row]:
    """A row for each metric and peer; the failures of all turns are added up."""
    rows = []
    for metric, unit in UNITS.items():
        if metric in found["ours"]:
            rows += [row(metric, unit, found["ours"][metric], found[peer][metric], peer) for peer in PEERS]
    return rows


def row(metric: str, unit: str, ours: list[float], theirs: list[float], peer: str) -> Row:
    """One metric against one peer."""
    middle = sum if metric == "failures" else statistics.median
    ratios = [one / other for one, other in zip(ours, theirs, strict=True) if other > 0]
    target = TARGETS.get(metric)
    return {
        "metric": metric,
        "unit": unit,
        "ours": _rounded(middle(ours)),
        "peer": _rounded(middle(theirs)),
        "peer_name": PEERS[peer],
        "ratio": _rounded(statistics.median(ratios)) if len(ratios) == len(ours) else None,
        "target": target,
        "reached": None if target is None else middle(ours) <= target,
        "ours_runs": [_rounded(one) for one in ours],
        "peer_runs": [_rounded(one) for one in theirs],
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def show(rows: list[Row]) -> None:
    """Print the table."""
    for one in rows:
        mark = {True: "reached", False: "missed", None: ""}[one["reached"]]
        ratio = "-" if one["ratio"] is None else f"x{one['ratio']}"
        print(f"{one['metric']:<28} {one['ours']:>10,g} {one['unit']:<13} {one['peer']:>10,g} {one['peer_name']:<15} {ratio:<10} {mark}")


def main() -> int:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--connections", type=int, default=1000, metavar="N")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    head = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Linux, Python {platform.python_version()}; all on loopback",
        "date": datetime.now(UTC).isoformat("T", "seconds"),
        "commit": commit,
        "load_average": [round(one, 1) for one in os.getloadavg()],
        "connections": options.connections,
    }
    with Clients() as clients:
        found = measure_rates(clients, options.connections, 1 if options.quick else 5)
        memory = measure_memory(clients, options.connections, 1 if options.quick else 3)
    for side in SIDES:
        memory[side]["failures"] += found[side]["failures"]
        found[side] |= memory[side]
    rows = rows_of(found)
    show(rows)
    if options.json:
        options.json.write_text(json.dumps([head, *rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
