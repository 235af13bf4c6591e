"""The constants of the policy, in one place."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from tidepool.messages import Tier

TIERS: tuple[Tier, ...] = ("premium", "standard", "basic")
"""Best first."""


@dataclass(frozen=True)
class Rules:
    """What the policy goes by. The defaults are what docs/pool.md tells people.

    `guarantees`: the part of the window in which a run holds at least its min, by tier (Shukla et al., Singularity, 2022,
    table 1, where basic has none). `weights`: how much a tier's relative speed-up counts when spare room is shared out.
    `bands_gpu_s`: of equals, the run that has used less goes first; bands instead of exact figures, so that two runs do
    not take turns (Gu et al., Tiresias, NSDI 2019).
    """

    guarantees: Mapping[Tier, float] = field(default_factory=lambda: {"premium": 0.95, "standard": 0.70, "basic": 0.0})
    weights: Mapping[Tier, float] = field(default_factory=lambda: {"premium": 4.0, "standard": 2.0, "basic": 1.0})
    window_s: float = 86_400.0
    tenure_s: float = 900.0
    """A run that got its min keeps it for so long, unless serving, a reservation or a leaving node needs the place."""
    aging_s: float = 43_200.0
    """A run that waited for so long goes ahead of every tier."""
    vacate_s: float = 60.0
    """How long before its end a node is vacated, and before its start a reservation's room is made."""
    cooldown_s: float = 120.0
    """A run does not grow so soon after its size changed."""
    rebalance_ratio: float = 1.5
    """A group moves between runs only where it speeds up so many times more than it slows down."""
    bands_gpu_s: tuple[float, ...] = (1800.0, 14_400.0, 115_200.0)
    max_grants: int = 1000
    """About as many groups and replicas start in one round at most; the next round goes on."""

    @cached_property
    def return_s(self) -> float:
        """From a claim until its place is there, at the worst: who is in it has just begun a tenure, and must vacate it then."""
        return self.tenure_s + self.vacate_s
