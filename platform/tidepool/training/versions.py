"""Whether the nodes of a cluster have the same software: compared before anything is computed. Pure but for one look.

Ray refuses another Ray or another minor version of Python by itself. What else a run's bits, files and messages depend on is
compared here: a worker with other versions than the driver is refused, and the message names its node.
"""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from tidepool.errors import VersionSkewError

_PACKAGES = ("ray", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy", "pyarrow", "obstore", "pydantic")


def installed_versions() -> dict[str, str]:
    """What this process would import, by package. A build's own mark (`+cu128`, `+cpu`) is left out: nodes may differ in it."""
    return {name: _version(name) for name in _PACKAGES}


def check_versions(expected: Mapping[str, str], found: Mapping[str, str], node: str) -> None:
    """Compare a node's versions with the driver's. Raises `VersionSkewError` that names the node and what differs."""
    if lines := [f"{name}: {expected[name]} -> {found[name]}" for name in expected if expected[name] != found[name]]:
        raise VersionSkewError(
            f"Node {node} has other software than the driver's node; driver -> node:\n  "
            + "\n  ".join(lines)
            + "\nInstall the same requirements.lock on every node (`ray up cluster.yaml` does), then submit the run again."
        )


def _version(name: str) -> str:
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return "none"
