"""Frozen convolutions with large weights and small images as one matrix product, on a CPU.

The 1280-channel convolutions of Stable Diffusion see 4 to 64 positions at the sizes that a CPU trains. Their time is
that of reading the weight; oneDNN first copies the weight into another order, at every call, forward and backward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MOST_POSITIONS = 64
"""Samples x height x width."""
LEAST_WEIGHTS = 2**23
"""Numbers in the weight: smaller ones stay in the processor's cache, and copying them costs little."""
TALL = 16
"""Below so many positions MKL is faster where the positions are the rows."""


class FastConv2d(nn.Conv2d):
    """torch's layer with a frozen weight, stride 1, and as much padding as keeps the size."""

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether a layer can become one."""
        return (
            type(module) is nn.Conv2d
            and module.weight.device.type == "cpu"
            and module.weight.numel() >= LEAST_WEIGHTS
            and not module.weight.requires_grad
            and (module.stride, module.dilation, module.groups) == ((1, 1), (1, 1), 1)
            and module.padding == tuple(size // 2 for size in module.kernel_size)
            and module.padding_mode == "zeros"
        )

    def forward(self, input: Tensor) -> Tensor:
        few = input.shape[0] * input.shape[2] * input.shape[3] <= MOST_POSITIONS
        if not (few and self.training) or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        return _Product.apply(input, self.weight, self.bias)  # type: ignore[return-value]


class _Product(torch.autograd.Function):
    """weight (out, in * k * k) times columns (in * k * k, positions)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        count, _, height, width = x.shape
        matrix, kernel, padding = weight.flatten(1), *_window(weight)
        columns = F.unfold(x, kernel, padding=padding).transpose(0, 1).flatten(1)
        if columns.shape[1] < TALL:
            columns = columns.T.contiguous().T
        output = (matrix @ columns).view(-1, count, height, width).transpose(0, 1).contiguous()
        ctx.save_for_backward(weight)
        ctx.size = height, width
        return output if bias is None else output.add_(bias[:, None, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None
        count, matrix, kernel, padding = len(gradient), weight.flatten(1), *_window(weight)
        rows = gradient.transpose(0, 1).flatten(1)
        columns = (rows.T.contiguous() @ matrix).T if rows.shape[1] < TALL else matrix.T @ rows
        taps = columns.reshape(len(columns), count, -1).transpose(0, 1).float()  # summed before they are rounded
        of_x = F.fold(taps, ctx.size, kernel, padding=padding)
        return of_x.to(gradient.dtype), None, None


def _window(weight: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """Sizes of the kernel and of the padding."""
    height, width = weight.shape[2:]
    return (height, width), (height // 2, width // 2)
