"""A Ray cluster of several nodes on this machine's loopback, for `recovery`: nodes join and leave while a job goes on.

Invariants: every process is a descendant of a `ray start --block` that was started here and is ended by its pid; the folders
of the nodes go with them. There is no dashboard.
"""

import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tidepool import local_cluster

_START_TIMEOUT_S = 120
_STOP_TIMEOUT_S = 15
_OBJECT_STORE_BYTES = 150 * 2**20
_STARTED = "This command will now block"


@dataclass
class Node:
    """A node: `process` is its `ray start --block`."""

    process: "subprocess.Popen[bytes]"
    ip: str


class Cluster:
    """A head with `head_cpus` logical CPUs; `join` and `leave` add and take away nodes, newest first."""

    def __init__(self, store_url: str, head_cpus: int, variables: Mapping[str, str]) -> None:
        """`variables` are set for all processes of the cluster and its jobs."""
        self._environment = local_cluster.environment(store_url) | {"TIDEPOOL_LOG": "json", "GLOO_SOCKET_IFNAME": "lo", **variables}
        self._environment["RAY_raylet_start_wait_time_s"] = str(_START_TIMEOUT_S)
        self._environment["RAY_worker_niceness"] = "0"  # Ray's workers yield to everything else (15), and on a busy machine hardly run
        self._environment.pop("RAY_TRAIN_ENABLE_STATE_TRACKING")  # it needs a dashboard
        self._folders: list[Path] = []
        self.nodes: list[Node] = []
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        head = {"head": None, "port": port, "include-dashboard": "false", "ray-client-server-port": free_port()}
        self._start_node("127.0.0.1", head | {"num-cpus": head_cpus})

    @property
    def environment(self) -> dict[str, str]:
        """What a process of this cluster needs in its environment.

        The address is for nodes, too: Ray Train's placement group cleaner, an actor, asks the state API of whichever cluster of
        the machine is the newest otherwise, and takes the workers away when that one does not know their controller.
        """
        return self._environment | {"RAY_ADDRESS": self.address}

    @property
    def logs(self) -> list[Path]:
        """The log folders of all nodes that there are or were."""
        return [folder / "ray" / "session_latest" / "logs" for folder in self._folders]

    def join(self, num_cpus: int) -> None:
        """Add a node."""
        self._start_node(f"127.0.0.{len(self._folders) + 1}", {"address": self.address, "num-cpus": num_cpus})

    def leave(self, notice_s: int) -> None:
        """Take the newest node away after a notice, as a spot instance goes: Ray is told at once and the node ends in time."""
        node = self.nodes[-1]
        assert len(self.nodes) > 1, "the head stays"
        deadline = time.monotonic() + notice_s
        subprocess.run(
            [*_RAY, "drain-node", f"--address={self.address}", f"--node-id={_node_id(node)}", "--reason=DRAIN_NODE_REASON_PREEMPTION",
             "--reason-message=benchmark", f"--deadline-remaining-seconds={notice_s}"],
            env=self.environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(max(0.0, deadline - time.monotonic()))
        end(node.process)
        self.nodes.remove(node)

    def stop(self) -> None:
        """End all nodes, the head last, and remove their folders."""
        for node in reversed(self.nodes):
            end(node.process)
        self.nodes.clear()
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)

    def _start_node(self, ip: str, options: Mapping[str, Any]) -> None:
        folder = Path(tempfile.mkdtemp(prefix="tp-rec-"))  # Ray's sockets need a short path
        self._folders.append(folder)
        common = {"node-ip-address": ip, "num-gpus": 0, "object-store-memory": _OBJECT_STORE_BYTES, "temp-dir": folder / "ray"}
        common |= {"dashboard-agent-listen-port": free_port()}
        arguments = [f"--{name}" if value is None else f"--{name}={value}" for name, value in {**options, **common}.items()]
        log = folder / "start.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*_RAY, "start", "--block", "--disable-usage-stats", *arguments],
                env=self.environment | {"TMPDIR": str(folder)},
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # so that Ctrl-C reaches us and not Ray
            )
        self.nodes.append(Node(process, ip))
        deadline = time.monotonic() + _START_TIMEOUT_S
        while _STARTED not in log.read_text(errors="replace"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"A Ray node did not start:\n{log.read_text(errors='replace')}")
            time.sleep(0.1)


_RAY = (sys.executable, "-m", "ray.scripts.scripts")


def end(process: "subprocess.Popen[bytes]", signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGKILL)) -> None:
    """End a process and all that it started: the process by the first signal, what is left in time by SIGKILL."""
    if process.poll() is not None:
        return
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    process.send_signal(signals[0])
    _, left = psutil.wait_procs(family, timeout=_STOP_TIMEOUT_S)
    for one in left:
        one.kill()
    process.wait()
    psutil.wait_procs(left, timeout=_STOP_TIMEOUT_S)


def free_port() -> int:
    """A port of loopback that nobody has now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _node_id(node: Node) -> str:
    """The id that a node has in Ray, from the command line of its raylet."""
    for process in psutil.Process(node.process.pid).children(recursive=True):
        match = re.search(r"--node[-_]id=([0-9a-f]+)", " ".join(process.cmdline()))
        if match:
            return match[1]
    raise RuntimeError(f"The node at {node.ip} has no raylet.")
