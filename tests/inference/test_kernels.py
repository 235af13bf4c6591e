"""The kernels for GPUs, where there is none: in Triton's interpreter, and compiled. `test_gpu` runs them on one."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: pip install -e '.[dev]' on Linux")
_HERE = Path(__file__).parent


def run(*command: str, tmp_path: Path, **environment: str) -> str:
    """What Python prints with these arguments, in a process of its own."""
    root = _HERE.parents[1]
    path = os.pathsep.join([str(root), str(root / "platform"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_paged_attention_is_attention(tmp_path: Path) -> None:
    assert "60 shapes" in run(str(_HERE / "interpreted_kernels.py"), "7", tmp_path=tmp_path, TRITON_INTERPRET="1")


def test_kernels_compile_for_an_h100(tmp_path: Path) -> None:
    assert "33 kernels" in run(str(_HERE / "compiled_kernels.py"), "5", tmp_path=tmp_path)


@pytest.mark.long
def test_adapters_are_added_in_the_interpreter(tmp_path: Path) -> None:
    assert "2 passed" in run("-m", "pytest", "-q", str(_HERE / "test_lora_triton.py"), tmp_path=tmp_path, TRITON_INTERPRET="1")


@pytest.mark.long
def test_all_of_them_do(tmp_path: Path) -> None:
    assert "60 shapes" in run(str(_HERE / "interpreted_kernels.py"), "1", tmp_path=tmp_path, TRITON_INTERPRET="1")
    assert "33 kernels" in run(str(_HERE / "compiled_kernels.py"), "1", tmp_path=tmp_path)
