"""The step loop in one process: what it computes, what interruption changes (nothing), and what it refuses."""

import dataclasses
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.conftest import CONFIG, Killed, check_exactly_once, killer, make_run, prepare_dataset, publish_base, train_here
from tests.training.test_commits import Faulty
from tidepool.checkpoint import RunLog
from tidepool.data import Dataset, find_dataset
from tidepool.data.shards import ShardReader
from tidepool.errors import DataError, ModelError, NonFiniteError, NumericsError, SpecChangedError, StoreUnreachableError, SupersededError
from tidepool.models import load_model
from tidepool.registry import Registry
from tidepool.specs import RunSpec
from tidepool.storage import ObjectStore, get_json, open_store
from tidepool.telemetry import MemorySink
from tidepool.training import loop, numerics, worker
from tidepool.training.batch import shard_samples
from tidepool.training.loop import derived_seed
from tidepool.training.outcome import Outcome, read_result

SHAS = ("weights_sha256", "optimizer_sha256", "history_sha256")
FULL: dict[str, Any] = {"model": {"config": CONFIG | {"attention_dropout": 0.2}}}


def bits(outcome: Outcome) -> list[str]:
    assert outcome.result is not None
    return [outcome.result[key] for key in SHAS]


def finish(spec: RunSpec, *kills: tuple[int, str]) -> Outcome:
    """Train to the end, dying on the way where `kills` say."""
    for at_step, phase in kills:
        with pytest.raises(Killed):
            train_here(spec, killer(at_step, phase))
    outcome = train_here(spec)
    assert outcome.finished
    return outcome


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_dying_anywhere_changes_no_bit(prepared: str, run_name: str, kind: str) -> None:
    changes = FULL if kind == "full" else {}
    alone = finish(make_run(prepared, f"{run_name}-a", **changes))
    spec = make_run(prepared, f"{run_name}-b", **changes)
    killed = finish(spec, (0, "step"), (3, "step"), (4, "commit"), (4, "step"), (7, "step"), (8, "evaluate"))
    assert bits(killed) == bits(alone)
    different = finish(make_run(prepared, f"{run_name}-c", seed=4, **changes))
    assert not set(bits(different)) & set(bits(alone)), "a comparison that could not fail would show nothing"


def test_training_goes_on_while_the_store_takes_nothing(
    prepared: str, run_name: str, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = finish(make_run(prepared, f"{run_name}-a"))
    away = Faulty(store)
    away.may_put.clear()
    committed: list[object] = []

    def beat(step: int, phase: str) -> bool:
        if (step, phase) == (7, "step") and not away.may_put.is_set():  # three checkpoints have been due
            committed.extend(RunLog(store, f"{run_name}-b").visible_commits())
            away.may_put.set()
        return False

    monkeypatch.setattr(worker, "open_store", lambda _url: away)
    outcome = train_here(make_run(prepared, f"{run_name}-b", checkpoint={"max_lag_s": 300}), beat)
    assert committed == []
    assert bits(outcome) == bits(alone)
    assert RunLog(store, f"{run_name}-b").visible_commits()[0].step == 8


def test_every_sample_is_read_once_though_steps_are_computed_again(prepared: str, run_name: str, store: ObjectStore) -> None:
    spec = make_run(prepared, run_name)
    finish(spec, (3, "step"), (4, "commit"), (7, "step"))
    check_exactly_once(store, spec)
    with pytest.raises(AssertionError):
        check_exactly_once(store, make_run(prepared, run_name, seed=4))


def test_dropout_is_on_and_seeded_by_step_and_shard(prepared: str, run_name: str) -> None:
    with_dropout = finish(make_run(prepared, f"{run_name}-a"))
    without = finish(make_run(prepared, f"{run_name}-b", model={"base": "base", "lora": {"rank": 4, "alpha": 8, "dropout": 0}}))
    assert bits(with_dropout)[0] != bits(without)[0]
    assert len({derived_seed(1, step, shard) for step in range(20) for shard in range(20)}) == 400


def test_it_learns_and_says_so(prepared: str, run_name: str, store: ObjectStore) -> None:
    sink = MemorySink()
    outcome = train_here(make_run(prepared, run_name, publish={"model": run_name}, training={"steps": 12}), sink=sink)
    result = outcome.result
    assert result is not None
    assert result["held_out_loss_after"] < result["held_out_loss_before"] - 0.05
    assert result["samples"] == 12 * 8
    assert result == read_result(store, run_name)
    steps = [step for step, values in sink.rows if "loss" in values]
    assert steps == list(range(1, 13))
    assert [step for step, values in sink.rows if "held_out_loss" in values] == [0, 4, 8, 12]
    assert all(0 <= values["data_wait_s"] < values["step_time_s"] for _, values in sink.rows if "loss" in values)
    rates = [values["learning_rate"] for _, values in sink.rows if "loss" in values]
    assert rates[:3] == pytest.approx([0.005, 0.01, 0.01])
    version = Registry(store).resolve(run_name)
    assert (version.kind, version.base, version.lineage["run"], version.lineage["step"]) == ("adapter", "base@1", run_name, 12)
    assert version.metrics["held_out_loss"] == result["held_out_loss_after"]
    assert result["published"] == version.ref


def test_a_finished_run_publishes_once_even_if_it_died_while_telling(prepared: str, run_name: str, store: ObjectStore) -> None:
    spec = make_run(prepared, run_name, publish={"model": run_name})
    finish(spec)
    store.delete(f"runs/{run_name}/result.json")
    finish(spec)
    assert [version.number for version in Registry(store).versions(run_name)] == [1]


@pytest.mark.parametrize("changes", [{"num_shards": 4, "micro_batch_size": 2}, {"gradient_checkpointing": True}])
def test_how_a_shard_is_computed_changes_rounding_at_most(prepared: str, run_name: str, changes: dict[str, Any]) -> None:
    model = {"base": "base", "lora": {"rank": 4, "alpha": 8, "dropout": 0.0}}
    one = finish(make_run(prepared, f"{run_name}-a", model=model)).result
    two = finish(make_run(prepared, f"{run_name}-b", model=model, training=changes)).result
    assert one is not None
    assert two is not None
    assert two["last_loss"] == pytest.approx(one["last_loss"], rel=1e-4)
    assert two["held_out_loss_after"] == pytest.approx(one["held_out_loss_after"], rel=1e-4)


def test_the_loss_is_that_of_plain_transformers(prepared: str, run_name: str, store: ObjectStore, tmp_path: Path) -> None:
    spec = make_run(prepared, run_name, model={"base": "base"}, training={"steps": 1, "num_shards": 2, "optimizer": {}})
    sink = MemorySink()
    train_here(spec, sink=sink)
    info = find_dataset(store, "tides")
    dataset = Dataset(store, info, "train", 4)
    model = load_model(Registry(store).fetch(Registry(store).resolve("base"), tmp_path), torch.float32)
    total, num_targets = 0.0, 0
    for sample in [n for shard in (0, 1) for n in shard_samples(0, shard, spec.training, spec.seed, dataset.layout)]:
        read = dataset.read([sample])
        for document in sorted(set(read.documents_NT[0].tolist()) - {-1}):
            inside = read.documents_NT[0] == document
            tokens = torch.from_numpy(read.tokens_NT[0][inside]).long()[None]
            labels = tokens.clone()
            labels[0, ~torch.from_numpy(read.loss_mask_NT[0][inside])] = -100
            if (labels[0, 1:] != -100).any():
                targets = int((labels[0, 1:] != -100).sum())
                total += model(input_ids=tokens, labels=labels).loss.item() * targets
                num_targets += targets
    loss = next(values["loss"] for _, values in sink.rows if "loss" in values)
    assert loss == pytest.approx(total / num_targets, rel=1e-5)


def test_a_wish_to_stop_is_met_by_a_commit_and_costs_nothing(prepared: str, run_name: str) -> None:
    alone = finish(make_run(prepared, f"{run_name}-a"))
    spec = make_run(prepared, f"{run_name}-b")
    outcome = train_here(spec, lambda step, _: step >= 4)
    assert (outcome.finished, outcome.step, outcome.result) == (False, 5, None)
    again = train_here(spec, killer(4, "step"))  # it never comes to step 4 again
    assert bits(again) == bits(alone)


def test_a_damaged_checkpoint_costs_the_steps_after_the_one_before(
    prepared: str, run_name: str, store: ObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    alone = finish(make_run(prepared, f"{run_name}-a"))
    spec = make_run(prepared, f"{run_name}-b")
    with pytest.raises(Killed):
        train_here(spec, killer(7))
    damaged = next(info.key for info in store.list(f"runs/{spec.run}/checkpoints/6/") if info.key.endswith("/optimizer.safetensors"))
    content = store.get(damaged)
    store.delete(damaged)
    store.put_if_absent(damaged, content[:-1] + bytes([content[-1] ^ 1]))
    seen: list[int] = []
    outcome = train_here(spec, lambda step, phase: bool(seen.append(step)) if phase == "step" else False)
    assert sorted(set(seen)) == [4, 5, 6, 7]
    assert bits(outcome) == bits(alone)
    assert "falling back to the commit before" in caplog.text
    assert "optimizer.safetensors" in caplog.text


def test_a_loss_that_is_not_finite_stops_before_it_does_harm(prepared: str, run_name: str, store: ObjectStore) -> None:
    spec = make_run(prepared, run_name, training={"optimizer": {"learning_rate": 1e30, "clip_norm": None, "warmup_steps": 0}})
    with pytest.raises(NonFiniteError, match=rf"Run {run_name} stopped at step \d+.*samples \d+.*Lower the learning rate") as caught:
        train_here(spec)
    step = int(str(caught.value).split("step ")[1].split(":")[0])
    assert all(commit.step < step for commit in RunLog(store, run_name).visible_commits())
    assert read_result(store, run_name) is None


def test_a_changed_spec_is_refused_with_the_difference(prepared: str, run_name: str) -> None:
    with pytest.raises(Killed):
        train_here(make_run(prepared, run_name), killer(1))
    with pytest.raises(SpecChangedError, match=r"training\.steps: 8 -> 9") as caught:
        train_here(make_run(prepared, run_name, training={"steps": 9}))
    assert "another `run` name" in str(caught.value)
    outcome = train_here(make_run(prepared, run_name, checkpoint={"every_steps": 3, "keep": 1}, workers={"num_workers": 3}))
    assert outcome.finished, "what does not decide the result may change"


def test_other_numerics_are_refused(prepared: str, run_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_run(prepared, run_name)
    with pytest.raises(Killed):
        train_here(spec, killer(1))
    monkeypatch.setattr(numerics.torch, "__version__", "9.9.9")
    with pytest.raises(NumericsError, match=r"torch: .* -> \"9\.9\.9\""):
        train_here(spec)


def test_a_run_keeps_what_its_names_meant_when_it_began(prepared: str, run_name: str, tmp_path: Path) -> None:
    url, store = prepared, open_store(prepared)
    spec = make_run(url, run_name)
    with pytest.raises(Killed):
        train_here(spec, killer(3))
    publish_base(url, find_dataset(store, "tides"), tmp_path, seed=6)
    assert Registry(store).resolve("base").number > 1
    try:
        resumed = finish(spec)
    finally:
        Registry(store).promote("base", 1)
    assert get_json(store, f"runs/{run_name}/spec.json")["pins"]["base"] == "base@1"
    assert bits(resumed) == bits(finish(make_run(url, f"{run_name}-b")))


def test_a_driver_that_was_overtaken_stops(prepared: str, run_name: str) -> None:
    spec = make_run(prepared, run_name)
    taken_over: list[Outcome] = []

    def beat(step: int, phase: str) -> bool:
        if (step, phase) == (3, "step"):
            taken_over.append(train_here(spec))
        return False

    with pytest.raises(SupersededError, match="taken over"):
        train_here(spec, beat)
    assert taken_over[0].finished


@pytest.mark.parametrize("ends", ["well", "killed", "asked to stop", "without data"])
def test_however_a_run_ends_it_reads_no_more(prepared: str, run_name: str, ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_run(prepared, run_name, training={"steps": 100 if ends == "asked to stop" else 4})
    if ends == "killed":
        with pytest.raises(Killed):
            train_here(spec, killer(2))
    elif ends == "without data":

        def unreachable(*_: object) -> None:
            raise StoreUnreachableError("no answer")

        monkeypatch.setattr(ShardReader, "read", unreachable)
        monkeypatch.setattr(loop, "evaluate", lambda *_: 0.0)
        with pytest.raises(StoreUnreachableError):
            train_here(spec)
    else:
        train_here(spec, lambda step, _: ends == "asked to stop" and step >= 1)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_what_is_kept_of_the_data_is_bounded_in_bytes(store: ObjectStore, caplog: pytest.LogCaptureFixture) -> None:
    info = find_dataset(store, "tides")
    window = info.layout("train").window
    assert worker._num_row_groups_cached(info) == 2 * window
    assert not caplog.records
    long = dataclasses.replace(info, sequence_length=2**20, samples_per_row_group=16)
    kept = worker._num_row_groups_cached(long)
    assert 1 <= kept < window
    assert kept * long.row_group_bytes <= 2**30
    assert f"take 144 MiB each, so that only {kept} of the {window}" in caplog.text
    assert "fewer samples_per_row_group" in caplog.text


def test_old_checkpoints_are_removed(prepared: str, run_name: str, store: ObjectStore) -> None:
    finish(make_run(prepared, run_name, checkpoint={"every_steps": 1, "keep": 2}))
    steps = sorted({int(info.key.split("/")[3]) for info in store.list(f"runs/{run_name}/checkpoints/")})
    assert steps == [7, 8]
    assert [commit.step for commit in RunLog(store, run_name).visible_commits()] == [8, 7]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dataset": "tide"}, DataError, "there are: .*tides"),
        ({"model": {"base": "bose"}}, ModelError, "did you mean base"),
        ({"model": {"base": "base", "lora": {"target_modules": ["query"]}}}, ModelError, "it has .*q_proj"),
        ({"model": {"config": CONFIG | {"hiden_size": 3}}}, ModelError, "hidden_size"),
    ],
)
def test_specs_that_cannot_be_trained(prepared: str, run_name: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        train_here(make_run(prepared, run_name, **changes))


def test_an_adapter_is_not_a_base(prepared: str, run_name: str) -> None:
    finish(make_run(prepared, run_name, publish={"model": f"{run_name}-adapter"}))
    with pytest.raises(ModelError, match=r"is an adapter: give the base .*base@1"):
        train_here(make_run(prepared, f"{run_name}-b", model={"base": f"{run_name}-adapter", "lora": {}}))


def test_metrics_are_in_the_store_for_tensorboard(prepared: str, run_name: str, store: ObjectStore, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    finish(make_run(prepared, run_name), (3, "step"))
    for info in store.list(f"runs/{run_name}/tensorboard/"):
        (tmp_path / info.key.rsplit("/", 1)[1]).write_bytes(store.get(info.key))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("loss")}
    assert sorted(losses) == list(range(1, 9))
    assert all(math.isfinite(value) for value in losses.values())


def test_all_checkpoints_damaged_means_from_the_start(prepared: str, run_name: str, store: ObjectStore) -> None:
    spec = make_run(prepared, run_name)
    with pytest.raises(Killed):
        train_here(spec, killer(5))
    for info in list(store.list(f"runs/{run_name}/checkpoints/")):
        store.delete(info.key)
    assert bits(finish(spec)) == bits(finish(make_run(prepared, f"{run_name}-b")))


def test_a_dataset_of_another_tokenizer_is_refused(prepared: str, run_name: str, tmp_path: Path) -> None:
    """Its tokens would fit the model, and mean something else to it."""
    other = tmp_path / "other"
    other.mkdir()
    publish_base(prepared, prepare_dataset(prepared, other, f"{run_name}-data", letters="m-z"), tmp_path, seed=9, name=f"{run_name}-base")
    with pytest.raises(ModelError, match=r"another tokenizer than the model's own .*tokenizer: \{of: MODEL\}"):
        train_here(make_run(prepared, run_name, model={"base": f"{run_name}-base", "lora": {}}))
