"""Local folders that are complete or not there: what is fetched from a store for others on the same machine to read."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def fill_folder(target: Path, fill: Callable[[Path], None]) -> Path:
    """Make `target` by calling `fill` with an empty folder beside it, renamed when it returns; returns `target`.

    A folder that is there already is used as it is. Several processes may do this at once; nothing is left if `fill` raises.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=".filling-"))
    try:
        fill(temporary)
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
