"""Ray's own doors: the token without which nobody asks for anything."""

import json
import os
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tidepool import local_cluster
from tidepool.local_cluster import LocalCluster

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.long]
TIMEOUT_S = 120
_DRIVER = "import sys, ray; ray.init(sys.argv[1], log_to_driver=False); print(ray.get(ray.put(7), timeout=60))"


def drive(cluster: LocalCluster, **variables: str | None) -> subprocess.CompletedProcess[str]:
    """Run the driver with a changed environment; None takes a variable away."""
    changed = {**cluster.environment, **variables}
    environment = {name: value for name, value in changed.items() if value is not None}
    command = [sys.executable, "-W", "ignore", "-c", _DRIVER, cluster.address]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


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
