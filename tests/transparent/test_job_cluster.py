"""A plain script as a job of a Ray cluster: stopped there, submitted again, and the same in the end as one that was left alone."""

import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
from ray.job_submission import JobStatus, JobSubmissionClient
from safetensors.torch import load_file

from tidepool.checkpoint import RunLog
from tidepool.local_cluster import LocalCluster
from tidepool.storage import ObjectStore, open_store

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.long]
NUM_STEPS, TIMEOUT_S = 300, 200
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
        self.id, self._client = f"script-{uuid.uuid4().hex[:8]}", JobSubmissionClient(cluster.dashboard_url)
        script = ["python", "-m", "tidepool.run", "--run", run, "--store", cluster.store_url, "--every-steps", "1", "script.py", str(out)]
        command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--no-wait", "--submission-id", self.id]
        command += ["--working-dir", str(folder), "--", *script]
        subprocess.run(command, env=cluster.environment, check=True, capture_output=True, timeout=TIMEOUT_S)

    def stop(self) -> None:
        self._client.stop_job(self.id)

    def wait(self) -> JobStatus:
        """Its last status."""
        deadline = time.monotonic() + TIMEOUT_S
        while not (status := self._client.get_job_status(self.id)).is_terminal():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.2)
        return status

    def logs(self) -> str:
        return self._client.get_job_logs(self.id)


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
    assert first.wait() == JobStatus.STOPPED
    stopped_at = wait_for_a_commit(store, run)
    assert 0 < stopped_at < NUM_STEPS

    second = Submitted(cluster, folder, run, tmp_path / "killed")
    assert second.wait() == JobStatus.SUCCEEDED, second.logs()
    assert f"going on from step {stopped_at}:" in second.logs()
    expected, found = load_file(tmp_path / "plain"), load_file(tmp_path / "killed")
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
