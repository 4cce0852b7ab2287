"""`loop.fast`: layers and optimiser of what trains become those of `kernels/`, which do the same in less time."""

from collections import Counter
from collections.abc import Mapping

from torch import nn
from torch.optim import Optimizer


def use_fast_layers(carriers: Mapping[str, nn.Module]) -> Counter[str]:
    """Changes, in place, every layer that fits; how many of each class there are now.

    Weights, names and what is computed stay; only the last bits of a sum may differ, always in the same way.
    """
    from .kernels.attention import FastAttention
    from .kernels.convolution import FastConv2d
    from .kernels.lora_linear import FastLinear

    changed: Counter[str] = Counter()
    for carrier in carriers.values():
        for module in carrier.modules():
            for kind in (FastLinear, FastAttention, FastConv2d):
                if kind.fits(module):
                    module.__class__ = kind
                    changed[kind.__name__] += 1
    return changed


def fast_optimizer(optimizer: Optimizer) -> Optimizer:
    """The same with fewer calls, where it is AdamW; one that has made no step yet."""
    from .kernels.adamw import FlatAdamW

    return FlatAdamW(optimizer.param_groups, fused=True) if FlatAdamW.fits(optimizer) else optimizer


def plain_class(instance: object) -> type:
    """The class of an object; of one of `kernels/`, that of the library whose work it does."""
    kind = type(instance)
    return kind.__mro__[1] if kind.__module__.startswith(f"{__package__}.kernels.") else kind
