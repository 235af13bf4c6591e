"""What a replica group asks of Ray Train, and what it does without."""

import subprocess
import sys

import pytest
from ray.train.v2._internal.execution.worker_group import state, worker_group
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from tidepool.training.trainer import GroupTrainer

NOT_NEEDED = {"DatasetsCallback", "PlacementGroupCleanerCallback"}


def callbacks(trainer: DataParallelTrainer) -> set[str]:
    return {type(one).__name__ for one in trainer._create_default_callbacks()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data")  # Ray's of itself
def test_what_a_group_has_no_use_for_is_left_out_and_nothing_else() -> None:
    assert callbacks(GroupTrainer(print)) == callbacks(DataParallelTrainer(print)) - NOT_NEEDED
    assert callbacks(DataParallelTrainer(print)) >= NOT_NEEDED, "Ray Train has other names for them now"
    assert hasattr(worker_group, "SynchronizationActor"), "Ray Train has another name for it now"
    assert hasattr(state, "_shutdown_sync_actor"), "Ray Train has another name for it now"
    assert GroupTrainer(print).backend_config.backend_cls.share_cuda_visible_devices


def test_who_starts_a_group_does_without_torch() -> None:
    code = "import sys, tidepool.training.trainer, tidepool.training.ray_worker; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
