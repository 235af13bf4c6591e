"""The numerics fingerprint: everything besides the spec that the bits of a result depend on.

It stands in the run's resolved spec; a worker with another fingerprint is refused, because it would continue the run
with other bits. On GPUs the deterministic algorithms of torch are switched on.
"""

import os
from importlib import import_module
from importlib.metadata import version

import torch

from tidepool.specs import RunSpec
from tidepool.training.pins import Fingerprint

_COMPUTATION = 2
"""Counts the changes of our own step that changed bits."""


def prepare_process(device: torch.device, num_threads: int) -> None:
    """Fix what may differ between processes: the number of threads, and on GPUs the choice of algorithms."""
    torch.set_num_threads(num_threads)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # It shows reads of memory that nobody wrote, at the price of writing whatever is allocated.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def resolve_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What the forward and backward passes compute in. `auto` is bf16 on GPUs that have it, else float32."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def fingerprint(spec: RunSpec, device: torch.device) -> Fingerprint:
    """The fingerprint of this process, after `prepare_process`."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "device": device.type,
        "hardware": hardware,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "triton": import_module("triton").__version__ if device.type == "cuda" else "none",
        "transformers": version("transformers"),
        "peft": version("peft"),
        "num_threads": torch.get_num_threads(),
        "dtype": str(resolve_dtype(spec.training.precision, device)).removeprefix("torch."),
        "attention": "sdpa",
        "computation": _COMPUTATION,
        "optimizer_kernel": spec.training.optimizer.kernel,
    }
