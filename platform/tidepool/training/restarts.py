"""Whether a run whose workers failed is started again. Pure: from the failures so far to a decision.

- An error that says what a person must do ends the run at once with that error: starting again would only repeat it.
- A damaged checkpoint does not: the next incarnation falls back to the commit before.
- The same exception at the same step, twice in a row, is a bug and not bad luck: it ends the run with its traceback.
- Anything else (a dead process, a lost node) is met by a restart, up to a number without a new commit in between. Where Ray
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
    """How one incarnation ended: started from `base_step`, reached `step`, and was ended by `error` with `detail` (a traceback)."""

    base_step: int
    step: int
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
    if len(failures) > 1 and _same(last, failures[-2]) and not last.hint:
        return RunError(f"The workers failed twice in the same way at step {last.step + 1}; this is a bug, not bad luck:\n{last.detail}")
    since_commit = list(takewhile(lambda failure: failure.base_step == last.base_step, reversed(failures)))
    if len(since_commit) > max_restarts:
        return WorkerLostError(
            f"Workers failed {len(since_commit)} times after the checkpoint of step {last.base_step}, the last time with: {last.summary}. "
            f"{last.hint}What was committed is safe. Look at the nodes (the Ray dashboard shows why workers died), then submit the run "
            "again."
        )
    return None


def _same(one: Failure, other: Failure) -> bool:
    return one.step == other.step and type(one.error) is type(other.error) and str(one.error) == str(other.error)
