"""A second node of a Ray cluster on this machine, at another address of loopback."""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tidepool import local_cluster
from tidepool.local_cluster import LocalCluster

TIMEOUT_S = 240
ADDRESS = "127.0.0.2"
GRACE_S = 60


@dataclass(frozen=True)
class Node:
    """The process of a node's `ray start`, and the node's own folder."""

    process: "subprocess.Popen[bytes]"
    folder: Path

    def kill(self) -> None:
        """SIGKILL to everything that the node runs, as when it loses its power."""
        family = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        for one in family:
            one.suspend()  # so that none of them sees the others die
        for one in family:
            one.kill()
        self.process.wait()

    def drain(self, cluster: LocalCluster, node_id: str) -> None:
        """Tell the cluster that the node will be taken back in two minutes."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address, "--node-id", node_id]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test", "--deadline-remaining-seconds", "120"]
        subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_S)


def end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and all that it started, by their pids."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)] if process.poll() is None else []
    process.terminate()
    _, left = psutil.wait_procs(family, timeout=20)
    for one in left:
        one.kill()
    process.wait()
    psutil.wait_procs(left, timeout=20)


@contextmanager
def second_node(cluster: LocalCluster, num_cpus: int, packages: Path | None = None, notice: bool = False) -> Iterator[Node]:
    """A node without the library on its path, in a folder of its own; its address is another one of loopback.

    `packages` is a folder of packages that it finds before those of the environment. With `notice`, `tidepool.spot_notice` runs it.
    """
    folder = Path(tempfile.mkdtemp(prefix="tidepool-second-"))  # Ray's sockets need a short path
    ours = ("PYTHONPATH", "TIDEPOOL_STORE", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    environment = {name: value for name, value in local_cluster.environment("file:///nowhere").items() if name not in ours}
    environment["TIDEPOOL_CACHE"] = str(folder / "cache")
    if packages is not None:
        environment["PYTHONPATH"] = str(packages)
    options = {"address": cluster.address, "node-ip-address": ADDRESS, "num-cpus": num_cpus, "num-gpus": 0}
    options |= {"object-store-memory": 100 * 2**20, "temp-dir": str(folder / "ray"), "dashboard-agent-listen-port": free_port()}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    if notice:
        command = [sys.executable, "-m", "tidepool.spot_notice", f"--address={cluster.address}", f"--grace={GRACE_S}", *command]
    with (folder / "ray.log").open("wb") as output:
        process = subprocess.Popen(
            [*command, *(f"--{name}={value}" for name, value in options.items())],
            env=environment,
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while "This command will now block" not in (folder / "ray.log").read_text():
            assert process.poll() is None, (folder / "ray.log").read_text()
            assert time.monotonic() < deadline, (folder / "ray.log").read_text()
            time.sleep(0.1)
        yield Node(process, folder)
    finally:
        end(process)
        shutil.rmtree(folder)


def free_port() -> int:
    return local_cluster._free_ports([0])[0]
