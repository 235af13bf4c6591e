"""Between the host's memory and a GPU's, without waiting for what the GPU computes. On a CPU there is nothing to move.

A plain copy to a GPU waits for everything that was launched before it, and a plain copy from it for what was launched after it.
"""

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A host's tensor on the device, for whatever is launched from now on."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Download:
    """Tensors on their way to the host, as they are when everything has been computed that was launched before."""

    def __init__(self, *tensors: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._tensors = list(tensors)
        if tensors[0].device.type != "cpu":
            self._tensors = [torch.empty(one.shape, dtype=one.dtype, pin_memory=True).copy_(one, non_blocking=True) for one in tensors]
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(tensors[0].device))

    def wait(self) -> list[Tensor]:
        """The tensors, once they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors
