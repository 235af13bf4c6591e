"""Checkpoints: commit, verify, restore, retention. `chain` holds the rules, `protocol` the calls to the store."""

from tidepool.checkpoint.chain import Commit, Incarnation, visible_commits
from tidepool.checkpoint.protocol import Checkpoints, claim_incarnation, read_manifest, verify

__all__ = ["Checkpoints", "Commit", "Incarnation", "claim_incarnation", "read_manifest", "verify", "visible_commits"]
