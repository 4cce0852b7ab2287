"""DoRA in PEFT's layers, weighed as every adapter is: h = W x + w (W' x - W x), so that a weight of 0 is the base.

W' = V m / |V| for V = W + s B A (Liu et al. 2024, equation 5), with a length m of each output, or of each input as
OneTrainer and LyCORIS (`wd_on_out=False`) have it too. PEFT's own puts the weight w beside s, inside the norm, and
leaves m: most of a DoRA is there at any weight then (huggingface/diffusers#4751).
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional


class WeighedDora:
    """What PEFT asks how one adapter of a layer is computed (`peft.tuners.lora.layer.LoraVariant`); its weight is that
    layer's scale beside its own."""

    def __init__(self, scale: float, over_inputs: bool):
        self.scale, self.over_inputs = scale, over_inputs
        self._fused: tuple[Tensor, Tensor] | None = None  # what PEFT has merged: 1 - w + w f, and w f s B A

    def supports_lora_conversion(self) -> bool:
        return True

    def weight(self, layer: Any, name: str) -> Any:
        """A number, or a tensor of one where adapters are swapped without compiling again."""
        return layer.scaling[name] / self.scale

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        dropout, alone = module.lora_dropout[active_adapter], _is_first(module, active_adapter)
        if module.training and not isinstance(dropout, nn.Identity):
            x, alone = dropout(x), False
        weight = self.weight(module, active_adapter)
        change = self._change(module, active_adapter, x, result if alone else None)
        return result + (change if isinstance(weight, float) and weight == 1.0 else weight * change)

    def _change(self, layer: Any, name: str, x: Tensor, known: Tensor | None) -> Tensor:
        """W' x - W x; `known` is what the base makes of x."""
        if self.over_inputs:
            factors = self._factors(layer, name, layer.get_base_layer().weight.to(x.dtype))
            turned = factors.reshape(-1, *[1] * (layer.get_base_layer().weight.ndim - 2)) * x
            added = layer.lora_B[name](layer.lora_A[name](turned)) * self.scale
            return _product(layer.get_base_layer(), turned - x) + added
        return layer.lora_magnitude_vector[name](
            x,
            lora_A=layer.lora_A[name],
            lora_B=layer.lora_B[name],
            scaling=self.scale,
            base_layer=layer.get_base_layer(),
            base_result=_output(layer.get_base_layer(), x) if known is None else known,
            adapter_name=name,
        )

    def _factors(self, layer: Any, name: str, base: Tensor) -> Tensor:
        """m / |V|, (out,) or (in,)."""
        lengths = self.lengths(base + self.scale * _plain(layer, name).to(base.dtype))
        return layer.lora_magnitude_vector[name].weight.flatten() / lengths

    def lengths(self, weight: Tensor) -> Tensor:
        """|V|, (out,) or (in,)."""
        return (weight.transpose(0, 1) if self.over_inputs else weight).flatten(1).norm(dim=1)

    # ---- PEFT's own merging, which diffusers' `fuse_lora` uses: W -> (1 - w + w f) W + w f s B A with f = m / |V|

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        with module._unmerged_base_weight(safe_merge=True) as base:
            factors = self._factors(module, active_adapter, base)
        return self._merged(module, active_adapter, module.get_base_layer().weight.data, factors)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        with module._unmerged_base_weight() as base:
            factors = self._factors(module, active_adapter, base)
        orig_weight.data = self._merged(module, active_adapter, orig_weight.data, factors)

    def _merged(self, layer: Any, name: str, weight: Tensor, factors: Tensor) -> Tensor:
        own = self.weight(layer, name)
        shaped = factors.reshape(*((1, -1) if self.over_inputs else (-1, 1)), *[1] * (weight.ndim - 2))
        kept, added = 1 - own + own * shaped, own * shaped * self.scale * _plain(layer, name)
        self._fused = kept, added
        return (kept * weight + added).to(weight.dtype)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        assert self._fused is not None, "it was merged"
        (kept, added), self._fused = self._fused, None
        return ((orig_weight.data - added) / kept).to(orig_weight.dtype)


def weigh(layer: Any, name: str, over_inputs: bool = False) -> None:
    """Makes a DoRA of PEFT's one that is weighed as others are; any other adapter stays as it is."""
    if name not in getattr(layer, "lora_magnitude_vector", ()) or is_weighed(layer, name):
        return
    held = layer.scaling[name]
    layer.set_scale(name, 1.0)
    own, layer.scaling[name] = float(layer.scaling[name]), held
    if own:  # of zero, no weight could be told
        layer.lora_variant[name] = WeighedDora(own, over_inputs)


def is_weighed(layer: Any, name: str) -> bool:
    return isinstance(getattr(layer, "lora_variant", {}).get(name), WeighedDora)


def is_over_inputs(layer: Any, name: str) -> bool:
    return is_weighed(layer, name) and layer.lora_variant[name].over_inputs


def own_scale(layer: Any, name: str) -> float:
    """Of B A: the scale of the layer, but for a DoRA without its weight."""
    return layer.lora_variant[name].scale if is_weighed(layer, name) else float(layer.scaling[name])


def strength(layer: Any, name: str) -> float:
    """The weight of a DoRA in its layer; of other adapters it is in their scale, and this is 1."""
    return float(layer.lora_variant[name].weight(layer, name)) if is_weighed(layer, name) else 1.0


def base_magnitude(layer: Any, name: str) -> Tensor:
    """The lengths of a weighed DoRA at which it changes nothing beside zero factors."""
    return layer.lora_variant[name].lengths(layer.get_base_layer().weight)


def _is_first(layer: Any, name: str) -> bool:
    """Whether nothing has changed what the base makes of x before this adapter is asked."""
    active = [each for each in layer.active_adapters if each in layer.lora_A]
    return active[:1] == [name] and layer.base_layer is layer.get_base_layer()


def _plain(layer: Any, name: str) -> Tensor:
    """B A in the shape of the weight."""
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    return (up.flatten(1) @ down.flatten(1)).reshape(layer.get_base_layer().weight.shape)


def _output(base: Any, x: Tensor) -> Tensor:
    """W x + b, in the type of x: of a convolution in half precision PEFT would not ask it so."""
    product = _product(base, x)
    return product if base.bias is None else product + base.bias.reshape(-1, *[1] * (base.weight.ndim - 2))


def _product(base: Any, x: Tensor) -> Tensor:
    """W x, without the bias."""
    weight = base.weight.to(x.dtype)
    if weight.ndim == 2:
        return functional.linear(x, weight)
    return functional.conv2d(x, weight, None, base.stride, base.padding, base.dilation, base.groups)
