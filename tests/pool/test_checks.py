"""What a check measures on this machine, how it ends, and how what NVIDIA's driver prints is read."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

import tidepool
from tidepool.pool import checks
from tidepool.pool.checks import check_node, disks, free_port, host_rate
from tidepool.pool.findings import Figures, Gpu, own_findings, read_figures, read_rate
from tidepool.pool.gpu_driver import parse_gpus

TIMEOUT_S = 120


def begin(request: Mapping[str, Any], **environment: str) -> "subprocess.Popen[str]":
    """A check as a process, as an inspection starts it."""
    command = [sys.executable, "-m", "tidepool.pool.checks", json.dumps(dict(request))]
    variables = os.environ | {"PYTHONPATH": str(Path(tidepool.__path__[0]).parent)} | environment
    return subprocess.Popen(command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def answer(check: "subprocess.Popen[str]") -> Any:
    assert check.stdout is not None
    printed = check.stdout.read()
    assert check.wait(TIMEOUT_S) == 0, printed
    assert check.stdin is not None
    check.stdin.close()
    check.stdout.close()
    return json.loads(printed.splitlines()[-1])


def test_a_check_of_this_machine_measures_what_can_be_read() -> None:
    figures = read_figures(answer(begin({"num_gpus": 0})))
    assert figures is not None
    assert figures.rates["the CPU"] > 1e8
    assert (figures.wrong, figures.gpus, figures.exchange) == ((), None, None)
    assert len(figures.disks) == 2


def test_a_product_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host_rate()[1]
    right = checks.fastest

    def broken(once: Any, clock: Any) -> Any:
        product, took_s = right(once, clock)
        product[17, 23] += 1
        return product, took_s

    monkeypatch.setattr(checks, "fastest", broken)
    figures = read_figures(check_node(0))
    assert figures is not None
    assert [finding.why for finding in own_findings(figures, 0) if finding.kind == "product"] == ["the CPU multiplies wrongly"]


def test_a_full_disk_is_found_on_a_real_one(small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(b"x" * 2**20)
    figures = read_figures(answer(begin({"num_gpus": 0}, TMPDIR=str(small_disk), TIDEPOOL_CACHE=str(small_disk / "cache" / "deep"))))
    assert figures is not None
    found = [finding for finding in own_findings(figures, 0) if finding.kind == "disk"]
    assert [finding.why for finding in found] == [
        f"the disk of {folder} is full: 1 MB of 2 MB are free" for folder in (small_disk, small_disk / "cache" / "deep")
    ]


def test_a_check_ends_with_its_input() -> None:
    check = begin({"rank": 0, "size": 2, "address": f"127.0.0.1:{free_port('127.0.0.1')}", "host": "127.0.0.1"})  # its peer never comes
    assert check.stdin is not None
    check.stdin.close()
    assert check.wait(TIMEOUT_S) == 1
    assert check.stdout is not None
    check.stdout.close()
    assert not psutil.pid_exists(check.pid) or psutil.Process(check.pid).status() == psutil.STATUS_ZOMBIE


def test_a_check_that_fails_says_why_last() -> None:
    check = begin({"rank": 0})
    assert check.stdout is not None
    assert "missing 3 required positional arguments" in check.stdout.read().splitlines()[-1]
    assert check.wait(TIMEOUT_S) == 1
    assert check.stdin is not None
    check.stdin.close()
    check.stdout.close()


def test_two_processes_measure_an_all_reduce() -> None:
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    ends = [begin({"rank": rank, "size": 2, "address": address, "host": "127.0.0.1"}) for rank in (0, 1)]
    rates = [read_rate(answer(end)) for end in ends]
    assert all(rate > 1e6 for rate in rates), rates


def test_disks_of_folders_that_are_not_there_yet(tmp_path: Path) -> None:
    [disk] = disks([tmp_path / "a" / "b"])
    assert disk["folder"] == str(tmp_path / "a" / "b")
    assert 0 <= disk["free_bytes"] <= disk["total_bytes"]


# --- NVIDIA's driver ------------------------------------------------------------------------------------------------------

HEALTHY = "00000000:07:00.0, 0\n00000000:0F:00.0, 0\n\n"
REMAPPED = "00000000:07:00.0, No, No\n00000000:0F:00.0, No, No\n\n"


def gpus(errors: str, remapped: str = REMAPPED) -> list[str]:
    """What is found wrong on a node of which Ray counts two GPUs."""
    printed = parse_gpus(errors, remapped)
    figures = read_figures({"disks": [], "gpus": printed, "rates": {}, "wrong": [], "exchange": None})
    assert figures is not None
    return [finding.why for finding in own_findings(figures, 2)]


def test_healthy_gpus_and_those_that_count_no_errors_are_fine() -> None:
    assert gpus(HEALTHY) == []
    assert gpus("00000000:07:00.0, [N/A]\n00000000:0F:00.0, [N/A]\n", "00000000:07:00.0, [N/A], [N/A]\n") == []
    assert gpus(HEALTHY, "00000000:07:00.0, 0, 0\n00000000:0F:00.0, 0, 0\n") == []
    assert gpus(HEALTHY, 'Field "remapped_rows.pending" is not a valid field to query.\n') == [], "a driver that is older than this"


@pytest.mark.parametrize(
    ("errors", "remapped", "found"),
    [
        ("00000000:07:00.0, 0\n00000000:0F:00.0, 3\n", REMAPPED, ["GPU 0000:0f:00.0 has 3 uncorrectable memory errors"]),
        (HEALTHY, "00000000:07:00.0, Yes, No\n", ["GPU 0000:07:00.0 has memory rows that wait to be replaced"]),
        (HEALTHY, "00000000:0F:00.0, 0, 1\n", ["GPU 0000:0f:00.0 has memory rows that could not be replaced"]),
        (
            "00000000:07:00.0, 0\n00000000:0F:00.0, [GPU is lost]\n",
            REMAPPED,
            ["GPU 0000:0f:00.0 has fallen off the bus", "Ray counts 2 GPUs and the driver reaches 1"],
        ),
        (
            "Unable to determine the device handle for GPU0000:0F:00.0: Unknown Error\n",
            "Unable to determine the device handle for GPU0000:0F:00.0: Unknown Error\n",
            ["GPU 0000:0f:00.0 has fallen off the bus", "Ray counts 2 GPUs and the driver reaches 0"],
        ),
        ("00000000:07:00.0, 0\n", REMAPPED, ["Ray counts 2 GPUs and the driver reaches 1"]),
        ("No devices were found\n", "No devices were found\n", ["Ray counts 2 GPUs and the driver reaches 0"]),
    ],
)
def test_what_is_wrong_with_a_gpu_is_read_from_what_the_driver_prints(errors: str, remapped: str, found: list[str]) -> None:
    assert gpus(errors, remapped) == found


def test_gpus_of_a_node_without_a_driver_are_made_up_and_fine() -> None:
    assert own_findings(Figures(), 4) == []
    assert own_findings(Figures(gpus=(Gpu("0000:07:00.0", 0, False, False, False),)), 1) == []
