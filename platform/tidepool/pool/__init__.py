"""Who holds which GPU, and why: a pure policy (no Ray, no torch, no clock, no files), and the arbiter around it."""

from tidepool.pool.policy import decide
from tidepool.pool.rules import Rules

__all__ = ["Rules", "decide"]
