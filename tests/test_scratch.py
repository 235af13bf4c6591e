"""Temporary folders go with their context, or, where a process was killed, with the next one made."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tidepool.scratch import ScratchFolder

_DIES = """
import os, signal
from pathlib import Path
from tidepool.scratch import ScratchFolder
folder = ScratchFolder("checkpoint")
(Path(folder.name) / "big").write_text("x")
print(folder.name, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def make_old(path: Path) -> None:
    an_hour_ago = time.time() - 3600
    os.utime(path, (an_hour_ago, an_hour_ago))


def test_what_a_killed_process_left_goes_with_the_next_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    foreign = tmp_path / "tidepool-ray-abc12345"
    foreign.mkdir()
    make_old(foreign)
    died = subprocess.run([sys.executable, "-c", _DIES], capture_output=True, text=True, env=dict(os.environ), check=False)
    left = Path(died.stdout.strip())
    with ScratchFolder("restore") as mine:
        assert (left / "big").exists(), "it is young: its process may not hold it yet"
        make_old(left)
        make_old(Path(mine))
        with ScratchFolder("check"):
            assert not left.exists()
            assert Path(mine).is_dir(), "that of a living process stays, however old it is"
    assert list(tmp_path.iterdir()) == [foreign]


def test_a_folder_goes_by_itself_and_can_be_let_go_of_early() -> None:
    folder = ScratchFolder("tensorboard")
    assert Path(folder.name).is_dir()
    folder.cleanup()
    assert not Path(folder.name).exists()
