"""Regions: each place of a prediction is that of the region's adapters and prompt, and nothing of it stays behind."""

import functools
import hashlib

import pytest
import torch
from PIL import Image

from loraloom.adapters import active
from loraloom.configs.errors import UserError
from loraloom.inference.callback import Callback
from loraloom.inference.callbacks.adapter_schedule import AdapterSchedule
from loraloom.inference.engine import Engine, Request
from loraloom.inference.regional import Region, blend, blending_weights, mask_tensor, regional
from loraloom.models.family import PromptOptions

pytestmark = pytest.mark.slow

REQUEST = Request(["a star", "a heart"], [0, 1], steps=1)
LEFT, RIGHT = torch.zeros(32, 32), torch.zeros(32, 32)
LEFT[:, :16] = RIGHT[:, 16:] = 1
ALL = torch.ones(32, 32)


@pytest.fixture(scope="module")
def engine_of(base_of, make_adapter):
    """Its adapters, `b` only in sd1, are in the text encoders too; none is active outside of the regions."""

    @functools.cache
    def engine_of(family: str) -> Engine:
        engine = Engine.load(str(base_of(family)))
        for seed, name in enumerate("ab" if family == "sd1" else "a"):
            engine.adapters.load_adapter(make_adapter(base_of(family), name=name, seed=seed), name)
        engine.adapters.set_adapters({})
        return engine

    return engine_of


@pytest.fixture
def sd1(engine_of) -> Engine:
    return engine_of("sd1")


@pytest.fixture(params=["sd1", "sdxl"])
def engine(request, engine_of) -> Engine:
    return engine_of(request.param)


def predicted(engine: Engine, request: Request = REQUEST, callbacks=()) -> torch.Tensor:
    """What the pipeline gets from the denoiser in its first step, (B, C, 4, 4), and 4 or 8 samples."""
    outputs = []
    handle = engine.parts["unet"].register_forward_hook(lambda *given: outputs.append(given[-1][0]))
    engine.generate(request, callbacks=callbacks)
    handle.remove()
    return outputs[0]


def with_adapters(engine: Engine, weights, request: Request = REQUEST) -> torch.Tensor:
    with engine.adapters.weighted(weights):
        return predicted(engine, request)


def with_regions(engine: Engine, *regions: Region, request: Request = REQUEST) -> torch.Tensor:
    with regional(engine, regions):
        return predicted(engine, request)


def test_one_region_everywhere_is_the_plain_engine_to_the_bit(engine):
    weight = {"unet": {"down": 0.5}, "text_encoder": 0.7}
    request = Request(["a star"], [0], steps=1)
    with engine.adapters.weighted({"a": weight}):
        plain = engine.generate(request)[0]
    with regional(engine, [Region(ALL, {"a": weight})]):
        assert engine.generate(request)[0].tobytes() == plain.tobytes()
    assert engine.generate(request)[0].tobytes() != plain.tobytes()


def test_halves_are_the_predictions_of_their_adapters_to_the_bit(sd1):
    a, b = with_adapters(sd1, {"a": 1.0}), with_adapters(sd1, {"b": 0.5})
    found = with_regions(sd1, Region(LEFT, {"a": 1.0}), Region(RIGHT, {"b": 0.5}))
    assert torch.equal(found[..., :2], a[..., :2])
    assert torch.equal(found[..., 2:], b[..., 2:])
    assert (a - b).abs().mean() > 1e-3


def test_where_no_region_is_the_pipeline_predicts_as_it_does_without(sd1):
    with sd1.adapters.weighted({"b": 1.0}):
        outside = predicted(sd1)
        found = with_regions(sd1, Region(LEFT, {"a": 1.0}))
    assert torch.equal(found[..., :2], with_adapters(sd1, {"a": 1.0})[..., :2])
    assert torch.equal(found[..., 2:], outside[..., 2:])


def test_a_schedule_of_an_adapter_is_for_the_places_without_a_region(sd1):
    schedule = AdapterSchedule(sd1.adapters, {"b": lambda fraction: 0.5})
    with regional(sd1, [Region(LEFT, {"a": 1.0})]):
        found = predicted(sd1, callbacks=[schedule])
    assert torch.equal(found[..., :2], with_adapters(sd1, {"a": 1.0})[..., :2])
    weights = {"b": {"unet": 0.5, "text_encoder": 0.0}}
    assert torch.equal(found[..., 2:], with_adapters(sd1, weights)[..., 2:])


def test_two_halves_of_weight_are_the_mean(sd1):
    a, base = with_adapters(sd1, {"a": 1.0}), predicted(sd1)
    found = with_regions(sd1, Region(ALL / 2, {"a": 1.0}), Region(ALL / 2))
    torch.testing.assert_close(found, (a + base) / 2, rtol=0, atol=1e-6)


def test_a_region_has_its_own_prompt_and_the_negative_one_of_the_request(engine):
    """In two windows of tokens, without one of the encoder's layers."""
    options = {"steps": 1, "prompt_options": PromptOptions(windows=2, clip_skip=1), "negative_prompt": "a moon"}
    request = Request(["a star", "a heart"], [0, 1], **options)
    found = with_regions(engine, Region(LEFT, {"a": 1.0}, "a red ring"), Region(RIGHT), request=request)
    ring = with_adapters(engine, {"a": 1.0}, Request(["a red ring"] * 2, [0, 1], **options))
    assert torch.equal(found[..., :2], ring[..., :2])
    assert torch.equal(found[..., 2:], predicted(engine, request)[..., 2:])
    assert not torch.equal(ring[4:], with_adapters(engine, {"a": 1.0}, request)[4:])


def test_without_guidance_the_positive_half_is_all(sd1):
    request = Request(["a star"], [0], steps=1, guidance=1.0)
    found = with_regions(sd1, Region(LEFT, {"a": 1.0}, "a ring"), Region(RIGHT), request=request)
    ring = with_adapters(sd1, {"a": 1.0}, Request(["a ring"], [0], steps=1, guidance=1.0))
    assert len(found) == 4
    assert torch.equal(found[..., :2], ring[..., :2])


@pytest.mark.parametrize(("regions", "passes"), [([ALL], 1), ([LEFT], 2), ([LEFT, RIGHT], 2), ([LEFT, LEFT], 3)])
def test_a_step_costs_a_pass_for_each_region_and_one_where_none_is(sd1, regions, passes):
    calls = []
    handle = sd1.parts["unet"].conv_in.register_forward_pre_hook(lambda *_: calls.append(1))
    with regional(sd1, [Region(mask, {"a": 1.0}) for mask in regions]):
        sd1.generate(Request(["a star"] * 5, range(5), steps=2))
    handle.remove()
    assert len(calls) == 2 * 2 * passes  # micro-batches, steps


# ---------------------------------------------------------------------------- what is left behind


def trace(engine: Engine):
    unet = engine.parts["unet"]
    models = [model for model in engine.parts.values() if isinstance(model, torch.nn.Module)]
    tensors = [tensor for model in models for tensor in model.state_dict().values()]
    return (
        [hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for tensor in tensors],
        [(id(each.layer), *each[1:]) for each in active.switches(models)],
        [*map(id, unet.modules())],
        dict(vars(unet)),
        (unet.forward.__func__, unet.forward.__self__ is unet),
        dict(engine.adapters.weights),
        [*engine.around],
    )


class Fails(Callback):
    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        raise RuntimeError("in the middle")


def test_nothing_is_left_behind(sd1):
    before = trace(sd1)
    with regional(sd1, [Region(LEFT, {"a": 0.5})]):
        sd1.generate(REQUEST)
    assert trace(sd1) == before
    with pytest.raises(RuntimeError, match="in the middle"), regional(sd1, [Region(LEFT, {"a": 0.5})]):
        sd1.generate(REQUEST, callbacks=[Fails()])
    assert trace(sd1) == before


def test_a_forward_that_a_hook_has_put_there_runs_and_comes_back(sd1):
    unet, calls = sd1.parts["unet"], []
    forward = unet.forward

    def hooked(*args, **arguments):
        calls.append(1)
        return forward(*args, **arguments)

    unet.forward = hooked
    with regional(sd1, [Region(LEFT, {"a": 1.0})]):
        sd1.generate(REQUEST)
    assert unet.forward is hooked
    assert len(calls) == 2
    del unet.forward


# ---------------------------------------------------------------------------- masks


def test_masks_are_pooled_and_normalised():
    first = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    second = torch.tensor([[0.75, 0.0, 0.0]])
    weights, bare = blending_weights([first, second], torch.zeros(1, 4, 1, 3))
    # 4 columns to 3: means of columns 0-1, 1-2, 2-3
    torch.testing.assert_close(weights, torch.tensor([[[0.5, 1.0, 0.0]], [[0.5, 0.0, 0.0]]]))
    assert torch.equal(bare, torch.tensor([[0.0, 0.0, 1.0]]))


def test_a_blend_on_paper():
    one, two = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[5.0, 6.0]]]])
    assert torch.equal(blend([one, two], torch.tensor([[[1.0, 0.25]], [[0.0, 0.75]]])), torch.tensor([[[[1.0, 5.0]]]]))


def test_a_picture_is_a_mask():
    picture = Image.new("L", (3, 2), 0)
    picture.putpixel((2, 1), 255)
    picture.putpixel((0, 0), 51)
    assert torch.equal(mask_tensor(picture), torch.tensor([[0.2, 0.0, 0.0], [0.0, 0.0, 1.0]]))


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.ones(1, 8, 8), r"shape \(1, 8, 8\)"),
        (2 * torch.ones(8, 8), r"values from 2 to 2"),
        (torch.full((8, 8), torch.nan), r"need to be in \[0, 1\]"),
        (torch.ones(0, 8), r"shape \(0, 8\)"),
    ],
)
def test_what_is_no_mask_is_one_line(sd1, mask, words):
    with pytest.raises(UserError, match=words), regional(sd1, [Region(mask)]):
        pass


def test_what_cannot_be_is_said_when_the_block_begins(sd1):
    with pytest.raises(UserError, match="no adapter 'c' here"), regional(sd1, [Region(ALL, {"c": 1.0})]):
        pass
    with pytest.raises(UserError, match="no region"), regional(sd1, []):
        pass
    with regional(sd1, [Region(ALL)]), pytest.raises(UserError, match="one list"), regional(sd1, [Region(ALL)]):
        pass
    sd1.adapters.set_adapters({"a": 1.0})
    sd1.adapters.fuse()
    with pytest.raises(UserError, match="unfuse first"), regional(sd1, [Region(ALL)]):
        pass
    sd1.adapters.unfuse()
    sd1.adapters.set_adapters({})
    assert sd1.around == []
