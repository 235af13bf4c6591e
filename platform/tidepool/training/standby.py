"""Processes that wait for replica groups to come: what takes a process seconds to import, it has imported by then.

Ray takes an idle process of the same job and runtime environment for a new actor, if it has one on the node. So one is started there
ahead of time, as Ray itself does for a new driver, and the runtime environment of a group's workers names `load` as the hook that each
runs as it begins. A process that waits holds no slot and computes nothing; Ray ends it with its job, or after a while in which nobody needed it.
"""

import logging
from importlib import import_module

import ray
import ray._private.state
from ray.core.generated import gcs_pb2, node_manager_pb2, node_manager_pb2_grpc

_logger = logging.getLogger(__name__)
_LOADED = ("ray.train.torch", "tidepool.training.member", "tidepool.training.worker", "tidepool.models")


def load() -> None:
    """Import what a worker needs, and says nothing if it cannot: the worker itself will."""
    for name in _LOADED:
        import_module(name)
