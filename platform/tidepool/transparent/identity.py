"""What a run of a script is: its file, its arguments, the versions that its bits depend on, and the seed for what it leaves unseeded.

The first start writes it into the store; every later one compares. A script that has changed would not do again what it did.
"""

import hashlib
import os
import platform
import random
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tidepool.errors import ObjectExistsError, ScriptError, SpecChangedError
from tidepool.storage import ObjectStore, get_json, put_json

_LATER = frozenset({"seed"})


def identify(script: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """The identity of a script that is to be started, with a new seed."""
    return {
        "script": script.name,
        "sha256": hashlib.sha256(script.read_bytes()).hexdigest(),
        "arguments": list(arguments),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "num_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "seed": secrets.randbits(32),
    }


def settle_identity(store: ObjectStore, run: str, now: Mapping[str, Any]) -> dict[str, Any]:
    """The run's identity: `now` for a new run, else the one that it began with. Raises `SpecChangedError` if they differ."""
    key = f"runs/{run}/script.json"
    there = {info.key for info in store.list(f"runs/{run}/")}
    if there and key not in there:
        raise SpecChangedError(f"Run {run} in {store.url} is no run of a script. Choose another --run.")
    try:
        put_json(store, key, now)
    except ObjectExistsError:
        began = get_json(store, key)
    else:
        return dict(now)
    changed = sorted(name for name in now.keys() | began.keys() if name not in _LATER and now.get(name) != began.get(name))
    if changed:
        listed = "; ".join(f"{name} was {began.get(name)!r} and is {now.get(name)!r}" for name in changed)
        raise SpecChangedError(
            f"Run {run} began with something else: {listed}. It would not end with the same bits. Restore that, or choose another --run."
        )
    return began


def sources_beside(folder: Path) -> dict[str, str]:
    """The sha256 of each module in use that lies in or below the script's folder."""
    found = {}
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and file.endswith(".py") and Path(file).is_relative_to(folder) and "site-packages" not in Path(file).parts:
            found[str(Path(file).relative_to(folder))] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return found


def refuse_changed_sources(began: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise `SpecChangedError` if a file that both of them use is not the same."""
    changed = sorted(name for name in began.keys() & now.keys() if began[name] != now[name])
    if changed:
        raise SpecChangedError(
            f"Since the last commit {', '.join(changed)} changed, which the script uses. Restore that, or start anew under another --run."
        )


def refuse_several_processes(environment: Mapping[str, str]) -> None:
    """Raise `ScriptError` if this is one process of several."""
    size = environment.get("WORLD_SIZE", "1")
    if size not in ("", "1"):
        raise ScriptError(
            f"WORLD_SIZE is {size}: tidepool.run makes a script of one process resumable. Start it without torchrun, or train by a spec "
            "(jobs/train.py), which runs on many."
        )


def seed_everything(seed: int) -> None:
    """Seeds for a script that sets none: the same in every start of a run."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def warn_of_cuda() -> str | None:
    """What to say of a GPU whose sums may come out differently each time; None if there is nothing to say."""
    if not torch.cuda.is_available() or torch.are_deterministic_algorithms_enabled():
        return None
    variable = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    return (
        "this machine has a GPU, and the script has not asked for deterministic algorithms (yet): a run that goes on after a kill is as "
        "good as one that was left alone, but bits may differ. For the same bits call torch.use_deterministic_algorithms(True) and set "
        f"CUBLAS_WORKSPACE_CONFIG=:4096:8 (now {variable!r})."
    )
