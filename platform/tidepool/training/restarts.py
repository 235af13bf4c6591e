"""Whether a run goes on after replica groups failed. Pure: from the failures so far to a decision.

- An error that says what a person must do ends the run at once with that error: starting again would only repeat it.
- A damaged checkpoint does not: the next incarnation falls back to the commit before.
- The same exception at the same step, twice in a row, is a bug and not bad luck: it ends the run with its traceback.
- Anything else (a dead process, a lost node) is met by another group, up to a number without a new step in between. Where Ray
  tells that a process was killed for its memory, or may have been, so does the message.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from tidepool.errors import CorruptCheckpointError, RunError, TidepoolError, WorkerLostError

_KILLED_BY_RAY = ("running low on memory", "OutOfMemoryError")
_KILLED_BY_KERNEL = "killed by the OOM killer"
"""What Ray 2.60 says of a worker that its memory monitor killed, and of one that went without a word."""


@dataclass(frozen=True)
class Failure:
    """How a replica group ended: it held the state after `step` steps in quorum `attempt`; `detail` is a traceback."""

    step: int
    attempt: str
    error: Exception
    detail: str

    @property
    def summary(self) -> str:
        """The last line that says something."""
        lines = [line.strip() for line in str(self.error).splitlines() if line.strip()]
        return f"{type(self.error).__name__}: {lines[-1] if lines else ''}"

    @property
    def hint(self) -> str:
        """What a person can do about a process that was killed for its memory, nothing for any other failure."""
        text = f"{self.error}\n{self.detail}"
        advice = "Lower training.micro_batch_size or set training.gradient_checkpointing (under another `run` name), or put fewer workers "
        advice += "on a node (raise workers.cpus_per_worker). "
        if any(words in text for words in _KILLED_BY_RAY):
            return f"Ray killed a worker because its node ran low on memory. {advice}"
        if _KILLED_BY_KERNEL in text:
            return f"A process was killed from outside; often that is the kernel, for its memory (`dmesg` on the node says so). {advice}"
        return ""


def give_up(failures: Sequence[Failure], max_restarts: int) -> TidepoolError | None:
    """The error to end the run with after the last of `failures`, None to start it again."""
    last = failures[-1]
    if isinstance(last.error, TidepoolError) and not isinstance(last.error, CorruptCheckpointError):
        return last.error
    since_step = list(takewhile(lambda failure: failure.step == last.step, reversed(failures)))
    if not last.hint and any(_same(last, earlier) for earlier in since_step[1:]):
        return RunError(f"The workers failed twice in the same way at step {last.step + 1}; this is a bug, not bad luck:\n{last.detail}")
    num_attempts = len({failure.attempt for failure in since_step})
    if num_attempts > max_restarts:
        return WorkerLostError(
            f"Workers failed {num_attempts} times after step {last.step}, the last time with: {last.summary}. "
            f"{last.hint}What was committed is safe. Look at the nodes (the Ray dashboard shows why workers died), then submit the run "
            "again."
        )
    return None


def _same(one: Failure, other: Failure) -> bool:
    """The same exception at the same step, and not of two groups that tried it together."""
    is_same_error = type(one.error) is type(other.error) and str(one.error) == str(other.error)
    return one.step == other.step and one.attempt != other.attempt and is_same_error
