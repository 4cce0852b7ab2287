"""Adapters scheduled by step: each step is predicted with the weights that its fraction says."""

import time

import numpy as np
import pytest
import torch

from loraloom.adapters import active
from loraloom.configs.errors import UserError
from loraloom.inference.callback import Callback
from loraloom.inference.callbacks.adapter_schedule import AdapterSchedule
from loraloom.inference.engine import Engine, Request
from loraloom.inference.schedulers import make_scheduler

pytestmark = pytest.mark.slow

STEPS = 4
REQUEST = Request(["a star"], [0], steps=STEPS)


@pytest.fixture(scope="module")
def one_engine(tiny_base, make_adapter) -> Engine:
    engine = Engine.load(str(tiny_base))
    for seed, name in enumerate("ab"):
        engine.adapters.load_adapter(make_adapter(tiny_base, name=name, seed=seed), name)
    return engine


@pytest.fixture
def engine(one_engine) -> Engine:
    one_engine.adapters.set_adapters({"a": 1.0, "b": 0.5})
    return one_engine


class Final(Callback):
    """Notes the latents after the last step."""

    tensor_inputs = ["latents"]

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        self.latents = callback_kwargs["latents"]
        return callback_kwargs


def sampled(engine: Engine, *callbacks: Callback, request: Request = REQUEST) -> torch.Tensor:
    final = Final()
    engine.generate(request, callbacks=[*callbacks, final])
    return final.latents


def state(engine: Engine):
    return active.switches([engine.parts["unet"], engine.parts["text_encoder"]]), dict(engine.adapters.weights)


def test_a_constant_schedule_is_the_static_weight_to_the_bit(engine):
    weight = {"unet": {"down": 0.3, "mid": 0.0, "up": 1.2}, "text_encoder": 0.6}
    with engine.adapters.weighted({"a": weight, "b": 0.5}):
        static = sampled(engine)
    with engine.adapters.weighted({"a": {"unet": 7.0, "text_encoder": 0.6}, "b": 0.5}):
        scheduled = sampled(engine, AdapterSchedule(engine.adapters, {"a": lambda fraction: weight}))
    assert torch.equal(scheduled, static)
    assert not torch.equal(static, sampled(engine))


def by_hand(engine: Engine, weights: list[float]) -> torch.Tensor:
    """Latents of a loop over UNet and scheduler, with the weight of `a` in each step."""
    prompts = [engine.family.encode_prompts(engine.parts, [words]).prompt_embeds for words in ("", "a star")]
    embeds = torch.cat([prompt.repeat(4, 1, 1) for prompt in prompts])
    scheduler = make_scheduler("dpmsolver++", engine.parts["scheduler"])
    scheduler.set_timesteps(STEPS)
    one = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    latents = one.repeat(4, 1, 1, 1)
    for timestep, weight in zip(scheduler.timesteps, weights, strict=True):
        engine.adapters.set_adapters({"a": {"unet": weight}, "b": 0.5})
        negative, positive = engine.parts["unet"](torch.cat([latents] * 2), timestep, embeds).sample.chunk(2)
        noise = negative + REQUEST.guidance * (positive - negative)
        latents = scheduler.step(noise, timestep, latents).prev_sample
    return latents


@torch.no_grad()
def test_two_phases_are_a_hand_written_loop(engine):
    fractions = []

    def second_half(fraction: float) -> float:
        fractions.append(fraction)
        return 0.0 if fraction < 0.5 else 1.5

    before = state(engine)
    scheduled = sampled(engine, AdapterSchedule(engine.adapters, {"a": second_half}))
    assert state(engine) == before
    assert fractions == [0.0, 0.0, 0.25, 0.5, 0.75]  # the first is a trial
    assert torch.equal(scheduled, by_hand(engine, [0.0, 0.0, 1.5, 1.5]))


def test_text_encoders_keep_the_weight_of_before(engine):
    """Zero in the UNet from the first step on, one in the words: neither the base nor the adapter."""
    off = AdapterSchedule(engine.adapters, {"a": lambda fraction: 0.0, "b": lambda fraction: 0.0})
    scheduled = sampled(engine, off)
    with engine.adapters.weighted({"a": {"unet": 0.0}, "b": {"unet": 0.0, "text_encoder": 0.5}}):
        assert torch.equal(scheduled, sampled(engine))
    with engine.adapters.weighted({}):
        assert not torch.equal(scheduled, sampled(engine))


def test_an_adapter_that_was_off_is_active_for_the_call(engine):
    schedule = AdapterSchedule(engine.adapters, {"b": lambda fraction: 0.5})
    with engine.adapters.weighted({"a": 1.0, "b": {"unet": 0.5, "text_encoder": 0.0}}):
        both = sampled(engine)
    with engine.adapters.weighted({"a": 1.0}):
        assert torch.equal(sampled(engine, schedule), both)
        assert engine.adapters.get_active_adapters() == ["a"]
    engine.adapters.disable()
    before, base = state(engine), sampled(engine)
    assert not torch.equal(sampled(engine, schedule), base)
    assert state(engine) == before
    assert torch.equal(sampled(engine), base)


def test_two_schedules_side_by_side_are_one(engine):
    weights = {"a": lambda fraction: 1 - fraction, "b": lambda fraction: fraction}
    apart = [AdapterSchedule(engine.adapters, {name: weight}) for name, weight in weights.items()]
    together = sampled(engine, AdapterSchedule(engine.adapters, weights))
    assert torch.equal(sampled(engine, *apart), together)


class Fails(Callback):
    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        if step_index == 1:
            raise RuntimeError("in the middle")
        return callback_kwargs


def test_everything_is_as_before_after_an_exception(engine):
    before, plain = state(engine), sampled(engine)
    with pytest.raises(RuntimeError, match="in the middle"):
        sampled(engine, AdapterSchedule(engine.adapters, {"a": lambda fraction: 9.0}), Fails())
    assert state(engine) == before
    assert torch.equal(sampled(engine), plain)


def refused(engine: Engine, weights) -> str:
    """What is said, and that it is said before a step is predicted."""
    steps = []
    handle = engine.parts["unet"].register_forward_pre_hook(lambda *_: steps.append(1))
    with pytest.raises(UserError) as caught:
        sampled(engine, AdapterSchedule(engine.adapters, weights))
    handle.remove()
    assert steps == []
    return str(caught.value)


def test_what_cannot_be_is_said_before_the_first_step(engine, tiny_base, make_adapter):
    assert "no adapter 'c' here" in refused(engine, {"c": lambda fraction: 1.0})
    assert "is no number" in refused(engine, {"a": lambda fraction: "full"})
    assert "did you mean" in refused(engine, {"a": lambda fraction: {"unett": 1.0}})
    words = make_adapter(tiny_base, name="words", parts={"text_encoder": "attention"})
    engine.adapters.load_adapter(words, "words")
    assert "has nothing in the unet" in refused(engine, {"words": lambda fraction: 1.0})
    engine.adapters.load_adapter(make_adapter(tiny_base, "oft", name="turned", block_size=4), "turned")
    assert "is a rotation" in refused(engine, {"turned": lambda fraction: 1.0})
    engine.adapters.delete_adapters(["turned", "words"])
    engine.adapters.set_adapters({"a": 1.0})
    engine.adapters.fuse()
    assert "unfuse first" in refused(engine, {"a": lambda fraction: 1.0})
    engine.adapters.unfuse()


def test_a_step_costs_under_two_milliseconds_on_pocket(make_adapter):
    engine = Engine.load("pocket")
    engine.adapters.load_adapter(make_adapter("pocket"), "a")
    schedule = AdapterSchedule(engine.adapters, {"a": lambda fraction: {"unet": {"up": fraction}}})
    engine.pipeline._num_timesteps = 20
    seconds = []
    with schedule.around(engine.pipeline, 20):
        for step in range(19):
            begun = time.perf_counter()
            schedule.callback_fn(engine.pipeline, step, None, {})
            seconds.append(time.perf_counter() - begun)
    assert np.median(seconds) < 2e-3
