"""A real S3 server for tests and benchmarks: Ceph's RADOS gateway from Debian's packages, on loopback. Root only.

    PYTHONPATH=. python tests/stores/ceph.py COMMAND ...     runs a command with the AWS_... variables that open it, and ends

One monitor, one OSD (bluestore on a file) and one radosgw, with cephx, in a temporary folder. The packages are installed
if they are missing, and stay. What it stores lives as long as the block of `ceph()`, also across `stop` and `start`.

Invariants:
- Nothing is left: however the block ends, the daemons are ended by pid and the folder goes. If this process is killed,
  the kernel kills the daemons (their parent-death signal), and only the folder remains.
- Every wait is for a condition and has a deadline; a daemon that ends meanwhile is told with the end of its log.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.stores.s3 import S3Server

_PACKAGES = ("ceph-mon", "ceph-osd", "radosgw")
_PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin", "setpriv")
_START_TIMEOUT_S = 120
_STOP_TIMEOUT_S = 20
_COMMAND_TIMEOUT_S = 120
_USER = "tidepool"
_CONFIG = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon_port}/0]
public addr = 127.0.0.1
ms bind ipv6 = false
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {folder}/keyring
run dir = {folder}
admin socket = {folder}/$name.asok
log file = {folder}/$name.log
crash dir = {folder}/crash
mon data = {folder}/mon
osd data = {folder}/osd
mon allow pool size one = true
mon max pg per osd = 1000
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd memory target = 1073741824
osd client watch timeout = 5
bluestore block size = 8589934592
rgw frontends = beast endpoint=127.0.0.1:{rgw_port} tcp_nodelay=1
rgw dynamic resharding = false
rgw bucket quota ttl = 0
rgw s3 auth use sts = true
rgw sts key = {sts_key}
rgw sts min session duration = 1
"""


class CephError(Exception):
    """Ceph cannot be installed or does not start; the message says what to do."""


class Ceph:
    """A running cluster; `server` is how to reach its gateway. Made by `ceph()`."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._mon_port, rgw_port = folder, _free_port(), _free_port()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        # The parent-death signal comes when the thread that started a daemon ends, so one thread starts them all.
        self._starter = ThreadPoolExecutor(1)
        self.server = S3Server(f"http://127.0.0.1:{rgw_port}", f"key{secrets.token_hex(8)}", secrets.token_hex(16))
        values = {"fsid": uuid.uuid4(), "folder": folder, "mon_port": self._mon_port, "rgw_port": rgw_port, "sts_key": secrets.token_hex(8)}
        (folder / "ceph.conf").write_text(_CONFIG.format(**values))

    def create(self) -> None:
        """Make the monitor, the OSD and the user, and start all."""
        self._create_keys()
        fsid = self._config_value("fsid")
        address = f"[v2:127.0.0.1:{self._mon_port}]"
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, str(self._folder / "monmap"))
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(self._folder / "monmap"), "--keyring", str(self._folder / "keyring"))
        self._start("ceph-mon", "-i", "a")
        osd_uuid = str(uuid.uuid4())
        self._run("ceph", "--connect-timeout", "60", "osd", "create", osd_uuid, "0")
        (self._folder / "osd").mkdir()
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_uuid)
        self._start("ceph-osd", "-i", "0")
        self.start()
        keys = ("--access-key", self.server.access_key, "--secret-key", self.server.secret_key)
        self.admin("user", "create", "--uid", _USER, "--display-name", _USER, *keys)

    def start(self) -> None:
        """Start the gateway and wait until it answers."""
        self._start("radosgw", "-n", "client.rgw")
        self._wait("radosgw", self.answers)

    def stop(self) -> None:
        """Kill the gateway, as a power cut would; what it answered is in the OSD."""
        process = self._processes.pop("radosgw")
        process.kill()
        process.wait()

    def answers(self) -> bool:
        """Whether the gateway answers HTTP."""
        try:
            return httpx.get(self.server.endpoint_url, timeout=5).status_code < 500
        except httpx.TransportError:
            return False

    def admin(self, *arguments: str) -> str:
        """Run `radosgw-admin`; returns what it printed."""
        return self._run("radosgw-admin", *arguments)

    def close(self) -> None:
        """End every daemon: politely, then by force."""
        for name in ("radosgw", "ceph-osd", "ceph-mon"):
            process = self._processes.pop(name, None)
            if process is None:
                continue
            process.send_signal(signal.SIGKILL if name == "radosgw" else signal.SIGTERM)
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._starter.shutdown()

    def _create_keys(self) -> None:
        everything = ("--cap", "mon", "allow *", "--cap", "osd", "allow *")
        profiles = {
            "mon.": ("--cap", "mon", "allow *"),
            "client.admin": everything,
            "osd.0": ("--cap", "mon", "allow profile osd", "--cap", "osd", "allow *"),
            "client.rgw": ("--cap", "mon", "allow rw", "--cap", "osd", "allow rwx"),
        }
        keyring = self._folder / "keyring"
        for number, (name, caps) in enumerate(profiles.items()):
            self._run("ceph-authtool", *(("--create-keyring",) if number == 0 else ()), str(keyring), "--gen-key", "-n", name, *caps)

    def _config_value(self, key: str) -> str:
        lines = (self._folder / "ceph.conf").read_text().splitlines()
        return next(line.partition(" = ")[2] for line in lines if line.startswith(f"{key} = "))

    def _run(self, program: str, *arguments: str) -> str:
        # The configuration goes by the environment: not every one of these programs takes -c in the same place.
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, env=self._environment(), check=False
        )
        if done.returncode:
            raise CephError(f"{program} {' '.join(arguments[:3])} failed ({done.returncode}): {(done.stderr or done.stdout)[-2000:]}")
        return done.stdout

    def _start(self, program: str, *arguments: str) -> None:
        # setpriv: the daemon dies with this process, however that dies.
        command = ["setpriv", "--pdeathsig", "KILL", program, "-f", *arguments]
        with (self._folder / f"{program}.out").open("ab") as output:
            starting = self._starter.submit(subprocess.Popen, command, stdout=output, stderr=output, env=self._environment())
            self._processes[program] = starting.result()

    def _wait(self, program: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not condition():
            for name, process in self._processes.items():
                if process.poll() is not None:
                    raise CephError(f"{name} ended with status {process.returncode}:\n{self._log(name)}")
            if time.monotonic() > deadline:
                raise CephError(f"{program} did not start within {_START_TIMEOUT_S} s:\n{self._log(program)}")
            time.sleep(0.05)

    def _log(self, program: str) -> str:
        return (self._folder / f"{program}.out").read_text(errors="replace")[-3000:]

    def _environment(self) -> dict[str, str]:
        return os.environ | {"CEPH_CONF": str(self._folder / "ceph.conf"), "LC_ALL": "C.UTF-8"}


@contextmanager
def ceph() -> Iterator[Ceph]:
    """A new, empty cluster for the block. Raises `CephError`."""
    install()
    folder = Path(tempfile.mkdtemp(prefix="tidepool-ceph-"))
    try:
        cluster = Ceph(folder)
        try:
            cluster.create()
            yield cluster
        finally:
            cluster.close()
    finally:
        shutil.rmtree(folder)


def install() -> None:
    """Install Ceph's packages if a program is missing. Raises `CephError` where that cannot be done."""
    if os.geteuid() != 0:
        raise CephError("Ceph's daemons need root here: run as root, or leave out `make test-s3` (`make test` needs neither).")
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if not missing:
        return
    if shutil.which("apt-get") is None or not Path("/etc/debian_version").exists():
        raise CephError(f"{', '.join(missing)} not found, and this is no Debian that could install them: install Ceph (mon, osd, radosgw).")
    print(f"Installing {' '.join(_PACKAGES)}", file=sys.stderr, flush=True)
    for command in (["update", "-q"], ["install", "-q", "-y", "--no-install-recommends", *_PACKAGES]):
        done = subprocess.run(
            ["apt-get", *command], env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise CephError(f"apt-get {command[0]} failed:\n{(done.stdout + done.stderr)[-2000:]}")


def environment(server: S3Server) -> Mapping[str, str]:
    """This process's environment with the variables that open `server`, and no others of AWS."""
    return {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | server.environment


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main(command: Sequence[str]) -> int:
    """Run a command with a cluster to itself; returns its exit status."""
    if not command:
        print(__doc__, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unwinds the block below, as Ctrl-C does
    try:
        with ceph() as cluster:
            return subprocess.run(command, env=environment(cluster.server), check=False).returncode
    except CephError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
