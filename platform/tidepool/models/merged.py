"""A base and an adapter as one whole model: published with both in its lineage.

Invariants:
- The adapter is merged into the very base that it was trained on (by the digest of its files), in the dtype of the base's files.
- The merged model answers as the base with the adapter does, but for rounding. Where one matrix would have to change for two
  uses (an adapter on an output layer that is tied to the embeddings), nothing is merged.
"""

import tempfile
from collections import Counter
from pathlib import Path

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from tidepool.errors import ModelError
from tidepool.models.opened import OpenedModel, open_model
from tidepool.models.pretrained import export_model, first_line
from tidepool.registry import ModelVersion, Registry
from tidepool.scratch import ScratchFolder
from tidepool.storage import ObjectStore, local_disk


def merge_model(ref: str, name: str, alias: str | None, store: ObjectStore, cache: Path) -> ModelVersion:
    """Publish an adapter of the registry, merged with its base, as the next version of `name`. Needs the memory of the base once.

    Raises `ModelError`, `RegistryError`, `StoreError`, `DiskError`.
    """
    version = Registry(store).resolve(ref)
    if version.kind != "adapter":
        raise ModelError(f"{version.ref} is a whole model already: give the name of an adapter.")
    opened = open_model(version.ref, store, cache, "auto")
    assert opened.base is not None, version.ref
    with (
        local_disk(Path(tempfile.gettempdir()), "set TMPDIR to a folder on a larger disk"),
        ScratchFolder("merge") as folder,
    ):
        export_model(merge(opened), opened.tokenizer, Path(folder))
        return Registry(store).publish(
            name,
            "full",
            Path(folder),
            base=opened.base.ref,
            base_digest=opened.base.digest,
            lineage={"merged": version.ref, "adapter_digest": version.digest},
            metrics={},
            alias=alias,
        )


def merge(opened: OpenedModel) -> PreTrainedModel:
    """The base with the adapter's weights added to its own, in place. Raises `ModelError` if that cannot be done."""
    model = opened.model
    assert isinstance(model, PeftModel), opened.source.ref
    num_uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for module_name, module in model.named_modules():
        if isinstance(module, LoraLayer) and num_uses[id(module.get_base_layer().weight)] > 1:
            raise ModelError(
                f"{opened.source.ref} changes {module_name.removeprefix('base_model.model.')}, whose weights are those of another layer "
                "too (tied embeddings): a merged model would answer otherwise. Serve the adapter on its base."
            )
    try:
        merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(f"{opened.source.ref} cannot be merged: {first_line(error)}") from error
    return merged
