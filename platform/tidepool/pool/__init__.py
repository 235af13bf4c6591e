"""The pool's policy: who holds which GPU, and why. Pure: no Ray, no torch, no clock, no files."""

from tidepool.pool.policy import decide
from tidepool.pool.rules import Rules

__all__ = ["Rules", "decide"]
