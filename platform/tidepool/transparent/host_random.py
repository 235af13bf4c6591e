"""The random states that Python code sees beside PyTorch's: `random` and NumPy's global one.

What is skipped may have drawn from them, so a journal says how they were left. Most often only a position has moved, and then
that is all that is kept.
"""

import json
import random
from dataclasses import dataclass
from typing import Any

import numpy as np

_SEPARATOR = b"\n"


@dataclass(frozen=True)
class HostRandom:
    """Both states: keys (the twister's 624 words) as bytes, and the rest, which is small."""

    python_key: tuple[int, ...]
    numpy_key: bytes
    rest: tuple[Any, ...]

    @classmethod
    def now(cls) -> "HostRandom":
        """The states as they are."""
        version, words, gauss = random.getstate()
        drawn: Any = np.random.get_state(legacy=False)
        state = drawn["state"]
        rest = version, words[-1], gauss, int(state["pos"]), int(drawn["has_gauss"]), float(drawn["gauss"])
        return cls(words[:-1], state["key"].tobytes(), rest)

    def changes(self, before: "HostRandom") -> bytes:
        """What makes this of the state `before`; empty if nothing does."""
        if self == before:
            return b""
        keys = b"".join(
            (np.array(self.python_key, np.uint32).tobytes() if self.python_key != before.python_key else b"",
             self.numpy_key if self.numpy_key != before.numpy_key else b"")
        )  # fmt: skip
        which = [self.python_key != before.python_key, self.numpy_key != before.numpy_key]
        return json.dumps([self.rest, which]).encode() + _SEPARATOR + keys

    def apply(self, changes: bytes) -> "HostRandom":
        """The state that `changes`, made from one like this, stand for."""
        head, _, keys = changes.partition(_SEPARATOR)
        rest, (has_python, has_numpy) = json.loads(head)
        size = len(self.numpy_key)
        python = tuple(np.frombuffer(keys[:size], np.uint32).tolist()) if has_python else self.python_key
        return HostRandom(python, keys[-size:] if has_numpy else self.numpy_key, tuple(rest))

    def set(self) -> None:
        """Make the states these."""
        version, position, gauss, numpy_position, has_gauss, numpy_gauss = self.rest
        random.setstate((version, (*self.python_key, position), gauss))
        key = np.frombuffer(self.numpy_key, np.uint32)
        np.random.set_state(("MT19937", key, numpy_position, has_gauss, numpy_gauss))

    def to_json(self) -> dict[str, Any]:
        """For a snapshot."""
        return {"python": list(self.python_key), "numpy": np.frombuffer(self.numpy_key, np.uint32).tolist(), "rest": list(self.rest)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "HostRandom":
        """The inverse of `to_json`."""
        return cls(tuple(value["python"]), np.array(value["numpy"], np.uint32).tobytes(), tuple(value["rest"]))


def set_changes(changes: bytes) -> None:
    """Go on from the states that `changes` lead to from those of now."""
    if changes:
        HostRandom.now().apply(changes).set()
