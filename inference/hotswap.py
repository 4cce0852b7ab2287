"""Putting the weights of one LoRA in the place of another's, in the same memory, so that nothing is compiled again."""

from pathlib import Path
from typing import Any

from torch import nn

from ..adapters.artifact import AdapterArtifact, module_path
from ..adapters.methods import lora
from ..adapters.peft_adapters import carried, tuner_layers
from ..configs.errors import UserError


def prepare(denoiser: Any, target_rank: int) -> None:
    """Pads the LoRAs of a model to one rank and makes their scales tensors, which a compiled graph reads anew."""
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    try:
        prepare_model_for_compiled_hotswap(denoiser, target_rank=target_rank, check_compiled="ignore")
    except ValueError as error:
        raise UserError(f"hot-swapping at rank {target_rank}: {str(error).splitlines()[0]}") from error


def swap(part: str, denoiser: nn.Module, artifact: AdapterArtifact, file: Path, name: str) -> None:
    """UserError for what cannot be swapped: text encoders, words, other methods, other modules, larger ranks."""
    from peft.utils.hotswap import check_hotswap_configs_compatible, hotswap_adapter_from_state_dict

    _check(part, artifact, file)
    has = {path for path, _ in denoiser.named_modules()}
    folded = {module_path(part, path, has): w for (_, path), w in artifact.folded().modules.items()}
    config = lora.config_of(folded)
    state = {}
    for path, weights in folded.items():
        state[f"{path}.lora_A.{name}.weight"] = weights.tensors["down"]
        state[f"{path}.lora_B.{name}.weight"] = weights.tensors["up"]
        if "magnitude" in weights.tensors:
            state[f"{path}.lora_magnitude_vector.{name}.weight"] = weights.tensors["magnitude"]
    held: Any = denoiser
    try:
        check_hotswap_configs_compatible(held.peft_config[name], _as_before(config, held.peft_config[name]))
        hotswap_adapter_from_state_dict(denoiser, state, name, config)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"{file}: cannot take the place of {name!r}: {str(error).splitlines()[0]}") from error
    for _, layer in tuner_layers(denoiser):
        if name in carried(layer):
            layer.r[name] = layer.lora_alpha[name] = 1  # the scale is in the weights


def _check(part: str, artifact: AdapterArtifact, file: Path) -> None:
    if others := sorted({owner for owner, _ in artifact.modules} - {part} | artifact.embeddings.keys()):
        raise UserError(
            f"{file}: has weights for {', '.join(others)}, and only adapters of the {part} alone can be hot-swapped: "
            "text encoders are not compiled, so delete the old adapter and load this one"
        )
    if artifact.method != "lora":
        raise UserError(f"{file}: is {artifact.method}, and only LoRA can be hot-swapped")


def _as_before(config: Any, held: Any) -> Any:
    """PEFT compares patterns of alphas as well, which here only tell how ranks differ."""
    from dataclasses import replace

    return replace(config, alpha_pattern=held.alpha_pattern)
