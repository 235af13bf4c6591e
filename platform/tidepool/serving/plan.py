"""What is served for a serving spec: each model's version, and the distinct bases below them, now and as names move.

One base is one set of files, whatever its names: two listed models on the same files share a deployment, and so do all
adapters trained on them.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from tidepool.errors import ModelError, TidepoolError
from tidepool.models.source import ModelSource, find_model
from tidepool.registry import ModelVersion, Registry
from tidepool.specs import ServingSpec
from tidepool.storage import ObjectStore

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServingPlan:
    """`models`: the version of each listed entry at deploy time. `bases`: what they need a deployment of, distinct by digest."""

    models: Mapping[str, ModelVersion]
    bases: tuple[ModelSource, ...]


def plan_serving(spec: ServingSpec, store: ObjectStore) -> ServingPlan:
    """Resolve the spec's models. Raises `RegistryError` for an unknown one, `ModelError` for a base that cannot be found."""
    registry = Registry(store)
    models = {entry: registry.resolve(entry) for entry in spec.models}
    bases = {version.digest: _base_of(version, store) for version in models.values() if version.kind == "full"}
    for version in models.values():
        if base_digest_of(version) not in bases:
            source = _base_of(version, store)
            bases[source.digest] = source
    return ServingPlan(models, tuple(bases.values()))


class NamedBases:
    """The bases that the entries of a spec mean now, their canaries' too: looked up again and again."""

    def __init__(self, plan: ServingPlan, store: ObjectStore) -> None:
        self._registry, self._store = Registry(store), store
        self._sources = {base.digest: base for base in plan.bases}
        self._meant = {entry: {base_digest_of(version)} for entry, version in plan.models.items()}
        self._problems: dict[str, str] = {}

    def look_up(self) -> dict[str, ModelSource]:
        """They by their digests. Of an entry that cannot be looked up, or that means what cannot be served, what it meant before."""
        for entry in self._meant:
            try:
                meaning = self._registry.meaning(entry)
                versions = [version for version in (meaning.version, meaning.canary) if version is not None]
                self._meant[entry] = {self._find(version) for version in versions}
                self._problems.pop(entry, None)
            except TidepoolError as error:
                if self._problems.get(entry) != str(error):
                    self._problems[entry] = str(error)
                    _logger.warning("%s goes on as it is: %s", entry, error)
        return {digest: self._sources[digest] for meant in self._meant.values() for digest in meant if digest is not None}

    def _find(self, version: ModelVersion) -> str:
        digest = base_digest_of(version)
        if digest is None or digest not in self._sources:  # to find it again may take a while
            source = _base_of(version, self._store)
            self._sources[source.digest] = source
            return source.digest
        return digest


def base_digest_of(version: ModelVersion) -> str | None:
    """The digest of the base whose replicas serve a version: its own, or for an adapter that of its base."""
    return version.digest if version.kind == "full" else version.base_digest


def _base_of(version: ModelVersion, store: ObjectStore) -> ModelSource:
    if version.kind == "full":
        return ModelSource(version.ref, version.digest, version)
    if version.base is None or version.base_digest is None:
        raise ModelError(f"{version.ref} does not say which base it was trained on: publish it again with its base.")
    source = find_model(version.base, store)
    if source.digest != version.base_digest:
        raise ModelError(
            f"{version.ref} was trained on {version.base} with the files {version.base_digest[:12]}, and there are other files now "
            f"({source.digest[:12]}): publish the base to the registry, where a version never changes."
        )
    return source
