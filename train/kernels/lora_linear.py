"""LoRA around linear layers as one function: fewer passes over memory than a module for each product and each sum.

    y = W x + s B A x   (Hu et al. 2021, equation 3)

Layers that read the same input, such as those of queries, keys and values, share the product with A and the sum of
the input's gradient.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...adapters.peft_adapters import NAME


class FastLinear(Linear):
    """PEFT's layer with one LoRA that has neither dropout nor a variant such as DoRA."""

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether a layer can become one."""
        return (
            type(module) is Linear
            and type(module.base_layer) is nn.Linear
            and not module.base_layer.weight.requires_grad
            and [*module.lora_A] == [NAME]
            and not module.lora_variant
            and not module.fan_in_fan_out
            and type(module.lora_dropout[NAME]) is nn.Identity
            and module.lora_B[NAME].bias is None
        )

    @property
    def is_ready(self) -> bool:
        """Whether the LoRA counts now."""
        return self.training and not self.disable_adapters and not self.merged and self.active_adapters == [NAME]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not self.is_ready:
            return super().forward(x, *args, **kwargs)
        return _of_one_input(x, [self])[0]


def are_ready(layers: Sequence[Any]) -> bool:
    """Whether all of them are such layers, whose LoRA counts."""
    return all(isinstance(layer, FastLinear) and layer.is_ready for layer in layers)


def apply_together(x: Tensor, *layers: Any, bases: Sequence[Tensor] | None = None) -> Sequence[Tensor]:
    """What linear layers make of the same input (..., in); `bases` are their `base_products`, if they are known."""
    return _of_one_input(x, layers, bases) if are_ready(layers) else [layer(x) for layer in layers]


@torch.no_grad()
def base_products(x: Tensor, layers: Sequence[Any]) -> list[Tensor]:
    """(M, out) of each: what the frozen layers alone make of an input of M rows."""
    rows = x.reshape(-1, x.shape[-1]).to(cast_type(x) or x.dtype)
    return [_base(rows, layer.base_layer.weight, layer.base_layer.bias) for layer in layers]


def cast_type(x: Tensor) -> torch.dtype | None:
    """The type that autocast wants."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _base(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    weight = weight.to(rows.dtype) if torch.is_autocast_enabled(rows.device.type) else weight
    return rows @ weight.T if bias is None else torch.addmm(bias.to(rows.dtype), rows, weight.T)


def _of_one_input(x: Tensor, layers: Sequence[Any], known: Sequence[Tensor] | None = None) -> Sequence[Tensor]:
    bases = [layer.base_layer for layer in layers]
    scales = tuple(float(layer.scaling[NAME]) for layer in layers)
    return _LoraLinears.apply(  # type: ignore[return-value]
        x,
        scales,
        known,
        *(base.weight for base in bases),
        *(base.bias for base in bases),
        *(layer.lora_A[NAME].weight for layer in layers),
        *(layer.lora_B[NAME].weight for layer in layers),
    )


class _LoraLinears(torch.autograd.Function):
    """All layers of one input. Products of the base are in its type or autocast's, those of the LoRA in their own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scales: tuple[float, ...], known: Sequence[Tensor] | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights, biases, downs, ups = _groups(tensors, len(scales))
        cast = cast_type(x)
        rows = x.reshape(-1, x.shape[-1]).to(cast or x.dtype)
        own = cast or downs[0].dtype
        down = (downs[0] if len(downs) == 1 else torch.cat([*downs])).to(own)
        ups = [up.to(own) for up in ups]
        inner = rows.to(own) @ down.T  # (M, sum of ranks)
        if known is None:
            outputs = [_base(rows, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        else:
            outputs = [output.clone() for output in known]
        for output, up, scale, part in zip(outputs, ups, scales, _split(inner, ups), strict=True):
            _add_product(output, part, up.T, scale)
        ctx.save_for_backward(rows, inner, down, *weights, *ups)
        ctx.scales, ctx.shape, ctx.types = scales, x.shape, (x.dtype, downs[0].dtype)
        return tuple(output.view(*x.shape[:-1], -1) for output in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, inner, down, *tensors = ctx.saved_tensors
        count = len(ctx.scales)
        weights, ups = tensors[:count], tensors[count:]
        kind, kept = ctx.types
        flat = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        own = [gradient.to(down.dtype) for gradient in flat]
        through = [gradient @ up * scale for gradient, up, scale in zip(own, ups, ctx.scales, strict=True)]
        parts = zip(own, _split(inner, ups), ctx.scales, strict=True)
        of_ups = [(gradient.T @ part).mul_(scale).to(kept) for gradient, part, scale in parts]
        together = through[0] if count == 1 else torch.cat(through, 1)
        of_downs = (together.T @ rows.to(down.dtype)).to(kept).split([up.shape[1] for up in ups])
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = flat[0] @ weights[0].to(flat[0].dtype)
            for gradient, weight in zip(flat[1:], weights[1:], strict=True):
                of_x.addmm_(gradient, weight.to(gradient.dtype))
            of_x = _add_product(of_x, together, down, 1.0).view(ctx.shape).to(kind)
        return (of_x, None, None, *[None] * (2 * count), *of_downs, *of_ups)


def _groups(tensors: Sequence[Any], count: int) -> list[Sequence[Any]]:
    return [tensors[start : start + count] for start in range(0, len(tensors), count)]


def _split(inner: Tensor, ups: Sequence[Tensor]) -> Iterator[Tensor]:
    """The columns of each layer."""
    return iter(inner.split([up.shape[1] for up in ups], 1))


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """total + scale * left @ right, in place; a product of another type is added before it is rounded."""
    if left.dtype == total.dtype:
        return total.addmm_(left, right, alpha=scale)
    return total.add_(left @ right, alpha=scale)
