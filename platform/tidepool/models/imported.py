"""Models and LoRA adapters that were trained elsewhere, published after a check that reads no weight.

Invariants:
- Only the files that make a model are taken (see `source`): no pickle, no code. No link leads out of the folder, and its
  index names files of the folder alone.
- A whole model has every weight that its architecture has, in its shape, and a tokenizer that fits it. An adapter is plain
  LoRA, and its weights are those that its configuration has on the base.
- What an adapter belongs to is recorded by us: the base that was named here, and the digest of that base's files.
- What is published is what was checked; a folder is not to be written to meanwhile.
"""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tidepool.errors import BaseMismatchError, ModelError, SpecError
from tidepool.models.adapter import check_adapter, record_base, recorded_base
from tidepool.models.pretrained import check_tokenizer, load_shapes, load_tokenizer, read_json, tensor_shapes
from tidepool.models.source import TOKENIZER_FILES, ModelSource, download_folder, download_from_hub, fetch_model, find_model, model_files
from tidepool.registry import ModelVersion, Registry
from tidepool.scratch import ScratchFolder
from tidepool.storage import ObjectStore, check_key, local_disk

_MAX_FILES = 4096
_MAX_BYTES = {"config.json": 2**20, "adapter_config.json": 2**20, "tidepool.json": 2**20, "generation_config.json": 2**20}
_MAX_JSON_BYTES = 256 * 2**20  # the largest tokenizer.json of the hub has some 40 MB
_COUNTS = ("layer", "expert", "block", "depth", "stage")
_USUAL_COUNT = 1024  # of layers or experts, where many share a tensor
_SIZES = (
    "dim",
    "size",
    "head",
    "hidden",
    "embd",
    "d_model",
    "width",
    "rank",
    "state",
    "inner",
    "kernel",
    "position",
    "seq",
    "ctx",
    "rotary",
)
_MOST_SIZE = 2**24  # transformers computes tables of some of these (rotary embeddings) even where it reads no weight


def import_model(ref: str, name: str, base_ref: str | None, alias: str | None, store: ObjectStore, cache: Path) -> ModelVersion:
    """Publish the model or adapter in a folder, at a store's URL or on the hub (`org/name`) as the next version of `name`.

    An adapter needs `base_ref`; of a whole model it says what it was trained from. Raises `ModelError`, `RegistryError`,
    `StoreError`, `DiskError`.
    """
    base = _find_base(base_ref, store) if base_ref else None
    with (
        local_disk(Path(tempfile.gettempdir()), "set TMPDIR to a folder on a larger disk"),
        ScratchFolder("import") as temporary,
    ):
        staged = Path(temporary)
        origin = _stage(ref, staged)
        names = _check_files(staged)
        is_adapter = "adapter_config.json" in names
        if is_adapter:
            _check_adapter(ref, staged, base, store, cache)
        else:
            check_tokenizer(load_shapes(staged), load_tokenizer(staged))
        return Registry(store).publish(
            name,
            "adapter" if is_adapter else "full",
            staged,
            base=base.ref if base else None,
            base_digest=base.digest if base else None,
            lineage={"imported_from": origin},
            metrics={},
            alias=alias,
        )


def _find_base(ref: str, store: ObjectStore) -> ModelSource:
    base = find_model(ref, store)
    if base.version is not None and base.version.kind == "adapter":
        raise ModelError(f"{base.ref} is an adapter: give the base it was trained on ({base.version.base}) as --base.")
    return base


def _stage(ref: str, staged: Path) -> str:
    """Fill an empty folder with a model's files (links, where they are local); returns where they came from."""
    if "://" in ref:
        download_folder(ref, staged)
        return ref
    folder, is_trusted = Path(ref).absolute(), False
    if not folder.is_dir() and "/" in ref and not ref.startswith(("/", ".")):
        folder, is_trusted = download_from_hub(ref), True  # whose cache is made of links to files beside the folder
    for name in model_files(folder):
        path = folder / name
        if not is_trusted and not path.resolve().is_relative_to(folder.resolve()):
            raise ModelError(f"{path} leads out of its folder (to {os.readlink(path)}): import a copy that holds the file itself.")
        (staged / name).symlink_to(path.resolve())
    return f"{ref.partition('@')[0]}@{folder.name}" if is_trusted else str(folder)


def _check_files(folder: Path) -> list[str]:
    """Check names, sizes and headers; returns the names. Raises `ModelError`, and `StoreError` for a name that no store takes."""
    names, num_tensors = model_files(folder), 0
    if len(names) > _MAX_FILES:
        raise ModelError(f"The model has {len(names)} files, and at most {_MAX_FILES} are taken: write it in larger ones.")
    for name in names:
        path = folder / check_key(name)
        if name.endswith(".safetensors"):
            num_tensors += len(tensor_shapes(path))
        elif (size_bytes := path.stat().st_size) > _MAX_BYTES.get(name, _MAX_JSON_BYTES):
            raise ModelError(f"{path.resolve()} has {size_bytes} bytes, too many for a file of this kind: it cannot be one.")
        if name.endswith(".index.json"):
            named = read_json(path).get("weight_map")
            if not isinstance(named, dict) or not {str(file) for file in named.values()} <= set(names):
                raise ModelError(f"{path.resolve()} names files that are not in its folder: import the whole folder, as it was written.")
    if "config.json" in names:
        _check_numbers(read_json(folder / "config.json"), max(num_tensors, _USUAL_COUNT))
    return names


def _check_numbers(config: Mapping[str, Any], most_layers: int) -> None:
    """Refuse a model of more layers than its files can hold, or of absurd sizes, before anything is made of its configuration."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_numbers(value, most_layers)
        elif isinstance(value, int | float):
            is_size, is_count = (any(word in key.lower() for word in words) for words in (_SIZES, _COUNTS))
            if (is_size and value > _MOST_SIZE) or (is_count and not is_size and value > most_layers):
                raise ModelError(f"config.json says {key[:100]}: {str(value)[:100]}, which its files cannot hold: import a whole model.")


def _check_adapter(ref: str, staged: Path, base: ModelSource | None, store: ObjectStore, cache: Path) -> None:
    """Check an adapter against its base, and record the base in it."""
    if base is None:
        named = recorded_base(staged)
        hint = f" (it says {named})" if named else ""
        raise SpecError(f"{ref} holds an adapter: give the base it was trained on{hint} as --base, by its name in the registry.")
    folder = fetch_model(base, store, cache)
    if not (folder / "config.json").is_file():
        raise BaseMismatchError(f"{base.ref} is no whole model: give the base that the adapter was trained on as --base.")
    check_adapter(load_shapes(folder), staged, base.digest)
    if any((staged / name).is_file() for name in TOKENIZER_FILES):
        theirs, ours = load_tokenizer(staged).get_vocab(), load_tokenizer(folder).get_vocab()
        if theirs != ours:
            raise BaseMismatchError(
                f"The adapter {ref} brings a tokenizer of {len(theirs)} tokens that is not the one of {base.ref} ({len(ours)} tokens): it "
                "was trained on another base, or on new tokens. Give its own base; new tokens need the merged model."
            )
    config = (staged / "adapter_config.json").read_bytes()
    (staged / "adapter_config.json").unlink()  # a link to the file that was given, which stays as it is
    (staged / "adapter_config.json").write_bytes(config)
    (staged / "tidepool.json").unlink(missing_ok=True)
    record_base(staged, base)
