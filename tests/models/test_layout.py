"""Names of layers, beside the models themselves and beside diffusers' own table of the original names."""

from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils as tables

from loraloom.adapters.artifact import base_modules
from loraloom.models.layout import clip_layers, original_names, unet_layers
from loraloom.models.part_tensors import meta_model
from loraloom.models.single_file import shipped_configs

KINDS = ["sd1", "sd2", "sdxl"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_names_are_those_of_the_models(kind):
    configs = shipped_configs(kind)
    for part in ("unet", "text_encoder", *(["text_encoder_2"] if kind == "sdxl" else [])):
        config = configs[f"{part}/config.json"]
        layers = unet_layers(config) if part == "unet" else clip_layers(config)
        assert len(set(layers)) == len(layers)
        assert set(layers) == set(base_modules(part, meta_model(part, config))), part


@pytest.mark.parametrize("kind", KINDS)
def test_original_names_are_those_that_diffusers_reads(kind):
    """Every original weight has a number of its own: after diffusers has renamed them, each is where we say."""
    config = shipped_configs(kind)["unet/config.json"]
    layers = unet_layers(config)
    names = original_names(layers)
    assert names.keys() == set(layers)
    numbers = {name: torch.tensor(float(number)) for number, name in enumerate(names.values())}
    norms = [f"{name.removesuffix('.in_layers.2')}.in_layers.0" for name in numbers if name.endswith(".in_layers.2")]
    checkpoint: dict[str, Any] = {f"model.diffusion_model.{name}.weight": number for name, number in numbers.items()}
    checkpoint |= {f"model.diffusion_model.{name}.weight": torch.tensor(-1.0) for name in [*norms, "out.0"]}
    biases = [name.removesuffix("weight") + "bias" for name in checkpoint]
    checkpoint |= {name: torch.tensor(-1.0) for name in biases}
    renamed = tables.convert_ldm_unet_checkpoint(checkpoint, dict(config))
    assert {path: renamed[f"{path}.weight"].item() for path in layers} == {
        path: numbers[name].item() for path, name in names.items()
    }


def test_of_other_models_there_are_no_original_names():
    assert original_names(["blocks.0.attn.to_q"]) == {}
