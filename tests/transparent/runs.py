"""Starts scripts as a person does, plainly or under `tidepool.run`, and kills them where it is told to."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
_ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "TIDEPOOL_STORE")},
    "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}",
    "OMP_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Outcome:
    """How a process ended, and what it said."""

    status: int
    output: str
    messages: str

    @property
    def committed(self) -> list[int]:
        """The steps that were committed."""
        return [int(step) for step in re.findall(r"^tidepool.run: committed step (\d+)", self.messages, re.MULTILINE)]


def start_plainly(script: Path, folder: Path, *arguments: str) -> Outcome:
    """`python script.py ...` in a folder."""
    return _run([sys.executable, str(script), *arguments], folder, 0, {})


def start(
    script: Path,
    folder: Path,
    *arguments: str,
    options: Sequence[str] = (),
    kill_at: int = 0,
    main: str = "tidepool.run",
    **environment: str,
) -> Outcome:
    """`python -m tidepool.run ... script.py ...` in a folder; killed when it has said that step `kill_at` or a later one is committed."""
    command = [sys.executable, "-m", main, "--run", "r", "--store", f"file://{folder}/store", *options, str(script), *arguments]
    return _run(command, folder, kill_at, environment)


def _run(command: list[str], folder: Path, kill_at: int, environment: dict[str, str]) -> Outcome:
    folder.mkdir(exist_ok=True)
    messages = []
    with (folder / "output").open("w+") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=_ENVIRONMENT | environment, stdout=output, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        assert process.stderr is not None
        for line in process.stderr:
            messages.append(line)
            found = re.match(r"tidepool.run: committed step (\d+)", line)
            if kill_at and found and int(found[1]) >= kill_at:
                os.killpg(process.pid, signal.SIGKILL)
        process.stderr.close()
        status = process.wait()
        output.seek(0)
        return Outcome(status, output.read(), "".join(messages))
