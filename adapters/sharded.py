"""Weights that are spread over processes (FSDP2): read as a whole, and filled from a whole. Others come as they are."""

from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only its part."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of it; where it is sharded, every process has to ask."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    sharded: Any = tensor
    return sharded.to_local() if is_sharded(tensor) else tensor


def spread_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, spread as another one is."""
    sharded: Any = like
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device, like.dtype), sharded.device_mesh, sharded.placements)
