"""A plain script as a job of a Ray cluster: stopped there, submitted again, and the same in the end as one that was left alone."""

import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tidepool.checkpoint import RunLog
from tidepool.local_cluster import LocalCluster
from tidepool.storage import ObjectStore, open_store

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.long]
NUM_STEPS, TIMEOUT_S = 600, 200
SCRIPT = f"""
import sys
import torch
from safetensors.torch import save_file
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))
optimizer = torch.optim.Adam(model.parameters())
x = torch.randn(12, 4)
for step in range({NUM_STEPS}):
    optimizer.zero_grad()
    loss = model(x).pow(2).mean()
    loss.backward()
    optimizer.step()
save_file(model.state_dict(), sys.argv[1])
"""


class Submitted:
    """A job that runs the script with this library of the nodes."""

    def __init__(self, cluster: LocalCluster, folder: Path, run: str, out: Path) -> None:
        self._cluster, self.id = cluster, f"script-{uuid.uuid4().hex[:8]}"
        command = ["python", "-m", "tidepool.run", "--run", run, "--store", cluster.store_url, "--every-steps", "1", "script.py", str(out)]
        self._ray("submit", "--no-wait", "--submission-id", self.id, "--working-dir", str(folder), "--", *command)

    def stop(self) -> None:
        self._ray("stop", self.id)

    def wait(self) -> str:
        """Its last status."""
        deadline = time.monotonic() + TIMEOUT_S
        while not any(end in (status := self._ray("status", self.id)) for end in ("SUCCEEDED", "FAILED", "STOPPED")):
            assert time.monotonic() < deadline, status
            time.sleep(0.2)
        return status

    def logs(self) -> str:
        return self._ray("logs", self.id)

    def _ray(self, *command: str) -> str:
        cli = [sys.executable, "-m", "ray.scripts.scripts", "job", *command]
        return subprocess.run(cli, env=self._cluster.environment, check=True, capture_output=True, text=True, timeout=TIMEOUT_S).stdout


def wait_for_a_commit(store: ObjectStore, run: str) -> int:
    deadline = time.monotonic() + TIMEOUT_S
    while not (commits := RunLog(store, run).visible_commits()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return commits[0].step


def test_a_script_that_was_stopped_goes_on_in_another_job_with_the_same_bits(cluster: LocalCluster, tmp_path: Path) -> None:
    folder, run, store = tmp_path / "mine", f"script-{uuid.uuid4().hex[:8]}", open_store(cluster.store_url)
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT)
    subprocess.run([sys.executable, "script.py", str(tmp_path / "plain")], cwd=folder, check=True, timeout=TIMEOUT_S)

    first = Submitted(cluster, folder, run, tmp_path / "killed")
    wait_for_a_commit(store, run)
    first.stop()
    assert "STOPPED" in first.wait()
    stopped_at = wait_for_a_commit(store, run)
    assert 0 < stopped_at < NUM_STEPS

    second = Submitted(cluster, folder, run, tmp_path / "killed")
    assert "SUCCEEDED" in second.wait(), second.logs()
    assert f"going on from step {stopped_at}:" in second.logs()
    expected, found = load_file(tmp_path / "plain"), load_file(tmp_path / "killed")
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
