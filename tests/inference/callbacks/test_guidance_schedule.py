"""A guidance scale of its own for each step: the numbers of a loop written by hand."""

import pytest
import torch
from diffusers import StableDiffusionControlNetImg2ImgPipeline
from diffusers.callbacks import SDCFGCutoffCallback

from loraloom.configs.errors import UserError
from loraloom.inference.callback import Callback
from loraloom.inference.callbacks.dynamic_guidance import DynamicGuidance
from loraloom.inference.callbacks.guidance_schedule import GuidanceSchedule
from loraloom.inference.engine import Request


class Scales(Callback):
    """The guidance scale after each step, as the pipeline has it."""

    def __init__(self):
        self.seen = []

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        self.seen.append(pipeline.guidance_scale)
        return callback_kwargs


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_constant_is_the_calls_own_scale_to_the_bit(engine_of, sample, kind):
    pipeline = engine_of(kind).pipeline
    assert torch.equal(sample(pipeline, GuidanceSchedule(lambda _: 4.0), guidance=9.0), sample(pipeline, guidance=4.0))


def test_a_constant_is_the_requests_own_scale_in_the_engine(engine_of):
    engine, request = engine_of("pocket"), Request(["a red star"], [0], steps=3, guidance=4.0)
    (plain,) = engine.generate(request)
    (scheduled,) = engine.generate(Request(["a red star"], [0], 3, 1.0), callbacks=[GuidanceSchedule(lambda _: 4.0)])
    assert scheduled.tobytes() == plain.tobytes()


def test_each_step_has_its_own(engine_of, sample):
    scales = Scales()
    sample(engine_of("sd1").pipeline, scales, GuidanceSchedule(lambda done: 8 - 4 * done))
    assert scales.seen == [8, 7, 6, 5]  # seen before the next one is set


def test_the_last_step_is_linear_in_its_scale(engine_of, sample):
    """From the same latents a step goes to x + scale * y: that of the scale 4 is halfway between those of 2 and 6."""
    pipeline = engine_of("sd1").pipeline

    def ending(scale):
        return sample(pipeline, GuidanceSchedule(lambda done: 8.0 if done < 0.5 else scale), steps=2)

    assert torch.allclose(ending(4.0), (ending(2.0) + ending(6.0)) / 2, atol=1e-5)
    assert (ending(2.0) - ending(6.0)).abs().max() > 1e-3


def test_one_is_the_prediction_with_the_words_alone(engine_of, sample):
    pipeline = engine_of("sd1").pipeline
    assert torch.allclose(sample(pipeline, GuidanceSchedule(lambda _: 1.0)), sample(pipeline, guidance=1.0), atol=1e-4)


@pytest.mark.parametrize(("scale", "words"), [(0.9, "is 0.9"), (float("nan"), "is nan"), (float("inf"), "is inf")])
def test_a_scale_that_cannot_be_is_found_before_the_first_step(engine_of, sample, scale, words):
    scales = Scales()
    with pytest.raises(UserError, match=f"after 75% of the steps {words}, not 1 or more"):
        sample(engine_of("sd1").pipeline, scales, GuidanceSchedule(lambda done: scale if done > 0.7 else 4.0))
    assert scales.seen == []


@pytest.mark.parametrize("end", [DynamicGuidance(0.5), SDCFGCutoffCallback(None, 1)])
def test_what_another_callback_has_ended_stays_ended(engine_of, sample, end):
    pipeline, schedule = engine_of("sd1").pipeline, GuidanceSchedule(lambda _: 4.0)
    alone = sample(pipeline, end, images=(0,))
    assert torch.equal(sample(pipeline, schedule, end, images=(0,)), alone)
    assert torch.equal(sample(pipeline, end, schedule, images=(0,)), alone)


def test_a_pipeline_that_would_not_notice_is_refused(engine_of, sample):
    parts = engine_of("sd1").pipeline.components
    pipeline = StableDiffusionControlNetImg2ImgPipeline(**parts, controlnet=None, requires_safety_checker=False)
    with pytest.raises(UserError, match="ControlNetImg2ImgPipeline reads its guidance scale only once"):
        sample(pipeline, GuidanceSchedule(lambda _: 4.0))
