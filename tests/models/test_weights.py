"""The embedded base as it is shipped: small, complete, and read by plain diffusers."""

import json

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from loraloom.models.base import check_base, detect_family, locate_base
from loraloom.models.pocket import FOLDER
from loraloom.models.pocket.measure import background_colour, object_colour


def tensors(part: str) -> dict[str, torch.dtype]:
    (file,) = (FOLDER / part).glob("*.safetensors")
    with safe_open(file, "pt") as content:
        return {name: content.get_tensor(name).dtype for name in content.keys()}  # noqa: SIM118


def test_it_is_at_most_25_megabytes_of_fp16():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 25e6
    for part in ("unet", "vae", "text_encoder"):
        assert set(tensors(part).values()) == {torch.float16}


def test_the_text_encoder_spells_text_model():
    assert all(name.startswith("text_model.") for name in tensors("text_encoder"))


def test_its_schedule_is_that_of_stable_diffusion():
    schedule = json.loads((FOLDER / "scheduler/scheduler_config.json").read_text())
    assert schedule["_class_name"] == "DDPMScheduler"
    assert (schedule["beta_start"], schedule["beta_end"]) == (0.00085, 0.012)
    assert (schedule["beta_schedule"], schedule["prediction_type"]) == ("scaled_linear", "epsilon")


def test_plain_diffusers_loads_it_without_any_option_and_it_follows_a_prompt():
    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER)
    assert {module.dtype for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    prompt = ["a red circle on a blue background"] * 4
    images = pipeline(prompt, num_inference_steps=20, guidance_scale=4.0, generator=generators).images
    pictures = [np.asarray(image) for image in images]
    assert all(picture.shape == (64, 64, 3) for picture in pictures)
    right = [(object_colour(picture), background_colour(picture)) == ("red", "blue") for picture in pictures]
    assert sum(right) >= 3


def test_it_is_found_by_its_name():
    assert check_base("pocket") == []
    assert locate_base("pocket") == FOLDER
    assert detect_family(FOLDER) == "sd1"
    assert len(StableDiffusionPipeline.from_pretrained(FOLDER).tokenizer) <= 2000


def test_the_card_has_its_scores():
    card = (FOLDER / "README.md").read_text()
    assert "| background as named |" in card
    assert "not measured yet" not in card
