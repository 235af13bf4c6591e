"""What Ray says of the cluster now, read from its control store (GCS). A shell around `tables`.

It is read about twice a second, so that it asks neither the dashboard nor the state API: a few calls to the GCS, some milliseconds
each. What node types could be launched stands in the autoscaler's configuration file, which only the head node has: the arbiter runs there.
"""

import functools
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import psutil
import ray
import ray._private.state
import yaml
from ray.core.generated import autoscaler_pb2, gcs_pb2
from ray.experimental.internal_kv import internal_kv_get_gcs_client

from tidepool.messages import NAMESPACE, ClusterView
from tidepool.pool.tables import Actor, Autoscaler, Tables, view

# In the order in which an actor passes through them, so that one that goes on between two calls is not missed.
_STATES = "DEPENDENCIES_UNREADY", "PENDING_CREATION", "ALIVE", "RESTARTING"
_CONFIG_OPTION = "--autoscaling-config="
_LOGS_OPTION = "--logs-dir="
_TIMEOUT_S = 10.0


def read_cluster() -> ClusterView:
    """What the arbiter sees of the cluster that this process is connected to. Raises Ray's errors if the GCS does not answer."""
    state = ray._private.state.state
    accessor = state._connect_and_get_accessor()
    actors = {actor_id: actor for name in _STATES for actor_id, actor in _actors(accessor.get_actor_table(None, name))}
    tables = Tables(
        nodes=accessor.get_node_table(),
        available=state.available_resources_per_node(),
        draining=accessor.get_draining_nodes(),
        actors=tuple(actors.values()),
        autoscaler=_autoscaler(),
    )
    return view(tables, time.time(), NAMESPACE)


def _actors(rows: list[bytes]) -> Iterator[tuple[bytes, Actor]]:
    """Those that have a name: ours, and Serve's."""
    for row in map(gcs_pb2.ActorTableData.FromString, rows):
        if row.name:
            is_alive = row.state == gcs_pb2.ActorTableData.ALIVE
            node = row.address.node_id if row.address.ip_address else b""  # before that it is only asked for room
            yield row.actor_id, Actor(row.name, row.ray_namespace, node.hex(), is_alive, dict(row.required_resources))


def _autoscaler() -> Autoscaler:
    path = _config_path(ray.get_runtime_context().get_session_name())
    if path is None:
        return Autoscaler()
    reply = autoscaler_pb2.GetClusterStatusReply.FromString(internal_kv_get_gcs_client().get_cluster_status(timeout_s=_TIMEOUT_S))
    state = reply.autoscaling_state
    launching = Counter(instance.ray_node_type_name for instance in state.pending_instances)
    for request in state.pending_instance_requests:
        launching[request.ray_node_type_name] += request.count
    failed: dict[str, float] = {}
    for request in state.failed_instance_requests:
        failed[request.ray_node_type_name] = max(request.failed_ts, failed.get(request.ray_node_type_name, 0.0))
    try:
        config = _read_config(path, os.stat(path).st_mtime_ns)
    except (OSError, yaml.YAMLError):  # it is being replaced: the next look finds it
        return Autoscaler()
    return Autoscaler(config, launching, failed)


@functools.cache
def _config_path(session: str) -> str | None:
    """The configuration file of the autoscaler of a Ray session, a process of this node; None where it has none or is not here."""
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or ()
        paths = [word.removeprefix(_CONFIG_OPTION) for word in command if word.startswith(_CONFIG_OPTION)]
        if paths and any(word.startswith(_LOGS_OPTION) and session in word for word in command):
            return os.path.expanduser(str(paths[0]))
    return None


@functools.lru_cache(maxsize=1)
def _read_config(path: str, _changed_ns: int) -> Mapping[str, Any]:
    """A configuration file, read once for each change of it: `ray up` replaces it while the cluster runs."""
    with open(path) as file:
        config: Mapping[str, Any] = yaml.safe_load(file)
    return config
