"""What a run says when a disk fills up or an object of the store is gone under it, and what does not fit: nothing committed is lost."""

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from jobs import evaluate, train
from tests.training.conftest import CONFIG, Beat, Killed, killer, make_run, prepare_dataset, publish_base, train_here
from tidepool.checkpoint import RunLog
from tidepool.data import find_dataset
from tidepool.errors import DataError, DiskError, ModelError, RegistryError, StoreError
from tidepool.models import build_model, check_length, export_model
from tidepool.models.scratch import new_config
from tidepool.registry import Registry
from tidepool.specs import RunSpec
from tidepool.storage import ObjectStore, open_store
from tidepool.training import job as training_job
from tidepool.training.outcome import Outcome

JOBS = {"train": train, "evaluate": evaluate}


def bits(outcome: Outcome) -> list[str]:
    assert outcome.result is not None
    return [outcome.result[key] for key in ("weights_sha256", "optimizer_sha256", "history_sha256")]


def begin(spec: RunSpec, steps: int = 3) -> None:
    """Train so many steps and die; with commits every two steps."""
    with pytest.raises(Killed):
        train_here(spec, killer(steps))


def committed(store: ObjectStore, run: str) -> list[int]:
    return [commit.step for commit in RunLog(store, run).visible_commits()]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a job in this process, its workers too, and returns the one message that it ends with."""

    def run(name: str, spec: dict[str, Any], beat: Beat = lambda *_: False) -> str:
        (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
        monkeypatch.setattr(sys, "argv", [f"{name}.py", str(tmp_path / "spec.yaml")])
        monkeypatch.setattr(training_job, "train", lambda spec: train_here(spec, beat))
        capsys.readouterr()
        status = JOBS[name].main()
        out, err = capsys.readouterr()
        assert status == 1, out + err
        assert "Traceback" not in out + err
        assert (out + err).count("error: ") == 1
        return err[err.index("error: ") + 7 :].strip()

    return run


# --- A full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a local store with a dataset and a base, well below a megabyte."""
    folder = tmp_path_factory.mktemp("small")
    url = (folder / "store").as_uri()
    publish_base(url, prepare_dataset(url, folder), folder)
    return folder / "store"


def fill(disk: Path) -> Path:
    """A file that takes all the room that is left."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(b"x" * 4096):
            continue
    assert shutil.disk_usage(disk).free == 0
    return filler


def filling(disk: Path, at_step: int) -> Beat:
    """A heartbeat that fills the disk when so many steps are completed."""

    def beat(step: int, phase: str) -> bool:
        if (step, phase) == (at_step, "step"):
            fill(disk)
        return False

    return beat


def test_a_store_that_is_full_ends_the_run_with_a_message_and_loses_nothing(
    small_store: Path, small_disk: Path, run_name: str, job: Callable[..., str]
) -> None:
    shutil.copytree(small_store, small_disk / "store")
    store = open_store((small_disk / "store").as_uri())
    spec = make_run(store.url, run_name)
    begin(spec)
    before = {info.key: store.get(info.key) for info in store.list("")}
    message = job("train", spec.model_dump(mode="json"), filling(small_disk, 3))
    assert store.url in message
    assert "No space left on device" in message
    assert {key: store.get(key) for key in before} == before, "what was there is there"
    assert committed(store, run_name) == [2]
    (small_disk / "filler").unlink()
    outcome = train_here(spec)
    assert bits(outcome) == bits(train_here(make_run(store.url, f"{run_name}-alone", checkpoint={"every_steps": 8, "keep": 1})))


def test_a_full_disk_for_temporary_files_ends_the_run_with_a_message_and_loses_nothing(
    prepared: str, run_name: str, store: ObjectStore, small_disk: Path, job: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commits need none; what is published is written there first."""
    spec = make_run(prepared, run_name, publish={"model": f"{run_name}-model"})
    begin(spec)
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    message = job("train", spec.model_dump(mode="json"), filling(small_disk, 3))
    assert message.startswith(
        f"The disk of {small_disk} on this machine is full: 0.0 MB of 2.1 MB are free. Make room there, or set TMPDIR"
    )
    assert "What was committed or published is safe." in message
    assert committed(store, run_name) == [8, 6, 4]
    (small_disk / "filler").unlink()
    assert list(small_disk.iterdir()) == [], "no half-written file is left"
    assert train_here(spec).finished


def test_a_full_cache_ends_the_run_with_a_message(
    prepared: str, run_name: str, small_disk: Path, job: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEPOOL_CACHE", str(small_disk / "cache"))
    filler = fill(small_disk)
    spec = make_run(prepared, run_name)
    message = job("train", spec.model_dump(mode="json"))
    assert message.startswith(f"The disk of {small_disk / 'cache' / 'models'} on this machine is full")
    assert "set TIDEPOOL_CACHE to a folder on a larger disk" in message
    filler.unlink()
    assert train_here(spec).finished


# --- Objects that are gone -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(prepared: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The bits of a run that nothing happened to."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TIDEPOOL_CACHE", str(tmp_path_factory.mktemp("cache")))
        return bits(train_here(make_run(prepared, "adversity-alone")))


@pytest.fixture
def gone(store: ObjectStore) -> Iterator[Callable[[str], None]]:
    """Deletes what lies under a key or prefix, and puts it back at the end."""
    kept: dict[str, bytes] = {}

    def delete(prefix: str) -> None:
        for info in list(store.list(prefix if prefix.endswith("/") else f"{prefix.rpartition('/')[0]}/")):
            if info.key.startswith(prefix):
                kept[info.key] = store.get(info.key)
                store.delete(info.key)
        assert kept

    yield delete
    for key, content in kept.items():
        store.put_if_absent(key, content)


@pytest.mark.parametrize("what", ["shards", "the base's weights", "the tokenizer"])
def test_an_object_that_is_gone_under_a_run_is_named_and_the_run_goes_on_when_it_is_back(
    what: str, alone: list[str], prepared: str, run_name: str, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_run(prepared, run_name)
    begin(spec)
    monkeypatch.setenv("TIDEPOOL_CACHE", str(tmp_path / "another node"))
    info, base = find_dataset(store, "tides"), Registry(store).resolve("base@1")
    weights = next(file for file in base.files if file.path == "model.safetensors")
    prefix, error, message = {
        "shards": (
            f"{info.prefix}train/",
            DataError,
            r"train/.*\.parquet of dataset tides@.* is missing from the store\. Run jobs/prepare",
        ),
        "the base's weights": (
            f"blobs/{weights.sha256}",
            RegistryError,
            "model.safetensors of base@1 is missing from the store: use another",
        ),
        "the tokenizer": (f"{info.prefix}tokenizer/", DataError, "tokenizer/.* is missing from the store. Run jobs/prepare.py"),
    }[what]
    kept = {entry.key: store.get(entry.key) for entry in store.list("") if entry.key.startswith(prefix)}
    for key in kept:
        store.delete(key)
    try:
        with pytest.raises(error, match=message):
            train_here(spec)
    finally:
        for key, content in kept.items():
            store.put_if_absent(key, content)
    assert committed(store, run_name) == [2]
    assert bits(train_here(spec)) == alone


def test_a_base_that_is_gone_from_the_store_is_taken_from_the_nodes_cache(
    prepared: str, run_name: str, store: ObjectStore, gone: Callable[[str], None]
) -> None:
    spec = make_run(prepared, run_name)
    begin(spec)
    weights = next(file for file in Registry(store).resolve("base@1").files if file.path == "model.safetensors")
    gone(f"blobs/{weights.sha256}")
    assert train_here(spec).finished


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_a_checkpoint_that_misses_an_object_costs_the_steps_since_the_one_before(
    name: str, prepared: str, run_name: str, store: ObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    spec = make_run(prepared, run_name)
    begin(spec, 5)
    for key in [info.key for info in store.list(f"runs/{run_name}/checkpoints/4/")]:
        if key.endswith(f"/{name}"):
            store.delete(key)
    seen: list[int] = []
    outcome = train_here(spec, lambda step, phase: bool(seen.append(step)) if phase == "step" else False)
    assert seen[0] == 2
    assert "falling back to the commit before" in caplog.text
    assert "missing" in caplog.text
    assert outcome.finished


# --- What does not fit -----------------------------------------------------------------------------------------------


def content(store: ObjectStore) -> list[tuple[str, int]]:
    return [(info.key, info.size_bytes) for info in store.list("")]


@pytest.fixture
def short_base(run_name: str, store: ObjectStore, tmp_path: Path) -> str:
    """The name of a model with the dataset's tokenizer that allows 16 tokens; the dataset's samples have 32."""
    from tidepool.data import fetch_tokenizer
    from tidepool.models import load_tokenizer

    tokenizer = load_tokenizer(fetch_tokenizer(store, find_dataset(store, "tides"), tmp_path / "tokenizers"))
    export_model(build_model(CONFIG | {"max_position_embeddings": 16}, len(tokenizer), 0, tokenizer), tokenizer, tmp_path / "short")
    Registry(store).publish(f"{run_name}-short", "full", tmp_path / "short", lineage={}, metrics={})
    return f"{run_name}-short"


def test_samples_longer_than_the_model_allows_are_refused_before_a_worker_starts(
    prepared: str, run_name: str, store: ObjectStore, short_base: str, job: Callable[..., str]
) -> None:
    before = content(store)
    for model in ({"base": short_base}, {"base": short_base, "lora": {}}, {"config": CONFIG | {"max_position_embeddings": 16}}):
        message = job("train", make_run(prepared, run_name, model=model).model_dump(mode="json"))
        assert "samples have 32 tokens and the model allows 16 (max_position_embeddings)" in message
        assert "sequence_length: 16 or less" in message
    message = job("evaluate", {"store": prepared, "model": short_base, "dataset": "tides"})
    assert "samples have 32 tokens and the model allows 16" in message
    assert content(store) == before


@pytest.mark.parametrize(
    ("config", "allowed"),
    [
        ({"model_type": "gpt2", "n_positions": 48}, 48),
        ({"model_type": "qwen2", "max_position_embeddings": 20}, 20),
        ({"model_type": "bloom"}, None),  # positions by distance: its configuration names no limit
    ],
)
def test_the_limit_is_the_one_of_the_models_own_configuration(config: dict[str, Any], allowed: int | None) -> None:
    built = new_config(config, 300)
    check_length(built, allowed or 10**6)
    if allowed:
        with pytest.raises(ModelError, match=f"samples have {allowed + 1} tokens and the model allows {allowed} "):
            check_length(built, allowed + 1)


@pytest.mark.parametrize(("batch_size", "advice"), [(8, "Lower batch_size from 8 to 4"), (1, "use a device with more memory")])
def test_an_evaluation_that_runs_out_of_memory_is_told(
    batch_size: int, advice: str, prepared: str, job: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_arguments: Any) -> float:
        return float(torch.empty(2**60, dtype=torch.uint8)[0])

    monkeypatch.setattr(evaluate, "evaluate", exhausted)
    message = job("evaluate", {"store": prepared, "model": "base@1", "dataset": "tides", "batch_size": batch_size})
    assert message.startswith("The evaluation ran out of memory (")
    assert advice in message


def test_a_tokenizer_that_is_not_the_models_is_refused_before_a_worker_starts(
    prepared: str, run_name: str, store: ObjectStore, tmp_path: Path, job: Callable[..., str]
) -> None:
    publish_base(
        prepared, prepare_dataset(prepared, tmp_path / "other", f"{run_name}-data", letters="m-z"), tmp_path, name=f"{run_name}-base"
    )
    before = content(store)
    message = job("train", make_run(prepared, run_name, model={"base": f"{run_name}-base", "lora": {}}).model_dump(mode="json"))
    assert "was prepared with another tokenizer than the model's own" in message
    assert "Prepare it with `tokenizer: {of: MODEL}` in the data spec" in message
    assert "another tokenizer" in job("evaluate", {"store": prepared, "model": f"{run_name}-base", "dataset": "tides"})
    assert content(store) == before


def test_the_errors_here_are_for_a_person_and_end_a_run_at_once() -> None:
    from tidepool.training.restarts import Failure, give_up

    for error in (DiskError("x"), StoreError("x"), DataError("x"), RegistryError("x"), ModelError("x")):
        assert give_up([Failure(2, 3, error, "")], 8) is error
