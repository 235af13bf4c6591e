"""Scripts are started from one process that has loaded PyTorch, each in a folder of its own."""

from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from tests.transparent.runs import Starter, fork_server


@pytest.fixture(scope="session")
def context() -> ForkServerContext:
    return fork_server()


@pytest.fixture
def starter(context: ForkServerContext, tmp_path: Path) -> Starter:
    return Starter(context, tmp_path)
