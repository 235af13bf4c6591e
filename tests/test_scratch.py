"""Temporary folders go with their context, or, where a process was killed, with the next one made."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tidepool.scratch import scratch_folder

_DIES = """
import os, signal
from pathlib import Path
from tidepool.scratch import scratch_folder
folder = scratch_folder("checkpoint")
(Path(folder.name) / "big").write_text("x")
print(folder.name, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_goes_with_the_next_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    foreign = [tmp_path / name for name in ("tidepool-ray-abc12345", "other-checkpoint-1-abc", "tidepool-checkpoint-x-abc")]
    for path in foreign:
        path.mkdir()
    died = subprocess.run([sys.executable, "-c", _DIES], capture_output=True, text=True, env=dict(os.environ), check=False)
    left = Path(died.stdout.strip())
    assert (left / "big").exists()
    with scratch_folder("restore") as mine, scratch_folder("check") as second:
        assert not left.exists()
        assert Path(mine).is_dir(), "that of a living process stays"
        assert Path(second).is_dir()
    assert sorted(tmp_path.iterdir()) == sorted(foreign)
