"""What to deploy for a serving spec: each model's version now, and the distinct bases below them.

One base is one set of files, whatever its names: two listed models on the same files share a deployment, and so do all
adapters trained on them. Later versions are the resolver's business.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from tidepool.errors import ModelError
from tidepool.models.source import ModelSource, find_model
from tidepool.registry import ModelVersion, Registry
from tidepool.specs import ServingSpec
from tidepool.storage import ObjectStore


@dataclass(frozen=True)
class ServingPlan:
    """`models`: the version of each listed entry at deploy time. `bases`: what needs a deployment, distinct by digest."""

    models: Mapping[str, ModelVersion]
    bases: tuple[ModelSource, ...]


def plan_serving(spec: ServingSpec, store: ObjectStore) -> ServingPlan:
    """Resolve the spec's models. Raises `RegistryError` for an unknown one, `ModelError` for a base that cannot be found."""
    registry = Registry(store)
    models = {entry: registry.resolve(entry) for entry in spec.models}
    bases = {version.digest: ModelSource(version.ref, version.digest, version) for version in models.values() if version.kind == "full"}
    for version in models.values():
        if base_digest_of(version) not in bases:
            source = _base_of(version, store)
            bases[source.digest] = source
    return ServingPlan(models, tuple(bases.values()))


def base_digest_of(version: ModelVersion) -> str | None:
    """The digest of the base whose replicas serve a version: its own, or for an adapter that of its base."""
    return version.digest if version.kind == "full" else version.base_digest


def _base_of(version: ModelVersion, store: ObjectStore) -> ModelSource:
    if version.base is None or version.base_digest is None:
        raise ModelError(f"{version.ref} does not say which base it was trained on: publish it again with its base.")
    source = find_model(version.base, store)
    if source.digest != version.base_digest:
        raise ModelError(
            f"{version.ref} was trained on {version.base} with the files {version.base_digest[:12]}, and there are other files now "
            f"({source.digest[:12]}): publish the base to the registry, where a version never changes."
        )
    return source
