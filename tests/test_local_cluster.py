"""The local cluster and the commands around it: what is started is found again, and nothing is left when it is stopped."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tidepool import local_cluster
from tidepool.errors import ClusterError
from tidepool.local_cluster import LocalCluster

TIMEOUT_S = 120
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tidepool(tmp_path: Path) -> Iterator[Command]:
    """Runs `tidepool` in a folder of its own, where nothing was ever started; returns its exit status, output and errors."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("TIDEPOOL_STORE", "RAY_ADDRESS")}
    environment["PYTHONPATH"] = str(Path(local_cluster.__file__).parents[1])

    def tidepool(*arguments: str) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "tidepool.cli", *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        return done.returncode, done.stdout, done.stderr

    yield tidepool
    if (cluster := local_cluster.load(folder / ".tidepool/cluster.json")) is not None:
        local_cluster.stop(cluster)


def is_gone(cluster: LocalCluster) -> bool:
    """Whether neither the cluster's folder is left nor a process that has it in its command line."""
    lines = (" ".join(one.info["cmdline"] or []) for one in psutil.process_iter(["cmdline"]))
    return not any(cluster.temp_dir in line for line in lines) and not Path(cluster.temp_dir).exists()


@pytest.mark.cluster
def test_up_starts_a_cluster_once_and_down_leaves_nothing(tidepool: Command, tmp_path: Path) -> None:
    status, out, err = tidepool("up", "--num-cpus", "1")
    assert (status, err) == (0, "")
    file = tmp_path / "cwd/.tidepool/cluster.json"
    cluster = local_cluster.load(file)
    assert cluster is not None
    assert cluster.store_url == (tmp_path / "cwd/.tidepool/store").as_uri()
    assert f"store      {cluster.store_url}\n" in out
    assert f"dashboard  {cluster.dashboard_url}\n" in out
    assert "not served: no model is published in this store yet" in out
    with urllib.request.urlopen(f"{cluster.dashboard_url}/api/version", timeout=30) as answer:
        assert "ray_version" in json.load(answer)

    status, out, err = tidepool("up")
    assert (status, out) == (1, "")
    assert err == f"error: A cluster runs already (dashboard {cluster.dashboard_url}); stop it first: make down.\n"
    assert local_cluster.load(file) == cluster

    assert "No models are published" in tidepool("models", "list")[1], "the running cluster's store is asked"
    with pytest.raises(ClusterError) as caught:
        local_cluster.serve(cluster, ["tides"])
    assert str(caught.value) == f"The models tides cannot be served: No model 'tides' in {cluster.store_url}; there are: none yet."

    family = [psutil.Process(cluster.pid), *psutil.Process(cluster.pid).children(recursive=True)]
    assert len(family) > 10
    assert tidepool("down") == (0, "Stopped.\n", "")
    assert psutil.wait_procs(family, timeout=30)[1] == []
    assert is_gone(cluster)
    assert not file.exists()
    assert tidepool("down") == (0, "No cluster runs that `tidepool up` started here.\n", "")


@pytest.mark.cluster
def test_a_cluster_that_cannot_start_names_its_log_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ("deep" * 30)  # too long a path for Ray's sockets
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with pytest.raises(ClusterError, match=f"did not start: see {tmp_path / 'ray.log'}"):
        local_cluster.start(tmp_path.as_uri(), num_cpus=1, log=tmp_path / "ray.log")
    assert "AF_UNIX path length cannot exceed" in (tmp_path / "ray.log").read_text()
    assert list(folder.iterdir()) == []


@pytest.mark.cluster
def test_a_cluster_whose_first_process_was_killed_is_stopped_all_the_same(tidepool: Command, tmp_path: Path) -> None:
    cluster = local_cluster.start(tmp_path.as_uri(), num_cpus=1, log=tmp_path / "ray.log")
    try:
        family = psutil.Process(cluster.pid).children(recursive=True)
        local_cluster.save(cluster, tmp_path / "cwd/.tidepool/cluster.json")
        os.kill(cluster.pid, signal.SIGKILL)
        status, out, err = tidepool("down")  # some of them go by themselves, and perhaps all
        assert (status, err) == (0, "")
        assert out in ("Stopped.\n", "No cluster runs that `tidepool up` started here.\n")
        assert psutil.wait_procs(family, timeout=30)[1] == []
        assert is_gone(cluster)
    finally:
        local_cluster.stop(cluster)


def dead_cluster(tmp_path: Path) -> LocalCluster:
    """As it would stand in a file after the machine was started again: its number belongs to somebody else by now."""
    return LocalCluster(os.getppid(), "127.0.0.1:1", "http://127.0.0.1:2", 3, 4, tmp_path.as_uri(), str(tmp_path / "tidepool-ray-gone"))


def test_a_cluster_that_died_is_not_taken_for_running(tidepool: Command, tmp_path: Path) -> None:
    file = tmp_path / "cwd/.tidepool/cluster.json"
    local_cluster.save(dead_cluster(tmp_path), file)
    Path(dead_cluster(tmp_path).temp_dir).mkdir()
    assert local_cluster.load(file) is None
    assert not Path(dead_cluster(tmp_path).temp_dir).exists()
    assert not local_cluster.is_running(dead_cluster(tmp_path))
    assert tidepool("models", "list")[2].startswith("error: Which store?")
    assert tidepool("down") == (0, "No cluster runs that `tidepool up` started here.\n", "")
    assert not file.exists()


def test_stopping_what_is_gone_touches_nobody(tmp_path: Path) -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        cluster = LocalCluster(sleeper.pid, "127.0.0.1:1", "http://127.0.0.1:2", 3, 4, tmp_path.as_uri(), str(tmp_path / "gone"))
        started = time.monotonic()
        local_cluster.stop(cluster)
        assert sleeper.poll() is None, "the pid was given to another process since"
        assert time.monotonic() - started < 10
    finally:
        sleeper.kill()
        sleeper.wait()


def test_free_ports_are_distinct_and_those_wanted_where_nobody_has_them() -> None:
    with socket.socket() as taken, socket.socket() as free:
        taken.bind(("127.0.0.1", 0))
        free.bind(("127.0.0.1", 0))
        wanted = free.getsockname()[1]
        free.close()
        ports = local_cluster._free_ports([taken.getsockname()[1], wanted, 0, 0])
        assert ports[1] == wanted
        assert ports[0] != taken.getsockname()[1]
    assert len(set(ports)) == 4


def test_rays_token_is_found_where_ray_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_cluster.environment("memory://x")["RAY_AUTH_MODE"] == "disabled", "it is said explicitly"
    assert local_cluster._authorization() == {}
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert local_cluster.environment("memory://x")["RAY_AUTH_MODE"] == "token"
    with pytest.raises(ClusterError, match=r"auth_token cannot be read.*ray get-auth-token --generate"):
        local_cluster._authorization()
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("one\n")
    assert local_cluster._authorization() == {"Authorization": "Bearer one"}
    (tmp_path / "other").write_text("two")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "other"))
    assert local_cluster._authorization() == {"Authorization": "Bearer two"}
    monkeypatch.setenv("RAY_AUTH_TOKEN", "three")
    assert local_cluster._authorization() == {"Authorization": "Bearer three"}
