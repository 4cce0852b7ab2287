"""Putting the weights of one LoRA in the place of another's, in the same memory, so that nothing is compiled again."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters.active import set_scale
from ..adapters.artifact import MAGNITUDES, AdapterArtifact, Weights, module_path
from ..adapters.peft_adapters import carried, read_layer, tuner_layers
from ..adapters.weighed_dora import base_magnitude, is_weighed
from ..configs.errors import UserError


def prepare(denoiser: Any, target_rank: int) -> None:
    """Pads the LoRAs of a model to one rank and makes their scales tensors, which a compiled graph reads anew."""
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    try:
        prepare_model_for_compiled_hotswap(denoiser, target_rank=target_rank, check_compiled="ignore")
    except ValueError as error:
        raise UserError(f"hot-swapping at rank {target_rank}: {str(error).splitlines()[0]}") from error


def swap(part: str, denoiser: nn.Module, artifact: AdapterArtifact, file: Path, name: str) -> None:
    """The new weights, mixed in as the old ones were; modules that the file has not count no more.

    Written into the tensors that are there: PEFT's own function looks for names that contain the adapter's, and would
    empty others. UserError, before anything changes, for text encoders, words, other methods, modules that the old one
    has not, and ranks that are larger.
    """
    _check(part, artifact, file)
    layers = {path: layer for path, layer in tuner_layers(denoiser) if name in carried(layer)}
    has = {path for path, _ in denoiser.named_modules()}
    new = {module_path(part, path, has): weights for (_, path), weights in artifact.folded().modules.items()}
    for path, weights in new.items():
        if problem := _misfit(layers.get(path), weights, name):
            raise UserError(f"{file}: cannot take the place of {name!r}: {path} {problem}")
    for path, layer in layers.items():
        _write(layer, name, new.get(path))


def _misfit(layer: Any, weights: Weights, name: str) -> str:
    if layer is None or name not in getattr(layer, "lora_A", {}):
        return "is no module of the LoRA that is there"
    if (kind := read_layer(layer, name).kind) != weights.kind:
        return f"is {weights.kind} in the file, and {kind} in the adapter that is there"
    if weights.rank > (room := layer.lora_A[name].weight.shape[0]):
        return f"has rank {weights.rank}, and there is room for {room}: say enable_hotswap before the first adapter"
    return ""


@torch.no_grad()
def _write(layer: Any, name: str, weights: Weights | None) -> None:
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    factor = float(layer.scaling[name]) * layer.r[name] / layer.lora_alpha[name]
    down.zero_()
    up.zero_()
    if is_weighed(layer, name):
        _write_magnitude(layer, name, weights)
    if weights is not None:
        down[: weights.rank].copy_(weights.tensors["down"])
        up[:, : weights.rank].copy_(weights.tensors["up"])
    layer.r[name] = layer.lora_alpha[name] = 1  # the scale is in the weights
    set_scale(layer, name, factor)


def _write_magnitude(layer: Any, name: str, weights: Weights | None) -> None:
    """Of a DoRA; where there is none any more, the lengths that the base's own weight has."""
    vector = layer.lora_magnitude_vector[name].weight
    if weights is None:
        vector.copy_(base_magnitude(layer, name).reshape(vector.shape))
    else:
        (magnitude,) = (weights.tensors[kind] for kind in MAGNITUDES if kind in weights.tensors)
        vector.copy_(magnitude.reshape(vector.shape))
    layer.lora_variant[name].scale = 1.0  # it is in the weights


def _check(part: str, artifact: AdapterArtifact, file: Path) -> None:
    if others := sorted({owner for owner, _ in artifact.modules} - {part} | artifact.embeddings.keys()):
        raise UserError(
            f"{file}: has weights for {', '.join(others)}, and only adapters of the {part} alone can be hot-swapped: "
            "text encoders are not compiled, so delete the old adapter and load this one"
        )
    if artifact.method != "lora":
        raise UserError(f"{file}: is {artifact.method}, and only LoRA can be hot-swapped")
