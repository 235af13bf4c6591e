"""Ray's own doors: the token without which nobody asks for anything, and TLS between nodes."""

import json
import os
import secrets
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import ray.util

from tests.certificates import Authority, Certificate
from tests.training.nodes import ADDRESS, second_node
from tidepool import local_cluster
from tidepool.local_cluster import LocalCluster

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.long]
TIMEOUT_S = 240
_DRIVER = "import sys, ray; ray.init(sys.argv[1], log_to_driver=False); print(ray.get(ray.put(7), timeout=60))"
# A task on each node and an actor; the second task takes an object that the first one made, which is too large to travel with the call.
_TWO_NODES = """
import json, sys
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ray.init(sys.argv[1], log_to_driver=False)
here = ray.get_runtime_context().get_node_id()
there, = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - {here}

@ray.remote(num_cpus=0)
def make():
    return ray.get_runtime_context().get_node_id(), bytes(2**22)

@ray.remote(num_cpus=0)
class Taker:
    def take(self, made):
        return made[0], ray.get_runtime_context().get_node_id(), len(made[1])

def on(node):
    return NodeAffinitySchedulingStrategy(node, soft=False)

made = make.options(scheduling_strategy=on(there)).remote()
taker = Taker.options(scheduling_strategy=on(here)).remote()
print(json.dumps(ray.get(taker.take.remote(made), timeout=120) == (there, here, 2**22)))
"""
_ACTOR = """
import sys, ray
ray.init(sys.argv[1], log_to_driver=False)

@ray.remote(num_cpus=0)
class Actor:
    def stay(self):
        return "up"

actor = Actor.remote()
print(ray.get(actor.stay.remote(), timeout=60), flush=True)
sys.stdin.read()
"""
_HTTP2_BEGINS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # with no settings (RFC 9113)
# A driver that nobody answers asks again for 13 minutes, by Ray's defaults.
_IMPATIENT = {"RAY_NUM_REDIS_GET_RETRIES": "1", "RAY_gcs_server_request_timeout_seconds": "5"}


def drive(cluster: LocalCluster, driver: str = _DRIVER, /, **variables: str | None) -> subprocess.CompletedProcess[str]:
    """Run a driver with a changed environment; None takes a variable away."""
    changed = {**cluster.environment, **variables}
    environment = {name: value for name, value in changed.items() if value is not None}
    command = [sys.executable, "-W", "ignore", "-c", driver, cluster.address]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def set_variables(monkeypatch: pytest.MonkeyPatch, certificate: Certificate) -> None:
    for name, value in certificate.ray_variables.items():
        monkeypatch.setenv(name, value)


def doors_of(processes: Sequence[psutil.Process]) -> Iterator[tuple[str, str, int]]:
    """Where they listen: what listens, address, port."""
    for process in processes:
        command = " ".join(process.cmdline())
        names = {"dashboard.py": "dashboard", "monitor.py": "monitor", "ray.util.client.server": "client server", " -c ": "driver"}
        name = next((name for part, name in names.items() if part in command), process.name().removeprefix("ray::"))
        for listening in process.net_connections("inet"):
            if listening.status == psutil.CONN_LISTEN:
                address = listening.laddr.ip.removeprefix("::ffff:")
                yield name, ray.util.get_node_ip_address() if address in ("::", "0.0.0.0") else address, listening.laddr.port


def answers(address: str, port: int, shown: Certificate | None, trusted: Certificate) -> bool:
    """Whether a server that has a certificate of the authority speaks HTTP/2 with who shows one, or none."""
    context = ssl.create_default_context(cafile=trusted.authority_path)
    context.set_alpn_protocols(["h2"])
    if shown is not None:
        context.load_cert_chain(shown.path, shown.key_path)
    try:
        with (
            socket.create_connection((address, port), timeout=30) as connection,
            context.wrap_socket(connection, server_hostname=address) as secured,
        ):
            secured.sendall(_HTTP2_BEGINS)
            return secured.recv(1) != b""
    except (ssl.SSLError, ConnectionError):
        return False


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    (tmp_path / "ours").mkdir()
    return Authority(tmp_path / "ours")


@pytest.fixture
def foreign(tmp_path: Path) -> Certificate:
    """Good for the same addresses, of an authority that nobody trusts."""
    (tmp_path / "theirs").mkdir()
    return Authority(tmp_path / "theirs").issue("head", ["127.0.0.1", ray.util.get_node_ip_address()])


@pytest.fixture
def tls_cluster(authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    """One node, whose certificate has the address that Ray takes for 127.0.0.1; this process has it in its environment."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    set_variables(monkeypatch, authority.issue("head", ["127.0.0.1", ray.util.get_node_ip_address()]))
    cluster = local_cluster.start((tmp_path / "store").as_uri(), num_cpus=1, log=tmp_path / "ray.log")
    try:
        yield cluster
    finally:
        local_cluster.stop(cluster)


def test_nodes_talk_by_tls_and_to_nobody_without_a_certificate_of_theirs(
    tls_cluster: LocalCluster, authority: Authority, foreign: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as nodes:
        with monkeypatch.context() as its_own:
            set_variables(its_own, authority.issue("second", ["127.0.0.1", ADDRESS]))
            nodes.enter_context(second_node(tls_cluster, 1))
        done = drive(tls_cluster, _TWO_NODES)
        assert done.stdout == "true\n", done.stderr
        for variables in ({"RAY_USE_TLS": "0"}, foreign.ray_variables):
            refused = drive(tls_cluster, **variables, **_IMPATIENT)
            assert (refused.returncode != 0, refused.stdout) == (True, ""), refused.stderr
        assert drive(tls_cluster).stdout == "7\n", "the cluster goes on"


def test_every_door_but_those_named_in_the_documents_asks_for_a_certificate(
    tls_cluster: LocalCluster, authority: Authority, foreign: Certificate
) -> None:
    ours = authority.issue("driver", ["127.0.0.1", ray.util.get_node_ip_address()])
    command = [sys.executable, "-W", "ignore", "-c", _ACTOR, tls_cluster.address]
    environment = {**tls_cluster.environment, **ours.ray_variables}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as driver:
        assert driver.stdin is not None
        assert driver.stdout is not None
        try:
            assert driver.stdout.readline() == b"up\n"
            doors = list(doors_of([*psutil.Process(tls_cluster.pid).children(recursive=True), psutil.Process(driver.pid)]))
            plain = {name for name, *address in doors if not answers(*address, ours, ours)}
            assert plain <= {"dashboard", "monitor", "DashboardAgent", "RuntimeEnvAgent"}
            strict = [door for door in doors if answers(*door[1:], ours, ours)]
            assert {"gcs_server", "raylet", "client server", "DashboardAgent", "Actor", "driver"} <= {name for name, *_ in strict}
            assert [door for door in strict if answers(*door[1:], None, ours) or answers(*door[1:], foreign, ours)] == []
        finally:
            driver.stdin.close()


def test_nobody_without_the_token_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster = local_cluster.start((tmp_path / "store").as_uri(), num_cpus=1, log=tmp_path / "ray.log")
    try:
        jobs = urllib.request.Request(f"{cluster.dashboard_url}/api/jobs/")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(jobs, timeout=30)
        assert refused.value.code in (401, 403)
        refused.value.close()
        jobs.add_header("Authorization", f"Bearer {os.environ['RAY_AUTH_TOKEN']}")
        with urllib.request.urlopen(jobs, timeout=30) as response:
            assert json.loads(response.read()) == []
        assert drive(cluster).stdout == "7\n"
        for variables in ({"RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": None}):
            assert drive(cluster, **variables).returncode != 0
    finally:
        local_cluster.stop(cluster)
