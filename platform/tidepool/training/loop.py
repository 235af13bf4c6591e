"""The step loop: one for LoRA and full training, for one worker and many. Knows no Ray.

Invariants:
- After step t the state has the same bits on every worker, for every number of workers and however often the run was
  interrupted, given the spec and the numerics fingerprint (with `reduction: fast`: and the number of workers).
- Every random number of a step is seeded by (seed, step, shard).
- A loss or gradient norm that is not finite is never applied or committed.
- All workers leave a quorum at the same step: the wishes to stop and to change it ride in the step's own exchange.
- A step that is interrupted changes nothing, unless the optimizer was at work; then the state is torn, and says so.
- What is due at a step boundary (an evaluation, a commit) follows from the state alone, so that whoever comes next does it.
- Samples are read ahead of the step that needs them; which ones, and in what order, the step numbers alone decide.

What is around it (devices, the store, peers, who restarts it) is handed in.
"""

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum

import torch
from transformers import PreTrainedModel

from tidepool.data import Dataset, Samples
from tidepool.errors import NonFiniteError
from tidepool.models import use_given_masks
from tidepool.specs import RunSpec
from tidepool.telemetry import Sink
from tidepool.training.batch import cut_batches, shard_samples
from tidepool.training.commits import Commits
from tidepool.training.evaluation import evaluate
from tidepool.training.group import Group
from tidepool.training.objective import loss_sum, precision
from tidepool.training.optimizer import build_optimizer, gradient_norm, learning_rate, scale, set_learning_rate
from tidepool.training.prefetch import Prefetch
from tidepool.training.reduction import REDUCTIONS
from tidepool.training.sample_record import SampleRecord, samples_digest
from tidepool.training.shard_clock import ShardClock
from tidepool.training.sharding import owned_shards
from tidepool.training.state import History, Tensors, capture, install, prepare_moments, trained_parameters
from tidepool.training.transfer import share_numbers, share_tensors
from tidepool.training.watch import Watch, Wishes


class Ending(Enum):
    """Why the loop gave the quorum back."""

    FINISHED = "finished"
    STOPPED = "stopped"
    CHANGE = "change"


@dataclass(frozen=True)
class _Said:
    """What the members of a group said in a step's exchange, so that all of them know the same at its end."""

    wishes: Wishes
    is_busy: bool
    """Somebody has no room for another snapshot."""
    newest_step: int
    """The newest step that is committed or on its way, as rank 0 knows."""
    data_wait_s: float

    @classmethod
    def parse(cls, sums_6: torch.Tensor) -> "_Said":
        stop, change, commit, busy, newest, wait_s = sums_6.tolist()
        return cls(Wishes(stop > 0, change > 0, commit > 0), busy > 0, int(newest), wait_s)


@dataclass
class StepLoop:
    """Trains `model` on `dataset`; the parts are kept as they were handed in, the state is the model's and the optimizer's."""

    spec: RunSpec
    model: PreTrainedModel
    train: Dataset
    held_out: Dataset
    dtype: torch.dtype
    sink: Sink
    watch: Watch
    commits: Commits
    publish: Callable[[], None] = lambda: None
    """Publishes the state; called by rank 0 where the spec asks for it, before the end."""
    step: int = 0
    history: History = field(default_factory=History)
    is_whole: bool = False
    """The state is that after `step` steps; not while it is being changed, nor before it was given its first."""

    def __post_init__(self) -> None:
        use_given_masks(self.model)
        self.device = next(self.model.parameters()).device
        self._parameters = trained_parameters(self.model)
        self._optimizer = build_optimizer(self._parameters, self.spec.training.optimizer)
        prepare_moments(self._parameters, self._optimizer)
        self._data = Prefetch(self._read, self.spec.training.shard_size * self.train.sample_bytes)
        self.record = SampleRecord()
        self._clock = ShardClock(self.device)
        self.is_initial = True
        """Nothing has changed the state since the model was built."""

    def warm_up(self) -> None:
        """Compute what is thrown away, so that the first step with others takes no longer than any: they would wait for it."""
        self.watch.tick("load")
        self.model.train()
        samples = self.train.read(range(min(self.spec.training.micro_batch_size, len(self.train))))
        for batch in cut_batches(samples, self.spec.training.micro_batch_size, self.device):
            with precision(self.dtype, self.device):
                loss = loss_sum(self.model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
        self.model.zero_grad(set_to_none=True)

    # --- State --------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Take the initial state as that after 0 steps."""
        assert self.is_initial
        self._is_now_whole()

    def restore(self, step: int, state: dict[str, Tensors]) -> None:
        """Go on from a state that was committed after `step` steps."""
        self._is_now_torn()
        self.history = install(self._parameters, self._optimizer, state)
        self.step, self.record = step, SampleRecord()
        self._is_now_whole()

    def share(self, source: int, group: Group) -> None:
        """Give the state of the group's rank `source` to all its members. Raises `QuorumLost`; a receiver is torn then."""
        is_source = group.rank == source
        if not is_source:
            self._is_now_torn()
        numbers = {**self.history.to_numbers(), **self.record.to_numbers(), "step": [float(self.step)]} if is_source else None
        received = share_numbers(numbers, source, group, self.device)
        state = capture(self._parameters, self._optimizer, self.history)
        share_tensors([*state["model"].values(), *state["optimizer"].values()], source, group, self.device)
        if not is_source:
            self.history, self.record = History.from_numbers(received), SampleRecord.from_numbers(received)
            self.step = int(received["step"][0])
            self._is_now_whole()

    def state(self) -> dict[str, Tensors]:
        """The state after `step` steps, see `state`."""
        return capture(self._parameters, self._optimizer, self.history)

    def _is_now_torn(self) -> None:
        self.commits.settle()
        self.is_whole = self.is_initial = False
        self.watch.holds(None, "")

    def _is_now_whole(self, shard_s: float = 0.0) -> None:
        self.is_whole = True
        losses, norms = self.history.losses, self.history.gradient_norms
        self.watch.holds(self.step, f"{losses[-1].hex()} {norms[-1].hex()}" if losses else "", shard_s)

    # --- Steps --------------------------------------------------------------------------------------------------------

    def run(self, group: Group) -> Ending:
        """Take steps with `group`; the last state is committed unless the quorum is only to change. Raises `QuorumLost`."""
        assert self.is_whole
        self.model.train()
        self.read_ahead(self.step, group.rank, group.size)
        said = self._agree(group)
        # A quorum takes a step before it changes, or it might never take one; but not when all of it only commits and goes.
        said = replace(said, wishes=Wishes(said.wishes.stop, change=said.wishes.commit, commit=said.wishes.commit))
        while True:
            if self._is_evaluation_due():
                self._evaluate(group)
            if group.rank == 0 and self._is_publication_due():
                self.watch.tick("commit")
                self.publish()
            ending = self._ending(said.wishes)
            is_last = ending is not None and (ending is not Ending.CHANGE or said.wishes.commit)
            self._commit_if_due(group, said, is_last)
            if is_last:
                self._meet(group)  # nobody leaves before the commit stands
            if ending is not None:
                return ending
            said = self._step(group)

    def read_ahead(self, step: int, rank: int, size: int) -> None:
        """Begin to read what rank `rank` of `size` needs from `step` on; `run` does it, too, and what was read by then is there."""
        training = self.spec.training
        self._data.plan(range(step, training.steps), owned_shards(rank, size, training.num_shards))

    def _ending(self, wishes: Wishes) -> Ending | None:
        if self.step == self.spec.training.steps:
            return Ending.FINISHED
        return Ending.STOPPED if wishes.stop else Ending.CHANGE if wishes.change else None

    def close(self) -> None:
        """End the threads that read ahead."""
        self._data.close()

    def _step(self, group: Group) -> _Said:
        """One optimizer step; returns what the members said in it."""
        started, waited_s = time.monotonic(), self._data.waited_s
        spec = self.spec.training
        stats_S3 = torch.zeros(spec.num_shards + 2, 3, dtype=torch.float64, device=self.device)
        mine_6 = self._said(group)
        reduce, adds_once = REDUCTIONS[spec.reduction], spec.micro_batch_size == spec.shard_size
        parameters = list(self._parameters.values())
        gradients = reduce(lambda shard: self._compute(shard, stats_S3), spec.num_shards, parameters, group, adds_once, self.watch.tick)
        norm_of_sum = gradient_norm(gradients)  # before anything waits for the device
        mine_6[-1] = self._data.waited_s - waited_s
        stats_S3[-2:] = mine_6.view(2, 3)
        group.all_reduce(stats_S3)
        stats = stats_S3.cpu()
        said = _Said.parse(stats[-2:].flatten())
        stats = stats[:-2]
        total, num_targets, _ = stats.cumsum(0)[-1].tolist()
        loss, norm = (total / num_targets, float(norm_of_sum) / num_targets) if num_targets else (math.nan, math.nan)
        self._check_finite(loss, norm, stats[:, 0])
        rate = learning_rate(self.step, spec.steps, spec.optimizer)
        scale(gradients, 1 / num_targets, norm, spec.optimizer.clip_norm)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.watch.tick("step")
        self.watch.check()
        self._apply(loss, norm, rate, stats[:, 2])
        self._optimizer.zero_grad()
        elapsed_s = time.monotonic() - started
        values = {
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": rate,
            "step_time_s": elapsed_s,
            "data_wait_s": said.data_wait_s / group.size,
            "targets_per_s": num_targets / elapsed_s,
        }
        self._record(values, group)
        return said

    def _agree(self, group: Group) -> _Said:
        """What the members say before the first step."""
        said_6 = self._said(group).to(self.device)
        self.watch.tick("exchange")
        group.all_reduce(said_6)
        return _Said.parse(said_6.cpu())

    def _said(self, group: Group) -> torch.Tensor:
        """This member's part of what `_Said` is the sum of, float64."""
        wishes = self.watch.wishes()
        newest = self.commits.newest_step() if group.rank == 0 else 0
        return torch.tensor([wishes.stop, wishes.change, wishes.commit, self.commits.is_busy, newest, 0], dtype=torch.float64)

    def _apply(self, loss: float, norm: float, rate: float, digests_S: torch.Tensor) -> None:
        self._is_now_torn()
        set_learning_rate(self._optimizer, rate)
        self._optimizer.step()
        self.step += 1
        self.history.losses.append(loss)
        self.history.gradient_norms.append(norm)
        self.record.note(self.step, [int(digest) for digest in digests_S.tolist()], self.watch.committed_step())
        self._is_now_whole(self._clock.take())

    def _compute(self, shard: int, stats_S3: torch.Tensor) -> None:
        """Add the gradient of one shard's summed loss to the parameters' `.grad`; note the sum, its targets, and what was read."""
        training = self.spec.training
        self.watch.tick("step")
        self.watch.check()
        _seed(self.device, derived_seed(self.spec.seed, self.step, shard))
        samples, digest = self._data.take(self.step, shard)
        stats_S3[shard, 2] = digest
        with self._clock.measure():
            for batch in cut_batches(samples, training.micro_batch_size, self.device):
                with precision(self.dtype, self.device):
                    loss = loss_sum(self.model, batch)
                loss.backward()  # type: ignore[no-untyped-call]
                stats_S3[shard, 0] += loss.detach().double()
                stats_S3[shard, 1] += batch.targets_NT.sum()

    def _read(self, step: int, shard: int) -> tuple[Samples, int]:
        numbers = shard_samples(step, shard, self.spec.training, self.spec.seed, self.train.layout)
        return self.train.read(numbers), samples_digest(numbers)

    def _check_finite(self, loss: float, norm: float, sums_S: torch.Tensor) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        training = self.spec.training
        shards = [shard for shard, value in enumerate(sums_S.tolist()) if not math.isfinite(value)] or list(range(training.num_shards))
        samples = [n for shard in shards for n in shard_samples(self.step, shard, training, self.spec.seed, self.train.layout)]
        shown = ", ".join(map(str, samples[:16])) + (" ..." if len(samples) > 16 else "")
        raise NonFiniteError(
            f"Run {self.spec.run} stopped at step {self.step + 1}: its loss is {loss} and its gradient norm {norm}. Nothing of this "
            f"step was applied or committed. It read the samples {shown} of {self.spec.dataset}. "
            "Lower the learning rate or look at these samples."
        )

    # --- Step boundaries ----------------------------------------------------------------------------------------------

    def _is_evaluation_due(self) -> bool:
        training, evaluations = self.spec.training, self.history.evaluations
        is_due = self.step % training.evaluate_every_steps == 0 or self.step == training.steps
        return is_due and (not evaluations or evaluations[-1][0] < self.step)

    def _is_publication_due(self) -> bool:
        every = self.spec.publish.every_steps if self.spec.publish else None
        return every is not None and self.step % every == 0 and 0 < self.step < self.spec.training.steps

    def _evaluate(self, group: Group) -> None:
        spec = self.spec.training
        self.watch.tick("evaluate")
        loss = evaluate(self.model, self.held_out, spec.evaluate_num_samples, spec.micro_batch_size, self.dtype, group, self.watch.tick)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"Run {self.spec.run} stopped: its held-out loss after step {self.step} is {loss}. Lower the learning rate."
            )
        self.history.evaluations.append((self.step, loss))
        self._record({"held_out_loss": loss}, group)

    def _commit_if_due(self, group: Group, said: _Said, is_last: bool) -> None:
        """Begin a commit where all agree that one is due. The last one is waited for, and so is one that lags too far behind."""
        every = self.spec.checkpoint.every_steps
        if is_last:
            self.commits.drain(self.watch)
        is_due = self.step > said.newest_step if is_last else self.step // every > said.newest_step // every and not said.is_busy
        if is_due:
            self.watch.tick("commit")
            self.watch.check()
            self.commits.take(self.step, self.state(), SampleRecord(dict(self.record.steps)), group.rank, group.size)
        self.commits.keep_up(self.watch)
        if is_last:
            self.commits.drain(self.watch)

    def _meet(self, group: Group) -> None:
        self.watch.tick("exchange")
        group.all_reduce(torch.zeros(1, device=self.device))

    def _record(self, values: dict[str, float], group: Group) -> None:
        if group.rank == 0:
            self.sink.record(self.step, values)


def derived_seed(seed: int, step: int, shard: int) -> int:
    """A seed of 63 bits for everything random in one shard of one step."""
    digest = hashlib.blake2b(f"{seed} {step} {shard}".encode(), digest_size=8, person=b"tidepool.step").digest()
    return int.from_bytes(digest, "big") >> 1


def _seed(device: torch.device, seed: int) -> None:
    """As `torch.manual_seed`, which formats a traceback for each kind of device that is not there."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
