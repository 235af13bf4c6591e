"""What projects hold against their quotas. Pure, within one round.

Invariants:
- What was granted earlier in the round counts; what is leaving counts until it has left.
- GPUs are counted; for workers and replicas without GPUs, their CPUs.
"""

from collections.abc import Sequence

from tidepool.messages import Quota, Reason
from tidepool.pool.reasons import reason


class Usage:
    """Serving and training by project."""

    def __init__(self, quotas: Sequence[Quota]) -> None:
        self._quotas = {quota.project: quota for quota in quotas}
        self._serving: dict[str, int] = {}
        self._training: dict[str, int] = {}
        self._leaving: dict[str, int] = {}

    def add_serving(self, project: str, gpus: int) -> None:
        """Count what replicas hold or were granted."""
        if project in self._quotas:
            self._serving[project] = self._serving.get(project, 0) + gpus

    def add_training(self, project: str, gpus: int, leaving_gpus: int = 0) -> None:
        """Count what groups hold or were granted, and how much of that is leaving."""
        if project in self._quotas:
            self._training[project] = self._training.get(project, 0) + gpus
            self._leaving[project] = self._leaving.get(project, 0) + leaving_gpus

    def serving_over(self, project: str, more: int) -> Reason | None:
        """Why so much more may not be granted; None if it may."""
        quota = self._quotas.get(project)
        return self._over(project, "serving", quota.serving_gpus if quota else None, self._serving.get(project, 0), more)

    def training_over(self, project: str, more: int) -> Reason | None:
        """Why so much more may not be granted; None if it may."""
        quota = self._quotas.get(project)
        return self._over(project, "training", quota.training_gpus if quota else None, self._training.get(project, 0), more)

    def training_excess(self, project: str, more: int) -> int:
        """How much must still be given up for so much more, besides what is leaving."""
        quota = self._quotas[project].training_gpus
        assert quota is not None
        return self._training.get(project, 0) - self._leaving.get(project, 0) + more - quota

    def training_quota(self, project: str) -> int | None:
        """The most that a project's runs may hold."""
        quota = self._quotas.get(project)
        return quota.training_gpus if quota else None

    @staticmethod
    def _over(project: str, what: str, quota: int | None, held: int, more: int) -> Reason | None:
        if quota is None or held + more <= quota:
            return None
        return reason("quota", project=project, quota=quota, what=what, held=held, more=more)
