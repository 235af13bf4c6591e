"""Ray Train's trainer with what a replica group needs of it: on few cores, each process that it does not start is seconds gained.

`TorchTrainer` without torch: a run's steps go through process groups of its quorums, so that Ray's own would join nobody, and the
launcher, which has no other use for torch, need not import it. And without four actors for each `fit()`: Ray Train's controller, which
runs in the launcher itself, an actor already; the one that hands out Ray datasets (ours come from the store); the one that removes
the placement group of a dead controller, which the driver does (`replica_groups`) and which asks the dashboard once a second; and the one
through which workers report a checkpoint together, or call `ray.train.collective`: ours have the run's coordinator.
"""

import asyncio
from typing import Any

from ray.train import Result
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import state, worker_group
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

_NOT_NEEDED = {"DatasetsCallback", "PlacementGroupCleanerCallback"}


class GroupTrainer(DataParallelTrainer):  # type: ignore[misc]  # Ray Train has no types
    """A `DataParallelTrainer` whose workers see all GPUs of their node that the group has, as NCCL wants it."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, backend_config=_SharedDevices(), **named)

    def _create_default_callbacks(self) -> list[Any]:
        return [one for one in super()._create_default_callbacks() if type(one).__name__ not in _NOT_NEEDED]

    def _initialize_and_run_controller(self, **named: Any) -> Result:
        worker_group.SynchronizationActor = _NoActor  # this process is the launcher's alone
        state._shutdown_sync_actor = lambda _: None
        controller = TrainController(**named | {"scaling_policy": _Granted(self.scaling_config)})
        asyncio.run(controller.run())
        return controller.get_result()


class _NoActor:
    """In the place of Ray Train's class of an actor. What stands for its handle travels to the workers, who never use it."""

    @classmethod
    def options(cls, **_: Any) -> type["_NoActor"]:
        return cls

    @staticmethod
    def remote(**_: Any) -> str:
        return "Tidepool's groups have no synchronization actor"


class _Granted(FixedScalingPolicy):  # type: ignore[misc]
    """Of the size that was granted. It tells Ray's autoscaler nothing, which goes by the last that it is told: that is to be
    what the arbiter says (`pool.demand`). Besides, Ray Train would speak through an actor that keeps the node of the first
    launcher from ever being idle.
    """

    def after_controller_start(self, train_run_context: Any) -> None:
        return

    def _maybe_send_resource_request(self) -> None:
        return


class _Devices(Backend):  # type: ignore[misc]
    share_cuda_visible_devices = True


class _SharedDevices(BackendConfig):  # type: ignore[misc]
    @property
    def backend_cls(self) -> type[Backend]:
        return _Devices
