"""Tells who serves that a name of the registry means something new: in this process's Ray cluster, or as a program in `RAY_ADDRESS`'s.

It only makes haste: gateways ask the store by themselves every second or so. So nothing here fails for what it cannot tell.
"""

import json
import logging
import os
import sys
import warnings

import ray
from ray.exceptions import RayError

DIRECTORY = "Directory"
"""The deployment of a serving application that hears of it."""
_TIMEOUT_S = 5.0
_logger = logging.getLogger(__name__)


def announce(name: str) -> None:
    """Tell every application that serves in the cluster; nothing where this process is in none, or nothing is served."""
    if not ray.is_initialized():
        return
    from ray import serve  # which takes a second, and most processes never publish
    from ray.serve.exceptions import RayServeException

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Serve warns whoever reads a deployment's settings of one of them
            applications = serve.status().applications
        for application, status in applications.items():
            if DIRECTORY in status.deployments:
                serve.get_deployment_handle(DIRECTORY, application).announce.remote(name).result(timeout_s=_TIMEOUT_S)
    except (RayError, RayServeException, TimeoutError) as error:
        _logger.warning("Who serves %s could not be told of it, and will see by itself: %r", name, error)


if __name__ == "__main__":
    ray.init(os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
    announce(sys.argv[1])
    print(json.dumps(None))
