"""What one API key may use in a minute and at one time: token buckets, by a clock that is handed in. Pure.

Invariants:
- A bucket is full at first and holds at most what a minute brings. Over any time t a key begins at most `requests_per_minute` *
  (1 + t/60 s) requests.
- Tokens are paid when they are known, those of the prompt when the engine has taken it, those of the answer as they come. So a
  request is let in while there is any token left, may leave a debt, and nothing more is let in until the debt is paid.
- A request that is refused costs nothing.

Each gateway process counts for itself: with n of them a key may use up to n times as much.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

_MINUTE_S = 60.0
_CONCURRENCY_RETRY_S = 1.0  # when another request ends nobody knows


@dataclass(frozen=True)
class Limits:
    """Of one key; None: no limit."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")  # a limit that is not understood must not be dropped

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or not given for no limit")


@dataclass(frozen=True)
class LimitReached:
    """Which limit stands in the way, and after how long it may not."""

    limit: Literal["requests_per_minute", "tokens_per_minute", "concurrent_requests"]
    value: int
    retry_after_s: float


class Bucket:
    """A token bucket (as in RFC 2697, with one rate): `per_minute` come in evenly, and as many fit."""

    def __init__(self, per_minute: int, now_s: float) -> None:
        self.per_minute = per_minute
        self._level, self._at_s = float(per_minute), now_s

    def wait_s(self, amount: float, now_s: float) -> float:
        """How long until `amount` is there, if nobody takes any; 0 if it is now."""
        self._fill(now_s)
        return max(0.0, amount - self._level) * _MINUTE_S / self.per_minute

    def take(self, amount: float, now_s: float) -> None:
        """Take an amount, whether it is there or not."""
        self._fill(now_s)
        self._level -= amount

    def _fill(self, now_s: float) -> None:
        elapsed_s = max(0.0, now_s - self._at_s)
        self._level = min(float(self.per_minute), self._level + elapsed_s * self.per_minute / _MINUTE_S)
        self._at_s = max(self._at_s, now_s)


class Meter:
    """What one key uses at one gateway."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self._limits, self._clock = limits, clock
        self._requests = Bucket(limits.requests_per_minute, clock()) if limits.requests_per_minute else None
        self._tokens = Bucket(limits.tokens_per_minute, clock()) if limits.tokens_per_minute else None
        self.num_running = 0

    def enter(self) -> LimitReached | None:
        """Begin a request, unless a limit stands in the way: then nothing has happened."""
        now_s, at_once = self._clock(), self._limits.concurrent_requests
        if at_once is not None and self.num_running >= at_once:
            return LimitReached("concurrent_requests", at_once, _CONCURRENCY_RETRY_S)
        if self._requests and (wait_s := self._requests.wait_s(1, now_s)):
            return LimitReached("requests_per_minute", self._requests.per_minute, wait_s)
        if self._tokens and (wait_s := self._tokens.wait_s(1, now_s)):
            return LimitReached("tokens_per_minute", self._tokens.per_minute, wait_s)
        if self._requests:
            self._requests.take(1, now_s)
        self.num_running += 1
        return None

    def spend(self, num_tokens: int) -> None:
        """Tokens of a prompt or an answer."""
        if self._tokens:
            self._tokens.take(num_tokens, self._clock())

    def leave(self) -> None:
        """A request that was let in has ended."""
        assert self.num_running > 0
        self.num_running -= 1
