"""Access to the API: who is let in, to which models, how often, and when not. Knows no Ray.

Invariants:
- Without keys everybody comes in, and may do everything but what needs an admin's key; such a gateway listens on loopback alone
  (`check_address`). With them nobody does without one that is valid now, and a request ends at its next token once its key is revoked.
- A key with a scope learns of no model outside it: neither from a list nor from an answer or an error.
- What is let in is counted until it has left, and each admission ends once, whatever becomes of its request.

What is refused raises `Refusal`: 401 (no key, or none that is valid), 403 (not an admin's), 404 (a model outside the scope), 429 with
`Retry-After` (a limit of the key, or a full gateway). 503 while keys cannot be known.
"""

import ipaddress
import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn, Self

from tidepool.errors import SpecError
from tidepool.serving.keys import ApiKey, KeyRing
from tidepool.serving.limits import Limits, Meter
from tidepool.serving.problem import Problem, Refusal
from tidepool.specs import GatewaySpec

_FULL_RETRY_S = 1


def check_address(host: str | None, spec: GatewaySpec) -> None:
    """Raises `SpecError` if a gateway without keys would listen where others reach it; None listens nowhere."""
    if spec.require_keys or host is None or _is_loopback(host):
        return
    raise SpecError(
        f"The API would listen on {host} and ask nobody for a key. Either set `gateway: {{require_keys: true}}` in the serving spec and "
        "make a key with `tidepool keys create`, or let it listen on this machine alone (`http_options: {host: 127.0.0.1}` in "
        "serve/serve.yaml)."
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Access:
    """Of one gateway process. `keys` is needed where the spec requires keys."""

    def __init__(self, spec: GatewaySpec, keys: KeyRing | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        assert keys is not None or not spec.require_keys
        self._keys = keys if spec.require_keys else None
        self._max_requests, self._clock = spec.max_requests, clock
        self._meters: dict[str, Meter] = {}
        self._all = Meter(Limits(), clock)

    async def identify(self, authorization: str | None) -> ApiKey | None:
        """Whose request it is, by its `Authorization` header; None where no keys are asked for."""
        if self._keys is None:
            return None
        kind, _, secret = (authorization or "").partition(" ")
        if kind.lower() != "bearer" or not secret:
            _refuse(401, "This API needs a key: send `Authorization: Bearer KEY`, with a key of `tidepool keys create`.", "invalid_api_key")
        key = await self._keys.find(secret.strip())
        if key is None:
            _refuse(401, "This key is not valid here: check that it is complete, or ask for a new one.", "invalid_api_key")
        if key.revoked_at is not None:
            _refuse(401, _REVOKED, "invalid_api_key")
        return key

    def enter(self, key: ApiKey | None) -> "Admission":
        """Let a request in, if the gateway has room and the key's limits allow it."""
        if self._all.num_running >= self._max_requests:
            _refuse(429, "The gateway is full: try again.", "gateway_busy", _FULL_RETRY_S)
        meters = [self._all] if key is None else [self._meters.setdefault(key.id, Meter(key.limits, self._clock)), self._all]
        if reached := meters[0].enter() if key else None:
            words = reached.limit.replace("_", " ")
            retry_s = max(1, math.ceil(reached.retry_after_s))
            _refuse(429, f"This key's limit of {reached.value} {words} is reached: try again in {retry_s} s.", reached.limit, retry_s)
        self._all.enter()
        return Admission(key, meters, self._keys)

    def overview(self, key: ApiKey | None) -> list[dict[str, Any]]:
        """For an admin: every key, without its hash, and how many of its requests run in this process."""
        if key is None or self._keys is None or not key.is_admin:
            _refuse(403, "This needs a key made with `tidepool keys create --admin`.", "admin_key_needed")
        return [
            {
                "id": one.id,
                "name": one.name,
                "project": one.project,
                "models": None if one.models is None else list(one.models),
                "admin": one.is_admin,
                "limits": vars(one.limits),
                "created_at": one.created_at,
                "revoked_at": one.revoked_at,
                "running": self._meters[one.id].num_running if one.id in self._meters else 0,
            }
            for one in self._keys.all()
        ]


class Admission:
    """One request that was let in; leaving as a context manager, or by `leave`."""

    def __init__(self, key: ApiKey | None, meters: list[Meter], keys: KeyRing | None) -> None:
        self._key, self._meters, self._keys = key, meters, keys
        self._is_in = True

    def check(self) -> None:
        """Raises `Refusal` if the key has been revoked since it was let in."""
        if self._key is not None and self._keys is not None and self._keys.is_revoked(self._key):
            _refuse(401, _REVOKED, "invalid_api_key")

    def spend(self, num_tokens: int) -> None:
        """Tokens of the prompt or the answer."""
        for meter in self._meters:
            meter.spend(num_tokens)

    def leave(self) -> None:
        """The request has ended; again changes nothing."""
        if self._is_in:
            self._is_in = False
            for meter in self._meters:
                meter.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.leave()


def check_scope(key: ApiKey | None, ref: str) -> None:
    """Raises `Refusal` for a model that a key may not ask for, in the words of one that is not there."""
    if key is not None and not key.may_use(ref):
        raise unknown_model(key, ref)


def unknown_model(key: ApiKey, ref: str) -> Refusal:
    """What a key with a scope is told of a model that it may not use, or that is not served."""
    named = ", ".join(key.models or ())
    return Refusal(Problem(404, f"There is no model {ref[:200]!r} for this key; its models: {named}.", "model_not_found", "model"))


_REVOKED = "This key has been revoked: ask for a new one."


def _refuse(status: int, message: str, code: str, retry_after_s: int | None = None) -> NoReturn:
    raise Refusal(Problem(status, message, code, retry_after_s=retry_after_s))
