"""One worker's part of a run, from its task to its result: builds the parts, restores, trains, publishes. Knows no Ray.

    runs/<run>/spec.json       what is being run (see `pins`)
    runs/<run>/result.json     put last: the run is finished when this exists

Which worker it is, on which device, and who listens to its metrics are handed in.
"""

import logging
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tidepool.checkpoint import Checkpoints, Incarnation
from tidepool.data import Dataset, DatasetInfo, fetch_tokenizer, find_dataset
from tidepool.errors import ObjectExistsError, ObjectNotFoundError
from tidepool.models import (
    ModelSource,
    add_lora,
    build_model,
    cache_folder,
    check_same_tokens,
    check_tokenizer,
    export_adapter,
    export_model,
    fetch_model,
    load_model,
    load_tokenizer,
)
from tidepool.registry import ModelVersion, Registry
from tidepool.scratch import ScratchFolder
from tidepool.specs import RunSpec
from tidepool.storage import ObjectStore, get_json, local_disk, open_store, put_json
from tidepool.telemetry import FanOut, LogSink, Sink, TensorBoardSink
from tidepool.training.group import Group
from tidepool.training.loop import Beat, StepLoop
from tidepool.training.memory import Demand, advise, loading_advice, model_size, told_of_memory
from tidepool.training.numerics import fingerprint, prepare_process, resolve_dtype
from tidepool.training.outcome import Outcome
from tidepool.training.pins import Pins, base_source, check_worker, write_document
from tidepool.training.state import Tensors, tensors_digest

_logger = logging.getLogger(__name__)
_CACHE_BYTES = 2**30


@dataclass(frozen=True)
class Task:
    """What a worker has to do: continue `spec` as `incarnation`, with its names meaning `pins`."""

    spec: RunSpec
    pins: Pins
    incarnation: Incarnation


def run_task(task: Task, group: Group, device: torch.device, sinks: list[Sink], beat: Beat) -> Outcome:
    """Do the work of one worker. Raises any of Tidepool's errors; a lost peer raises `RuntimeError`."""
    spec, who = task.spec, f"A worker of run {task.spec.run}"
    beat(0, "load")
    prepare_process(device, spec.workers.threads_per_worker)
    store = open_store(spec.store)
    _settle(task, store, group, device)
    tensorboard = TensorBoardSink(store.put_if_absent, f"runs/{spec.run}/tensorboard/", task.incarnation.number)
    # A run that fails flushes what it has measured on the way out: the last steps tell why.
    with (
        local_disk(Path(tempfile.gettempdir()), "set TMPDIR on the nodes to a folder on a larger disk"),
        ScratchFolder("worker") as folder,
        closing(tensorboard),
    ):
        with told_of_memory(who, device, lambda _: loading_advice(spec)):
            parts = _build_parts(task, store, Path(folder), device)
        with told_of_memory(who, device, lambda capacity: _step_advice(spec, parts, capacity)):
            loop = _build_loop(task, parts, store, group, FanOut([LogSink(), tensorboard, *sinks]), beat)
            finished = loop.run()
        if not finished:
            return Outcome(False, loop.step, None)
        result = _finish(task, parts, loop, store, Path(folder)) if group.rank == 0 else None
    return Outcome(True, loop.step, result)


def _step_advice(spec: RunSpec, parts: "_Parts", capacity_bytes: int) -> str:
    training = spec.training
    dtype = resolve_dtype(training.precision, next(parts.model.parameters()).device)
    demand = Demand(training.micro_batch_size, training.gradient_checkpointing, parts.info.sequence_length)
    advice = advise(model_size(parts.model, dtype), demand, training, capacity_bytes)
    return f"{advice}. What decides the result needs another `run` name to be changed; what was committed under this one is safe"


def _settle(task: Task, store: ObjectStore, group: Group, device: torch.device) -> None:
    """Make sure that the run has its document and that this worker fits it."""
    numerics = fingerprint(task.spec, device)
    if group.rank == 0:
        write_document(task.spec, task.pins, store, numerics)
    group.all_reduce(torch.zeros(1, device=device))
    check_worker(task.spec, task.pins, store, numerics)


@dataclass(frozen=True)
class _Parts:
    info: DatasetInfo
    tokenizer: PreTrainedTokenizerBase
    base: ModelSource | None
    model: PreTrainedModel


def _build_parts(task: Task, store: ObjectStore, folder: Path, device: torch.device) -> _Parts:
    spec = task.spec
    info = find_dataset(store, task.pins.dataset)
    tokenizer = load_tokenizer(fetch_tokenizer(store, info, folder))
    base = base_source(task.pins, store)
    if base is None:
        assert spec.model.config is not None
        model = build_model(spec.model.config, len(tokenizer), spec.seed, tokenizer)
    else:
        frozen = resolve_dtype(spec.training.precision, device) if spec.model.lora else torch.float32
        base_folder = fetch_model(base, store, cache_folder())
        check_same_tokens(load_tokenizer(base_folder), tokenizer)
        model = load_model(base_folder, frozen)
        check_tokenizer(model, tokenizer)
        if spec.model.lora:
            model = add_lora(model, spec.model.lora, spec.seed, base.ref)
    if spec.training.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return _Parts(info, tokenizer, base, model.to(device))


def _build_loop(task: Task, parts: _Parts, store: ObjectStore, group: Group, sink: Sink, beat: Beat) -> StepLoop:
    spec = task.spec
    checkpoints = Checkpoints(store, spec.run, task.incarnation)

    def commit(step: int, state: dict[str, Tensors]) -> None:
        made = checkpoints.save(step, state, {"dataset": task.pins.dataset, "base": task.pins.base, "spec_digest": spec.digest})
        checkpoints.retain(spec.checkpoint.keep)
        _logger.info("committed step %d of run %s as %s", step, spec.run, made.name)

    cached = _num_row_groups_cached(parts.info)
    loop = StepLoop(
        spec=spec,
        model=parts.model,
        train=Dataset(store, parts.info, "train", cached),
        held_out=Dataset(store, parts.info, "held_out", cached),
        group=group,
        dtype=resolve_dtype(spec.training.precision, next(parts.model.parameters()).device),
        sink=sink,
        beat=beat,
        commit=commit,
    )
    if (base := task.incarnation.base) is not None:
        loop.restore(base.step, {name: checkpoints.restore(base, name) for name in ("model", "optimizer", "history")})
    return loop


def _num_row_groups_cached(info: DatasetInfo) -> int:
    """Two windows of the global order, so that the next one can be read ahead while this one is in use; fewer if they are large."""
    window = info.layout("train").window
    fitting = _CACHE_BYTES // info.row_group_bytes
    if fitting < window:
        _logger.warning(
            "row groups of dataset %s take %d MiB each, so that only %d of the %d that are read from at a time are kept: they will be "
            "fetched again and again. Prepare the dataset with fewer samples_per_row_group.",
            *(info.ref, info.row_group_bytes // 2**20, fitting, window),
        )
    return max(1, min(2 * window, fitting))


def _finish(task: Task, parts: _Parts, loop: StepLoop, store: ObjectStore, folder: Path) -> dict[str, Any]:
    spec, state = task.spec, loop.state()
    version = _publish(task, parts, loop, store, folder / "export") if spec.publish else None
    evaluations = loop.history.evaluations
    result = {
        "run": spec.run,
        "steps": loop.step,
        "num_samples": loop.step * spec.training.global_batch_size,
        "first_loss": loop.history.losses[0],
        "last_loss": loop.history.losses[-1],
        "held_out_loss_before": evaluations[0][1],
        "held_out_loss_after": evaluations[-1][1],
        "weights_sha256": tensors_digest(state["model"]),
        "optimizer_sha256": tensors_digest(state["optimizer"]),
        "history_sha256": tensors_digest(state["history"]),
        "published": version.ref if version else None,
    }
    try:
        put_json(store, _result_key(spec.run), result)
    except ObjectExistsError:
        return get_json(store, _result_key(spec.run))  # a worker before this one wrote it and died before it could say so
    return result


def _publish(task: Task, parts: _Parts, loop: StepLoop, store: ObjectStore, folder: Path) -> ModelVersion:
    spec, base = task.spec, parts.base
    assert spec.publish is not None
    if spec.model.lora:
        assert base is not None
        export_adapter(parts.model, parts.tokenizer, folder, base)
    else:
        export_model(parts.model, parts.tokenizer, folder)
    return Registry(store).publish(
        spec.publish.model,
        "adapter" if spec.model.lora else "full",
        folder,
        base=base.ref if base else None,
        base_digest=base.digest if base else None,
        lineage={"run": spec.run, "step": loop.step, "dataset": task.pins.dataset, "spec_digest": spec.digest},
        metrics={"loss": loop.history.losses[-1], "held_out_loss": loop.history.evaluations[-1][1]},
        alias=spec.publish.alias,
    )


def read_result(store: ObjectStore, run: str) -> dict[str, Any] | None:
    """The result of a finished run, None for any other."""
    try:
        return get_json(store, _result_key(run))
    except ObjectNotFoundError:
        return None


def _result_key(run: str) -> str:
    return f"runs/{run}/result.json"
