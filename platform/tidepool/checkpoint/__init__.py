"""Checkpoints: commit, verify, restore, retention. `history` holds the rules, `run_log` and `protocol` the calls to the store."""

from tidepool.checkpoint.history import Commit, Incarnation, visible_commits
from tidepool.checkpoint.protocol import Checkpoints, StoredObject, claim_incarnation, read_manifest, verify
from tidepool.checkpoint.run_log import RunLog
from tidepool.checkpoint.snapshot import Snapshot, divide

__all__ = [
    "Checkpoints",
    "Commit",
    "Incarnation",
    "RunLog",
    "Snapshot",
    "StoredObject",
    "claim_incarnation",
    "divide",
    "read_manifest",
    "verify",
    "visible_commits",
]
