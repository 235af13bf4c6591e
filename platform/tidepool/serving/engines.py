"""The deployment of a base's replicas on Ray Serve: an application of its own beside the gateway's. Knows Ray.

Serve starts, watches and stops the processes. The answers travel over channels between gateway and replicas (`serving.channel`), of which
Serve knows nothing, so that a connected gateway neither counts as traffic nor holds up a replica that must go.
"""

import asyncio
import hashlib
import logging
import math
import warnings
from collections.abc import Callable
from typing import Literal

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from tidepool import __version__
from tidepool.announcement import DIRECTORY
from tidepool.collector import collector_paused
from tidepool.errors import ModelError
from tidepool.inference.engine import EngineStats
from tidepool.messages import ARBITER, NAMESPACE
from tidepool.models.source import ModelSource
from tidepool.serving import scaling
from tidepool.serving.autoscaler import Autoscaler
from tidepool.serving.bases import base_id
from tidepool.serving.host import ReplicaHost
from tidepool.serving.scaling import CACHE_USE, OCCUPANCY, TTFT_S
from tidepool.serving.wire import Endpoint
from tidepool.specs import EngineSpec, ReplicasSpec, ScaleSpec, ServingSpec
from tidepool.telemetry import configure_logging

SERVE_ERRORS = (RayError, RayServeException, TimeoutError)
SHUTDOWN_TIMEOUT_S = 60
SHUTDOWN_POLL_S = 0.2
_PATIENCE_S = 10.0
"""For what a replica that must go still finishes by itself."""
_REPORT_EVERY_S = 3.0
_CHECK_EVERY_S = 3.0
_METRICS_EVERY_S = 1.0
"""How often Serve asks a replica for what its scaling policy goes by."""
_logger = logging.getLogger(__name__)


def engines_of(application: str, base: str) -> tuple[str, str]:
    """The application and the deployment of a base by its id, beside an application."""
    return f"{application}-{base}", f"Engine-{base}"


def engines(application: str, spec: ServingSpec, base: ModelSource) -> serve.Application:
    """A base's replicas, for an application whose directory they report to.

    To deploy it over one of the same settings changes nothing; a difference in the number alone starts and stops no others.
    """
    device = "cuda" if spec.replicas.gpus_per_replica else "cpu"
    settings = "\n".join([__version__, spec.store, base.digest, spec.engine.model_dump_json(), device])
    deployment = serve.deployment(
        EngineReplica,
        name=engines_of(application, base_id(base.digest))[1],
        autoscaling_config=autoscaling(spec.replicas),
        ray_actor_options={"num_cpus": spec.replicas.cpus_per_replica, "num_gpus": spec.replicas.gpus_per_replica},
        health_check_period_s=_CHECK_EVERY_S,
        graceful_shutdown_timeout_s=SHUTDOWN_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=SHUTDOWN_POLL_S,
    )
    # Serve gives a deployment of no version a new one each time, and starts all replicas anew.
    pinned = deployment.options(version=hashlib.sha256(settings.encode()).hexdigest(), _internal=True)
    return pinned.bind(spec.store, base, spec.engine, device, application)


def autoscaling(spec: ReplicasSpec) -> AutoscalingConfig:
    """How many replicas, in Serve's words: bounds and delays are our policy's to apply, which asks the arbiter before Serve hears of it."""
    scale = spec.scale or ScaleSpec(min=spec.num_replicas, max=spec.num_replicas)
    claim = [spec.project, spec.priority, math.ceil(spec.gpus_per_replica), math.ceil(spec.cpus_per_replica)]
    ray.cloudpickle.register_pickle_by_value(scaling)  # Serve does it for the policy's own module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the interval shall be a variable of each process's environment one day
        return AutoscalingConfig(
            min_replicas=0,
            max_replicas=scale.max,
            upscale_delay_s=0,
            downscale_delay_s=0,
            metrics_interval_s=_METRICS_EVERY_S,
            policy=AutoscalingPolicy(policy_function=Autoscaler, policy_kwargs={"limits": scale.model_dump(), "claim": claim}),
        )


class EngineReplica:
    """A `Replica` in a process of Serve's, and the host that gateways reach it by."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, store_url: str, base: ModelSource, spec: EngineSpec, device: Literal["cpu", "cuda"], application: str
    ) -> None:
        configure_logging()
        self._max_batch_size = spec.max_batch_size
        with collector_paused():
            from tidepool.serving.replica import load_replica  # torch is for the replicas alone
        self._replica = load_replica(store_url, base, spec, device)
        self._host = ReplicaHost(self._replica)
        endpoint = await self._host.open(_own_id(), base.digest, ray.util.get_node_ip_address())
        self._presence = Presence(endpoint, serve.get_deployment_handle(DIRECTORY, application), lambda: self._host.is_busy)

    async def check_health(self) -> None:
        """Asked by Serve, which starts another replica for one that raises a few times, and lets this one hand its requests over."""
        self._replica.check()
        if why := await _why_closed(ray.get_runtime_context().get_node_id()):
            raise ModelError(f"This replica leaves its node, which is in quarantine: {why}.")

    def counters(self) -> EngineStats:
        """What the engine of this replica has counted, for whoever looks: a request of Serve's, which goes to any of them."""
        return self._replica.stats()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Serve, for the policy of `serving.scaling`."""
        load = self._replica.load()
        return {
            OCCUPANCY: (load.num_running + load.num_queued) / self._max_batch_size,
            CACHE_USE: 1 - load.num_free_blocks / load.num_blocks,
            TTFT_S: self._host.ttft_s,
        }

    async def __del__(self) -> None:
        """Called and awaited by Serve when this replica must go."""
        await self._presence.end()
        await self._host.leave(_PATIENCE_S)


class Presence:
    """Keeps a replica listed in the directory, from now until its end."""

    def __init__(self, endpoint: Endpoint, directory: DeploymentHandle, is_busy: Callable[[], bool]) -> None:
        self._endpoint, self._directory, self._is_busy = endpoint, directory, is_busy
        self._reporting = asyncio.create_task(self._report_regularly())

    async def end(self) -> None:
        """Have the replica listed no longer."""
        self._reporting.cancel()
        await asyncio.gather(self._reporting, return_exceptions=True)
        try:
            async with asyncio.timeout(_REPORT_EVERY_S):
                await self._directory.leave.remote(self._endpoint.replica_id)
        except SERVE_ERRORS as error:  # the gateways notice by themselves that it is gone
            _logger.info("The directory was not told that this replica goes: %r", error)

    async def _report_regularly(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_REPORT_EVERY_S):
                    await self._directory.report.remote(self._endpoint, self._is_busy())
            except SERVE_ERRORS as error:  # Serve starts another one
                _logger.warning("The directory does not answer: %r", error)
            await asyncio.sleep(_REPORT_EVERY_S)


async def _why_closed(node: str) -> str | None:
    """Why this node is to be left, as far as there is an arbiter that says so."""
    try:
        async with asyncio.timeout(_REPORT_EVERY_S):
            why: str | None = await ray.get_actor(ARBITER, NAMESPACE).why_closed.remote(node)
    except (ValueError, *SERVE_ERRORS):  # there is none, or it is being started again
        return None
    return why


def _own_id() -> str:
    return str(serve.get_replica_context().replica_id.unique_id)
