"""The Serve application: a deployment of engine replicas for each base model, and the gateway before them.

The one module of serving that knows Ray. Ray's errors become Tidepool's here, so that the gateway can tell a busy engine from
a wrong request and from a replica that is gone.
"""

from collections.abc import AsyncGenerator, Mapping
from typing import Any, Literal

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from tidepool.errors import ClusterError, EngineBusyError, TidepoolError
from tidepool.models.source import ModelSource
from tidepool.registry import ModelVersion, Registry
from tidepool.serving.access import check_address
from tidepool.serving.backend import Call, Frame
from tidepool.serving.gateway import build_gateway
from tidepool.serving.keys import KeyLog, KeyRing
from tidepool.serving.plan import plan_serving
from tidepool.serving.resolver import Resolver
from tidepool.specs import EngineSpec, ServingSpec, parse_spec
from tidepool.storage import open_store
from tidepool.telemetry import configure_logging

_SHUTDOWN_TIMEOUT_S = 60
_HEADROOM = 64
_LOOKUP_DEADLINE_S = 5.0
_GATEWAY_CPUS = 0  # it waits for others nearly all the time; what it holds no run could have


def build(args: dict[str, Any]) -> serve.Application:
    """The application of a serving spec; `args` are its keys. Raises `SpecError`, `RegistryError`, `ModelError`, `StoreError`."""
    spec = parse_spec(args, ServingSpec, source="The serving spec")
    plan = plan_serving(spec, open_store(spec.store))
    replicas = {base.digest: _deployment(spec, base) for base in plan.bases}
    gateway = serve.deployment(
        serve.ingress()(Gateway),
        name="Gateway",
        ray_actor_options={"num_cpus": _GATEWAY_CPUS},
        max_ongoing_requests=spec.gateway.max_requests + _HEADROOM,  # more than the gateway takes: it is the one that says that it is full
        graceful_shutdown_timeout_s=_SHUTDOWN_TIMEOUT_S,
    )
    return gateway.bind(spec, plan.models, replicas)


def _deployment(spec: ServingSpec, base: ModelSource) -> serve.Application:
    limit = spec.engine.max_batch_size + spec.engine.max_queued_requests
    device = "cuda" if spec.replicas.gpus_per_replica else "cpu"
    deployment = serve.deployment(
        EngineReplica,
        name=f"Engine-{base.digest[:12]}",
        num_replicas=spec.replicas.num_replicas,
        ray_actor_options={"num_cpus": spec.replicas.cpus_per_replica, "num_gpus": spec.replicas.gpus_per_replica},
        max_ongoing_requests=limit + _HEADROOM,  # more than the engine takes: it is the engine that says that it is busy
        max_queued_requests=limit,
        graceful_shutdown_timeout_s=_SHUTDOWN_TIMEOUT_S,
    )
    return deployment.bind(spec.store, base, spec.engine, device)


class EngineReplica:
    """A `Replica` in a process of Serve's."""

    def __init__(self, store_url: str, base: ModelSource, spec: EngineSpec, device: Literal["cpu", "cuda"]) -> None:
        from tidepool.serving.replica import load_replica  # torch is for the replicas alone

        configure_logging()
        self._replica = load_replica(store_url, base, spec, device)

    def check_health(self) -> None:
        """Asked by Serve, which replaces a replica that raises."""
        self._replica.check()

    async def generate(self, call: Call) -> AsyncGenerator[Frame, None]:
        """See `Replica.generate`."""
        frames = self._replica.generate(call)
        try:
            async for frame in frames:
                yield frame
        finally:
            await frames.aclose()


class Gateway:
    """The gateway in a process of Serve's, which asks for its ASGI application once it is constructed."""

    def __init__(self, spec: ServingSpec, deployed: Mapping[str, ModelVersion], replicas: Mapping[str, DeploymentHandle]) -> None:
        configure_logging()
        check_address(_get_global_client().http_config.host, spec.gateway)
        store = open_store(spec.store, deadline_s=_LOOKUP_DEADLINE_S)
        resolver = Resolver(Registry(store).resolve, deployed, replicas.keys(), spec.resolve_ttl_s)
        keys = KeyRing(KeyLog(store).read_after, spec.gateway.keys_max_age_s)
        self._app = build_gateway(resolver, ServeBackend(replicas), spec.gateway, keys)

    def __serve_build_asgi_app__(self) -> Any:
        return self._app


class ServeBackend:
    """The `Backend` of Serve handles, by the digest of their base."""

    def __init__(self, replicas: Mapping[str, DeploymentHandle]) -> None:
        self._handles = {digest: handle.options(stream=True) for digest, handle in replicas.items()}

    async def generate(self, call: Call) -> AsyncGenerator[Frame, None]:
        """See `Backend.generate`."""
        frames = self._handles[call.base_digest].generate.remote(call)
        finished = False
        try:
            async for frame in frames:
                yield frame
            finished = True
        except Exception as error:
            finished = True
            raise _tidepool_error(error) from error
        finally:
            if not finished:  # the client left, or the answer is complete for us
                frames.cancel()


def _tidepool_error(error: Exception) -> Exception:
    """What an error of Serve or of a replica means to the gateway; any other one stays as it is."""
    if isinstance(error, RayTaskError):
        return error.cause if isinstance(error.cause, TidepoolError) else error
    if isinstance(error, BackPressureError):
        return EngineBusyError(str(error))
    if isinstance(error, RayError | DeploymentUnavailableError | ReplicaUnavailableError):
        return ClusterError("The replica that served this request is gone: try again.")
    return error
