"""The registry: published models as numbered versions with lineage, and aliases that move between them. Knows no torch."""

from tidepool.registry.registry import Registry
from tidepool.registry.versions import FileEntry, ModelVersion, describe_folder, files_digest, is_pickle

__all__ = ["FileEntry", "ModelVersion", "Registry", "describe_folder", "files_digest", "is_pickle"]
