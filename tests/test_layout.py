"""What the source tree must never hold: a package named `platform`, a way to run code from data; and what must stay light."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "platform" / "tidepool"
UNPICKLING = (
    "pickle",
    "_pickle",
    "cloudpickle",
    "ray.cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "torch.load",
    "torch.save",
    "torch.jit.load",
    "torch.hub",
    "torch.distributed.checkpoint",
    "pandas.read_pickle",
)


def test_platform_is_only_a_source_root_and_never_a_package() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert (LIBRARY / "__init__.py").is_file()


def test_the_standard_librarys_platform_wins_where_the_workers_have_our_folders_on_the_path() -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'platform'}"}
    command = [
        sys.executable,
        "-c",
        "import platform, tidepool; print(platform.system(), platform.__file__, tidepool.__file__, sep=chr(10))",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True)
    system, standard, library = done.stdout.splitlines()
    assert system == os.uname().sysname
    assert not Path(standard).is_relative_to(ROOT)
    assert Path(library) == LIBRARY / "__init__.py"


def names_used(source: str) -> Iterator[str]:
    """Every imported module, and every name that starts at an import, in full (`t.load` after `import torch as t`: torch.load)."""
    tree = ast.parse(source)
    imported: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
                imported[alias.asname or alias.name.partition(".")[0]] = alias.name if alias.asname else alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
                imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            if first in imported:
                yield f"{imported[first]}.{rest}".rstrip(".")


WRITES_ONLY = "ray.cloudpickle.register_pickle_by_value("


def unpickling(source: str) -> list[str]:
    names = names_used(source.replace(WRITES_ONLY, "("))
    return sorted({name for name in names for bad in UNPICKLING if name == bad or name.startswith(f"{bad}.")})


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads as f",
        "import torch\ntorch.load('x')",
        "import torch as t\ndef f():\n    return t.load('x')",
        "from torch import load",
        "from ray import cloudpickle",
        "import torch.distributed.checkpoint as dcp",
    ],
)
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert unpickling(source)
    assert not unpickling("import json, torch\nfrom safetensors.torch import load_file\ntorch.loaded, json.load")


@pytest.mark.parametrize("path", [*sorted(LIBRARY.rglob("*.py")), *sorted((ROOT / "jobs").glob("*.py"))], ids=lambda path: path.stem)
def test_no_module_unpickles_or_trusts_a_models_code(path: Path) -> None:
    source = path.read_text()
    assert unpickling(source) == []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            assert isinstance(node.value, ast.Constant), ast.unparse(node)
            assert node.value.value is False, ast.unparse(node)


def test_the_coordinator_of_a_run_needs_no_torch() -> None:
    """It is a process of its own in each run: importing torch there would cost each start seconds."""
    code = "import sys, tidepool.training.coordinator; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT / "platform")}, check=True)


def test_who_starts_workers_imports_nothing_that_only_a_worker_needs() -> None:
    """A run's driver, and the launcher and the controller of each of its groups, start one after the other, before any worker does."""
    code = "import sys, tidepool.training.job; print({'torch', 'transformers', 'peft', 'ray.train'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT / "platform")}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("module", ["tidepool.serving.app", "tidepool.serving.engines"])
def test_gateways_and_what_serve_starts_replicas_by_need_no_torch(module: str) -> None:
    """A gateway never computes; a replica imports torch with the collector paused."""
    code = f"import sys, {module}; print({{'torch', 'transformers'}} & {{*sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT / "platform")}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
