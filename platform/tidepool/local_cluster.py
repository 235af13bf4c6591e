"""A Ray cluster of this machine alone: what `tidepool up`, the demo and the tests run on.

Invariants:
- Every process is a descendant of the one `ray start --block` that was started here, and is ended by its pid; Ray
  clusters of other people on the machine are never touched (`ray stop` would end them too).
- Its ports are free ones, and its temporary folder goes with it. Dashboard, job API and Serve listen on loopback. Ray's own
  GCS and client server listen on all interfaces whatever they are told. Whether they ask for a token is said explicitly: not, unless
  `RAY_AUTH_MODE=token` is in the environment (docs/security.md). On a network that is not trusted, set it or put a firewall before them.
- Its processes find the library, the Serve application and the store in their environment, as the nodes of
  `cluster.yaml` do.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

import tidepool
from tidepool.errors import ClusterError
from tidepool.run_queue import POOL_VARIABLE
from tidepool.specs import STORE_VARIABLE

_START_TIMEOUT_S = 120
_STOP_TIMEOUT_S = 8  # nothing that was committed needs a process to end well
_SERVE_TIMEOUT_S = 180
_REQUEST_TIMEOUT_S = 30
_POLL_S = 0.1
_OBJECT_STORE_BYTES = 200 * 2**20
_APPLICATION = "tidepool"
_started: list[subprocess.Popen[bytes]] = []  # kept, or Python would warn of a process that outlives its handle, as it is meant to


@dataclass(frozen=True)
class LocalCluster:
    """A running cluster: `address` for `ray.init`, `dashboard_url` for `ray job submit --address`."""

    pid: int
    address: str
    dashboard_url: str
    http_port: int
    direct_port: int
    store_url: str
    temp_dir: str
    pool: str = "local"
    """By which its runs are known in the store (see `run_queue`)."""

    @property
    def api_url(self) -> str:
        """The base URL of the OpenAI-compatible API, once `serve` returned: through Serve's proxy."""
        return f"http://127.0.0.1:{self.http_port}/v1"

    @property
    def direct_url(self) -> str:
        """The same at the gateway itself."""
        return f"http://127.0.0.1:{self.direct_port}/v1"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use this cluster."""
        return environment(self.store_url, self.pool) | {"RAY_ADDRESS": self.address, "RAY_API_SERVER_ADDRESS": self.dashboard_url}


def environment(store_url: str, pool: str = "local") -> dict[str, str]:
    """This process's environment, with what the cluster's processes need: the library, the store, and plain HTTP on loopback."""
    source = Path(tidepool.__path__[0]).parent
    paths = [str(source.parent), str(source), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        # The shell of a job's entrypoint must find this Python, whether or not its environment is activated here.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        STORE_VARIABLE: store_url,
        POOL_VARIABLE: pool,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "disabled"),
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # what Serve has here can go nowhere: waiting for it costs 30 s
    }


def start(store_url: str, num_cpus: int, log: Path, usual_ports: bool = False, find_gpus: bool = False) -> LocalCluster:
    """Start a cluster with `num_cpus` logical CPUs and wait until it answers. Raises `ClusterError` that names the log.

    `usual_ports` asks for the ports that Ray's documentation uses (8265, 8000), and 8001, where they are free; `find_gpus` offers the
    GPUs that Ray finds, else there are none.
    """
    temp_dir = tempfile.mkdtemp(prefix="tidepool-ray-")
    port, agent, client, dashboard, http, direct = _free_ports([0, 0, 0, 8265, 8000, 8001] if usual_ports else [0] * 6)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    options = {
        "node-ip-address": "127.0.0.1",
        "port": port,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "ray-client-server-port": client,
        "num-cpus": num_cpus,
        "object-store-memory": _OBJECT_STORE_BYTES,
        "temp-dir": temp_dir,
    }
    command += [f"--{name}={value}" for name, value in (options if find_gpus else options | {"num-gpus": 0}).items()]
    log.parent.mkdir(parents=True, exist_ok=True)
    # What a killed worker leaves in its temporary folder goes with the cluster's.
    # The address: Ray Train's placement group cleaner asks the newest cluster of the machine otherwise, and takes the workers away
    # when that one does not know their controller.
    # The store may be another cluster's, too: only one that is started here again and again goes on with the runs of the one before.
    pool = os.environ.get(POOL_VARIABLE) or (f"local-{socket.gethostname()}" if usual_ports else Path(temp_dir).name)
    variables = environment(store_url, pool) | {"TMPDIR": temp_dir, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    with log.open("wb") as output:
        # A session of its own, so that Ctrl-C in the terminal reaches us and not Ray.
        process = subprocess.Popen(
            command, env=variables, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
    _started.append(process)
    cluster = LocalCluster(process.pid, f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", http, direct, store_url, temp_dir, pool)
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not _answers(f"{cluster.dashboard_url}/api/version"):
        if process.poll() is not None or time.monotonic() > deadline:
            stop(cluster)
            raise ClusterError(f"The local Ray cluster did not start: see {log}.")
        time.sleep(_POLL_S)
    return cluster


def serve(cluster: LocalCluster, models: Sequence[str], **options: Any) -> None:
    """Serve models by registry name on the cluster's HTTP port; returns when they answer. `options`: other keys of a serving spec.

    Raises `ClusterError`.
    """
    gateway = {"port": cluster.direct_port, **options.get("gateway", {})}
    application = {
        "name": _APPLICATION,
        "route_prefix": "/",
        "import_path": "serve.app:build",
        "args": {"store": cluster.store_url, "models": list(models), **options, "gateway": gateway},
    }
    http = {"host": "127.0.0.1", "port": cluster.http_port}
    scale = options.get("replicas", {}).get("scale") or {}
    path = "ready" if scale.get("min", 1) else "health"  # to ask whether models are ready starts those that wait for traffic
    url = f"{cluster.dashboard_url}/api/serve/applications/"
    _request("PUT", url, {"proxy_location": "HeadOnly", "http_options": http, "applications": [application]})
    began_at, deadline = time.time(), time.monotonic() + _SERVE_TIMEOUT_S
    while True:
        states = _request("GET", url)["applications"]
        if states.get(_APPLICATION, {}).get("status") == "RUNNING" and _answers(f"{cluster.api_url.removesuffix('/v1')}/{path}"):
            return
        ours = [state for name, state in states.items() if name == _APPLICATION or _is_new_model(name, state, began_at)]
        failed = [state for state in ours if state["status"] in ("DEPLOY_FAILED", "UNHEALTHY")]
        if failed or time.monotonic() > deadline:
            raise ClusterError(f"The models {', '.join(models)} cannot be served: {_reason((failed or [states.get(_APPLICATION, {})])[0])}")
        time.sleep(_POLL_S)


def _is_new_model(name: str, state: Mapping[str, Any], since: float) -> bool:
    """Models are applications beside it; one that was there before may be a model that nobody wants any more."""
    return name.startswith(f"{_APPLICATION}-") and float(state["last_deployed_time_s"]) > since


def _reason(state: Mapping[str, Any]) -> str:
    """What Serve says of an application that failed: an error of ours without the tracebacks around it, or all of it."""
    parts = [state, *state.get("deployments", {}).values()]
    message = "\n".join(str(part["message"]) for part in parts if part.get("message"))
    _, is_ours, ours = message.rpartition("\ntidepool.errors.")
    return ours.partition(": ")[2].strip() if is_ours else f"{state.get('status')} {message}"


def stop(cluster: LocalCluster) -> None:
    """End every process of the cluster and remove its temporary folder; no error if it is gone already."""
    processes = _processes(cluster)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            # Only the top process on SIGTERM: it ends the others in their order.
            if number == signal.SIGKILL or process.pid == cluster.pid:
                _send(process, number)
        _, processes = psutil.wait_procs(processes, timeout=_STOP_TIMEOUT_S)
    _started[:] = [process for process in _started if process.poll() is None]
    shutil.rmtree(cluster.temp_dir, ignore_errors=True)


def is_running(cluster: LocalCluster) -> bool:
    """Whether the cluster's top process lives."""
    return bool(_processes(cluster))


def save(cluster: LocalCluster, path: Path) -> None:
    """Write a cluster down for `load`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(cluster), indent=2))


def load(path: Path) -> LocalCluster | None:
    """The running cluster that was written down at `path`, None if there is none; what one that died left is removed."""
    try:
        cluster = LocalCluster(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ClusterError(f"{path} is damaged ({error}): end the `ray start` process by hand and delete the file.") from error
    if is_running(cluster):
        return cluster
    stop(cluster)
    return None


def _processes(cluster: LocalCluster) -> list[psutil.Process]:
    """The cluster's processes, the top one first; those whose parent died are known by the folder in their command line."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        if any(cluster.temp_dir in argument for argument in process.info["cmdline"] or []):
            found.append(process)
    family = {process.pid: process for process in found}
    for process in found:
        try:
            family |= {child.pid: child for child in process.children(recursive=True)}
        except psutil.NoSuchProcess:
            continue
    family.pop(os.getpid(), None)
    return sorted(family.values(), key=lambda process: (process.pid != cluster.pid, process.pid))


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):  # it went by itself
        process.send_signal(number)


def _request(method: str, url: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **_authorization()}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=_REQUEST_TIMEOUT_S) as response:
            text = response.read()
    except urllib.error.HTTPError as error:
        raise ClusterError(f"{method} {url} was refused: {error.read().decode(errors='replace')}") from error
    except OSError as error:
        raise ClusterError(f"{url} does not answer ({error}): is the cluster still running?") from error
    return json.loads(text) if text else None


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=_authorization()), timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _authorization() -> dict[str, str]:
    """Ray's token for its HTTP, found where Ray finds it; nothing where none is asked for."""
    if os.environ.get("RAY_AUTH_MODE", "disabled") != "token":
        return {}
    token = os.environ.get("RAY_AUTH_TOKEN")
    if token is None:
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
        try:
            token = path.read_text()
        except OSError as error:
            raise ClusterError(
                f"RAY_AUTH_MODE is token and {path} cannot be read ({error.strerror}): make one with `ray get-auth-token --generate`."
            ) from error
    return {"Authorization": f"Bearer {token.strip()}"}


def _free_ports(wanted: Sequence[int]) -> list[int]:
    """Distinct ports that are free now on loopback: those wanted where that is possible, and any where 0 is."""
    sockets = [socket.socket() for _ in wanted]
    try:
        for one, port in zip(sockets, wanted, strict=True):
            try:
                one.bind(("127.0.0.1", port))
            except OSError:  # somebody has it
                one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
