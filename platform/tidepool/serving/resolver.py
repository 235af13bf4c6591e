"""From the model name in a request to the version that answers it.

Invariants:
- Only what the serving spec lists is served: an entry as it stands, and for a bare name its versions (`name@3`) and aliases
  (`name:canary`) too.
- What a name means is asked again after `ttl_s`, and at once when `moved` says that it is new; `name@3` always means the same and is
  asked once. Requests for one name at one time share one question to the store.
- A new version of a name is made ready first (`prepare`), while requests go on with the one before; it answers from then on, or after
  `PREPARE_S` in any case. One that cannot be made ready does not answer: it is tried again, and the log says so.
- While a name has a canary, each request is answered by one of the two versions, drawn by its weight.
- What was known or served once goes on when the store does not answer, or while an alias has moved to a version whose base does not run
  yet; each is logged. A version that was asked for by its number is never answered by another one.
- Errors are not remembered.

The memory of what was served is this process's: a gateway that starts anew begins with the versions of the deployment.
"""

import asyncio
import difflib
import logging
import random
import re
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Set
from dataclasses import dataclass

from tidepool.errors import ClusterError, RegistryError, StoreError, TidepoolError
from tidepool.registry import Meaning, ModelVersion
from tidepool.serving.plan import base_digest_of

_logger = logging.getLogger(__name__)
_PINNED = re.compile(r"[^@:]+@[1-9][0-9]{0,8}", re.ASCII)


PREPARE_S = 1.5
_TRY_AGAIN_S = 5.0
_RECENT_S = 60.0

Prepare = Callable[[ModelVersion, ModelVersion], Awaitable[None]]


@dataclass(frozen=True)
class _Known:
    meaning: Meaning
    expires_at: float


class Resolver:
    """Resolves names for one gateway, in one event loop. `lookup` is `Registry.meaning`, which blocks and runs in a thread.

    `base_digests` are the bases that run, now as ever. `prepare` makes a version ready that takes the place of another one, and raises one
    of Tidepool's errors if it cannot. `draw` gives numbers from 0 to 1.
    """

    def __init__(
        self,
        lookup: Callable[[str], Meaning],
        deployed: Mapping[str, ModelVersion],
        base_digests: Set[str],
        ttl_s: float,
        clock: Callable[[], float] = time.monotonic,
        prepare: Prepare | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._lookup, self._ttl_s, self._clock, self._prepare, self._draw = lookup, ttl_s, clock, prepare, draw
        self._entries, self._base_digests = tuple(deployed), base_digests
        self._served = dict(deployed)
        self._known = {ref: _Known(Meaning(version), self._expiry(ref)) for ref, version in deployed.items()}
        self._asked_at = dict.fromkeys(deployed, clock())
        self._lookups: dict[str, asyncio.Task[Meaning]] = {}
        self._preparing: dict[str, tuple[Meaning, asyncio.Task[None]]] = {}
        self._not_before: dict[str, float] = {}  # versions that could not be made ready, and when to try again
        self._warned: dict[str, str] = {}

    async def resolve(self, ref: str) -> ModelVersion:
        """The version that answers a request for `ref` now.

        Raises `RegistryError` for what is not served or not there, `ClusterError` for a version whose base does not run,
        `StoreError` if the store does not answer and nothing is known.
        """
        meaning = await self._meaning(ref)
        if meaning.canary is not None and base_digest_of(meaning.canary) in self._base_digests and self._draw() < meaning.weight:
            return meaning.canary
        return self._servable(ref, meaning.version)

    async def models(self, is_wanted: Callable[[str], bool] = lambda _: True) -> dict[str, ModelVersion]:
        """Every entry of the serving spec that is wanted, with the version that answers for it now, but for canaries."""
        entries = [entry for entry in self._entries if is_wanted(entry)]
        meanings = await asyncio.gather(*(self._meaning(entry) for entry in entries))
        return {entry: self._servable(entry, meaning.version) for entry, meaning in zip(entries, meanings, strict=True)}

    async def refresh(self, names: Collection[str] | None = None) -> None:
        """Ask anew what these names (None: all) mean in what was asked for lately, so that no request has to wait for the answer."""
        since = self._clock() - _RECENT_S
        refs = [ref for ref in self._known if self._asked_at.get(ref, since) >= since or ref in self._entries]
        wanted = [ref for ref in refs if not _PINNED.fullmatch(ref) and (names is None or re.split("[:@]", ref)[0] in names)]
        await asyncio.gather(*(self._ask(ref) for ref in wanted))

    async def close(self) -> None:
        """Wait for nothing any more."""
        tasks = [*self._lookups.values(), *(task for _, task in self._preparing.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _meaning(self, ref: str) -> Meaning:
        self._check_served(ref)
        known = self._known.get(ref)
        meaning = known.meaning if known and self._clock() < known.expires_at else await self._ask(ref)
        self._asked_at[ref] = self._clock()
        return meaning

    async def _ask(self, ref: str) -> Meaning:
        task = self._lookups.get(ref)
        if task is None:
            task = self._lookups[ref] = asyncio.create_task(self._look_up(ref))
        return await asyncio.shield(task)  # a client that leaves must not cancel the others' question

    async def _look_up(self, ref: str) -> Meaning:
        known = self._known.get(ref)
        try:
            meaning = await asyncio.to_thread(self._lookup, ref)
            self._warned.pop(f"{ref} away", None)
        except (StoreError, RegistryError) as error:
            if known is None:
                raise
            self._warn_once(
                f"{ref} away", str(type(error)), f"{ref} cannot be looked up ({error}): requests go on with {known.meaning.version.ref}."
            )
            meaning = known.meaning
        finally:
            del self._lookups[ref]
        if known is not None and (new := self._to_prepare(known.meaning, meaning)):
            self._start_preparing(ref, known.meaning, meaning, new)
            meaning = known.meaning
        self._known[ref] = _Known(meaning, self._expiry(ref))
        return meaning

    # --- Made ready first ----------------------------------------------------------------------------------------------

    def _to_prepare(self, before: Meaning, after: Meaning) -> list[ModelVersion]:
        """The versions of a new meaning that have not answered for the name yet."""
        old = {version.digest for version in (before.version, before.canary) if version is not None}
        versions = [version for version in (after.version, after.canary) if version is not None and version.digest not in old]
        return [version for version in versions if self._prepare is not None and base_digest_of(version) in self._base_digests]

    def _start_preparing(self, ref: str, before: Meaning, after: Meaning, new: list[ModelVersion]) -> None:
        if any(self._clock() < self._not_before.get(version.digest, 0.0) for version in new):
            return
        if running := self._preparing.get(ref):
            if running[0] == after:
                return
            running[1].cancel()
        self._preparing[ref] = after, asyncio.create_task(self._make_ready(ref, before, after, new))

    async def _make_ready(self, ref: str, before: Meaning, after: Meaning, new: list[ModelVersion]) -> None:
        assert self._prepare is not None
        try:
            async with asyncio.timeout(PREPARE_S):
                for version in new:
                    await self._prepare(version, before.version)
        except TimeoutError:
            _logger.info("%s is not ready after %g s: its first requests wait for it.", new[-1].ref, PREPARE_S)
        except TidepoolError as error:
            self._not_before |= {version.digest: self._clock() + _TRY_AGAIN_S for version in new}
            self._warn_once(ref, new[-1].ref, f"{new[-1].ref} cannot be made ready ({error}): requests go on with {before.version.ref}.")
            del self._preparing[ref]
            return
        self._known[ref] = _Known(after, self._expiry(ref))
        del self._preparing[ref]

    def _expiry(self, ref: str) -> float:
        return float("inf") if _PINNED.fullmatch(ref) else self._clock() + self._ttl_s

    def _warn_once(self, about: str, what: str, message: str) -> None:
        if self._warned.get(about) != what:
            self._warned[about] = what
            _logger.warning(message)

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
        # What the spec lists gets a deployment by itself.
        remedy = (
            "which is being started" if ref in self._entries else f"which has no deployment: list {ref} among the models that are served"
        )
        if last is None or base_digest_of(last) not in self._base_digests:
            raise ClusterError(f"{version.ref} needs {_needed(version)}, {remedy}.")
        message = f"{ref} is {version.ref} now, which needs {_needed(version)}, {remedy}: requests go on with {last.ref}."
        self._warn_once(ref, version.ref, message)
        return last


def _needed(version: ModelVersion) -> str:
    return f"the base {version.base}" if version.kind == "adapter" else "its own weights loaded"
