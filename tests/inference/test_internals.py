"""What callbacks need of diffusers beyond its public names: each is there, and is used as `internals` says.

Where a test fails after an update of diffusers, `inference/internals.py` is the place to look at.
"""

import inspect
import re

import diffusers
import pytest

from loraloom.inference.internals import CHANGED, DOUBLED, GUIDED_BY_ARGUMENT, NOT_TAKEN_BACK, SHOWN, restored

KINDS = ("", "Img2Img", "Inpaint")
PIPELINES = [
    f"StableDiffusion{size}{control}{kind}Pipeline"
    for size in ("", "XL")
    for control in ("", "ControlNet")
    for kind in KINDS
]
UNIONS = [f"StableDiffusionXLControlNetUnion{kind}Pipeline" for kind in KINDS]


def source(of) -> str:
    return inspect.getsource(inspect.unwrap(of))


@pytest.fixture(params=PIPELINES)
def pipeline(request):
    return getattr(diffusers, request.param)


def test_the_names_are_these():
    assert (SHOWN, CHANGED) == ("_callback_tensor_inputs", ("_guidance_scale", "_interrupt"))


def test_a_call_sets_what_callbacks_change_and_its_steps_read_it(pipeline):
    call = source(pipeline.__call__)
    assert "self._guidance_scale = guidance_scale" in call
    assert "self._interrupt = False" in call
    assert "self._guidance_scale > 1" in source(pipeline.do_classifier_free_guidance.fget)
    assert "self._interrupt" in source(pipeline.interrupt.fget)
    assert "self._num_timesteps" in source(pipeline.num_timesteps.fget)
    loop = call[call.index("for i, t in enumerate(timesteps)") :]
    assert re.search(r"if self\.interrupt:\s+continue", loop)
    assert "torch.cat([latents] * 2) if self.do_classifier_free_guidance else latents" in loop


def test_it_takes_back_the_tensors_that_it_shows(pipeline):
    shown, call = getattr(pipeline, SHOWN), source(pipeline.__call__)
    assert {"latents", "prompt_embeds"} <= set(shown)
    lost = [name for name in ("latents", *DOUBLED) if name in shown and f'.pop("{name}", {name})' not in call]
    assert set(lost) == set(NOT_TAKEN_BACK.get(pipeline.__name__, ()))


def test_what_it_shows_of_ours_is_all_that_it_doubles(pipeline):
    """It joins a negative and a positive half itself, or has a control image or a mask prepared that way."""
    call = source(pipeline.__call__)
    doubled = set(re.findall(r"(\w+) = torch\.cat\(\[\w+, \w+\](?:, dim=0)?\)", call))
    for names in re.findall(r"^ +([\w, ]+) = self\.prepare_(?:control_)?(?:image|mask_latents)\(", call, re.MULTILINE):
        doubled |= {name for name in names.split(", ") if not name.endswith("_")}
    assert doubled == {name for name in DOUBLED if name in getattr(pipeline, SHOWN)}


@pytest.mark.parametrize("name", [*PIPELINES, *UNIONS])
def test_which_pipelines_follow_the_attribute(name):
    call = source(getattr(diffusers, name).__call__)
    assert ("+ self.guidance_scale * (" in call) == (name not in GUIDED_BY_ARGUMENT)
    assert ("+ guidance_scale * (" in call) == (name in GUIDED_BY_ARGUMENT)


def test_a_pipeline_is_as_before_also_where_it_had_nothing():
    class Pipeline:
        def __init__(self):
            self._guidance_scale = 3.0

    pipeline = Pipeline()
    with pytest.raises(RuntimeError), restored(pipeline):
        pipeline._guidance_scale, pipeline._interrupt, pipeline.other = 1.0, True, 5
        raise RuntimeError
    assert vars(pipeline) == {"_guidance_scale": 3.0, "other": 5}
