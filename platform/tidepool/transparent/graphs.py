"""Whether a gradient may still be asked for through what was computed before: then a snapshot has to wait for a later step.

A graph that was used by `backward` has given its tensors away, and one whose tensors were changed since is of no use: PyTorch
refuses both. So a tensor whose graph has one such node is a value and nothing more. A graph without one may still be used (a GAN's
`fake` between two optimizers).
"""

import gc
from typing import Any

from torch import Tensor

_UNUSABLE = ("a second time", "modified by an inplace operation")


def pending_graphs() -> list[Tensor]:
    """The tensors of this process that a gradient may still be taken through."""
    roots = [one for one in gc.get_objects() if issubclass(type(one), Tensor) and one.grad_fn is not None]
    return [root for root in roots if not _is_used(root.grad_fn)]


def _is_used(root: Any) -> bool:
    seen, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if _has_given_away(node):
            return True
        waiting += [function for function, _ in node.next_functions if function is not None]
    return False


def _has_given_away(node: Any) -> bool:
    names = [name for name in dir(node) if name.startswith("_saved_") or name == "saved_tensors"]
    for name in names:
        try:
            getattr(node, name)
        except RuntimeError as error:
            if not any(one in str(error) for one in _UNUSABLE):
                raise
            return True
    return False
