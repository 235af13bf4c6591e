"""jobs/evaluate.py: its numbers are those of plain transformers and peft, and each mistake is one clear message."""

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from jobs import evaluate as job
from tests.training.conftest import publish_base
from tidepool.data import Dataset, DatasetInfo, fetch_tokenizer, find_dataset, prepare
from tidepool.models import ModelSource, add_lora, export_adapter, load_model, load_tokenizer, train_tokenizer
from tidepool.registry import Registry
from tidepool.specs import DataSpec, LoraSpec, parse_spec
from tidepool.storage import open_store

ROOT = Path(__file__).parents[2]
NUM_SAMPLES = 9
Evaluate = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with the dataset `tides`, the model `base`, and the adapter `bot` on it."""
    folder = tmp_path_factory.mktemp("prepared")
    url = (folder / "store").as_uri()
    lines = [line.strip() for line in Path(os.__file__).read_text().splitlines()]
    tokenizer = train_tokenizer(lines, 320)
    info = prepare_lines(url, folder, "tides", [line for line in lines if len(line) > 10], tokenizer)
    publish_base(url, info, folder)
    publish_adapter(url, folder)
    return url


def prepare_lines(url: str, folder: Path, name: str, lines: list[str], tokenizer: Any) -> DatasetInfo:
    """A dataset of short documents, several of which share a sample."""
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    tokenizer.save_pretrained(folder / "tokenizer")
    spec = {"store": url, "dataset": name, "tokenizer": {"train": {}}, "sequence_length": 32, "held_out_fraction": 0.2}
    spec |= {"inputs": [{"path": str(folder / "lines.jsonl"), "format": "jsonl"}], "samples_per_row_group": 8}
    return prepare(parse_spec(spec, DataSpec), load_tokenizer(folder / "tokenizer"), folder / "tokenizer", open_store(url))


def publish_adapter(url: str, folder: Path) -> None:
    registry = Registry(open_store(url))
    version = registry.resolve("base")
    base = ModelSource(version.ref, version.digest, version)
    adapted = add_lora(load_model(folder / "base-5", torch.float32), LoraSpec(rank=4, alpha=512), 0, base.ref)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    export_adapter(adapted, load_tokenizer(folder / "base-5"), folder / "bot", base)
    registry.publish("bot", "adapter", folder / "bot", base=base.ref, base_digest=base.digest, lineage={}, metrics={})


@pytest.fixture
def evaluate(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """Runs the job on a spec in this process; returns its exit status, output and errors."""
    monkeypatch.setenv("TIDEPOOL_CACHE", str(tmp_path / "cache"))

    def evaluate(**spec: Any) -> tuple[int, str, str]:
        path = tmp_path / "spec.yaml"
        path.write_text(yaml.safe_dump({"store": url, "dataset": "tides"} | spec))
        monkeypatch.setattr(sys, "argv", ["evaluate.py", str(path)])
        status = job.main()
        return (status, *capsys.readouterr())

    return evaluate


def plain_loss(url: str, folder: Path, model: str, num_samples: int) -> float:
    """The mean loss by plain transformers and peft, each document of each sample by itself."""
    store = open_store(url)
    registry = Registry(store)
    version = registry.resolve(model)
    base = registry.fetch(registry.resolve(version.base or model), folder)
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if version.kind == "adapter":
        loaded = PeftModel.from_pretrained(loaded, registry.fetch(version, folder))
    samples = Dataset(store, find_dataset(store, "tides"), "held_out", 4).read(range(num_samples))
    assert (samples.documents_NT.max(axis=1) > 0).sum() >= 2, "documents share samples"
    total, num_targets = 0.0, 0
    for tokens, mask, documents in zip(samples.tokens_NT, samples.loss_mask_NT, samples.documents_NT, strict=True):
        for number in sorted(set(documents.tolist()) - {-1}):
            mine = torch.from_numpy(documents == number)
            document, wanted = torch.from_numpy(tokens)[mine].long(), torch.from_numpy(mask)[mine][1:]
            with torch.no_grad():
                logits = loaded(input_ids=document[None]).logits[0, :-1]
            total += cross_entropy(logits[wanted], document[1:][wanted], reduction="sum").item()
            num_targets += int(wanted.sum())
    assert num_targets > num_samples
    return total / num_targets


@pytest.mark.parametrize("model", ["base", "bot"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_loss_is_that_of_plain_transformers(evaluate: Evaluate, url: str, tmp_path: Path, model: str) -> None:
    status, out, _ = evaluate(model=model, num_samples=NUM_SAMPLES, batch_size=4)
    assert status == 0
    measured = json.loads(out.splitlines()[-1])
    loss = plain_loss(url, tmp_path / "plain", model, NUM_SAMPLES)
    assert measured["held_out_loss"] == pytest.approx(loss, abs=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert (measured["model"], measured["base"]) == (f"{model}@1", "base@1" if model == "bot" else None)
    assert measured["dataset"] == find_dataset(open_store(url), "tides").ref
    assert measured["num_samples"] == NUM_SAMPLES


@pytest.mark.slow
def test_the_adapter_makes_a_difference_and_batches_make_none(evaluate: Evaluate, url: str) -> None:
    num_held_out = find_dataset(open_store(url), "tides").num_samples["held_out"]
    results = [
        json.loads(evaluate(model=model, num_samples=10_000, batch_size=batch_size)[1].splitlines()[-1])
        for model, batch_size in (("base", 8), ("base", 5), ("bot", 8))
    ]
    assert [result["num_samples"] for result in results] == [num_held_out] * 3
    losses = [result["held_out_loss"] for result in results]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert abs(losses[2] - losses[0]) > 1e-3


# --- Mistakes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign(url: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset in the same store whose tokenizer has as many tokens as the model's, but others."""
    folder = tmp_path_factory.mktemp("foreign")
    store = open_store(url)
    num_tokens = len(load_tokenizer(fetch_tokenizer(store, find_dataset(store, "tides"), folder)))
    lines = [f"ebb flood neap spring {n}" for n in range(200)]
    tokenizer = train_tokenizer(lines, num_tokens)
    assert len(tokenizer) == num_tokens
    return prepare_lines(url, folder, "foreign", lines, tokenizer).name


@pytest.mark.parametrize(
    ("spec", "messages"),
    [
        ({"model": "bott"}, ["No model bott in the registry", "did you mean bot?"]),
        ({"model": "bot@9"}, ["No version 9 of bot; its versions: 1"]),
        ({"model": "./nowhere"}, ["No model folder", "nowhere"]),
        ({"model": "base", "dataset": "tide"}, ["No dataset tide", "there are: ", "tides", "jobs/prepare.py"]),
        ({"model": "base", "dataset": "tides@ab"}, ["tides has the digests"]),
        ({"model": "base", "batch_sise": 1}, ["batch_sise: unknown key; did you mean `batch_size`?"]),
    ],
)
def test_a_mistake_is_one_clear_message(evaluate: Evaluate, spec: dict[str, Any], messages: list[str]) -> None:
    status, out, err = evaluate(**spec)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("error: ") == 1
    for message in messages:
        assert message in err


@pytest.mark.parametrize("model", ["base", "bot"])
def test_a_dataset_of_another_tokenizer_is_refused(evaluate: Evaluate, foreign: str, model: str) -> None:
    status, out, err = evaluate(model=model, dataset=foreign)
    assert (status, out) == (1, "")
    assert err.startswith("error: The dataset was prepared with another tokenizer than the model's own")
    assert err.count("error: ") == 1
    assert "`tokenizer: {of: MODEL}`" in err
