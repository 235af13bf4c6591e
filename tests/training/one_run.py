"""One incarnation of a run in a process of its own, to be killed: it says on a pipe where it is, and its result at the end."""

import os
from multiprocessing.connection import Connection

from tests.training.conftest import make_run, train_here


def train(store_url: str, run: str, environment: dict[str, str], said: Connection) -> None:
    """Claim the run and train it. `environment` opens the store."""
    os.environ.update(environment)

    def beat(step: int, phase: str) -> bool:
        said.send((step, phase))
        return False

    outcome = train_here(make_run(store_url, run), beat)
    assert outcome.result is not None
    said.send(dict(outcome.result))
