"""One worker's part of a run, from its task to its result: loads, joins quorums, takes the state, trains, publishes. Knows no Ray.

    runs/<run>/spec.json       what is being run (see `pins`)
    runs/<run>/result.json     put last: the run is finished when this exists

Everything is loaded before the worker waits for its first quorum, so that those who train do not wait for it. Which worker
it is, on which device, how it meets its peers and who listens to its metrics are handed in.
"""

import logging
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tidepool.checkpoint import Checkpoints, Commit, Incarnation, StoredObject
from tidepool.data import Dataset, DatasetInfo, fetch_tokenizer, find_dataset
from tidepool.errors import ObjectExistsError, SupersededError
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
from tidepool.training.commits import BackgroundCommits, Taken
from tidepool.training.group import QuorumLost
from tidepool.training.loop import Ending, StepLoop
from tidepool.training.member import Membership
from tidepool.training.membership import Quorum
from tidepool.training.memory import Demand, advise, loading_advice, model_size, told_of_memory
from tidepool.training.numerics import fingerprint, prepare_process, resolve_dtype
from tidepool.training.outcome import Outcome, result_key
from tidepool.training.pins import base_source, check_worker, write_document
from tidepool.training.publications import Publications
from tidepool.training.state import tensors_digest
from tidepool.training.task import Task

_logger = logging.getLogger(__name__)
_CACHE_BYTES = 2**30
Account = Callable[[], Mapping[str, Any]]
Announce = Callable[[str], None]


def run_task(
    task: Task,
    member: Membership,
    device: torch.device,
    sinks: list[Sink],
    account: Account = lambda: {},
    announce: Announce = lambda _: None,
) -> Outcome | None:
    """Do the work of one worker; None if it was released before the run ended. Raises any of Tidepool's errors.

    `account` gives what is known of where the run's time went, for its result; `announce` tells of a name that was published.
    """
    spec, who = task.spec, f"A worker of run {task.spec.run}"
    member.tick("load")
    prepare_process(device, spec.workers.threads_per_worker)
    store = open_store(spec.store)
    numerics = fingerprint(spec, device)
    write_document(spec, task.pins, store, numerics)
    check_worker(spec, task.pins, store, numerics)
    writer = f"{task.session:08d}-{member.worker.group:06d}.{member.worker.rank:04d}"
    tensorboard = TensorBoardSink(store.put_if_absent, f"runs/{spec.run}/tensorboard/", writer)
    # A run that fails flushes what it has measured on the way out: the last steps tell why.
    with (
        local_disk(Path(tempfile.gettempdir()), "set TMPDIR on the nodes to a folder on a larger disk"),
        ScratchFolder("worker") as folder,
        closing(tensorboard),
    ):
        sink = FanOut([LogSink(), tensorboard, *sinks])
        part = _Part(task, store, Path(folder), device, member, sink, account, announce)
        with told_of_memory(who, device, lambda _: loading_advice(spec)):
            part.load()
        with closing(part), told_of_memory(who, device, lambda capacity: _step_advice(spec, part.parts, capacity)):
            return part.take_part()


class _Part:
    """A worker between its first quorum and its last."""

    def __init__(
        self,
        task: Task,
        store: ObjectStore,
        folder: Path,
        device: torch.device,
        member: Membership,
        sink: Sink,
        account: Account,
        announce: Announce,
    ) -> None:
        self._task, self._store, self._folder, self._device = task, store, folder, device
        self._member, self._sink, self._account, self._announce = member, sink, account, announce
        self._publications = Publications(self._publish)
        self._commits = BackgroundCommits(task.spec.checkpoint.max_lag_s, self._commit, member.committed_step)
        self._num_loads = 0

    def load(self) -> None:
        """Build everything that a step needs; the state is the initial one."""
        self._num_loads += 1
        folder = self._folder / f"load-{self._num_loads}"
        folder.mkdir()
        self.parts = _build_parts(self._task, self._store, folder, self._device)
        self._loop = self._build_loop()

    def close(self) -> None:
        """End the threads that read ahead and write behind."""
        self._loop.close()
        self._commits.close()
        self._publications.close()

    def take_part(self) -> Outcome | None:
        """Take steps in one quorum after the other, until the run ends or this worker is released."""
        self._loop.warm_up()
        while (quorum := self._member.wait_for_quorum()) is not None:
            try:
                outcome = self._take_steps(quorum)
            except QuorumLost as lost:
                _logger.info("worker %s leaves quorum %s at step %d: %s", self._member.worker, quorum.number, self._loop.step, lost)
                self._member.note_lost(str(lost))
                continue
            if outcome is not None:
                return outcome
        return None

    def _take_steps(self, quorum: Quorum) -> Outcome | None:
        base = Commit.parse(quorum.base) if quorum.base else None
        checkpoints = Checkpoints(self._store, self._task.spec.run, Incarnation(quorum.incarnation, base))
        self._commits.enter(quorum, checkpoints)
        self._loop.read_ahead(quorum.step, quorum.workers.index(self._member.worker), len(quorum.workers))
        group = self._member.connect(quorum, quorum.workers, "steps")
        self._take_state(quorum, base, checkpoints)
        try:
            ending = self._loop.run(group)
        except SupersededError:
            self._member.check_anew()  # a worker that was put out of its quorum waits for the next; any other is told of another driver
            raise
        if ending is Ending.CHANGE:
            return None
        if ending is Ending.STOPPED:
            return Outcome(False, self._loop.step, None)
        self._member.tick("finish")
        result = self._finish() if group.rank == 0 else None
        self._member.tick("exchange")
        group.all_reduce(torch.zeros(1, device=self._device))  # whoever is left of the quorum finishes what rank 0 began
        return Outcome(True, self._loop.step, result)

    def _take_state(self, quorum: Quorum, base: Commit | None, checkpoints: Checkpoints) -> None:
        """Be where the quorum starts: by what is held, from a peer, from the store, or from the beginning."""
        worker = self._member.worker
        if quorum.from_base and base is None:
            if not self._loop.is_initial:
                self._loop.close()
                self._member.tick("load")
                self.load()
            self._loop.begin()
            return
        assert quorum.source is not None
        if quorum.from_base and worker == quorum.source:
            assert base is not None
            self._member.tick("restore")
            parts = {name: checkpoints.restore(base, name) for name in ("model", "optimizer", "history")}
            self._loop.restore(base.step, parts)
        sharing = sorted({quorum.source, *quorum.behind})
        if worker in sharing and len(sharing) > 1:
            self._member.tick("transfer")
            group = self._member.connect(quorum, sharing, "state")
            self._loop.share(sharing.index(quorum.source), group)
        assert self._loop.is_whole
        assert self._loop.step == quorum.step, (self._loop.step, quorum)

    def _build_loop(self) -> StepLoop:
        task, info = self._task, self.parts.info
        cached = _num_row_groups_cached(info)
        return StepLoop(
            spec=task.spec,
            model=self.parts.model,
            train=Dataset(self._store, info, "train", cached),
            held_out=Dataset(self._store, info, "held_out", cached),
            dtype=resolve_dtype(task.spec.training.precision, self._device),
            sink=self._sink,
            watch=self._member,
            commits=self._commits,
            publish=self._publish_now,
        )

    def _publish_now(self) -> None:
        """Export the state, and have it published while training goes on."""
        self._publications.take(self._loop.step, lambda folder: _export(self._task, self.parts, folder), _metrics(self._loop))

    def _publish(self, step: int, folder: Path, metrics: Mapping[str, float]) -> None:
        """In the thread that publishes."""
        version = _publish(self._task, self.parts, step, metrics, self._store, folder)
        _logger.info("published step %d of run %s as %s", step, self._task.spec.run, version.ref)
        self._announce(version.name)

    def _commit(self, taken: Taken, commit: Commit, objects: list[StoredObject]) -> None:
        """In the thread that commits: what `Finish` asks."""
        task = self._task
        taken.record.store(self._store, task.spec.run)
        details = {"dataset": task.pins.dataset, "base": task.pins.base, "spec_digest": task.spec.digest, "account": dict(self._account())}
        taken.checkpoints.commit(commit, objects, details)
        self._member.note_commit(commit.incarnation, commit.step)
        _logger.info("committed step %d of run %s as %s", commit.step, task.spec.run, commit.name)
        taken.checkpoints.retain(task.spec.checkpoint.keep)
        self._sink.flush()

    def _finish(self) -> dict[str, Any]:
        self._publications.settle()  # the last version is the newest
        with ScratchFolder("export") as folder:
            result = _finish(self._task, self.parts, self._loop, self._store, Path(folder) / "export", self._account())
        if self._task.spec.publish is not None:
            self._announce(self._task.spec.publish.model)
        return result


def _step_advice(spec: RunSpec, parts: "_Parts", capacity_bytes: int) -> str:
    training = spec.training
    dtype = resolve_dtype(training.precision, next(parts.model.parameters()).device)
    demand = Demand(training.micro_batch_size, training.gradient_checkpointing, parts.info.sequence_length)
    advice = advise(model_size(parts.model, dtype), demand, training, capacity_bytes)
    return f"{advice}. What decides the result needs another `run` name to be changed; what was committed under this one is safe"


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


def _finish(task: Task, parts: _Parts, loop: StepLoop, store: ObjectStore, folder: Path, account: Mapping[str, Any]) -> dict[str, Any]:
    spec, state = task.spec, loop.state()
    version = None
    if spec.publish:
        _export(task, parts, folder)
        version = _publish(task, parts, loop.step, _metrics(loop), store, folder)
    evaluations = loop.history.evaluations
    result = {
        "run": spec.run,
        "steps": loop.step,
        "samples": loop.step * spec.training.global_batch_size,
        "first_loss": loop.history.losses[0],
        "last_loss": loop.history.losses[-1],
        "held_out_loss_before": evaluations[0][1],
        "held_out_loss_after": evaluations[-1][1],
        "weights_sha256": tensors_digest(state["model"]),
        "optimizer_sha256": tensors_digest(state["optimizer"]),
        "history_sha256": tensors_digest(state["history"]),
        "published": version.ref if version else None,
        **account,
    }
    try:
        put_json(store, result_key(spec.run), result)
    except ObjectExistsError:
        return get_json(store, result_key(spec.run))  # a worker before this one wrote it and died before it could say so
    return result


def _export(task: Task, parts: _Parts, folder: Path) -> None:
    if task.spec.model.lora:
        assert parts.base is not None
        export_adapter(parts.model, parts.tokenizer, folder, parts.base)
    else:
        export_model(parts.model, parts.tokenizer, folder)


def _metrics(loop: StepLoop) -> dict[str, float]:
    return {"loss": loop.history.losses[-1], "held_out_loss": loop.history.evaluations[-1][1]}


def _publish(task: Task, parts: _Parts, step: int, metrics: Mapping[str, float], store: ObjectStore, folder: Path) -> ModelVersion:
    """Publish an export; its alias moves if it passes the gate."""
    spec, base = task.spec, parts.base
    assert spec.publish is not None
    gate, loss = spec.publish.max_held_out_loss, metrics["held_out_loss"]
    is_passing = gate is None or loss <= gate
    version = Registry(store).publish(
        spec.publish.model,
        "adapter" if spec.model.lora else "full",
        folder,
        base=base.ref if base else None,
        base_digest=base.digest if base else None,
        lineage={"run": spec.run, "step": step, "dataset": task.pins.dataset, "spec_digest": spec.digest},
        metrics=metrics,
        alias=spec.publish.alias if is_passing else None,
    )
    if not is_passing:
        _logger.warning("%s is published and no alias moves: its held-out loss is %.4g, and %.4g is the most", version.ref, loss, gate)
    return version
