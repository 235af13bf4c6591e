"""Checks of a node that need torch: products on its GPUs, and all-reduces between processes. Imported by the process of a check alone.

All-reduces go by gloo between CPUs and by NCCL between GPUs. The one between GPUs has not run yet: it takes two.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from tidepool.pool.checks import fastest, free_port, timed

_SIZE = 4096
_SPAN_S = 0.5
_TIMEOUT = timedelta(seconds=60)
_BYTES = {"cpu": 2**24, "cuda": 2**28}
_NUM_REDUCED = 8


@dataclass(frozen=True)
class Meeting:
    """One end of an all-reduce: processes of `rank` 0 to `size` - 1 meet at the `address` of the first.

    `host` is this process's own address, on which gloo listens. `gpu` is the number of the GPU, None for the CPU.
    """

    rank: int
    size: int
    address: str
    host: str
    gpu: int | None = None


def gpu_rate(number: int) -> tuple[float, bool]:
    """As `checks.host_rate`, on a GPU."""
    device = torch.device("cuda", number)
    numbers = torch.arange(_SIZE, device=device)
    left, right = (numbers[:, None] * 3 + numbers) % 7, (numbers[:, None] + numbers * 5) % 11
    floats = left.float(), right.float()

    def once() -> torch.Tensor:
        product = floats[0] @ floats[1]
        torch.cuda.synchronize(device)
        return product

    product, took_s = fastest(once, span_s=_SPAN_S)
    weights = (numbers % 13).double()
    is_right = torch.equal(product.double() @ weights, left.double() @ (right.double() @ weights))  # whole numbers below 2^53
    return 2 * _SIZE**3 / took_s, is_right


def all_reduce(meeting: Meeting) -> float:
    """Bytes per second that each end moves in an all-reduce (2 (n - 1) / n of its size, as nccl-tests count). Raises if it is wrong."""
    host, _, port = meeting.address.rpartition(":")
    store = TCPStore(host, int(port), meeting.size, is_master=meeting.rank == 0, timeout=_TIMEOUT)
    device = torch.device("cpu") if meeting.gpu is None else torch.device("cuda", meeting.gpu)
    group = _group(store, meeting, device)
    values = torch.empty(_BYTES[device.type] // 4, device=device)

    def once() -> None:
        values.fill_(float(meeting.rank + 1))
        group.allreduce([values]).wait()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    once()  # which connects
    times_s = [timed(once)[1] for _ in range(_NUM_REDUCED)]  # a fixed number: every end makes the same calls
    expected = meeting.size * (meeting.size + 1) / 2
    if not bool((values == expected).all()):
        raise ArithmeticError(f"an all-reduce of {meeting.size} ends gave {values.min().item()} and not {expected}")
    group.allreduce([torch.zeros(1, device=device)]).wait()  # no end leaves while another measures
    return 2 * (meeting.size - 1) / meeting.size * values.nbytes / min(times_s)


def _group(store: TCPStore, meeting: Meeting, device: torch.device) -> dist.ProcessGroup:
    made: Any
    if device.type == "cuda":
        torch.cuda.set_device(device)
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = _TIMEOUT
        made = dist.ProcessGroupNCCL(store, meeting.rank, meeting.size, nccl)
    else:
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._timeout = _TIMEOUT
        options._devices = [gloo.create_device(hostname=meeting.host)]
        made = gloo(store, meeting.rank, meeting.size, options)
    group: dist.ProcessGroup = made
    return group


def exchange_among_gpus(num_gpus: int) -> float:
    """Bytes per second of an all-reduce among the GPUs of this node, a process each. Raises if one fails."""
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    ends = []
    for rank in range(num_gpus):
        request = json.dumps(asdict(Meeting(rank, num_gpus, address, "127.0.0.1", rank)))
        command = [sys.executable, "-m", "tidepool.pool.checks", request]
        ends.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    printed = []
    for end in ends:
        assert end.stdout is not None
        printed.append(end.stdout.read())  # to its end: `communicate` would close its input, and so end it
        end.wait()
    return min(float(json.loads(lines.splitlines()[-1])["exchange"]) for lines in printed)
