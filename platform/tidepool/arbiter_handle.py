"""The arbiter of the Ray cluster that this process is in: found by its name, started by whoever needs it first."""

from importlib import import_module

import ray
from ray.actor import ActorHandle

from tidepool.messages import ARBITER, NAMESPACE

HEAD_NODE = {"node:__internal_head__": 0.001}
"""A little of Ray's own resource of the head node: what asks for it runs there."""
_CLASS = "tidepool.pool.arbiter", "Arbiter"  # by its path: training and serving start it, and import nothing of the pool


def find_arbiter() -> ActorHandle:
    """The cluster's arbiter. It outlives whoever starts it, and Ray starts it again where it dies.

    On the head node, whose loss ends the cluster anyway, and where the autoscaler's configuration lies (`pool.cluster`).
    """
    module, name = _CLASS
    actor = ray.remote(num_cpus=0, resources=HEAD_NODE, max_restarts=-1)(getattr(import_module(module), name))
    return actor.options(name=ARBITER, namespace=NAMESPACE, lifetime="detached", get_if_exists=True).remote()
