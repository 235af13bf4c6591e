"""Where a model comes from: a reference is found, pinned to the digest of its files, and fetched as a local folder.

    /abs or ./rel           a folder of this machine
    scheme://...            a folder of an object store (file:///, s3://)
    name, name@3, name:tag  a version in the registry of the run's store
    org/name                a model of the Hugging Face hub; org/name@revision pins it

Invariants:
- What is fetched is what was found: the files' digest is compared, wherever they came from.
- The digest is over the files that make a model (weights, configuration, tokenizer), so that the same model has the same
  digest in every place; pickled weights and Python code are no part of it, are not fetched, and are never read.
- Finding needs no torch. A store URL or hub model is hashed when it is found, which reads all of it once.
"""

import fnmatch
import functools
import hashlib
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tidepool.errors import ModelError, ObjectNotFoundError, RegistryError
from tidepool.registry import FileEntry, ModelVersion, Registry, files_digest, is_pickle
from tidepool.storage import CACHE_VARIABLE, ObjectStore, cached_folder, open_store

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)
_MODEL_FILES = (*TOKENIZER_FILES, "*.safetensors", "*.json")
_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class ModelSource:
    """A model that was found. `ref` finds it again: `name@3`, an absolute path, a store URL, or `org/name@revision`."""

    ref: str
    digest: str
    version: ModelVersion | None = None

    @property
    def is_on_hub(self) -> bool:
        """Whether `ref` is `org/name@revision`."""
        return _is_hub_name(self.ref)


def find_model(ref: str, store: ObjectStore) -> ModelSource:
    """Find and pin a model. Raises `ModelError` that says where it looked, `StoreError` if a store does not answer."""
    if "://" in ref:
        return ModelSource(ref, files_digest(_describe_store(ref)))
    if ref.startswith(("/", ".")):
        folder = Path(ref).absolute()
        return ModelSource(str(folder), files_digest(_describe_model(folder)))
    if _is_hub_name(ref):
        folder, commit = _download(ref)
        return ModelSource(f"{ref.partition('@')[0]}@{commit}", files_digest(_describe_model(folder)))
    try:
        version = Registry(store).resolve(ref)
    except RegistryError as error:
        raise ModelError(
            f"No model {ref} in the registry of {store.url}: {error} (A folder of this machine is written ./{ref}, a model of the "
            "Hugging Face hub org/name.)"
        ) from error
    return ModelSource(version.ref, version.digest, version)


def fetch_model(source: ModelSource, store: ObjectStore, cache: Path) -> Path:
    """A local folder with the model's files, below `cache` unless it was local; it stays while this process lives (see
    `storage.cache`). Raises `ModelError`, `RegistryError`, `StoreError`, `DiskError`.
    """
    if source.version is not None:
        return Registry(store).fetch(source.version, cache)
    if "://" in source.ref:
        return _fetch_from_store(source, cache)
    folder = _download(source.ref)[0] if source.is_on_hub else Path(source.ref)
    _check_digest(source, _describe_model(folder))
    return folder


def copy_files(source: ModelSource, store: ObjectStore, names: Iterable[str], folder: Path) -> None:
    """Put those of these (small) files that a model has into a folder, without fetching the rest. Raises as `fetch_model` does."""
    if source.version is not None:
        Registry(store).download(source.version, folder, names)
        return
    if "://" in source.ref:
        remote = open_store(source.ref)
        for name, size_bytes in _store_files(source.ref, remote).items():
            if name in names:
                _download_object(remote, name, size_bytes, folder / name)
        return
    local = _download(source.ref)[0] if source.is_on_hub else Path(source.ref)
    for name in set(names) & set(model_files(local)):
        shutil.copyfile(local / name, folder / name)


def cache_folder() -> Path:
    """Where this node keeps the models it has fetched: `TIDEPOOL_CACHE`, else `~/.cache/tidepool`."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "tidepool") / "models"


def model_files(folder: Path) -> list[str]:
    """The names of the files in a local folder that make a model. Raises `ModelError` if it is none, or pickled."""
    try:
        names = [path.name for path in folder.iterdir() if path.is_file()]
    except OSError as error:
        raise ModelError(f"No model folder {folder}: {error.strerror}. Give the path of a folder with config.json.") from error
    return _relevant(names, str(folder))


def copy_tokenizer(folder: Path, target: Path) -> None:
    """Copy the tokenizer's files of a model folder, and nothing else, into an empty folder."""
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)


def _is_hub_name(ref: str) -> bool:
    return "/" in ref and "://" not in ref and not ref.startswith(("/", "."))


def _describe_model(folder: Path) -> tuple[FileEntry, ...]:
    return tuple(_describe(name, _file_chunks(folder / name)) for name in model_files(folder))


def _relevant(names: Iterable[str], where: str) -> list[str]:
    names = sorted(names)
    relevant = [name for name in names if _matches(name, _MODEL_FILES)]
    if not any(_matches(name, ("*.safetensors",)) for name in relevant):
        pickles = [name for name in names if is_pickle(name)]
        if pickles:
            raise ModelError(
                f"{where} has pickled weights only ({', '.join(pickles[:3])}): loading them could run any code, so Tidepool never does. "
                "Convert them to safetensors (`model.save_pretrained(folder)` in transformers does)."
            )
        raise ModelError(f"{where} holds no weights (*.safetensors): give the folder of a model or an adapter.")
    if not {"config.json", "adapter_config.json"} & set(relevant):
        raise ModelError(f"{where} has neither config.json (a model) nor adapter_config.json (an adapter).")
    return relevant


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _describe(name: str, chunks: Iterable[bytes]) -> FileEntry:
    sha256, size_bytes = hashlib.sha256(), 0
    for chunk in chunks:
        sha256.update(chunk)
        size_bytes += len(chunk)
    return FileEntry(name, size_bytes, sha256.hexdigest())


def _file_chunks(path: Path) -> Iterable[bytes]:
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise ModelError(f"Cannot read {path}: {error.strerror}.") from error


def _object_chunks(store: ObjectStore, key: str, size_bytes: int) -> Iterable[bytes]:
    for start in range(0, size_bytes, _CHUNK_BYTES):
        yield store.get(key, start, _CHUNK_BYTES)


def _store_files(url: str, store: ObjectStore) -> dict[str, int]:
    """The relevant objects of a store's top folder, with their sizes in bytes."""
    sizes = {entry.key: entry.size_bytes for entry in store.list("") if "/" not in entry.key}
    return {name: sizes[name] for name in _relevant(sizes, url)}


def _describe_store(url: str) -> tuple[FileEntry, ...]:
    store = open_store(url)
    return tuple(_describe(name, _object_chunks(store, name, size)) for name, size in _store_files(url, store).items())


def download_folder(url: str, folder: Path) -> None:
    """Put the files that make a model from a store's URL into an empty folder. Raises `ModelError`, `StoreError`."""
    store = open_store(url)
    for name, size_bytes in _store_files(url, store).items():
        _download_object(store, name, size_bytes, folder / name)


def download_from_hub(ref: str) -> Path:
    """The local folder of a model of the hub (`org/name`, `org/name@revision`), downloaded if it is not there. Raises `ModelError`."""
    return _download(ref)[0]


def _fetch_from_store(source: ModelSource, cache: Path) -> Path:
    store = open_store(source.ref)
    sizes = functools.cache(lambda: _store_files(source.ref, store))

    def fill(folder: Path) -> None:
        try:
            files = tuple(_download_object(store, name, size_bytes, folder / name) for name, size_bytes in sizes().items())
        except ObjectNotFoundError as error:
            raise _changed(source) from error
        _check_digest(source, files)

    return cached_folder(cache, source.digest, lambda: sum(sizes().values()), fill)


def _download_object(store: ObjectStore, key: str, size_bytes: int, path: Path) -> FileEntry:
    """Write an object to a path and describe what was written, a chunk at a time."""
    with path.open("wb") as file:
        return _describe(path.name, (chunk for chunk in _object_chunks(store, key, size_bytes) if file.write(chunk)))


def _check_digest(source: ModelSource, files: tuple[FileEntry, ...]) -> None:
    if files_digest(files) != source.digest:
        raise _changed(source)


def _changed(source: ModelSource) -> ModelError:
    return ModelError(
        f"The files of {source.ref} are not those that were found before (digest {source.digest[:12]}): they changed, or another "
        "machine has others at that place. Publish the model to the registry, or start again under a new run name."
    )


def _download(ref: str) -> tuple[Path, str]:
    """The hub's snapshot folder and its commit; a model that is in the hub's cache needs no network if `ref` is pinned."""
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    name, _, revision = ref.partition("@")
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(_MODEL_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.HTTPError, OSError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ModelError(
            f"Cannot get {ref} from the Hugging Face hub: {reason} Check the name, the network and HF_TOKEN; or download the model "
            f"elsewhere and give its folder (a folder of this machine is written ./{ref})."
        ) from error
    return folder, folder.name
