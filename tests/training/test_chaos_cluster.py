"""All that can happen to a run, each once and always in the same order, by `benchmarks/chaos.py` and on a cluster of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
KINDS = {"kill", "hang", "resize", "pause", "store away", "store bad"}
pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.timeout(600)]


def test_no_bit_and_no_sample_depends_on_a_little_chaos(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "chaos.py"), "--faults", str(len(KINDS)), "--every-s", "5", "--seed", "5"]
    command += ["--json", "rows.json"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'platform'}"}
    with (tmp_path / "output").open("wb") as output:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            status = process.wait(540)
        finally:
            process.send_signal(signal.SIGTERM)  # it ends its cluster
            process.wait(60)
    assert status == 0, (tmp_path / "output").read_text(errors="replace")[-4000:]
    rows: dict[str, Any] = {row["metric"]: row for row in json.loads((tmp_path / "rows.json").read_text())[1:]}
    assert rows["faults"]["by_kind"] == dict.fromkeys(KINDS, 1)
    assert (rows["bits_equal"]["ours"], rows["samples_lost"]["ours"], rows["samples_repeated"]["ours"]) == (1, 0, 0)
    assert rows["goodput"]["steps"] > 0
