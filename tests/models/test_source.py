"""Finding and fetching models: from folders, stores, the registry and the hub; what is fetched is what was found."""

import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from tidepool.errors import ModelError
from tidepool.models import copy_files, copy_tokenizer, export_model, fetch_model, find_model
from tidepool.registry import Registry, describe_folder, files_digest
from tidepool.storage import ObjectStore, open_store


@pytest.fixture
def store() -> ObjectStore:
    return open_store(f"memory://{uuid.uuid4().hex}")


@pytest.fixture(scope="session")
def exported(_models: dict[str, Any], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export_model(_models["llama"], tokenizer, folder)
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A model folder of the test's own."""
    copy = tmp_path / "model"
    copy.mkdir()
    for path in exported.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_a_model_has_the_same_digest_wherever_it_lies(
    folder: Path, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Registry(store).publish("tides", "full", folder, lineage={}, metrics={})
    sources = [find_model(ref, store) for ref in (str(folder), "./model", f"file://{folder}", "tides", "tides@1", "tides:production")]
    assert {source.digest for source in sources} == {files_digest(describe_folder(folder))}
    assert [source.ref for source in sources] == [str(folder), str(folder), f"file://{folder}", "tides@1", "tides@1", "tides@1"]
    for source in sources:
        fetched = fetch_model(source, store, tmp_path / "cache")
        assert describe_folder(fetched) == describe_folder(folder)
        assert find_model(source.ref, store) == source, "a pinned reference means the same again"


def test_the_small_files_of_a_model_come_without_the_rest_wherever_it_lies(folder: Path, store: ObjectStore, tmp_path: Path) -> None:
    Registry(store).publish("tides", "full", folder, lineage={}, metrics={})
    for number, ref in enumerate((str(folder), f"file://{folder}", "tides")):
        source, target = find_model(ref, store), tmp_path / str(number)
        target.mkdir()
        copy_files(source, store, ("config.json", "tokenizer.json", "vocab.txt"), target)
        assert {path.name: path.read_bytes() for path in target.iterdir()} == {
            name: (folder / name).read_bytes() for name in ("config.json", "tokenizer.json")
        }


def test_files_that_make_no_model_change_no_digest_and_are_not_fetched(folder: Path, store: ObjectStore, tmp_path: Path) -> None:
    before = find_model(str(folder), store).digest
    for name in ("README.md", "pytorch_model.bin", "modeling.py", "optimizer.pt"):
        (folder / name).write_text("x")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "model.safetensors").write_text("x")
    source = find_model(f"file://{folder}", store)
    assert find_model(str(folder), store).digest == source.digest == before
    names = {path.name for path in fetch_model(source, store, tmp_path / "cache").iterdir()}
    assert not names & {"README.md", "pytorch_model.bin", "modeling.py", "optimizer.pt", "checkpoints"}


def test_a_model_that_changed_since_it_was_found_is_refused(folder: Path, store: ObjectStore, tmp_path: Path) -> None:
    sources = [find_model(ref, store) for ref in (str(folder), f"file://{folder}")]
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    for source in sources:
        with pytest.raises(ModelError, match="are not those that were found before"):
            fetch_model(source, store, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name not in (".locks", ".uses")], "nothing half-fetched is left"


def test_a_model_in_a_store_is_fetched_once(folder: Path, store: ObjectStore, tmp_path: Path) -> None:
    source = find_model(f"file://{folder}", store)
    fetched = fetch_model(source, store, tmp_path / "cache")
    for path in folder.iterdir():
        path.unlink()
    assert fetch_model(source, store, tmp_path / "cache") == fetched


def test_pickled_weights_are_refused_where_they_lie(folder: Path, store: ObjectStore) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for ref in (str(folder), f"file://{folder}"):
        with pytest.raises(ModelError, match="pickled weights only"):
            find_model(ref, store)


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("/nowhere/model", "No model folder /nowhere/model"),
        ("./nowhere", "No model folder .*/nowhere"),
        ("tide", r"No model tide in the registry of memory://.*is written \./tide, a model of the Hugging Face hub org/name"),
    ],
)
def test_a_model_that_is_not_there_is_an_error_that_says_where_it_looked(ref: str, message: str, store: ObjectStore) -> None:
    with pytest.raises(ModelError, match=message):
        find_model(ref, store)


def test_a_store_folder_without_a_model_is_an_error(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no weights"):
        find_model(f"file://{tmp_path}", store)


def test_without_a_network_a_hub_model_is_one_clear_error_and_finding_it_loads_no_torch(tmp_path: Path) -> None:
    code = """
import sys
from tidepool.errors import ModelError
from tidepool.models import find_model
from tidepool.storage import open_store
for ref in ("org/name", "org/name@0123", "org/too/many"):
    try:
        find_model(ref, open_store("memory://hub"))
    except ModelError as error:
        print(error)
assert "torch" not in sys.modules
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert [line.split(" from the Hugging Face hub: ")[0] for line in lines] == [
        "Cannot get org/name",
        "Cannot get org/name@0123",
        "Cannot get org/too/many",
    ]
    assert all("HF_TOKEN; or download the model elsewhere" in line for line in lines)


def test_a_tokenizer_is_copied_without_the_model(folder: Path, tmp_path: Path) -> None:
    copy_tokenizer(folder, tmp_path / "tokenizer")
    names = {path.name for path in (tmp_path / "tokenizer").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
