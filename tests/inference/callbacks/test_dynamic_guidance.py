"""Guidance that ends early: the same numbers as two phases written by hand, at half the cost in the second."""

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
)
from diffusers.callbacks import SDCFGCutoffCallback, SDXLCFGCutoffCallback

from loraloom.configs.errors import UserError
from loraloom.inference.callbacks.dynamic_guidance import DynamicGuidance, positive_half
from loraloom.models.noise.process import Noised

pytestmark = pytest.mark.slow

KINDS = ("sd1", "sdxl", "pocket")
PROMPTS = ["a red star", "a blue moon"]


def rows_of(module) -> tuple[list[int], object]:
    """The rows of each forward pass of a module, and the handle of the hook that counts them."""
    rows: list[int] = []
    hook = module.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(args[0] if args else kwargs["sample"])), with_kwargs=True
    )
    return rows, hook


def by_hand(engine, steps: int, guided: int, guidance: float) -> torch.Tensor:
    """Latents of PROMPTS with the seeds 0 and 1, guided in the first steps only."""
    family, parts, scheduler = engine.family, engine.parts, engine.pipeline.scheduler
    positive, negative = (family.encode_prompts(parts, words) for words in (PROMPTS, ["", ""]))
    shape = (1, *family.native_latents(parts))
    side = float(shape[-1] * engine.pipeline.vae_scale_factor)
    geometry = torch.tensor([[side, side, 0, 0, side, side]] * 2)
    scheduler.set_timesteps(steps)
    latents = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(k)) for k in (0, 1)])
    latents = latents * scheduler.init_noise_sigma
    for index, timestep in enumerate(scheduler.timesteps):
        noised = Noised(scheduler.scale_model_input(latents, timestep), timestep, latents, geometry, geometry)
        prediction = family.predict(parts, noised, positive, geometry)
        if index < guided:
            without = family.predict(parts, noised, negative, geometry)
            prediction = without + guidance * (prediction - without)
        latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_to_the_end_changes_no_bit(engine_of, sample, kind):
    pipeline = engine_of(kind).pipeline
    assert torch.equal(sample(pipeline, DynamicGuidance(until=1.0)), sample(pipeline))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_half_of_it_is_two_phases_written_by_hand(engine_of, sample, kind):
    engine = engine_of(kind)
    found = sample(engine.pipeline, DynamicGuidance(until=0.5), prompt=PROMPTS, negative_prompt=["", ""])
    assert torch.allclose(found, by_hand(engine, steps=4, guided=2, guidance=4.0), atol=1e-4)
    assert (found - sample(engine.pipeline)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_images_of_one_call_are_those_of_single_calls(engine_of, sample, kind):
    pipeline = engine_of(kind).pipeline
    together = sample(pipeline, DynamicGuidance(until=0.5), images=(0, 1, 2))
    for k in (0, 1):
        assert torch.allclose(sample(pipeline, DynamicGuidance(until=0.5), images=(k,))[0], together[k], atol=1e-4)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_rest_of_the_steps_cost_half(engine_of, sample, kind):
    pipeline = engine_of(kind).pipeline
    rows, hook = rows_of(pipeline.unet)
    with hook:
        sample(pipeline, DynamicGuidance(until=0.6), steps=5)
    assert rows == [4, 4, 4, 2, 2]


def test_without_guidance_there_is_nothing_to_do(engine_of, sample):
    pipeline = engine_of("sd1").pipeline
    assert torch.equal(sample(pipeline, DynamicGuidance(0.5), guidance=1.0), sample(pipeline, guidance=1.0))


@pytest.mark.parametrize(("kind", "cutoff"), [("sd1", SDCFGCutoffCallback), ("sdxl", SDXLCFGCutoffCallback)])
def test_a_single_image_is_that_of_diffusers_own_cutoff(engine_of, sample, kind, cutoff):
    pipeline = engine_of(kind).pipeline
    theirs = cutoff(cutoff_step_ratio=None, cutoff_step_index=1)
    alone = sample(pipeline, theirs, images=(1,))
    assert torch.equal(sample(pipeline, DynamicGuidance(0.5), images=(1,)), alone)
    assert torch.equal(sample(pipeline, DynamicGuidance(0.9), theirs, images=(1,)), alone)
    assert torch.equal(sample(pipeline, theirs, DynamicGuidance(0.5), images=(1,)), alone)


@pytest.fixture(scope="module")
def control_of(engine_of):
    """A ControlNet whose output matters."""

    def control_of(kind: str) -> ControlNetModel:
        control = ControlNetModel.from_unet(engine_of(kind).pipeline.unet)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in control.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        return control.eval()

    return control_of


def pictures(count: int) -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))[:count]


def with_control(pipeline_class, pipeline, control, **options):
    made = pipeline_class(**pipeline.components | {"controlnet": control}, **options)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize(("guess_mode", "control_rows"), [(False, [6, 6, 3, 3]), (True, [3, 3, 3, 3])])
def test_several_controlnets_and_guess_mode(engine_of, control_of, sample, guess_mode, control_rows):
    pair = [control_of("sd1"), control_of("sd1")]
    pipeline = with_control(
        StableDiffusionControlNetPipeline, engine_of("sd1").pipeline, pair, requires_safety_checker=False
    )
    options = {"guess_mode": guess_mode, "controlnet_conditioning_scale": [0.7, 0.4]}
    rows, hook = rows_of(pair[1])
    with hook:
        together = sample(
            pipeline, DynamicGuidance(0.5), images=(0, 1, 2), image=[pictures(3), pictures(3).flip(3)], **options
        )
    assert rows == control_rows
    single = [pictures(1), pictures(1).flip(3)]
    first = sample(pipeline, DynamicGuidance(0.5), images=(0,), image=single, **options)
    assert torch.allclose(first[0], together[0], atol=1e-4)
    assert not torch.allclose(sample(pipeline, images=(0,), image=single, **options), first, atol=1e-3)


def test_the_controlnet_of_sdxl(engine_of, control_of, sample):
    pipeline = with_control(
        StableDiffusionXLControlNetPipeline, engine_of("sdxl").pipeline, control_of("sdxl"), add_watermarker=False
    )
    rows, hook = rows_of(pipeline.unet)
    with hook:
        together = sample(pipeline, DynamicGuidance(0.5), images=(0, 1), image=pictures(2))
    assert rows == [4, 4, 2, 2]
    assert torch.allclose(
        sample(pipeline, DynamicGuidance(0.5), images=(0,), image=pictures(1))[0], together[0], atol=1e-4
    )


def test_inpainting_keeps_its_mask(engine_of, sample):
    """The part that is not painted is the picture's own, in every image."""
    parts = engine_of("sd1").pipeline.components
    pipeline = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    mask = torch.zeros(2, 1, 32, 32)
    mask[0, :, :16] = mask[1, :, 16:] = 1
    options = {"image": pictures(2), "mask_image": mask, "strength": 1.0, "height": 32, "width": 32}
    full, half = sample(pipeline, **options), sample(pipeline, DynamicGuidance(0.5), **options)
    assert torch.equal(full[0, :, 2:], half[0, :, 2:])
    assert torch.equal(full[1, :, :2], half[1, :, :2])
    assert (full[0, :, :2] - half[0, :, :2]).abs().max() > 1e-3


def test_a_pipeline_that_takes_no_answer_is_refused(engine_of, control_of, sample):
    pipeline = with_control(
        StableDiffusionXLControlNetInpaintPipeline,
        engine_of("sdxl").pipeline,
        control_of("sdxl"),
        add_watermarker=False,
    )
    with pytest.raises(UserError, match="does not take back add_text_embeds, add_time_ids"):
        sample(pipeline, DynamicGuidance(0.5))


def test_an_ip_adapter_is_refused(engine_of, sample, monkeypatch):
    pipeline = engine_of("sd1").pipeline
    monkeypatch.setattr(pipeline.unet, "encoder_hid_proj", torch.nn.Identity())
    with pytest.raises(UserError, match="IP adapter"):
        sample(pipeline, DynamicGuidance(0.5))


@pytest.mark.parametrize("until", [0.0, -1.0, 1.1, float("nan")])
def test_a_fraction_is_above_0_and_up_to_1(until):
    with pytest.raises(UserError, match="above 0 and up to 1"):
        DynamicGuidance(until)


def test_only_doubled_tensors_are_halved():
    doubled = torch.arange(4.0)
    assert positive_half(doubled, rows=2).tolist() == [2, 3]
    assert positive_half(doubled, rows=4) is doubled
    assert [each.tolist() for each in positive_half([doubled, doubled[:2]], rows=2)] == [[2, 3], [0, 1]]
    assert positive_half(None, rows=2) is None
