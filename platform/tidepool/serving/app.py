"""The Serve application: the gateway and the directory, which keeps a deployment of engine replicas for each base beside them.

Serve starts, watches and stops the processes, and brings requests to the gateway. Gateway and replicas talk over channels of their own.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette

from tidepool.announcement import DIRECTORY
from tidepool.arbiter_handle import find_arbiter
from tidepool.errors import ClusterError
from tidepool.registry import ModelVersion, Registry
from tidepool.serving.access import check_address
from tidepool.serving.autoscaler import ring_bell
from tidepool.serving.bases import base_id
from tidepool.serving.directory import Directory, View, answering
from tidepool.serving.door import Door
from tidepool.serving.engines import SERVE_ERRORS, SHUTDOWN_POLL_S, SHUTDOWN_TIMEOUT_S, engines_of
from tidepool.serving.fleet import Fleet
from tidepool.serving.gateway import build_gateway
from tidepool.serving.keeper import Keeper
from tidepool.serving.keys import KeyLog, KeyRing
from tidepool.serving.plan import ServingPlan, base_digest_of, plan_serving
from tidepool.serving.resolver import Resolver
from tidepool.serving.wire import Endpoint
from tidepool.specs import ServingSpec, parse_spec
from tidepool.storage import open_store
from tidepool.telemetry import configure_logging

_HEADROOM = 64
_LOOKUP_DEADLINE_S = 5.0
_FIRST_VIEW_S = 5.0
_WATCH_S = 2.0
_FAREWELL_S = 15.0
_RETRY_S = 1.0
_POLL_SHARE, _SHORTEST_POLL_S = 0.8, 0.2
_LOOPBACK = "127.0.0.1"
_TLS_OPTIONS = ("ssl_certfile", "ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs")
_DOOR_PATIENCE_S = SHUTDOWN_TIMEOUT_S - 10.0  # Serve ends the process then
_GATEWAY_CPUS = 0  # it waits for others nearly all the time; what it holds no run could have
_logger = logging.getLogger(__name__)


def build(args: dict[str, Any]) -> serve.Application:
    """The application of a serving spec; `args` are its keys. Raises `SpecError`, `RegistryError`, `ModelError`, `StoreError`."""
    spec = parse_spec(args, ServingSpec, source="The serving spec")
    plan = plan_serving(spec, open_store(spec.store))
    directory = directory_deployment().bind(spec, plan)
    gateway = serve.deployment(
        serve.ingress()(Gateway),
        name="Gateway",
        num_replicas=spec.gateway.replicas,
        ray_actor_options={"num_cpus": _GATEWAY_CPUS},
        max_ongoing_requests=spec.gateway.max_requests + _HEADROOM,  # more than the gateway takes: it is the one that says that it is full
        graceful_shutdown_timeout_s=SHUTDOWN_TIMEOUT_S,
    )
    return gateway.bind(spec, plan.models, directory)


def directory_deployment() -> serve.Deployment:
    """The deployment of an application's directory."""
    return serve.deployment(
        DirectoryActor,
        name=DIRECTORY,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=10_000,  # each gateway has a question open
        graceful_shutdown_timeout_s=_FAREWELL_S,
        graceful_shutdown_wait_loop_s=SHUTDOWN_POLL_S,
    )


class DirectoryActor:
    """A `Directory` in a process of Serve's, and with a plan the `Keeper` of its bases. It also sees to it that there is an arbiter."""

    def __init__(self, spec: ServingSpec | None = None, plan: ServingPlan | None = None) -> None:
        configure_logging()
        self._directory = Directory()
        self._keeper: Keeper | None = None
        if spec is not None and plan is not None:
            self._keeper = Keeper(serve.get_replica_context().app_name, spec, plan, self._directory)
            self._keeping = asyncio.create_task(self._keeper.run())
        find_arbiter()  # those who scale ask it, and start none

    async def report(self, endpoint: Endpoint, is_busy: bool) -> None:
        """See `Directory.report`."""
        self._directory.report(endpoint, is_busy)

    async def leave(self, replica_id: str) -> None:
        """See `Directory.leave`."""
        self._directory.leave(replica_id)

    async def announce(self, name: str) -> None:
        """See `Directory.announce`."""
        self._directory.announce(name)

    async def watch(self, epoch: str, seen: int) -> View:
        """See `Directory.watch`."""
        return await self._directory.watch(epoch, seen, _WATCH_S)

    def check_health(self) -> None:
        """Asked by Serve, which starts another one where this raises."""
        if self._keeper is not None and self._keeping.done():
            self._keeping.result()

    async def __del__(self) -> None:
        """Called and awaited by Serve when this replica must go."""
        if self._keeper is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
            await self._keeper.end()


class Gateway:
    """The gateway in a process of Serve's, which constructs it in its event loop and asks for its ASGI application then."""

    def __init__(self, spec: ServingSpec, deployed: Mapping[str, ModelVersion], directory: DeploymentHandle) -> None:
        configure_logging()
        http = _get_global_client().http_config
        check_address(http.host, spec.gateway)
        store = open_store(spec.store, deadline_s=_LOOKUP_DEADLINE_S)
        self._fleet = Fleet(self._wake)
        self._bases = {digest for version in deployed.values() if (digest := base_digest_of(version))}
        self._resolver = Resolver(Registry(store).meaning, deployed, self._bases, spec.resolve_ttl_s, prepare=self._fleet.prepare)
        keys = KeyRing(KeyLog(store).read_after, spec.gateway.keys_max_age_s)
        self._app = build_gateway(self._resolver, self._fleet, spec.gateway, keys, self._lifespan)
        tls = {name: getattr(http, name) for name in _TLS_OPTIONS}
        port = spec.gateway.port
        self._door = Door(self._app, http.host or _LOOPBACK, port, tls) if port is not None else None
        self._is_informed = asyncio.Event()
        self._tasks = [
            asyncio.create_task(follow(directory, self._take)),
            asyncio.create_task(_poll(self._resolver, spec.resolve_ttl_s)),
        ]

    async def __serve_build_asgi_app__(self) -> Any:
        with suppress(TimeoutError):  # then it begins with what was deployed first
            async with asyncio.timeout(_FIRST_VIEW_S):
                await self._is_informed.wait()
        if self._door is not None:
            self._door.open()
        return self._app

    def check_health(self) -> None:
        """Asked by Serve, which starts another one where this raises."""
        if self._door is not None:
            self._door.check()

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Serve ends it when this replica must go, once what came through Serve's proxy is answered."""
        yield
        if self._door is not None:
            await self._door.close(_DOOR_PATIENCE_S)

    async def _take(self, view: View) -> None:
        self._fleet.update(view.endpoints)
        bases = answering(self._bases, view)
        self._bases.clear()
        self._bases.update(bases)
        if view.moved != ():
            await self._resolver.refresh(view.moved)
        self._is_informed.set()

    async def _wake(self, base_digest: str) -> None:
        try:
            await asyncio.to_thread(ring_bell, *engines_of(serve.get_replica_context().app_name, base_id(base_digest)))
        except RayError as error:  # the head is away
            raise ClusterError(f"Ray cannot be told: {error}") from error


async def follow(directory: DeploymentHandle, take: Callable[[View], Awaitable[None]]) -> None:
    """Take whatever there is new in a directory, for ever."""
    epoch, seen = "", -1
    while True:
        try:
            view: View = await directory.watch.remote(epoch, seen)
        except SERVE_ERRORS as error:  # Serve starts another one; what is connected stays so
            _logger.warning("The directory does not answer: %r", error)
            await asyncio.sleep(_RETRY_S)
            continue
        if (view.epoch, view.number) != (epoch, seen):
            epoch, seen = view.epoch, view.number
            await take(view)


async def _poll(resolver: Resolver, ttl_s: float) -> None:
    """Look what names mean before a request has to, for ever: not every move is announced."""
    while True:
        await asyncio.sleep(max(_POLL_SHARE * ttl_s, _SHORTEST_POLL_S))
        await resolver.refresh()
