"""Stopping: what was done so far is decoded, nothing more is begun, and the next request is whole again."""

import numpy as np
import pytest
import torch

from loraloom.configs.errors import UserError
from loraloom.inference.callback import Callback
from loraloom.inference.callbacks.interrupt import Interrupt
from loraloom.inference.callbacks.recorder import Recorder
from loraloom.inference.engine import MICRO_BATCH, Request
from loraloom.inference.latent_images import decoded


class After(Callback):
    """Does something after a step, counted over all calls of a request."""

    def __init__(self, step, action):
        self.step, self.action = step, action
        self.begin()

    def begin(self):
        self.done = 0

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        self.done += 1
        if self.done == self.step:
            self.action()
        return callback_kwargs


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_latents_are_those_after_the_step(engine_of, sample, kind):
    pipeline, interrupt, recorder = engine_of(kind).pipeline, Interrupt(), Recorder()
    whole = sample(pipeline, recorder)
    found = sample(pipeline, After(2, interrupt.stop), interrupt)
    assert torch.equal(found, torch.stack([frames[1] for frames in recorder.latents]))
    assert torch.equal(sample(pipeline, interrupt), whole)


def test_the_engine_decodes_what_was_begun_and_begins_nothing_more(engine_of):
    engine, interrupt, recorder = engine_of("pocket"), Interrupt(), Recorder()
    request = Request.repeat(["a red star"], 2 * MICRO_BATCH + 1, 0, steps=3)
    stop = After(3 + 2, interrupt.stop)  # in the second step of the second of three micro-batches
    images = engine.generate(request, callbacks=[recorder, stop, interrupt])
    assert len(images) == 2 * MICRO_BATCH
    assert [len(frames) for frames in recorder.latents] == [3] * MICRO_BATCH + [2] * MICRO_BATCH
    wanted = decoded(engine.pipeline, torch.stack([frames[-1] for frames in recorder.latents[MICRO_BATCH:]]))
    for found, image in zip(images[MICRO_BATCH:], wanted, strict=True):
        assert np.array_equal(np.asarray(found), np.asarray(image))


def test_an_engine_works_again_on_the_next_call(engine_of):
    engine, interrupt = engine_of("sd1"), Interrupt()
    request = Request.repeat(["a star"], MICRO_BATCH + 1, 0, steps=2)
    plain = engine.generate(request)
    assert len(engine.generate(request, callbacks=[After(1, interrupt.stop), interrupt])) == MICRO_BATCH
    again = engine.generate(request, callbacks=[interrupt])
    assert [image.tobytes() for image in again] == [image.tobytes() for image in plain]


def test_a_budget_of_time_counts_from_the_beginning_of_the_request(engine_of, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("loraloom.inference.callbacks.interrupt.monotonic", lambda: now[0])
    engine, interrupt, recorder = engine_of("sd1"), Interrupt(seconds=30.0), Recorder()
    request = Request(["a star"], [0], steps=4)

    def later(seconds):
        now[0] += seconds

    for seconds, steps in ((29.0, 4), (30.0, 2), (29.0, 4)):
        engine.generate(request, callbacks=[recorder, After(2, lambda: later(seconds)), interrupt])  # noqa: B023
        assert len(recorder.latents[0]) == steps
        later(1000.0)


def test_a_budget_that_is_over_leaves_one_step(engine_of):
    recorder = Recorder()
    engine_of("sd1").generate(Request(["a star"], [0], steps=4), callbacks=[recorder, Interrupt(seconds=1e-9)])
    assert len(recorder.latents[0]) == 1


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_budget_is_a_finite_time(seconds):
    with pytest.raises(UserError, match="not a finite number above 0"):
        Interrupt(seconds)
