"""The registry: published models as numbered versions with lineage, and aliases that move between them. Knows no torch."""

from tidepool.registry.registry import Meaning, Registry
from tidepool.registry.versions import FileEntry, ModelVersion, describe_folder, files_digest, is_pickle

__all__ = ["FileEntry", "Meaning", "ModelVersion", "Registry", "describe_folder", "files_digest", "is_pickle"]
