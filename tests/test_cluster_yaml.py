"""cluster.yaml, as Ray itself reads it; nothing here contacts a cloud."""

import copy
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tidepool import local_cluster

ROOT = Path(__file__).parents[1]
LOCAL_ONLY = {
    "RAY_USAGE_STATS_ENABLED",
    "RAY_AUTH_MODE",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S",
}
"""What a cluster of one machine needs beside: no reports, plain HTTP on loopback, GPUs left visible, an end at once."""
NETWORK = ("NCCL_", "FI_")
"""How variables of the nodes' network begin, which one machine does not need."""


@pytest.fixture
def config() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return loaded


def check(config: dict[str, Any]) -> None:
    """What `ray up` does with a file before it asks the cloud for anything."""
    validate_config(prepare_config(copy.deepcopy(config)))


def test_ray_accepts_it(config: dict[str, Any]) -> None:
    check(config)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda config: config.update(idle_timeout=10), "idle_timeout"),
        (lambda config: config["available_node_types"]["gpu_spot"].update(max_worker=3), "max_worker"),
        (lambda config: config["provider"].pop("type"), "type"),
        (lambda config: config.pop("head_node_type"), "head_node_type"),
        (lambda config: config.update(head_node_type="heads"), "head_node_type"),
        (lambda config: config["available_node_types"].pop("head"), "head_node_type"),
        (lambda config: config["available_node_types"]["gpu_spot"].update(min_workers=19), "max_workers"),
    ],
)
def test_ray_refuses_a_broken_copy(config: dict[str, Any], damage: Callable[[dict[str, Any]], Any], message: str) -> None:
    damage(config)
    with pytest.raises((jsonschema.ValidationError, ValueError, KeyError), match=message):
        check(config)


def test_it_has_gpu_workers_on_demand_and_spot_that_start_at_none(config: dict[str, Any]) -> None:
    types = config["available_node_types"]
    assert types["head"]["resources"]["GPU"] == 0
    workers = {name: kind for name, kind in types.items() if name != config["head_node_type"]}
    spot = {name for name, kind in workers.items() if kind["node_config"].get("InstanceMarketOptions") == {"MarketType": "spot"}}
    assert spot
    assert set(workers) - spot
    assert all(kind["resources"]["GPU"] > 0 and kind["min_workers"] == 0 for kind in workers.values())
    assert sum(kind["max_workers"] for kind in workers.values()) <= config["max_workers"]
    for name, kind in workers.items():
        market = "spot" if name in spot else "on-demand"
        assert kind["labels"] == {"ray.io/node-group": name, "ray.io/market-type": market}  # by which the arbiter asks for one


def test_the_nodes_install_the_lock_file_and_run_ray_from_that_environment(config: dict[str, Any]) -> None:
    (folder,) = config["file_mounts"]
    assert config["file_mounts"][folder] == "."
    installs = [command for command in config["setup_commands"] if "pip install" in command]
    (made,) = re.findall(r"-m venv (\S+)", " ".join(config["setup_commands"]))
    assert installs == [f"{made}/bin/pip install --quiet -r {folder}/requirements.lock"]
    assert (ROOT / "requirements.lock").is_file()
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert re.findall(r"(\S*\bray) (?:stop|start)\b", " ".join(commands)) == [f"{made}/bin/ray"] * 2


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_a_node_exports_what_a_local_cluster_gives_its_processes(
    config: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (start,) = (command for command in config[f"{kind}_start_ray_commands"] if "ray start" in command)
    (exports,) = re.findall(r"export ([^;]*);", start)
    exported = dict(pair.split("=", 1) for pair in exports.split())
    network = {name: exported.pop(name) for name in list(exported) if name.startswith(NETWORK)}
    assert bool(network) == (kind == "worker")
    for name in list(os.environ):
        monkeypatch.delenv(name)
    local = local_cluster.environment("s3://BUCKET/PREFIX")
    (folder,) = config["file_mounts"]
    (made,) = re.findall(r"-m venv (\S+)", " ".join(config["setup_commands"]))
    assert exported.pop("PATH") == f"{made}/bin:$PATH", "a job's `python` is the one of the environment"
    assert (exported.pop("RAY_AUTH_MODE"), exported.pop("RAY_AUTH_TOKEN_PATH")) == ("token", f"{folder}/ray_token")
    assert local.pop("PATH").split(":")[0] == str(Path(sys.executable).parent)
    assert local.pop("PYTHONPATH").replace(str(ROOT), folder) == exported.pop("PYTHONPATH")
    assert exported.pop("TIDEPOOL_POOL") == config["cluster_name"] != local.pop("TIDEPOOL_POOL")
    assert exported == {name: value for name, value in local.items() if name not in LOCAL_ONLY}


def test_the_pool_of_a_head_that_came_back_goes_on_with_what_is_wanted(config: dict[str, Any]) -> None:
    *_, start = config["head_start_ray_commands"]
    assert re.search(r"RAY_ADDRESS=127\.0\.0\.1:6379 .*-m tidepool\.cli pool start --store s3://BUCKET/PREFIX$", start)
    assert "RAY_AUTH_MODE=token" in start
    assert "pool start" not in " ".join(config["worker_start_ray_commands"])


def test_nodes_with_efa_can_use_it_and_spot_notices_are_watched_for_on_the_workers(config: dict[str, Any]) -> None:
    efa = config["available_node_types"]["gpu_efa"]["node_config"]
    assert {card["InterfaceType"] for card in efa["NetworkInterfaces"]} == {"efa", "efa-only"}
    assert sorted(card["NetworkCardIndex"] for card in efa["NetworkInterfaces"]) == list(range(len(efa["NetworkInterfaces"])))
    start = " ".join(config["worker_start_ray_commands"])
    assert "FI_PROVIDER=efa" in start
    assert "ulimit -l unlimited" in start, "EFA pins memory"
    assert re.search(r"python -m tidepool\.spot_notice\s+--address=\$RAY_HEAD_IP:6379\b.*&$", start)
    assert "spot_notice" not in " ".join(config["head_start_ray_commands"])


def test_whoever_talks_to_ray_has_its_token_which_goes_with_no_job(config: dict[str, Any]) -> None:
    (folder,) = config["file_mounts"]
    (notice,) = (command for command in config["worker_start_ray_commands"] if "-m tidepool.spot_notice" in command)
    assert notice.startswith(f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={folder}/ray_token ")
    assert "ray_token" in (ROOT / ".gitignore").read_text().splitlines(), "what git ignores is not uploaded with a job"
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])


def test_the_image_holds_what_the_nodes_need() -> None:
    lines = (ROOT / "Containerfile").read_text().splitlines()
    copied = [line.split()[1] for line in lines if line.startswith("COPY ")]
    assert copied == ["requirements.lock", "platform", "jobs", "serve"]
    assert all((ROOT / name).exists() for name in copied)
    (base,) = (line for line in lines if line.startswith("FROM "))
    version = tuple(int(part) for part in re.findall(r"python:(\d+)\.(\d+)", base)[0])
    requires = re.findall(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', (ROOT / "pyproject.toml").read_text())[0]
    assert (3, int(requires[0])) <= version < (3, int(requires[1]))
    assert "RUN pip install --no-cache-dir -r /tmp/requirements.lock" in lines
