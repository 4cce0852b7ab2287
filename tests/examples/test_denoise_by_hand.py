"""The lesson makes the pipeline's own image."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from loraloom.configs.command import run_command
from loraloom.examples.denoise_by_hand import decode, denoise, main, without_noise
from loraloom.inference.engine import Engine


@pytest.mark.parametrize("base", ["pocket", "sd1", "sd2"])
def test_it_is_the_image_of_the_pipeline(base, base_of):
    engine = Engine.load(base if base == "pocket" else str(base_of(base)))
    arguments = {"prompt": "a red star", "negative_prompt": "a moon", "guidance_scale": 4.0, "num_inference_steps": 3}
    generator = torch.Generator().manual_seed(1)
    expected = engine.pipeline(**arguments, generator=generator).images[0]
    with torch.no_grad():
        *_, last = denoise(engine.parts, "a red star", "a moon", steps=3, guidance=4.0, seed=1)
        found = decode(engine.parts, last.latents)
        latents = engine.pipeline(**arguments, generator=generator.manual_seed(1), output_type="latent").images
    assert torch.equal(last.latents, latents)
    assert (np.asarray(found) == np.asarray(expected)).all()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_right_prediction_gives_the_image_without_noise(prediction):
    scheduler = DDPMScheduler(prediction_type=prediction)
    clean, eps = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for timestep in torch.tensor([10, 500]):
        latents = scheduler.add_noise(clean, eps, timestep[None])
        target = eps if prediction == "epsilon" else scheduler.get_velocity(clean, eps, timestep[None])
        assert (without_noise(scheduler, latents, target, timestep) - clean).abs().max() < 1e-5


def test_it_writes_what_it_sees_on_the_way(tmp_path, capsys):
    arguments = ["--prompt", "a red star on a blue background", "--steps", "4", "--every", "2", "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["image.png", "step-002.png", "step-004.png"]
    names = ("step-002", "step-004", "image")
    first, last, image = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in names)
    assert (first != last).any()
    assert first.shape == image.shape == (64, 64, 3)
    assert "2 looks" in capsys.readouterr().out


def test_a_base_of_two_text_encoders_is_one_line(base_of, tmp_path, capsys):
    assert run_command(main, ["--prompt", "x", "--base", str(base_of("sdxl")), "--out", str(tmp_path)]) == 2
    assert "has two text encoders" in capsys.readouterr().err
