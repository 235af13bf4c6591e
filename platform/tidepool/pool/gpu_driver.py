"""What NVIDIA's driver says of a node's GPUs, by `nvidia-smi`. Tested on text in the documented format; an H200's driver answered so.

A GPU that has fallen off the bus is told of in the place of its values, or in the place of all output.
"""

import re
import shutil
import subprocess
from typing import Any

_TIMEOUT_S = 30
_ERRORS = "--query-gpu=pci.bus_id,ecc.errors.uncorrected.volatile.total"
_REMAPPED = "--query-remapped-rows=gpu_bus_id,remapped_rows.pending,remapped_rows.failure"
_FORMAT = "--format=csv,noheader,nounits"
_BUS = re.compile(r"(?:[0-9A-Fa-f]{4})?([0-9A-Fa-f]{4}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-9A-Fa-f])")
_LOST = re.compile(r"GPU is lost|fallen off the bus|Unknown Error|Unable to determine the device handle|ERR!", re.IGNORECASE)
_YES = ("yes", "1")


def ask_driver() -> list[dict[str, Any]] | None:
    """The GPUs of this node, each with the fields of `findings.Gpu`; None where there is no driver. Raises if it hangs."""
    if shutil.which("nvidia-smi") is None:
        return None
    return parse_gpus(_ask(_ERRORS), _ask(_REMAPPED))


def _ask(query: str) -> str:
    done = subprocess.run(["nvidia-smi", query, _FORMAT], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    return f"{done.stdout}\n{done.stderr}"  # where it fails, it says which GPU it cannot reach


def parse_gpus(errors: str, remapped: str) -> list[dict[str, Any]]:
    """The GPUs in what `nvidia-smi` printed of memory errors and of rows that are replaced. What a GPU does not count is none."""
    gpus: dict[str, dict[str, Any]] = {}
    for line in errors.splitlines():
        if bus := _BUS.search(line):
            count = line.rpartition(",")[2].strip()
            gpus[bus[1].lower()] = {
                "name": bus[1].lower(),
                "num_uncorrected": int(count) if count.isdigit() else 0,
                "is_remap_pending": False,
                "is_remap_failed": False,
                "is_lost": _LOST.search(line) is not None,
            }
    for line in remapped.splitlines():
        bus, values = _BUS.search(line), [value.strip().lower() for value in line.split(",")]
        if bus and len(values) == 3 and (gpu := gpus.get(bus[1].lower())):
            gpu["is_remap_pending"], gpu["is_remap_failed"] = values[1] in _YES, values[2] in _YES
    return list(gpus.values())
