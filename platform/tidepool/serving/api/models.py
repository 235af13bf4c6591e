"""/v1/models: OpenAI's model object, and what the registry knows of the version that answers now."""

from datetime import datetime
from typing import Any

from tidepool.registry import ModelVersion


def describe(name: str, version: ModelVersion) -> dict[str, Any]:
    """`root` is the version that answers now, `parent` the base of an adapter; both as registry references."""
    return {
        "id": name,
        "object": "model",
        "created": int(datetime.fromisoformat(version.published_at).timestamp()),
        "owned_by": "tidepool",
        "root": version.ref,
        "parent": version.base if version.kind == "adapter" else None,
        "version": version.number,
        "digest": version.digest,
        "kind": version.kind,
        "base": version.base,
        "base_digest": version.base_digest,
        "lineage": dict(version.lineage),
    }
