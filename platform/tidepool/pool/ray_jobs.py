"""The cluster's job service, asked on the head node: where its address is one that only the head can reach, too."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError
from ray.job_submission import JobStatus, JobSubmissionClient

from tidepool.arbiter_handle import HEAD_NODE
from tidepool.errors import ClusterError
from tidepool.job_folder import ENTRYPOINT, job_folder
from tidepool.pool.resubmission import JobState

_TIMEOUT_S = 60
_STATES: Mapping[JobStatus, JobState] = {
    JobStatus.PENDING: "active",
    JobStatus.RUNNING: "active",
    JobStatus.STOPPED: "stopped",
    JobStatus.SUCCEEDED: "ended",
    JobStatus.FAILED: "failed",
}
_Answer = TypeVar("_Answer")


class RayJobs:
    """See `resubmitter.Jobs`. For a process that is connected to the cluster."""

    def state(self, job: str) -> JobState:
        """How a job is; takes a second, for the process on the head. Raises `ClusterError`."""
        return _on_head(_state, job)

    def submit(self, job: str, spec: Mapping[str, Any]) -> None:
        """Submit a job, by that id, that trains by a spec (JSON), with the library of this process. Raises `ClusterError`."""
        _on_head(_submit, job, dict(spec))


def _on_head(function: Callable[..., _Answer], *arguments: Any) -> _Answer:
    task = ray.remote(num_cpus=0, resources=HEAD_NODE, max_retries=0)(function)
    try:
        answer: _Answer = ray.get(task.remote(*arguments), timeout=_TIMEOUT_S)
    except RayError as error:
        cause = str(error).strip().rpartition("\n")[2]
        raise ClusterError(f"the cluster's job service does not answer ({type(error).__name__}: {cause})") from error
    return answer


def _client() -> JobSubmissionClient:
    return JobSubmissionClient(ray.get_runtime_context().gcs_address)


def _state(job: str) -> JobState:
    jobs = {one.submission_id: one.status for one in _client().list_jobs()}
    return _STATES[jobs[job]] if job in jobs else "unknown"


def _submit(job: str, spec: Mapping[str, Any]) -> None:
    with job_folder(spec) as folder:
        _client().submit_job(entrypoint=" ".join(ENTRYPOINT), submission_id=job, runtime_env={"working_dir": folder})
