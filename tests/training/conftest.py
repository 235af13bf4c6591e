"""A small prepared dataset, a tiny model configuration, and runs on it without a cluster."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tidepool.checkpoint import claim_incarnation
from tidepool.data import Dataset, DatasetInfo, find_dataset, prepare
from tidepool.models import build_model, export_model, load_tokenizer, train_tokenizer
from tidepool.registry import Registry
from tidepool.specs import DataSpec, RunSpec, parse_spec
from tidepool.storage import ObjectStore, open_store
from tidepool.telemetry import MemorySink
from tidepool.training.batch import shard_samples
from tidepool.training.member import Alone
from tidepool.training.outcome import Outcome
from tidepool.training.pins import read_pins
from tidepool.training.resolution import resolve
from tidepool.training.sample_record import read_record, samples_digest
from tidepool.training.task import Task
from tidepool.training.worker import Account, run_task

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
Beat = Callable[[int, str], bool]


def prepare_dataset(store_url: str, folder: Path, name: str = "tides", letters: str = "a-c") -> DatasetInfo:
    """Prepare a dataset of Python's own source, with a tokenizer trained on it."""
    store, texts = open_store(store_url), folder / "texts"
    texts.mkdir(parents=True)
    for number, path in enumerate(sorted(Path(os.__file__).parent.glob(f"[{letters}]*.py"))[:24]):
        (texts / f"{number}.txt").write_text(path.read_text()[:6000])
    tokenizer = train_tokenizer([path.read_text() for path in sorted(texts.iterdir())], vocab_size=320)
    tokenizer.save_pretrained(folder / "tokenizer")
    spec = {"store": store_url, "dataset": name, "inputs": [{"path": str(texts)}], "tokenizer": {"train": {}}, "sequence_length": 32}
    spec |= {"held_out_fraction": 0.2, "samples_per_row_group": 16, "row_groups_per_shard": 4}
    return prepare(parse_spec(spec, DataSpec), load_tokenizer(folder / "tokenizer"), folder / "tokenizer", store)


def publish_base(
    store_url: str, info: DatasetInfo, folder: Path, seed: int = 5, name: str = "base", config: dict[str, Any] = CONFIG
) -> None:
    """Publish an untrained model with the dataset's tokenizer."""
    from tidepool.data import fetch_tokenizer

    store = open_store(store_url)
    tokenizer = load_tokenizer(fetch_tokenizer(store, info, folder / "tokenizers"))
    model = build_model(config | {"initializer_range": 0.2}, len(tokenizer), seed, tokenizer)
    export_model(model, tokenizer, folder / f"{name}-{seed}")
    Registry(store).publish(name, "full", folder / f"{name}-{seed}", lineage={}, metrics={})


def make_run(store_url: str, run: str, **changes: Any) -> RunSpec:
    """A run of 8 steps with dropout on its LoRA layers, which waits for each commit.

    `changes` replace whole top-level keys; `training` and `checkpoint` are merged.
    """
    training = {"steps": 8, "global_batch_size": 8, "num_shards": 4, "evaluate_every_steps": 4, "evaluate_num_samples": 6}
    training["optimizer"] = {"learning_rate": 0.01, "warmup_steps": 2, "weight_decay": 0.1}
    spec = {
        "store": store_url,
        "run": run,
        "dataset": "tides",
        "seed": 3,
        "model": {"base": "base", "lora": {"rank": 4, "alpha": 8, "dropout": 0.3}},
    }
    spec |= {key: value for key, value in changes.items() if key != "training"}
    spec["checkpoint"] = {"every_steps": 2, "keep": 3, "max_lag_s": 0} | changes.get("checkpoint", {})
    return parse_spec(spec | {"training": training | changes.get("training", {})}, RunSpec)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of a memory store with the dataset `tides` and the model `base`; tests use run names of their own."""
    folder = tmp_path_factory.mktemp("prepared")
    url = f"memory://{uuid.uuid4().hex}"
    publish_base(url, prepare_dataset(url, folder), folder)
    return url


@pytest.fixture
def store(prepared: str) -> ObjectStore:
    return open_store(prepared)


@pytest.fixture
def run_name() -> str:
    return f"r{uuid.uuid4().hex[:12]}"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEPOOL_CACHE", str(tmp_path / "cache"))


class Killed(BaseException):
    """Ends a worker where a test wants it to die; nothing catches it."""


def killer(at_step: int, phase: str = "step") -> Beat:
    """A heartbeat that dies when so many steps are completed and the phase begins."""

    def beat(step: int, now: str) -> bool:
        if (step, now) == (at_step, phase):
            raise Killed
        return False

    return beat


def train_here(
    spec: RunSpec,
    beat: Beat = lambda *_: False,
    sink: MemorySink | None = None,
    account: Account = lambda: {},
    device: torch.device = torch.device("cpu"),  # noqa: B008 - a value
) -> Outcome:
    """One incarnation of a run in this process, as the driver would start it."""
    store = open_store(spec.store)
    pins = read_pins(spec, store) or resolve(spec, store)
    claimed = claim_incarnation(store, spec.run, {"spec_digest": spec.digest})
    base = claimed.base
    alone = Alone(claimed.number, base.name if base else None, base.step if base else 0, beat)
    outcome = run_task(Task(spec, pins, claimed.number), alone, device, [sink or MemorySink()], account)
    assert outcome is not None
    return outcome


def check_exactly_once(store: ObjectStore, spec: RunSpec) -> None:
    """Every shard of every step read just the samples that are its own."""
    layout = Dataset(store, find_dataset(store, spec.dataset), "train", 1).layout
    record = read_record(store, spec.run)
    assert sorted(record) == list(range(1, spec.training.steps + 1))
    for step, stored in record.items():
        shards = range(spec.training.num_shards)
        expected = [samples_digest(shard_samples(step - 1, shard, spec.training, spec.seed, layout)) for shard in shards]
        assert all(digests == expected for digests in stored), step
