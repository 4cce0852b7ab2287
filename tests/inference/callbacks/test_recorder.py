"""The recorder keeps what diffusers has after each step, image by image, and draws it."""

import numpy as np
import pytest
import torch
from PIL import Image

from loraloom.configs.errors import UserError
from loraloom.inference.callback import Call
from loraloom.inference.callbacks.interrupt import Interrupt
from loraloom.inference.callbacks.preview import Preview
from loraloom.inference.callbacks.recorder import Recorder
from loraloom.inference.engine import MICRO_BATCH, Request
from loraloom.models.latent_rgb import to_rgb


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "pocket"])
def test_the_last_frame_is_the_result_and_the_result_is_the_same(engine_of, sample, kind):
    pipeline, recorder = engine_of(kind).pipeline, Recorder(every=3)
    found = sample(pipeline, recorder)
    assert torch.equal(found, sample(pipeline))
    assert [tuple(frames.shape) for frames in recorder.latents] == [(2, *found.shape[1:])] * 2  # steps 3 and 4
    assert torch.equal(torch.stack([frames[-1] for frames in recorder.latents]), found)


def test_each_image_of_a_request_has_its_row_and_the_next_request_begins_anew(engine_of):
    engine, recorder = engine_of("sd1"), Recorder()
    engine.generate(Request.repeat(["a star"], MICRO_BATCH + 1, 0, steps=2), callbacks=[recorder])
    assert [len(frames) for frames in recorder.latents] == [2] * (MICRO_BATCH + 1)
    last = recorder.latents[-1]
    engine.generate(Request(["a star"], [MICRO_BATCH], steps=2), callbacks=[recorder])
    (alone,) = recorder.latents
    assert torch.equal(alone, last)


def test_a_strip_has_a_row_for_each_image_and_a_gif_a_frame_for_each_step(engine_of, sample, tmp_path):
    engine, recorder = engine_of("pocket"), Recorder()
    sample(engine.pipeline, recorder, steps=3, call=Call(engine.family))
    recorder.write_strip(tmp_path / "strip.png")
    recorder.write_gif(tmp_path / "frames.gif")
    strip = np.asarray(Image.open(tmp_path / "strip.png"))
    assert strip.shape == (2 * 66 - 2, 3 * 66 - 2, 3)
    factors = engine.family.latent_rgb(engine.parts)
    for row in range(2):
        for column in range(3):
            corner = strip[row * 66 : row * 66 + 64, column * 66 : column * 66 + 64]
            wanted = to_rgb(recorder.latents[row][column : column + 1], factors)[0].numpy()
            assert np.array_equal(corner[::4, ::4], wanted)
    with Image.open(tmp_path / "frames.gif") as animation:
        assert (animation.n_frames, animation.size) == (3, (2 * 66 - 2, 64))  # type: ignore[attr-defined]
        frame = np.asarray(animation.convert("RGB"))[:, :64].astype(int)
    assert np.abs(frame - strip[:64, :64]).mean() < 10  # 256 colours


def test_rows_of_an_interrupted_request_are_as_long_as_they_came(engine_of, tmp_path):
    engine, recorder, interrupt, done = engine_of("sd1"), Recorder(), Interrupt(), []
    stop = Preview(lambda images, step: interrupt.stop() if done.append(step) or len(done) == 3 else None)
    request = Request.repeat(["a star"], MICRO_BATCH + 1, 0, steps=2)
    engine.generate(request, callbacks=[recorder, stop, interrupt])
    assert [len(frames) for frames in recorder.latents] == [2] * MICRO_BATCH + [1]
    recorder.write_strip(tmp_path / "strip.png")
    recorder.write_gif(tmp_path / "frames.gif")
    strip = np.asarray(Image.open(tmp_path / "strip.png"))
    assert strip.shape == (5 * 34 - 2, 2 * 34 - 2, 3)
    assert (strip[-32:, -32:] == 255).all()  # no second frame of the last one


def test_without_latents_or_a_family_there_is_nothing_to_draw(engine_of, sample, tmp_path):
    recorder = Recorder()
    with pytest.raises(UserError, match="nothing was recorded"):
        recorder.write_strip(tmp_path / "strip.png")
    sample(engine_of("sd1").pipeline, recorder, steps=1)
    with pytest.raises(UserError, match=r"Call\(family\)"):
        recorder.write_gif(tmp_path / "frames.gif")
    with pytest.raises(UserError, match="every=0"):
        Recorder(every=0)
