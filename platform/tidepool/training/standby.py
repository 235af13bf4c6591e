"""Processes that wait for replica groups to come: what takes a worker seconds to import, they have imported by then.

Ray takes an idle process of the same job and runtime environment for a new actor, where a node has one. So one is started ahead of time,
by the call with which Ray itself starts processes before they are needed, and the runtime environment of a group's workers names `load`
as the hook that each process runs as it begins. A process that waits holds nothing that the pool counts. Ray ends it with its
job, or where nobody has needed it for `_KEEP_S`; then a group starts as it does without.
"""

import logging
from importlib import import_module

import grpc
import ray
import ray._private.state
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR
from ray.core.generated import common_pb2, gcs_pb2, node_manager_pb2, node_manager_pb2_grpc

from tidepool.collector import collector_paused
from tidepool.messages import Places

RUNTIME_ENV = {"env_vars": {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: f"{__name__}.load"}}
"""That of a group's workers, beside their job's."""

_logger = logging.getLogger(__name__)
_NEEDED = ("ray.train.torch", "tidepool.announcement", "tidepool.training.member", "tidepool.training.worker")
_KEEP_S = 3600
_TIMEOUT_S = 5.0


def load() -> None:
    """Import what a worker needs (see `ray_worker`). Nothing of it may look for a GPU: which one is the worker's, Ray says later."""
    with collector_paused():
        for name in _NEEDED:
            import_module(name)


def start_processes(places: Places) -> None:
    """Start processes that wait, there. Nothing comes of it before this job's first worker, and where Ray does not answer."""
    environment = _worker_environment()
    if environment is None:
        return
    nodes = {node["NodeID"]: f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}" for node in ray.nodes() if node["Alive"]}
    for node, num_processes in places:
        if node not in nodes:
            continue
        request = node_manager_pb2.PrestartWorkersRequest(
            language=common_pb2.Language.PYTHON, job_id=_job().binary(), keep_alive_duration_secs=_KEEP_S, num_workers=num_processes
        )
        request.runtime_env_info.serialized_runtime_env = environment
        try:
            with init_grpc_channel(nodes[node]) as channel:
                node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            _logger.info("no process waits on node %s for a group to come: %s", node, error)


def _worker_environment() -> str | None:
    """The runtime environment of this job's workers, as Ray has written it down for one of them: only the same text is the same."""
    accessor = ray._private.state.state._connect_and_get_accessor()
    actors = map(gcs_pb2.ActorTableData.FromString, accessor.get_actor_table(_job(), None))
    hook = RUNTIME_ENV["env_vars"][WORKER_PROCESS_SETUP_HOOK_ENV_VAR]
    return next((str(actor.serialized_runtime_env) for actor in actors if hook in actor.serialized_runtime_env), None)


def _job() -> "ray.JobID":
    return ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
