"""The step loop: one for LoRA and full training, for one worker and many. Knows no Ray.

Invariants:
- After step t the state has the same bits on every worker, for every number of workers and however often the run was
  interrupted, given the spec and the numerics fingerprint (with `reduction: fast`: and the number of workers).
- Every random number of a step is seeded by (seed, step, shard).
- A loss or gradient norm that is not finite is never applied or committed.
- All workers leave at the same step: a wish to stop rides in the step's own exchange.
- Samples are read ahead of the step that needs them; which ones, and in what order, the step numbers alone decide.

What is around it (devices, the store, who restarts it) is handed in.
"""

import hashlib
import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from tidepool.data import Dataset, Samples
from tidepool.errors import NonFiniteError
from tidepool.specs import RunSpec
from tidepool.telemetry import Sink
from tidepool.training.batch import cut_batches, shard_samples
from tidepool.training.evaluation import evaluate
from tidepool.training.group import Group
from tidepool.training.objective import loss_sum, precision
from tidepool.training.optimizer import build_optimizer, clip, learning_rate, set_learning_rate
from tidepool.training.prefetch import Prefetch
from tidepool.training.reduction import REDUCTIONS, GradientBuffers
from tidepool.training.sharding import owned_shards
from tidepool.training.state import History, Tensors, capture, install, trained_parameters

Beat = Callable[[int, str], bool]
"""Tells the outside (completed steps, phase) and returns whether somebody wants the run to stop."""
Commit = Callable[[int, dict[str, Tensors]], None]
"""Makes the state after a number of steps outlive this process. Called on the worker of rank 0 alone."""


@dataclass
class StepLoop:
    """Trains `model` on `dataset`; the parts are kept as they were handed in, the state is the model's and the optimizer's."""

    spec: RunSpec
    model: PreTrainedModel
    train: Dataset
    held_out: Dataset
    group: Group
    dtype: torch.dtype
    sink: Sink
    beat: Beat
    commit: Commit
    step: int = 0
    history: History = field(default_factory=History)

    def __post_init__(self) -> None:
        self._device = next(self.model.parameters()).device
        self._parameters = trained_parameters(self.model)
        self._optimizer = build_optimizer(self._parameters, self.spec.training.optimizer)
        self._buffers = GradientBuffers(self._parameters, self.group.size)
        self._data = Prefetch(self._read, self.spec.training.shard_size * self.train.sample_bytes)
        self._committed_step: int | None = None

    def restore(self, step: int, state: dict[str, Tensors]) -> None:
        """Go on from a state that was committed after `step` steps."""
        self.history = install(self._parameters, self._optimizer, state)
        self.step = self._committed_step = step

    def state(self) -> dict[str, Tensors]:
        """The state after `step` steps (at least one), see `state`."""
        return capture(self._parameters, self._optimizer, self.history)

    def run(self) -> bool:
        """Take the steps that are left; returns False if somebody asked to stop first. The last state is committed."""
        training = self.spec.training
        self.model.train()
        with closing(self._data):
            self._data.plan(range(self.step, training.steps), owned_shards(self.group.rank, self.group.size, training.num_shards))
            self._take_steps()
        return self.step == training.steps

    def _take_steps(self) -> None:
        training = self.spec.training
        if not self.history.evaluations:
            self._evaluate()
        stopping = False
        while self.step < training.steps and not stopping:
            stopping = self._step()
            if self.step % training.evaluate_every_steps == 0 or self.step == training.steps:
                self._evaluate()
            if self.step % self.spec.checkpoint.every_steps == 0 or self.step == training.steps or stopping:
                self._commit()

    def _step(self) -> bool:
        """One optimizer step; returns whether somebody wants the run to stop after it."""
        started, waited_s = time.monotonic(), self._data.waited_s
        stop = self.beat(self.step, "step")
        spec = self.spec.training
        stats_S2 = torch.zeros(spec.num_shards + 1, 2, dtype=torch.float64, device=self._device)
        stats_S2[-1, 0] = float(stop)
        reduce, adds_once = REDUCTIONS[spec.reduction], spec.micro_batch_size == spec.shard_size
        gradient = reduce(lambda shard: self._compute(shard, stats_S2), spec.num_shards, self._buffers, self.group, adds_once)
        stats_S2[-1, 1] = self._data.waited_s - waited_s
        self.group.all_reduce(stats_S2)
        stats = stats_S2.cpu()
        total, num_targets = stats[:-1].cumsum(0)[-1].tolist()
        loss = total / num_targets if num_targets else math.nan
        # Without the padding, whose length depends on the number of workers: a sum's bits depend on its length.
        norm = clip(gradient.div_(num_targets)[: self._buffers.num_elements], spec.optimizer.clip_norm)
        self._check_finite(loss, norm, stats[:-1, 0])
        rate = learning_rate(self.step, spec.steps, spec.optimizer)
        set_learning_rate(self._optimizer, rate)
        self._buffers.point(gradient)
        self._optimizer.step()
        self._buffers.give_back(gradient)
        self.step += 1
        self.history.losses.append(loss)
        self.history.gradient_norms.append(norm)
        elapsed_s = time.monotonic() - started
        values = {
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": rate,
            "step_time_s": elapsed_s,
            "data_wait_s": float(stats[-1, 1]) / self.group.size,
            "targets_per_s": num_targets / elapsed_s,
        }
        self._record(values)
        return bool(stats[-1, 0] > 0)

    def _compute(self, shard: int, stats_S2: torch.Tensor) -> None:
        """Add the gradient of one shard's summed loss to the parameters' `.grad`, and note the sum and its targets."""
        training = self.spec.training
        torch.manual_seed(derived_seed(self.spec.seed, self.step, shard))
        for batch in cut_batches(self._data.take(self.step, shard), training.micro_batch_size, self._device):
            with precision(self.dtype, self._device):
                loss = loss_sum(self.model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            stats_S2[shard, 0] += loss.detach().double()
            stats_S2[shard, 1] += batch.targets_NT.sum()

    def _read(self, step: int, shard: int) -> Samples:
        return self.train.read(shard_samples(step, shard, self.spec.training, self.spec.seed, self.train.layout))

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

    def _evaluate(self) -> None:
        self.beat(self.step, "evaluate")
        spec = self.spec.training
        loss = evaluate(self.model, self.held_out, spec.evaluate_num_samples, spec.micro_batch_size, self.dtype, self.group)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"Run {self.spec.run} stopped: its held-out loss after step {self.step} is {loss}. Lower the learning rate."
            )
        self.history.evaluations.append((self.step, loss))
        self._record({"held_out_loss": loss})

    def _commit(self) -> None:
        if self.step == self._committed_step:
            return
        self.beat(self.step, "commit")
        if self.group.rank == 0:
            self.commit(self.step, self.state())
            self.sink.flush()
        self._committed_step = self.step

    def _record(self, values: dict[str, float]) -> None:
        if self.group.rank == 0:
            self.sink.record(self.step, values)


def derived_seed(seed: int, step: int, shard: int) -> int:
    """A seed of 63 bits for everything random in one shard of one step."""
    digest = hashlib.blake2b(f"{seed} {step} {shard}".encode(), digest_size=8, person=b"tidepool.step").digest()
    return int.from_bytes(digest, "big") >> 1
