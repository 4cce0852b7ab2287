"""Every sampler draws, or is refused in one line; what is not finite is an error, not a black picture."""

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from loraloom.configs.command import run_command
from loraloom.configs.errors import UserError
from loraloom.inference.__main__ import main
from loraloom.inference.engine import Engine, Request
from loraloom.inference.finite import NotFinite
from loraloom.inference.schedulers import SCHEDULERS, check_steps, compatibles, make_scheduler

pytestmark = pytest.mark.slow

STEPS = {"sd1": (1, 2, 4, 20, 1001), "sd2": (1, 4, 1001)}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize(("family", "change"), [("sd1", {}), ("sd2", ZERO_SNR)])
def test_every_sampler_draws_or_is_refused_in_one_line(small_base, family, change):
    """Of noise and of v, with few steps and with all."""
    engine = Engine.load(str(small_base(family)))
    base = engine.parts["scheduler"]
    engine.parts["scheduler"] = base = type(base).from_config(base.config, **change)
    refused: dict[tuple[str, int], UserError] = {}
    for name in [*SCHEDULERS, *compatibles(base)]:
        for steps in STEPS[family] if name in SCHEDULERS else (1, 1001):
            try:
                engine.set_scheduler(name)
                (image,) = engine.generate(Request(["a star"], [0], steps=steps, guidance=1.0, micro_batch=1))
            except UserError as error:
                refused[name, steps] = error
            else:
                assert np.asarray(image).std() > 0, (name, steps)
    assert all(type(error) is UserError and "\n" not in str(error) for error in refused.values()), (
        "before it is sampled"
    )
    assert {key for key in refused if key[0] in SCHEDULERS} == {(name, 1001) for name in SCHEDULERS}
    few = {name for name, steps in refused if steps < 1001}
    assert few <= {"PNDMScheduler", "LMSDiscreteScheduler", "DPMSolverSDEScheduler"}, "Runge-Kutta, scipy, torchsde"


@pytest.mark.parametrize("steps", [51, 999, 1000])
def test_many_steps_are_drawn_or_refused_beforehand(small_base, steps):
    """The schedule alone, without the thousand passes of a UNet."""
    base, refused = diffusers.DDPMScheduler.from_pretrained(small_base("sd1"), subfolder="scheduler"), {}
    for name in SCHEDULERS:
        sampler = make_scheduler(name, base)
        try:
            check_steps(sampler, steps)
        except UserError as error:
            refused[name] = str(error)
        else:
            assert float(sampler.timesteps.max()) < 1000
    assert not any("\n" in words for words in refused.values())
    assert steps == 1000 or not {"euler", "ddim"} & refused.keys()  # a base that counts from 1 has 999
    assert steps != 51 or refused.keys() == {"lcm"}


def test_a_base_of_flow_matching_has_samplers_of_its_own():
    base = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    found = make_scheduler("dpmsolver++", base).config
    assert (found.use_flow_sigmas, found.prediction_type, found.flow_shift) == (True, "flow_prediction", 3.0)
    assert isinstance(
        make_scheduler("FlowMatchEulerDiscreteScheduler", base), diffusers.FlowMatchEulerDiscreteScheduler
    )
    with pytest.raises(UserError, match="'euler' is not for bases of flow matching; there are: dpmsolver"):
        make_scheduler("euler", base)


def damaged(base, part, folder):
    """A copy with one NaN."""
    shutil.copytree(base, folder)
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = min(tensors)
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("unet", "the sampled latents are not finite, so there is no picture: unet."),
        ("text_encoder", "the sampled latents are not finite, so there is no picture: text_encoder."),
        ("vae", "the VAE makes numbers that are not finite of the sampled latents, so there is no picture: vae."),
        ("weight", "too large"),
    ],
)
def test_what_is_not_finite_is_named_and_no_picture_is_written(what, words, small_base, make_adapter, tmp_path, capsys):
    base = small_base("sd1")
    options = ["--prompt", "a star", "--steps", "2", "--num-images", "1", "--out", str(tmp_path / "pictures")]
    if what == "weight":
        options += ["--base", str(base), "--adapter", f"{make_adapter(base)}:1e30"]
    else:
        options += ["--base", damaged(base, what, tmp_path / "base")]
    assert run_command(main, options) == 3
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in line
    assert not [*(tmp_path / "pictures").glob("*.png")]


def test_too_much_guidance_is_no_picture(small_base):
    with pytest.raises(NotFinite, match="guidance"):
        Engine.load(str(small_base("sd1"))).generate(Request(["a star"], [0], steps=2, guidance=1e38))


@pytest.mark.parametrize("zeros", [True, False])
def test_sdxl_without_a_negative_prompt_is_what_diffusers_makes(small_base, tmp_path, zeros):
    """Zeros or the embeddings of no words, as the index of the base has it."""
    folder = tmp_path / "base"
    shutil.copytree(small_base("sdxl"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": zeros}))
    engine = Engine.load(str(folder))
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, scheduler=engine.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for negative in (None, "a moon"):
        request = Request(["a star"], [7], steps=2, negative_prompt=negative or "", micro_batch=1)
        (ours,) = engine.generate(request)
        theirs = pipeline(
            "a star",
            negative_prompt=negative,
            num_inference_steps=2,
            guidance_scale=request.guidance,
            generator=torch.Generator().manual_seed(7),
        ).images[0]
        pictures.append(ours.tobytes())
        assert ours.tobytes() == theirs.tobytes()
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_half_precision_samples_on_a_cpu(small_base, family):
    """SDXL's VAE computes in fp32 for that; pictures are near those of fp32."""
    pictures = {}
    for dtype in ("fp32", "bf16", "fp16"):
        (image,) = Engine.load(str(small_base(family)), dtype=dtype).generate(Request(["a star"], [0], steps=2))
        pictures[dtype] = np.asarray(image, float)
    assert np.abs(pictures["fp32"] - pictures["fp16"]).mean() < 2
    assert np.abs(pictures["fp32"] - pictures["bf16"]).mean() < 8
