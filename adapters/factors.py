"""A weight as a product of two small factors, with a core between them where it is a convolution's."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def product_size(a: "Tensor", b: "Tensor", core: "Tensor | None" = None) -> tuple[int, int] | None:
    """(out, in) of a @ b, (out, in * k * k) of a^T core b for a core (r, s, k, k); None where they do not fit."""
    if a.ndim != 2 or b.ndim != 2 or 0 in (*a.shape, *b.shape):
        return None
    if core is None:
        return (a.shape[0], b.shape[1]) if a.shape[1] == b.shape[0] else None
    if core.ndim != 4 or core.shape[:2] != (a.shape[0], b.shape[0]):
        return None
    return a.shape[1], b.shape[1] * core.shape[2:].numel()
