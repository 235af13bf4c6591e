"""Keeps the deployments of an application's bases as `serving.bases` decides: a shell between the registry, the directory and Ray Serve.

Each base is an application of Serve's beside the gateway's (`serving.engines`): it comes, fails and goes without touching the others. What
there is is read anew in each round, so what one leaves half done is done by the next one, in whichever process.
"""

import asyncio
import logging
import re
import time

from ray import serve
from ray.serve.schema import ApplicationStatus

from tidepool.errors import TidepoolError
from tidepool.models.source import ModelSource
from tidepool.serving.autoscaler import ring_bell
from tidepool.serving.bases import Bases, Deploy, Remove, Ring, Seen, base_id
from tidepool.serving.directory import Directory
from tidepool.serving.engines import SERVE_ERRORS, engines, engines_of
from tidepool.serving.plan import NamedBases, ServingPlan
from tidepool.specs import ServingSpec
from tidepool.storage import open_store

_LOOKUP_DEADLINE_S = 5.0
_SHORTEST_ROUND_S, _LONGEST_ROUND_S = 0.2, 2.0
_FAILED = (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY)
_logger = logging.getLogger(__name__)


class Keeper:
    """Of one application, in the event loop of its directory."""

    def __init__(self, application: str, spec: ServingSpec, plan: ServingPlan, directory: Directory) -> None:
        self._application, self._spec, self._directory = application, spec, directory
        self._named = NamedBases(plan, open_store(spec.store, deadline_s=_LOOKUP_DEADLINE_S))
        self._bases = Bases(base_id(base.digest) for base in plan.bases)

    async def run(self) -> None:
        """Keep them, for ever: at once when a name moves or a replica comes, else every two seconds."""
        while True:
            view = await self._directory.watch("", -1, 0)
            try:
                await self._do_round()
            except (*SERVE_ERRORS, TidepoolError) as error:
                _logger.warning("The deployments of the models are not looked after now, and tried again: %r", error)
            await asyncio.sleep(_SHORTEST_ROUND_S)
            await self._directory.watch(view.epoch, view.number, _LONGEST_ROUND_S)

    async def end(self) -> None:
        """This process ends: take the deployments along, if the application is being deleted."""
        try:
            statuses = await asyncio.to_thread(_statuses)
            if statuses.get(self._application, ApplicationStatus.DELETING) == ApplicationStatus.DELETING:
                for name in filter(self._id_of, statuses):
                    await asyncio.to_thread(serve.delete, name, _blocking=False)
        except SERVE_ERRORS as error:
            _logger.warning("Serve does not say whether the deployments of the models shall go too: %r", error)

    async def _do_round(self) -> None:
        named = {base_id(digest): base for digest, base in (await asyncio.to_thread(self._named.look_up)).items()}
        statuses = {one: status for name, status in (await asyncio.to_thread(_statuses)).items() if (one := self._id_of(name))}
        there = {one: status in _FAILED for one, status in statuses.items() if status != ApplicationStatus.DELETING}
        steps = self._bases.decide(Seen(named, there, self._directory.busy()), time.monotonic())
        self._directory.offer(self._bases.offered)
        for step in steps:
            match step:
                case Deploy(base):
                    if base_id(base.digest) not in statuses.keys() - there.keys():  # else when it is gone
                        _logger.info("Deploying %s", base.ref)
                        await asyncio.to_thread(self._deploy, base)
                case Remove(one):
                    _logger.info("Removing the deployment of the base %s", one)
                    await asyncio.to_thread(serve.delete, engines_of(self._application, one)[0], _blocking=False)
                case Ring(one):
                    await asyncio.to_thread(ring_bell, *engines_of(self._application, one))

    def _deploy(self, base: ModelSource) -> None:
        name, _ = engines_of(self._application, base_id(base.digest))
        target = serve.RunTarget(engines(self._application, self._spec, base), name, route_prefix=None)
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        self._bases.note_deployed(base_id(base.digest))

    def _id_of(self, application: str) -> str | None:
        """The id of the base whose application this is; None if it is none of ours."""
        found = re.fullmatch(re.escape(self._application) + "-([0-9a-f]{12})", application)
        return found and found[1]


def _statuses() -> dict[str, ApplicationStatus]:
    return {name: one.status for name, one in serve.status().applications.items()}
