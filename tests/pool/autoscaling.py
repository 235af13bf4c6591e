"""A Ray cluster of this machine whose nodes Ray's own autoscaler starts and ends, by its provider of made-up nodes.

Ray's `AutoscalingCluster` does the same, but reads a file that Ray's package lacks, and runs `ray stop`, which ends every Ray
process of the machine. Here all nodes are descendants of one process, and go with it.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tidepool import local_cluster
from tidepool.local_cluster import LocalCluster

_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
_HEAD_ID = "f" * 51 + "00000"
"""What that provider takes the head's id for."""
_LISTS = (
    "cluster_synced_files",
    "rsync_exclude",
    "rsync_filter",
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
"""What is copied to and run on real nodes."""
_OBJECT_STORE_BYTES = 100 * 2**20
_START_TIMEOUT_S = 120


@contextmanager
def autoscaling_cluster(store_url: str, node_types: Mapping[str, Any], idle_s: float) -> Iterator[LocalCluster]:
    """A cluster whose head has no CPU for anybody; `node_types` as in `cluster.yaml`. Nodes end after `idle_s` without work."""
    folder = Path(tempfile.mkdtemp(prefix="tidepool-ray-"))
    port, agent, client, dashboard, http, direct = local_cluster._free_ports([0] * 6)
    address = f"127.0.0.1:{port}"
    config = {
        "cluster_name": "made-up",
        "max_workers": sum(one["max_workers"] for one in node_types.values()),
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": idle_s / 60,
        "provider": {
            "type": "external",
            "module": _PROVIDER,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": _HEAD_ID,
            "gcs_address": address,
        },
        **{name: [] for name in _LISTS},
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        "file_mounts_sync_continuously": False,
        "head_node_type": "ray.head.default",
        "available_node_types": {"ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}, **node_types},
    }
    (folder / "autoscaling.yaml").write_text(yaml.safe_dump(config))
    options = {
        "node-ip-address": "127.0.0.1",
        "port": port,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "ray-client-server-port": client,
        "num-cpus": 0,
        "num-gpus": 0,
        "object-store-memory": _OBJECT_STORE_BYTES,
        "temp-dir": folder,
        "autoscaling-config": folder / "autoscaling.yaml",
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--{name}={value}" for name, value in options.items()]
    variables = local_cluster.environment(store_url) | {"TMPDIR": str(folder), "RAY_ADDRESS": address}
    variables |= {"RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    variables |= {"RAY_CLOUD_INSTANCE_ID": _HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID}
    log = folder / "ray.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=variables, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    cluster = LocalCluster(process.pid, address, f"http://127.0.0.1:{dashboard}", http, direct, store_url, str(folder))
    try:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not local_cluster._answers(f"{cluster.dashboard_url}/api/version"):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield cluster
    finally:
        local_cluster.stop(cluster)
        process.wait()
