"""The contract: asked-for tensors exist, and nothing that a callback changes outlasts its call."""

import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback

from loraloom.configs.errors import UserError
from loraloom.inference.callback import Call, Callback, attached, is_due
from loraloom.inference.callbacks.dynamic_guidance import DynamicGuidance
from loraloom.inference.callbacks.guidance_schedule import GuidanceSchedule
from loraloom.inference.callbacks.interrupt import Interrupt
from loraloom.inference.callbacks.preview import Preview
from loraloom.inference.callbacks.recorder import Recorder
from loraloom.inference.engine import Engine
from loraloom.inference.internals import CHANGED


def stopping() -> Interrupt:
    """One that has been asked to stop when its first step ends."""
    return Interrupt(seconds=1e-9)


ALL = {
    "dynamic_guidance": lambda: DynamicGuidance(0.25),
    "guidance_schedule": lambda: GuidanceSchedule(lambda done: 9.0 - done),
    "preview": lambda: Preview(lambda images, step: None, vae=True),
    "interrupt": stopping,
    "recorder": Recorder,
    "diffusers' cutoff": lambda: SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0),
}


CALL_ONLY = {"_num_timesteps", "_guidance_rescale", "_clip_skip", "_cross_attention_kwargs"}
"""What a call leaves in a pipeline without any callback."""


class Asks(Callback):
    tensor_inputs = ["prompt_embed"]


class Breaks(Callback):
    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        raise RuntimeError("broken")


def test_an_unknown_tensor_is_answered_with_the_list(engine_of, sample):
    with pytest.raises(UserError, match=r'asks for \'prompt_embed\' \(did you mean "prompt_embeds"\?\).* latents, '):
        sample(engine_of("sd1").pipeline, Asks())


@pytest.mark.parametrize("name", ALL)
def test_nothing_outlasts_the_call(tiny_base, engine_of, sample, name):
    """Neither of one that ends nor of one that breaks, on a pipeline that was called before and on one that was not."""
    called, fresh = engine_of("sd1").pipeline, Engine.load(str(tiny_base)).pipeline
    plain = sample(called, images=(0,))
    for pipeline in (called, fresh):
        callback, before = ALL[name](), dict(vars(pipeline))
        changed = sample(pipeline, callback, images=(0,))
        assert vars(pipeline).keys() - before.keys() <= CALL_ONLY
        with pytest.raises(RuntimeError, match="broken"):
            sample(pipeline, callback, Breaks(), images=(0,))
        assert {key: vars(pipeline)[key] for key in CHANGED if key in vars(pipeline)} == {
            key: before[key] for key in CHANGED if key in before
        }
        assert callback.call == Call() if isinstance(callback, Callback) else True
    assert torch.equal(sample(called, images=(0,)), plain)
    assert torch.equal(changed, plain) == (name in ("preview", "recorder"))


def test_all_of_them_work_beside_each_other(engine_of, sample):
    pipeline, recorder = engine_of("sd1").pipeline, Recorder()
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    watching = [Preview(lambda images, step: None, vae=True), recorder, Interrupt()]
    schedule = GuidanceSchedule(lambda _: 4.0)
    found = sample(pipeline, *watching, schedule, cutoff, DynamicGuidance(0.9), images=(0,))
    assert torch.equal(found, sample(pipeline, DynamicGuidance(0.5), images=(0,)))
    assert len(recorder.latents[0]) == 4


def test_diffusers_own_list_runs_ours_without_attaching_them(engine_of, sample):
    """By hand, in plain diffusers: what concerns the first step, and what is restored, is then the user's."""
    pipeline, recorder = engine_of("sd1").pipeline, Recorder()
    both = MultiPipelineCallbacks([DynamicGuidance(0.5), recorder, SDCFGCutoffCallback(0.75)])
    found = sample(pipeline, images=(0,), callback_on_step_end=both)
    assert torch.equal(found, sample(pipeline, DynamicGuidance(0.5), images=(0,)))
    assert torch.equal(recorder.latents[0][-1], found[0])


def test_without_callbacks_nothing_is_attached(engine_of):
    with attached(engine_of("sd1").pipeline, [], num_steps=4) as arguments:
        assert arguments == {}


def test_rows_of_a_call_are_named_without_the_padding():
    assert Call().by_image("ab") == {0: "a", 1: "b"}
    assert Call(images=[4, 5]).by_image("abcd") == {4: "a", 5: "b"}


def test_every_third_step_and_the_last_are_due():
    class Pipeline:
        num_timesteps = 7

    assert [index for index in range(7) if is_due(Pipeline, index, 3)] == [2, 5, 6]
