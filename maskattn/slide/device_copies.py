"""Copies between the host and a GPU that do not wait for the GPU's work, so that the next batch is always queued."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["HostCopies", "to_device"]


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Return an array on a device; a GPU takes it from page-locked memory, in the order of its other work."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class HostCopies:
    """Copies of tensors on the host, which a GPU makes when it has computed them.

    Args:
        tensors: the tensors, all on one device.
    """

    def __init__(self, *tensors: Tensor) -> None:
        # The copy of a GPU's tensor is page-locked memory, and complete only after the event.
        self._copies = [tensor.detach().float().to("cpu", non_blocking=tensor.is_cuda) for tensor in tensors]
        self._made: torch.cuda.Event | None = None
        if tensors and tensors[0].is_cuda:
            self._made = torch.cuda.Event()
            self._made.record(torch.cuda.current_stream(tensors[0].device))

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Wait for the copies, and return them as float32."""
        if self._made is not None:
            self._made.synchronize()
        return tuple(copy.numpy() for copy in self._copies)
