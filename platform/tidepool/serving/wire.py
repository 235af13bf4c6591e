"""What gateways and replicas say to each other over a channel: messages as JSON, which nothing but these types comes out of.

A gateway submits calls and cancels them. A replica tells the frames of each, and then one of three ends: done, failed with an error of
ours, or gone: it will not finish this one, whoever asks has to send it elsewhere. Besides, it reports its state.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from tidepool.errors import ClusterError, TidepoolError
from tidepool.registry import ModelVersion
from tidepool.serving.backend import Call, Frame
from tidepool.serving.router import ReplicaState


class ReplicaLostError(ClusterError):
    """The replica that worked on a request will not finish it."""


class HandedBackError(ReplicaLostError):
    """The replica must go, and the request has to be finished by another one."""


class ReplicaFaultError(Exception):
    """A replica failed on a request with an error that is not ours; its log says which."""


@dataclass(frozen=True)
class Endpoint:
    """Where a replica of a base listens, and the secret of those who may connect."""

    replica_id: str
    base_digest: str
    host: str
    port: int
    secret: str = field(repr=False)


@dataclass(frozen=True)
class Submit:
    call: Call
    kind: Literal["submit"] = "submit"


@dataclass(frozen=True)
class Cancel:
    request_id: str
    kind: Literal["cancel"] = "cancel"


@dataclass(frozen=True)
class Warm:
    """Load this adapter: requests for it are about to come. The answer is done or failed."""

    request_id: str
    adapter: ModelVersion
    kind: Literal["warm"] = "warm"


@dataclass(frozen=True)
class Told:
    request_id: str
    frame: Frame
    kind: Literal["told"] = "told"


@dataclass(frozen=True)
class Done:
    request_id: str
    kind: Literal["done"] = "done"


@dataclass(frozen=True)
class Failed:
    """`error` is the name of one of ours, or empty."""

    request_id: str
    error: str
    message: str
    kind: Literal["failed"] = "failed"


@dataclass(frozen=True)
class Gone:
    """`is_handed_back`: because the replica must go, and not because something broke."""

    request_id: str
    is_handed_back: bool = False
    kind: Literal["gone"] = "gone"


@dataclass(frozen=True)
class Report:
    """A replica's state; it also says that the replica lives. `has_prefixes`: those in it are all, else they are as before."""

    state: ReplicaState
    has_prefixes: bool = True
    kind: Literal["report"] = "report"


ToReplica = Submit | Cancel | Warm
ToGateway = Told | Done | Failed | Gone | Report

_CONFIG = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64", ser_json_inf_nan="constants")
TO_REPLICA: TypeAdapter[list[ToReplica]] = TypeAdapter(list[Annotated[ToReplica, Field(discriminator="kind")]], config=_CONFIG)
TO_GATEWAY: TypeAdapter[list[ToGateway]] = TypeAdapter(list[Annotated[ToGateway, Field(discriminator="kind")]], config=_CONFIG)


def failure(request_id: str, error: Exception) -> Failed:
    """How an error travels: one of ours as itself, of another one nothing but that there was one (it may quote a prompt)."""
    is_ours = isinstance(error, TidepoolError)
    return Failed(request_id, type(error).__name__ if is_ours else "", str(error) if is_ours else "")


def error_of(failed: Failed) -> Exception:
    """The error that a replica raised."""
    kind = next((one for one in _kinds(TidepoolError) if one.__name__ == failed.error), None)
    return kind(failed.message) if kind else ReplicaFaultError("A replica failed on a request; its log says why.")


def _kinds(root: type[TidepoolError]) -> list[type[TidepoolError]]:
    return [root, *(kind for child in root.__subclasses__() for kind in _kinds(child))]
