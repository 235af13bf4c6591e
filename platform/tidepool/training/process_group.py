"""Process groups of torch that a run makes and leaves as its quorum changes: gloo on CPUs, NCCL on GPUs (run there with one worker only).

NCCL takes one worker a GPU. Where several share one, they meet by gloo, and what they exchange goes through host memory.

Ray Train's own process group spans one replica group and cannot change; these span a quorum. A gloo operation cannot be
aborted, and neither can its group be deleted while one is pending (torch 2.13: both block until the timeout). So:

Invariants:
- An operation is waited for in slices; between them `check` may raise `QuorumLost`.
- A group that was left while an operation was pending is kept, with the tensors that the operation may still write to, until
  the operation has failed (its peer was killed, or the timeout has passed). It is never used again.
- Connecting is interrupted in the same way: it goes on in a thread of its own, which nobody waits for.
"""

import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore

from tidepool.training.group import Group, QuorumLost

Check = Callable[[], None]
"""Raises `QuorumLost` if what goes on is over."""

_SLICE = timedelta(milliseconds=50)
_TIMEOUT = timedelta(seconds=600)
_CONNECT_TIMEOUT = timedelta(seconds=30)


class ProcessGroup:
    """The collectives of `group.Group` on a process group of torch."""

    def __init__(self, group: dist.ProcessGroup, check: Check) -> None:
        self._group, self._check = group, check
        self.rank, self.size = group.rank(), group.size()

    def all_reduce(self, values: Tensor) -> None:
        self._finish(lambda: self._group.allreduce([values]), values)

    def all_to_all(self, sent: Tensor, num_sent: Sequence[int], num_received: Sequence[int]) -> Tensor:
        received = torch.empty(sum(num_received), dtype=sent.dtype, device=sent.device)
        self._finish(lambda: self._group.alltoall_base(received, sent, list(num_received), list(num_sent)), sent, received)
        return received

    def all_gather(self, part: Tensor, whole: Tensor) -> None:
        self._finish(lambda: self._group._allgather_base(whole, part), part, whole)

    def broadcast(self, values: Tensor, source: int) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = source, 0
        self._finish(lambda: self._group.broadcast([values], options), values)

    def _finish(self, begin: Callable[[], Any], *tensors: Tensor) -> None:
        work = None
        try:
            work = begin()
            while not work.is_completed():
                self._wait_a_slice(work)
            work.wait()
        except RuntimeError as error:
            self._leave(work, tensors)
            raise QuorumLost(str(error).partition("\n")[0]) from error
        except QuorumLost:
            self._leave(work, tensors)
            raise

    def _wait_a_slice(self, work: Any) -> None:
        if tensors_on_gpu(self._group):
            time.sleep(0.0002)  # NCCL's `wait` does not block the host; its kernels take longer than this
        else:
            with suppress(RuntimeError):  # the slice has passed, or it failed: then it is completed, and waiting for it once more says why
                work.wait(_SLICE)
        self._check()

    def _leave(self, work: Any, tensors: tuple[Tensor, ...]) -> None:
        if tensors_on_gpu(self._group):
            self._group.abort()
        elif work is not None and not work.is_completed():
            _Abandoned.keep(work, self._group, tensors)


class StagedGroup:
    """The collectives of a group of CPU tensors for tensors on a GPU, through host memory."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self.rank, self.size = group.rank, group.size

    def all_reduce(self, values: Tensor) -> None:
        staged = values.cpu()
        self._group.all_reduce(staged)
        values.copy_(staged)

    def all_to_all(self, sent: Tensor, num_sent: Sequence[int], num_received: Sequence[int]) -> Tensor:
        return self._group.all_to_all(sent.cpu(), num_sent, num_received).to(sent.device)

    def all_gather(self, part: Tensor, whole: Tensor) -> None:
        staged = torch.empty(whole.shape, dtype=whole.dtype)
        self._group.all_gather(part.cpu(), staged)
        whole.copy_(staged)

    def broadcast(self, values: Tensor, source: int) -> None:
        staged = values.cpu()
        self._group.broadcast(staged, source)
        values.copy_(staged)


def tensors_on_gpu(group: dist.ProcessGroup) -> bool:
    """Whether the group is one of NCCL's."""
    return dist.is_nccl_available() and isinstance(group, dist.ProcessGroupNCCL)


class _Abandoned:
    """What a pending operation may still write to, until it is done or has failed."""

    _lock = threading.Lock()
    _kept: list[tuple[Any, object]] = []  # noqa: RUF012

    @classmethod
    def keep(cls, work: Any, *things: object) -> None:
        with cls._lock:
            cls._kept.append((work, things))

    @classmethod
    def drop_old(cls) -> None:
        with cls._lock:
            cls._kept = [one for one in cls._kept if not one[0].is_completed()]


class MeetingPoint:
    """Where the other workers of a quorum find each other, if this worker has rank 0 in it. One for the life of a process."""

    def __init__(self, host: str, is_gpu_shared: bool = False) -> None:
        """Listens on `host`, an address of this node that the other nodes reach, and on no other."""
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        listener.bind((host, 0))
        listener.listen(128)
        self.address = f"{host}:{listener.getsockname()[1]}"
        port = listener.getsockname()[1]
        self._host, self._listener, self._is_gpu_shared = host, listener, is_gpu_shared
        self._store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())

    def connect(self, name: str, address: str, rank: int, size: int, device: torch.device, check: Check) -> Group:
        """Meet `size` - 1 others at the `address` of one of them, under a name that is used once. Raises `QuorumLost`."""
        _Abandoned.drop_old()
        made: list[dist.ProcessGroup] = []
        failed: list[RuntimeError] = []

        def make() -> None:
            try:
                made.append(self._make(name, address, rank, size, device))
            except RuntimeError as error:
                failed.append(error)

        thread = threading.Thread(target=make, name=f"connect {name}", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.01)
            check()
        if failed:
            raise QuorumLost(str(failed[0]).partition("\n")[0]) from failed[0]
        group = ProcessGroup(made[0], check)
        return StagedGroup(group) if device.type == "cuda" and self._is_gpu_shared else group

    def _make(self, name: str, address: str, rank: int, size: int, device: torch.device) -> dist.ProcessGroup:
        host, _, port = address.rpartition(":")
        # A connection of its own, also to the worker's own store: one that waits in vain holds its connection's lock.
        store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=_CONNECT_TIMEOUT)
        prefixed = PrefixStore(name, store)
        made: Any
        if device.type == "cuda" and not self._is_gpu_shared:
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = _TIMEOUT
            made = dist.ProcessGroupNCCL(prefixed, rank, size, nccl)
        else:
            gloo: Any = dist.ProcessGroupGloo
            options = gloo._Options()
            options._timeout = _TIMEOUT
            options._devices = [gloo.create_device(hostname=self._host)]
            made = gloo(prefixed, rank, size, options)
        group: dist.ProcessGroup = made
        return group
