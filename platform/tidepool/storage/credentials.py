"""Where the keys to S3 come from: this node, in the order in which every AWS tool looks.

The environment (`AWS_ACCESS_KEY_ID`, ...), the shared file (`AWS_SHARED_CREDENTIALS_FILE`, `AWS_PROFILE`), a process or web
identity that the shared config names, the container's or the instance's role.

Invariants:
- Keys travel between no two processes: each one asks its own node, so no spec, store, log or dashboard ever holds one.
- They are asked for again before they expire, and every few minutes where they do not say when: a file that was rotated,
  a role that was renewed need no restart.
"""

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from tidepool.errors import StoreAccessError

_ASKED_AGAIN_AFTER = timedelta(minutes=5)


def client_settings() -> dict[str, Any]:
    """What an S3 client of obstore is given beside the environment, which it reads itself: keys and region where it has none."""
    settings: dict[str, Any] = {}
    if "AWS_ACCESS_KEY_ID" not in os.environ:
        settings["credential_provider"] = ask_node
    if not {"AWS_REGION", "AWS_DEFAULT_REGION"} & os.environ.keys() and (
        region := _ask(lambda session: session.get_config_variable("region"))
    ):
        settings["region"] = region
    return settings


def ask_node() -> dict[str, Any]:
    """The keys now: `access_key_id`, `secret_access_key`, `token` (or None), `expires_at`. Raises `StoreAccessError`."""
    credentials = _ask(lambda session: session.get_credentials())
    if credentials is None:
        raise StoreAccessError("no credentials on this node")
    keys = _ask(lambda _: credentials.get_frozen_credentials())
    return {
        "access_key_id": keys.access_key,
        "secret_access_key": keys.secret_key,
        "token": keys.token,
        "expires_at": datetime.now(UTC) + _ASKED_AGAIN_AFTER,
    }


def _ask(question: Callable[[Any], Any]) -> Any:
    """Ask a new session of botocore: an old one remembers the files that it has read."""
    import botocore.session  # slow to import, and only S3 needs it
    from botocore.exceptions import BotoCoreError

    try:
        return question(botocore.session.get_session())
    except BotoCoreError as error:
        raise StoreAccessError(f"This node's settings for S3 cannot be used: {error} Correct AWS_PROFILE or the shared files.") from error
