"""From the model name in a request to the version that answers it.

Invariants:
- Only what the serving spec lists is served: an entry as it stands, and for a bare name its versions (`name@3`) and aliases
  (`name:canary`) too.
- What a name means is asked again after `ttl_s`; `name@3` always means the same and is asked once. Requests for one name at
  one time share one question to the store.
- What was known or served once goes on when the store does not answer, or when an alias moves to a version whose base has no
  deployment; each is logged. A version that was asked for by its number is never answered by another one.
- Errors are not remembered.

The memory of what was served is this process's: a gateway that starts anew begins with the versions of the deployment.
"""

import asyncio
import difflib
import logging
import re
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass

from tidepool.errors import ClusterError, RegistryError, StoreError
from tidepool.registry import ModelVersion
from tidepool.serving.plan import base_digest_of

_logger = logging.getLogger(__name__)
_PINNED = re.compile(r"[^@:]+@[1-9][0-9]{0,8}", re.ASCII)


@dataclass(frozen=True)
class _Known:
    version: ModelVersion
    expires_at: float


class Resolver:
    """Resolves names for one gateway, in one event loop. `lookup` is `Registry.resolve`, which blocks and runs in a thread."""

    def __init__(
        self,
        lookup: Callable[[str], ModelVersion],
        deployed: Mapping[str, ModelVersion],
        base_digests: Set[str],
        ttl_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lookup, self._ttl_s, self._clock = lookup, ttl_s, clock
        self._entries, self._base_digests = tuple(deployed), base_digests
        self._served = dict(deployed)
        self._known = {ref: _Known(version, self._expiry(ref)) for ref, version in deployed.items()}
        self._lookups: dict[str, asyncio.Task[ModelVersion]] = {}
        self._warned: dict[str, str] = {}

    async def resolve(self, ref: str) -> ModelVersion:
        """The version that answers requests for `ref` now.

        Raises `RegistryError` for what is not served or not there, `ClusterError` for a version whose base has no deployment,
        `StoreError` if the store does not answer and nothing is known.
        """
        self._check_served(ref)
        known = self._known.get(ref)
        version = known.version if known and self._clock() < known.expires_at else await self._ask(ref)
        return self._servable(ref, version)

    async def models(self, is_wanted: Callable[[str], bool] = lambda _: True) -> dict[str, ModelVersion]:
        """Every entry of the serving spec that is wanted, with the version that answers for it now."""
        entries = [entry for entry in self._entries if is_wanted(entry)]
        versions = await asyncio.gather(*(self.resolve(entry) for entry in entries))
        return dict(zip(entries, versions, strict=True))

    async def _ask(self, ref: str) -> ModelVersion:
        task = self._lookups.get(ref)
        if task is None:
            task = self._lookups[ref] = asyncio.create_task(self._refresh(ref))
        return await asyncio.shield(task)  # a client that leaves must not cancel the others' question

    async def _refresh(self, ref: str) -> ModelVersion:
        try:
            version = await asyncio.to_thread(self._lookup, ref)
        except (StoreError, RegistryError) as error:
            known = self._known.get(ref)
            if known is None:
                raise
            _logger.warning("%s cannot be looked up (%s): requests go on with %s.", ref, error, known.version.ref)
            version = known.version
        finally:
            del self._lookups[ref]
        self._known[ref] = _Known(version, self._expiry(ref))
        return version

    def _expiry(self, ref: str) -> float:
        return float("inf") if _PINNED.fullmatch(ref) else self._clock() + self._ttl_s

    def _check_served(self, ref: str) -> None:
        name, mark, _ = ref.replace(":", "@", 1).partition("@")
        if ref in self._entries or (mark and name in self._entries and ("@" not in ref or _PINNED.fullmatch(ref))):
            return
        near = difflib.get_close_matches(ref, self._entries, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(self._entries)}."
        raise RegistryError(f"The model {ref!r} is not served here; {hint}")

    def _servable(self, ref: str, version: ModelVersion) -> ModelVersion:
        if base_digest_of(version) in self._base_digests:
            if not _PINNED.fullmatch(ref):
                self._served[ref] = version
            return version
        last = self._served.get(ref)
        if last is None:
            raise ClusterError(
                f"{version.ref} needs {_needed(version)}, which has no deployment: deploy the serving application again "
                f"(with {version.ref} among its models)."
            )
        if self._warned.get(ref) != version.ref:
            self._warned[ref] = version.ref
            _logger.warning(
                "%s is %s now, which needs %s: it has no deployment, so requests go on with %s. Deploy the serving application again.",
                ref,
                version.ref,
                _needed(version),
                last.ref,
            )
        return last


def _needed(version: ModelVersion) -> str:
    return f"the base {version.base}" if version.kind == "adapter" else "its own weights loaded"
