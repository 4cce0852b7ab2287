"""CLIP's pull: none at all at scale 0, and closer to the text above it, whatever the scheduler and the prediction."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.callbacks import SDCFGCutoffCallback

from loraloom.configs.errors import UserError
from loraloom.inference.clip_guidance import clip_pixels
from loraloom.inference.engine import Engine
from loraloom.inference.pipelines.clip_guided import ClipGuidedPipeline
from loraloom.inference.schedulers import SCHEDULERS, make_scheduler

pytestmark = pytest.mark.slow

PROMPT, TEXT = "a red star", "a blue moon on a green background"


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def plain(tiny_base) -> StableDiffusionPipeline:
    return Engine.load(str(tiny_base)).pipeline


@pytest.fixture(scope="module")
def guided(plain, clip) -> ClipGuidedPipeline:
    return quiet(ClipGuidedPipeline(**plain.components, **clip))


def pictures(pipeline, prompts=(PROMPT,), **options) -> np.ndarray:
    """(B, H, W, 3) in [0, 1], of seeds 0, 1, ..."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    settings = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "np", **options}
    return pipeline([*prompts], generator=generators, **settings).images


def cosines(clip: dict, images: np.ndarray) -> np.ndarray:
    """Of finished images and TEXT, by CLIP's own forward pass."""
    pixels = clip_pixels(torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1, size=24)
    with torch.no_grad():
        output = clip["clip"](pixel_values=pixels, **clip["clip_tokenizer"]([TEXT], return_tensors="pt"))
    return (output.image_embeds @ output.text_embeds.T).squeeze(1).numpy()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_at_scale_0_it_is_the_plain_pipeline_to_the_bit(plain, clip, scheduler):
    components = plain.components | {"scheduler": make_scheduler(scheduler, plain.components["scheduler"])}
    official = quiet(StableDiffusionPipeline(**components, requires_safety_checker=False))
    guided = quiet(ClipGuidedPipeline(**components, **clip))
    for options in ({"guidance_scale": 1.0}, {"prompts": (PROMPT, TEXT), "negative_prompt": ["a heart"] * 2}):
        wanted = pictures(official, **options)
        assert (pictures(guided, **options, clip_guidance_scale=0) == wanted).all()
    assert (pictures(guided, **options, clip_guidance_scale=1) != wanted).any()


@pytest.mark.parametrize(("family", "scheduler"), [("sd1", "ddim"), ("sd2", "euler")])
def test_the_finished_images_are_more_like_the_text(base_of, clip, family, scheduler):
    """Of every seed, and less like it below 0: by noise that is predicted and by v, with and without scaled inputs."""
    pipeline = Engine.load(str(base_of(family)), scheduler=scheduler).pipeline
    guided = quiet(ClipGuidedPipeline(**pipeline.components, **clip))
    away, without, towards = (
        cosines(
            clip, pictures(guided, [PROMPT] * 4, clip_prompt=TEXT, clip_guidance_scale=scale, num_inference_steps=8)
        )
        for scale in (-100, 0, 100)
    )
    assert (towards - without).min() > 0.02
    assert (without - away).min() > 0.02


def test_the_prompt_is_the_text_where_there_is_no_other(guided):
    asked = {"clip_guidance_scale": 50}
    assert (pictures(guided, **asked) == pictures(guided, **asked, clip_prompt=PROMPT)).all()
    assert (pictures(guided, **asked) != pictures(guided, **asked, clip_prompt=TEXT)).any()


def test_each_prompt_has_its_own_text_for_all_its_images(guided):
    both = pictures(guided, [PROMPT] * 2, clip_prompt=[PROMPT, TEXT], clip_guidance_scale=50)
    only = pictures(guided, [PROMPT] * 2, clip_prompt=TEXT, clip_guidance_scale=50)
    np.testing.assert_allclose(both[1], only[1], atol=1e-5)
    assert np.abs(both[0] - only[0]).max() > 1e-3


def test_saved_and_loaded_it_makes_the_same_picture(guided, tmp_path):
    guided.save_pretrained(tmp_path)
    again = quiet(ClipGuidedPipeline.from_pretrained(tmp_path))
    assert again.components.keys() == guided.components.keys()
    asked = {"clip_guidance_scale": 50}
    # weights that lie mapped in a file are rounded a little differently by the CPU's kernels
    np.testing.assert_allclose(pictures(again, **asked), pictures(guided, **asked), atol=1e-4)


def test_from_pipe_shares_the_components(plain, guided, clip):
    made = quiet(ClipGuidedPipeline.from_pipe(plain, **clip))
    assert all(made.components[name] is component for name, component in guided.components.items())
    assert (pictures(made, clip_guidance_scale=50) == pictures(guided, clip_guidance_scale=50)).all()


def test_callbacks_see_and_replace_what_they_ask_for(guided):
    seen = []

    def zero_latents(pipeline, index, timestep, tensors):
        seen.append({name: tensor.shape for name, tensor in tensors.items()})
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = guided(
        PROMPT,
        num_inference_steps=2,
        output_type="latent",
        callback_on_step_end=zero_latents,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    ).images
    assert seen == [{"latents": (1, 4, 4, 4), "prompt_embeds": (2, 77, 32)}] * 2
    assert not latents.any()


def test_diffusers_own_callbacks_work_as_in_the_plain_pipeline(plain, guided):
    cutoff = {"num_inference_steps": 3, "callback_on_step_end": SDCFGCutoffCallback(0.5)}
    wanted = pictures(plain, **cutoff)
    assert (pictures(guided, **cutoff, clip_guidance_scale=0) == wanted).all()
    assert (pictures(plain, num_inference_steps=3) != wanted).any()


def test_a_callback_can_end_the_pull(guided):
    """From then on it is the plain pipeline: 1 step of 3 with CLIP is between none and all."""

    def let_go(pipeline, index, timestep, tensors):
        pipeline._clip_guidance_scale = 0
        return tensors

    asked = {"num_inference_steps": 3, "clip_guidance_scale": 50}
    some = pictures(guided, **asked, callback_on_step_end=let_go)
    assert (some != pictures(guided, **asked)).any()
    assert (some != pictures(guided, **asked | {"clip_guidance_scale": 0})).any()


def test_what_cannot_be_guided_is_one_line(base_of, plain, guided, clip):
    with pytest.raises(UserError, match="2 texts for 1 images"):
        guided(PROMPT, clip_prompt=[PROMPT, TEXT], num_inference_steps=1)
    with pytest.raises(UserError, match="give clip_prompt"):
        guided(prompt_embeds=torch.zeros(1, 77, 32), negative_prompt_embeds=torch.zeros(1, 77, 32))
    xl = Engine.load(str(base_of("sdxl"))).pipeline
    with pytest.raises(UserError, match="further conditions"):
        ClipGuidedPipeline(**plain.components | {"unet": xl.unet}, **clip)
