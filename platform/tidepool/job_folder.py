"""What a job is submitted with that trains by a spec of the store: this library and the spec, in a folder of their own."""

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tidepool
from tidepool.scratch import ScratchFolder

ENTRYPOINT = ("python", "-m", "tidepool.training.job", "spec.json")


@contextmanager
def job_folder(spec: Mapping[str, Any]) -> Iterator[str]:
    """The path of the folder, as a job's working directory; it is gone after the block."""
    with ScratchFolder("submit") as folder:
        shutil.copytree(tidepool.__path__[0], Path(folder) / "tidepool", ignore=shutil.ignore_patterns("__pycache__"))
        (Path(folder) / "spec.json").write_text(json.dumps(spec))
        yield folder


def new_job_id(run: str) -> str:
    """An id for another job of a run, which tells whose it is."""
    return f"{run}-{uuid.uuid4().hex[:8]}"
