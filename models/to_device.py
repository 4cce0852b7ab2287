"""Tensors on their way to where the model is."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def to_device(tensor: "Tensor", device: Any, dtype: "torch.dtype | None" = None) -> "Tensor":
    """The tensor on a device (and in a type). A GPU gets it through page-locked memory, when it comes to that.

    A plain `.to` lets the host wait until the GPU has done everything that it was told before, in every step.
    """
    import torch

    if tensor.device.type == "cpu" and device is not None and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, dtype, non_blocking=True)
    return tensor.to(device=device, dtype=dtype)


def to_like(tensor: "Tensor", other: "Tensor") -> "Tensor":
    """The tensor where another is, in its type."""
    return to_device(tensor, other.device, other.dtype)
