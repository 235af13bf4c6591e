"""Checkpoints: commit, verify, restore, retention. `history` holds the rules, `run_log` and `protocol` the calls to the store, `snapshot`
the bytes of a commit (it brings torch, of which drivers and commands have no need)."""

from tidepool.checkpoint.history import Commit, Incarnation, visible_commits
from tidepool.checkpoint.protocol import Checkpoints, StoredObject, claim_incarnation, read_manifest, verify
from tidepool.checkpoint.run_log import RunLog

__all__ = [
    "Checkpoints",
    "Commit",
    "Incarnation",
    "RunLog",
    "StoredObject",
    "claim_incarnation",
    "read_manifest",
    "verify",
    "visible_commits",
]
