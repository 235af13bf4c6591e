"""Keys to the store that stand in the nodes' environment stand nowhere else: not in a log, the dashboard, a file or the store."""

import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.training.conftest import CONFIG, make_run, prepare_dataset
from tidepool import local_cluster
from tidepool.local_cluster import LocalCluster
from tidepool.storage import open_store

pytestmark = [pytest.mark.cluster, pytest.mark.long]
ROOT = Path(__file__).parents[1]
RUN = f"secretive-{uuid.uuid4().hex[:8]}"
PLANTED = {name: f"planted-{name.lower()}-{uuid.uuid4().hex}" for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN")}
PAGES = (
    "api/jobs/",
    "api/serve/applications/",
    "api/train/v2/runs/v1",
    "nodes?view=summary",
    "api/cluster_status",
    "api/v0/nodes?detail=1",
)
PAGES += tuple(f"api/v0/{kind}?detail=1&limit=10000" for kind in ("actors", "tasks", "workers", "runtime_envs", "jobs"))


@pytest.fixture
def busy_cluster(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    """A cluster whose nodes have the keys in their environment; it has trained, published and served on S3."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("TIDEPOOL_CACHE", str(tmp_path / "cache"))
    prepare_dataset(s3_url, tmp_path / "data")
    spec = make_run(s3_url, RUN, model={"config": CONFIG}, training={"steps": 2}, publish={"model": RUN}).model_dump(mode="json")
    (tmp_path / f"{RUN}.yaml").write_text(yaml.safe_dump(spec))
    cluster = local_cluster.start(s3_url, num_cpus=3, log=tmp_path / "ray.log")
    try:
        submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", ".", "--"]
        job = [*submit, "python", "jobs/train.py", str(tmp_path / f"{RUN}.yaml")]
        done = subprocess.run(job, env=cluster.environment, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
        (tmp_path / "job.log").write_text(done.stdout + done.stderr)
        assert done.returncode == 0, done.stdout[-5000:]
        local_cluster.serve(cluster, [RUN])
        httpx.post(f"{cluster.api_url}/completions", json={"model": RUN, "prompt": "the tide"}, timeout=60).raise_for_status()
        yield cluster
    finally:
        local_cluster.stop(cluster)


def places(cluster: LocalCluster, store_url: str, folder: Path) -> Iterator[tuple[str, bytes]]:
    """Everything that a run, a deployment and Ray leave behind or show, by where it is."""
    for root in (Path(cluster.temp_dir), folder):
        for path in root.rglob("*"):
            if path.is_file():
                yield f"file {path}", path.read_bytes()
    store = open_store(store_url)
    for info in store.list(""):
        yield f"object {info.key}", store.get(info.key)
    for page in PAGES:
        answer = httpx.get(f"{cluster.dashboard_url}/{page}", timeout=60)
        assert answer.status_code == 200, f"{page}: {answer.text}"
        yield f"page {page}", answer.content


def test_planted_keys_are_nowhere(busy_cluster: LocalCluster, s3_url: str, tmp_path: Path) -> None:
    found = {where: content for where, content in places(busy_cluster, s3_url, tmp_path) if where.split()[0] != "file" or content}
    for name, value in PLANTED.items():
        leaks = [where for where, content in found.items() if value.encode() in content]
        assert leaks == [], f"AWS_{name} stands in {leaks}"
    # It looked where the run shows itself: in Ray's logs, in the job's own, in the store, on each page that lists work.
    seen = [where for where, content in found.items() if RUN.encode() in content]
    for part in ("/logs/", "job.log", "object runs/", "page api/jobs/", "page api/serve/", "page api/train/", "page api/v0/actors"):
        assert any(part in where for where in seen), f"nothing of the run in {part}"
