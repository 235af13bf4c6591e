"""A store with a tiny base model and two versions of an adapter, for the session."""

import warnings

import pytest

from tests.serving.models import Published, publish

with warnings.catch_warnings():  # Ray 2.60 declares its models in a way that pydantic 2 is about to drop
    warnings.filterwarnings("ignore", message="Using extra keyword arguments on `Field`", category=DeprecationWarning)
    import ray.serve  # noqa: F401


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    folder = tmp_path_factory.mktemp("published")
    return publish((folder / "store").as_uri(), folder, num_adapters=2)
