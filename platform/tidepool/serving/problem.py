"""What a client is told when a request fails: OpenAI's error object and its HTTP status. Pure, but for one line in the log.

A person's mistake is answered with its message. What went wrong inside (a path, a store's address, a traceback) stays in the
log, and the client is told when to come again. The message of an error that is not ours stays out of the log too: it may quote the
prompt.
"""

import logging
import traceback
from dataclasses import dataclass
from typing import Any

from tidepool.errors import ClusterError, EngineBusyError, RegistryError, RequestError, TidepoolError
from tidepool.serving.backend import ContextLengthError

_logger = logging.getLogger(__name__)
_BUSY_RETRY_S = 1
_UNAVAILABLE_RETRY_S = 5


@dataclass(frozen=True)
class Problem:
    """One failed request: `param` is the field that is wrong, `code` a word for programs."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry_after_s: int | None = None

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": _type(self.status), "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """`Retry-After`, where it may help to come again; what a 401 must say by HTTP (RFC 9110)."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


class Refusal(Exception):
    """A request that the gateway itself refuses; it never leaves the gateway."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def problem_of(error: Exception) -> Problem:
    """What to tell the client about an error; one that is not the client's is logged with where it was raised."""
    match error:
        case Refusal():
            return error.problem
        case ContextLengthError():
            return Problem(400, str(error), "context_length_exceeded", "max_tokens")
        case RequestError():
            return Problem(400, str(error))
        case RegistryError():
            return Problem(404, str(error), "model_not_found", "model")
        case EngineBusyError():
            return Problem(429, "All replicas of this model are busy: try again.", "engine_busy", retry_after_s=_BUSY_RETRY_S)
        case ClusterError():
            _logger.warning("A request could not be served: %s", error)
            return Problem(503, str(error), "unavailable", retry_after_s=_UNAVAILABLE_RETRY_S)
        case TidepoolError():
            _logger.error("A request could not be served", exc_info=error)
            message = "The model cannot be used now: try again. If it stays so, the server's log says why."
            return Problem(503, message, "unavailable", retry_after_s=_UNAVAILABLE_RETRY_S)
        case _:
            _logger.error("A request failed: %s", _without_messages(error))
            return Problem(500, "The server failed on this request; its log says why.", "internal_error")


def _type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def _without_messages(error: BaseException) -> str:
    """The kinds of an error and of its causes, and where each was raised."""
    lines = [type(error).__name__, *traceback.format_tb(error.__traceback__)]
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\n".join([*(line.rstrip() for line in lines), *([f"caused by {_without_messages(cause)}"] if cause else [])])
