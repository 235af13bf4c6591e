"""What is measured on a node, in a process of its own: `python -m tidepool.pool.checks REQUEST` prints JSON and ends. Knows no Ray.

REQUEST is JSON: `{"num_gpus": 2}` for the node by itself, which prints what `findings.read_figures` reads; or one end of an
all-reduce, see `device_checks.Meeting`, which prints `{"exchange": bytes per second}`. Nothing is judged here.

The process ends when its standard input does, so that whoever started it can call it off, even by dying.
"""

import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from shutil import disk_usage
from typing import Any, TypeVar

import numpy as np

from tidepool.pool.gpu_driver import ask_driver

T = TypeVar("T")
Clock = Callable[[], float]
_SIZE = 512
_SPAN_S = 0.1
_CACHE_VARIABLE = "TIDEPOOL_CACHE"  # as in `storage.cache`, which takes seconds to import


def check_node(num_gpus: int) -> dict[str, Any]:
    """The figures of this node, of which Ray counts so many GPUs."""
    rate, is_right = host_rate()
    rates, wrong, exchange = {"the CPU": rate}, [] if is_right else ["the CPU"], None
    gpus = ask_driver() if num_gpus else None
    num_there = min(num_gpus, sum(not gpu["is_lost"] for gpu in gpus or []))
    if num_there:
        from tidepool.pool.device_checks import exchange_among_gpus, gpu_rate  # which bring torch

        for number in range(num_there):
            rates[f"GPU {number}"], is_right = gpu_rate(number)
            wrong += [] if is_right else [f"GPU {number}"]
        exchange = exchange_among_gpus(num_there) if num_there > 1 else None
    return {"disks": disks(folders()), "gpus": gpus, "rates": rates, "wrong": wrong, "exchange": exchange}


def folders() -> list[Path]:
    """Where runs and replicas write on this node: temporary files (Ray's too), and the cache."""
    return [Path(tempfile.gettempdir()), Path(os.environ.get(_CACHE_VARIABLE) or Path.home() / ".cache" / "tidepool")]


def disks(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The disks of folders, which need not be there yet."""
    found = []
    for path in paths:
        usage = disk_usage(next(one for one in (path, *path.parents) if one.exists()))
        found.append({"folder": str(path), "free_bytes": usage.free, "total_bytes": usage.total})
    return found


def host_rate() -> tuple[float, bool]:
    """Multiplications and additions of a matrix product per second of processor time, and whether the product is right.

    Processor time: what else happens on the machine is no fault of its processor.

    The factors hold small whole numbers, so that floats hold the product exactly; it is compared with what integers give, after a
    product of both with a vector (Freivalds, 1977), which takes a fraction of the time.
    """
    numbers = np.arange(_SIZE)
    left, right = (numbers[:, None] * 3 + numbers) % 7, (numbers[:, None] + numbers * 5) % 11
    floats = left.astype(np.float32), right.astype(np.float32)
    product, took_s = fastest(lambda: floats[0] @ floats[1], time.process_time)
    weights = numbers % 13
    is_right = np.array_equal(product.astype(np.int64) @ weights, left @ (right @ weights))
    return 2 * _SIZE**3 / took_s, is_right


def timed(once: Callable[[], T], clock: Clock = time.perf_counter) -> tuple[T, float]:
    """What `once` returns, and the seconds that it took."""
    started = clock()
    result = once()
    return result, max(clock() - started, 1e-9)


def fastest(once: Callable[[], T], clock: Clock = time.perf_counter, span_s: float = _SPAN_S) -> tuple[T, float]:
    """What `once` returns, and the shortest time in seconds that it took in `span_s`, three times at least."""
    times_s: list[float] = []
    while len(times_s) < 3 or sum(times_s) < span_s:
        result, took_s = timed(once, clock)
        times_s.append(took_s)
    return result, min(times_s)


def free_port(host: str) -> int:
    """A port of this address that nobody listens on now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    if "rank" not in request:
        return check_node(request["num_gpus"])
    from tidepool.pool.device_checks import Meeting, all_reduce

    return {"exchange": all_reduce(Meeting(**request))}


def _end_with_stdin() -> None:
    while os.read(sys.stdin.fileno(), 4096):  # without a buffer, whose lock would hold up the end of the process
        pass
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    print(json.dumps(_answer(json.loads(sys.argv[1]))), flush=True)
    os._exit(0)  # process groups may wait for their peers when they are deleted
