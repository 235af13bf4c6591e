"""What the checks of a node found, and what of it is a reason to keep everybody off the node. Pure.

Invariants:
- A check runs where something may be broken, so nothing that it says is taken on trust: what is not of the right shape is nonsense,
  and nonsense is no answer.
- What a node's check says is held against that node alone. The figures of others are for comparison only: of at least three nodes of a
  kind, by their lower median, so that one of them that boasts condemns nobody.
"""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

FAR_BELOW = 0.5
"""A figure below this part of what is usual is far below it."""
MIN_ALIKE = 3
"""Of two nodes nobody can say which one is the slow one."""
MIN_FREE_BYTES = 2**28
"""A disk with less is full: no worker could load a model or commit there."""


@dataclass(frozen=True)
class Disk:
    """The disk of one folder."""

    folder: str
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Gpu:
    """A GPU, as the driver knows it."""

    name: str
    num_uncorrected: int
    """Uncorrectable memory errors since the driver was loaded."""
    is_remap_pending: bool
    """Rows of its memory are to be replaced at the next reset."""
    is_remap_failed: bool
    is_lost: bool
    """The driver cannot reach it: it has fallen off the bus."""


@dataclass(frozen=True)
class Figures:
    """What one check measured. `rates` are multiplications and additions per second, by device."""

    disks: tuple[Disk, ...] = ()
    gpus: tuple[Gpu, ...] | None = None
    """None: the node has no driver, so that GPUs that it is said to have are made up."""
    rates: Mapping[str, float] = field(default_factory=dict)
    wrong: tuple[str, ...] = ()
    """Devices whose products are not right."""
    exchange: float | None = None
    """Bytes per second of an all-reduce among the node's GPUs."""


@dataclass(frozen=True)
class Finding:
    """One reason to keep everybody off a node: the `kind` of check that found it, and why, for a person.

    `needs_proof`: a busy moment can bring it about; it counts once it was found twice.
    """

    kind: str
    why: str
    needs_proof: bool = False


def read_figures(value: object) -> Figures | None:
    """The figures in what a check printed as JSON; None if that is nonsense."""
    try:
        return _read(value)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _read(value: object) -> Figures:
    fields = _mapping(value)
    if not fields.keys() <= {"disks", "gpus", "rates", "wrong", "exchange"} or not fields:
        raise ValueError(value)
    gpus, exchange = fields.get("gpus"), fields.get("exchange")
    return Figures(
        tuple(_disk(_mapping(one)) for one in _list(fields["disks"])),
        None if gpus is None else tuple(_gpu(_mapping(one)) for one in _list(gpus)),
        {_text(name): _rate(rate) for name, rate in _mapping(fields["rates"]).items()},
        tuple(_text(name) for name in _list(fields["wrong"])),
        None if exchange is None else _rate(exchange),
    )


def _disk(fields: Mapping[object, object]) -> Disk:
    disk = Disk(_text(fields["folder"]), _count(fields["free_bytes"]), _count(fields["total_bytes"]))
    if disk.free_bytes > disk.total_bytes:
        raise ValueError(fields)
    return disk


def _gpu(fields: Mapping[object, object]) -> Gpu:
    flags = [fields[name] for name in ("is_remap_pending", "is_remap_failed", "is_lost")]
    if not all(isinstance(flag, bool) for flag in flags):
        raise TypeError(fields)
    pending, failed, lost = map(bool, flags)
    return Gpu(_text(fields["name"]), _count(fields["num_uncorrected"]), pending, failed, lost)


def _mapping(value: object) -> Mapping[object, object]:
    if not isinstance(value, dict):
        raise TypeError(value)
    return value


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError(value)
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value[:200]


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(value)
    return value


def _rate(value: object) -> float:
    """A rate; raises where it is no number that anything could have measured."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        raise TypeError(value)
    return float(value)


def own_findings(figures: Figures, num_gpus: int) -> list[Finding]:
    """What is wrong by itself with a node of which Ray counts so many GPUs."""
    found = [
        Finding("disk", f"the disk of {disk.folder} is full: {disk.free_bytes / 1e6:,.0f} MB of {disk.total_bytes / 1e6:,.0f} MB are free")
        for disk in figures.disks
        if disk.free_bytes < MIN_FREE_BYTES
    ]
    for gpu in figures.gpus or ():
        found += [Finding("gpu", f"GPU {gpu.name} {what}") for what in _troubles(gpu)]
    num_there = num_gpus if figures.gpus is None else sum(not gpu.is_lost for gpu in figures.gpus)
    if num_there < num_gpus:
        found.append(Finding("gpu", f"Ray counts {num_gpus} GPUs and the driver reaches {num_there}"))
    return found + [Finding("product", f"{device} multiplies wrongly") for device in figures.wrong]


def _troubles(gpu: Gpu) -> list[str]:
    return [
        *(["has fallen off the bus"] if gpu.is_lost else []),
        *([f"has {gpu.num_uncorrected} uncorrectable memory errors"] if gpu.num_uncorrected else []),
        *(["has memory rows that wait to be replaced"] if gpu.is_remap_pending else []),
        *(["has memory rows that could not be replaced"] if gpu.is_remap_failed else []),
    ]


@dataclass(frozen=True)
class Usual:
    """The usual figures of one kind of nodes; None where too few are known."""

    rate: float | None
    exchange: float | None

    @classmethod
    def among(cls, alike: Iterable[Figures]) -> "Usual":
        """By the figures of all nodes of a kind; of each counts its slowest device."""
        known = list(alike)
        rates = [min(one.rates.values()) for one in known if one.rates]
        return cls(usual_among(rates), usual_among(one.exchange for one in known if one.exchange is not None))


def relative_findings(figures: Figures, usual: Usual) -> list[Finding]:
    """What is far below what is usual among nodes of the same kind."""
    found = []
    if figures.rates and usual.rate is not None:
        device, rate = min(figures.rates.items(), key=lambda item: item[1])
        if rate < FAR_BELOW * usual.rate:
            words = f"{device} computes {rate / 1e9:.3g} GFLOP/s, and {usual.rate / 1e9:.3g} are usual among its peers"
            found.append(Finding("rate", words, True))
    if figures.exchange is not None and usual.exchange is not None and figures.exchange < FAR_BELOW * usual.exchange:
        found.append(bandwidth_finding("links", figures.exchange, usual.exchange, "among its GPUs"))
    return found


def bandwidth_finding(kind: str, own: float, usual: float, where: str) -> Finding:
    """That an all-reduce is far slower than its peers'."""
    return Finding(kind, f"an all-reduce {where} moves {own / 1e6:,.3g} MB/s, and {usual / 1e6:,.3g} are usual among its peers", True)


def usual_among(figures: Iterable[float]) -> float | None:
    """What is usual among the nodes of a kind, the one in question among them; None where there are too few."""
    known = list(figures)
    return statistics.median_low(known) if len(known) >= MIN_ALIKE else None


def read_rate(value: object) -> float:
    """The bytes per second that a check of an all-reduce between two nodes printed; 0 if that is nonsense."""
    try:
        return _rate(_mapping(value)["exchange"])
    except (KeyError, TypeError):
        return 0.0
