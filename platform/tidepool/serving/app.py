"""The Serve application: a deployment of engine replicas for each base model, the gateway before them, and the directory between.

The one module of serving that knows Ray. Serve starts, watches and stops the processes, and brings requests to the gateway. The answers
themselves travel over channels between gateway and replicas (`serving.channel`), of which Serve knows nothing, so that a connected
gateway neither counts as traffic nor holds up a replica that must go.
"""

import asyncio
import logging
import warnings
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, Literal

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from tidepool.announcement import DIRECTORY
from tidepool.errors import ClusterError
from tidepool.models.source import ModelSource
from tidepool.registry import ModelVersion, Registry
from tidepool.serving.access import check_address
from tidepool.serving.directory import Directory, View
from tidepool.serving.fleet import Fleet
from tidepool.serving.gateway import build_gateway
from tidepool.serving.host import ReplicaHost
from tidepool.serving.keys import KeyLog, KeyRing
from tidepool.serving.plan import plan_serving
from tidepool.serving.resolver import Resolver
from tidepool.serving.scaling import CACHE_USE, OCCUPANCY, TTFT_S, Autoscaler
from tidepool.serving.wire import Endpoint
from tidepool.specs import EngineSpec, ReplicasSpec, ServingSpec, parse_spec
from tidepool.storage import open_store
from tidepool.telemetry import configure_logging

_SHUTDOWN_TIMEOUT_S = 60
_PATIENCE_S = 10.0
"""For what a replica that must go still finishes by itself."""
_SHUTDOWN_POLL_S = 0.2
_HEADROOM = 64
_LOOKUP_DEADLINE_S = 5.0
_REPORT_EVERY_S = 3.0
_METRICS_EVERY_S = 1.0
"""How often Serve asks a replica for what its scaling policy goes by."""
_WATCH_S = 2.0
_RETRY_S = 1.0
_POLL_SHARE, _SHORTEST_POLL_S = 0.8, 0.2
_GATEWAY_CPUS = 0  # it waits for others nearly all the time; what it holds no run could have
_SERVE_ERRORS = (RayError, RayServeException, TimeoutError)
_logger = logging.getLogger(__name__)


def build(args: dict[str, Any]) -> serve.Application:
    """The application of a serving spec; `args` are its keys. Raises `SpecError`, `RegistryError`, `ModelError`, `StoreError`."""
    spec = parse_spec(args, ServingSpec, source="The serving spec")
    plan = plan_serving(spec, open_store(spec.store))
    directory = directory_deployment().bind()
    replicas = {base.digest: _engines(spec, base, directory) for base in plan.bases}
    gateway = serve.deployment(
        serve.ingress()(Gateway),
        name="Gateway",
        ray_actor_options={"num_cpus": _GATEWAY_CPUS},
        max_ongoing_requests=spec.gateway.max_requests + _HEADROOM,  # more than the gateway takes: it is the one that says that it is full
        graceful_shutdown_timeout_s=_SHUTDOWN_TIMEOUT_S,
    )
    return gateway.bind(spec, plan.models, replicas, directory)


def _engines(spec: ServingSpec, base: ModelSource, directory: serve.Application) -> serve.Application:
    device = "cuda" if spec.replicas.gpus_per_replica else "cpu"
    deployment = serve.deployment(
        EngineReplica,
        name=f"Engine-{base.digest[:12]}",
        **_number(spec.replicas),
        ray_actor_options={"num_cpus": spec.replicas.cpus_per_replica, "num_gpus": spec.replicas.gpus_per_replica},
        graceful_shutdown_timeout_s=_SHUTDOWN_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=_SHUTDOWN_POLL_S,
    )
    return deployment.bind(spec.store, base, spec.engine, device, directory)


def _number(spec: ReplicasSpec) -> dict[str, Any]:
    """How many replicas, in Serve's words."""
    if spec.scale is None:
        return {"num_replicas": spec.num_replicas}
    scale = spec.scale
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the interval shall be a variable of each process's environment one day
        config = AutoscalingConfig(
            min_replicas=scale.min,
            max_replicas=scale.max,
            upscale_delay_s=scale.up_after_s,
            downscale_delay_s=scale.down_after_s,
            downscale_to_zero_delay_s=scale.zero_after_s,
            metrics_interval_s=_METRICS_EVERY_S,
            policy=AutoscalingPolicy(policy_function=Autoscaler, policy_kwargs={"ttft_s": scale.ttft_s}),
        )
    return {"autoscaling_config": config}


def directory_deployment() -> serve.Deployment:
    """The deployment of an application's directory."""
    return serve.deployment(
        DirectoryActor,
        name=DIRECTORY,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=10_000,  # each gateway has a question open
        graceful_shutdown_timeout_s=_WATCH_S,
        graceful_shutdown_wait_loop_s=_SHUTDOWN_POLL_S,
    )


class DirectoryActor:
    """A `Directory` in a process of Serve's."""

    def __init__(self) -> None:
        configure_logging()
        self._directory = Directory()

    async def report(self, endpoint: Endpoint) -> None:
        """See `Directory.report`."""
        self._directory.report(endpoint)

    async def leave(self, replica_id: str) -> None:
        """See `Directory.leave`."""
        self._directory.leave(replica_id)

    async def announce(self, name: str) -> None:
        """See `Directory.announce`."""
        self._directory.announce(name)

    async def watch(self, epoch: str, seen: int) -> View:
        """See `Directory.watch`."""
        return await self._directory.watch(epoch, seen, _WATCH_S)


class EngineReplica:
    """A `Replica` in a process of Serve's, and the host that gateways reach it by."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, store_url: str, base: ModelSource, spec: EngineSpec, device: Literal["cpu", "cuda"], directory: DeploymentHandle
    ) -> None:
        from tidepool.serving.replica import load_replica  # torch is for the replicas alone

        configure_logging()
        self._max_batch_size = spec.max_batch_size
        self._replica = load_replica(store_url, base, spec, device)
        self._host = ReplicaHost(self._replica)
        self._presence = Presence(await self._host.open(_own_id(), base.digest, ray.util.get_node_ip_address()), directory)

    def check_health(self) -> None:
        """Asked by Serve, which replaces a replica that raises."""
        self._replica.check()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Serve, for the policy of `serving.scaling`."""
        load = self._replica.load()
        return {
            OCCUPANCY: (load.num_running + load.num_queued) / self._max_batch_size,
            CACHE_USE: 1 - load.num_free_blocks / load.num_blocks,
            TTFT_S: self._host.ttft_s,
        }

    async def wake(self) -> None:
        """A request of Serve's, which starts a replica where there is none."""

    async def __del__(self) -> None:
        """Called and awaited by Serve when this replica must go."""
        await self._presence.end()
        await self._host.leave(_PATIENCE_S)


class Presence:
    """Keeps a replica listed in the directory, from now until its end."""

    def __init__(self, endpoint: Endpoint, directory: DeploymentHandle) -> None:
        self._endpoint, self._directory = endpoint, directory
        self._reporting = asyncio.create_task(self._report_regularly())

    async def end(self) -> None:
        """Have the replica listed no longer."""
        self._reporting.cancel()
        await asyncio.gather(self._reporting, return_exceptions=True)
        try:
            async with asyncio.timeout(_REPORT_EVERY_S):
                await self._directory.leave.remote(self._endpoint.replica_id)
        except _SERVE_ERRORS as error:  # the gateways notice by themselves that it is gone
            _logger.info("The directory was not told that this replica goes: %r", error)

    async def _report_regularly(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_REPORT_EVERY_S):
                    await self._directory.report.remote(self._endpoint)
            except _SERVE_ERRORS as error:  # Serve starts another one
                _logger.warning("The directory does not answer: %r", error)
            await asyncio.sleep(_REPORT_EVERY_S)


class Gateway:
    """The gateway in a process of Serve's, which constructs it in its event loop and asks for its ASGI application then."""

    def __init__(
        self,
        spec: ServingSpec,
        deployed: Mapping[str, ModelVersion],
        replicas: Mapping[str, DeploymentHandle],
        directory: DeploymentHandle,
    ) -> None:
        configure_logging()
        check_address(_get_global_client().http_config.host, spec.gateway)
        store = open_store(spec.store, deadline_s=_LOOKUP_DEADLINE_S)
        self._replicas = replicas
        self._fleet = Fleet(self._wake)
        self._resolver = Resolver(Registry(store).meaning, deployed, replicas.keys(), spec.resolve_ttl_s, prepare=self._fleet.prepare)
        keys = KeyRing(KeyLog(store).read_after, spec.gateway.keys_max_age_s)
        self._app = build_gateway(self._resolver, self._fleet, spec.gateway, keys)
        self._tasks = [
            asyncio.create_task(follow(directory, self._fleet, self._resolver.refresh)),
            asyncio.create_task(_poll(self._resolver, spec.resolve_ttl_s)),
        ]

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    async def _wake(self, base_digest: str) -> None:
        try:
            await self._replicas[base_digest].wake.remote()
        except _SERVE_ERRORS as error:
            raise ClusterError(f"Serve has no replica: {error}") from error


async def follow(directory: DeploymentHandle, fleet: Fleet, refresh: Callable[[Collection[str] | None], Awaitable[None]]) -> None:
    """Keep a gateway's replicas those that the directory lists, and ask anew for names that have moved, for ever."""
    epoch, seen = "", -1
    while True:
        try:
            view: View = await directory.watch.remote(epoch, seen)
        except _SERVE_ERRORS as error:  # Serve starts another one; what is connected stays so
            _logger.warning("The directory does not answer: %r", error)
            await asyncio.sleep(_RETRY_S)
            continue
        if (view.epoch, view.number) != (epoch, seen):
            fleet.update(view.endpoints)
            epoch, seen = view.epoch, view.number
            if view.moved != ():
                await refresh(view.moved)


async def _poll(resolver: Resolver, ttl_s: float) -> None:
    """Look what names mean before a request has to, for ever: not every move is announced."""
    while True:
        await asyncio.sleep(max(_POLL_SHARE * ttl_s, _SHORTEST_POLL_S))
        await resolver.refresh()


def _own_id() -> str:
    return str(serve.get_replica_context().replica_id.unique_id)
