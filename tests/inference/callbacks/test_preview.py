"""Previews: the latents after each step, in colour or decoded, of the images that were asked for."""

import numpy as np
import pytest
import torch
from PIL import Image

from loraloom.configs.errors import UserError
from loraloom.inference.callback import Call
from loraloom.inference.callbacks.preview import Preview
from loraloom.inference.callbacks.recorder import Recorder
from loraloom.inference.engine import MICRO_BATCH, Request
from loraloom.models.latent_rgb import to_rgb


class Shown:
    """What a preview's function was given."""

    def __init__(self):
        self.steps, self.images = [], []

    def __call__(self, images, step):
        self.steps.append(step)
        self.images.append([np.asarray(image) for image in images])


@pytest.mark.parametrize("kind", ["sdxl", "pocket"])
def test_it_shows_the_latents_by_the_familys_map(engine_of, sample, kind):
    engine, shown, recorder = engine_of(kind), Shown(), Recorder()
    sample(engine.pipeline, Preview(shown, every=3), recorder, call=Call(engine.family))
    assert shown.steps == [3, 4]  # every third, and the last
    factors, zoom = engine.family.latent_rgb(engine.parts), engine.pipeline.vae_scale_factor
    for step, images in zip(shown.steps, shown.images, strict=True):
        wanted = to_rgb(torch.stack([frames[step - 1] for frames in recorder.latents]), factors).numpy()
        assert np.array_equal(np.stack(images), wanted.repeat(zoom, axis=1).repeat(zoom, axis=2))


def test_the_last_one_through_the_vae_is_the_picture(engine_of):
    engine, shown = engine_of("pocket"), Shown()
    request = Request.repeat(["a red star"], MICRO_BATCH, 0, steps=3)
    images = engine.generate(request, callbacks=[Preview(shown, vae=True)])
    assert shown.steps == [1, 2, 3]
    assert np.array_equal(np.stack(shown.images[-1]), np.stack([np.asarray(image) for image in images]))
    assert not np.array_equal(np.stack(shown.images[0]), np.stack(shown.images[-1]))


def test_watching_changes_nothing_and_needs_no_family_with_the_vae(engine_of, sample):
    pipeline, shown = engine_of("sd1").pipeline, Shown()
    assert torch.equal(sample(pipeline, Preview(shown, vae=True)), sample(pipeline))
    assert [len(images) for images in shown.images] == [2] * 4


def test_a_folder_holds_each_image_under_its_place_without_padding(engine_of, tmp_path):
    engine, folder = engine_of("sd1"), tmp_path / "a" / "b"
    request = Request.repeat(["a star"], MICRO_BATCH + 1, 0, steps=2)
    engine.generate(request, callbacks=[Preview(folder=folder, every=2)])
    assert sorted(file.name for file in folder.glob("0*")) == [f"{k:04d}-002.png" for k in range(MICRO_BATCH + 1)]
    pixels = {Image.open(file).tobytes() for file in folder.glob("0*")}
    assert len(pixels) == MICRO_BATCH + 1


def test_without_a_family_it_says_what_to_do(engine_of, sample):
    with pytest.raises(UserError, match=r"Call\(family\).* vae=True"):
        sample(engine_of("sd1").pipeline, Preview(Shown()))


def test_a_folder_that_cannot_be_is_one_line(engine_of, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        engine_of("sd1").generate(Request(["a"], [0], 1), callbacks=[Preview(folder=tmp_path / "file" / "x")])


@pytest.mark.parametrize("arguments", [{}, {"folder": "x", "every": 0}])
def test_arguments_that_cannot_be(arguments):
    with pytest.raises(UserError, match="Preview: "):
        Preview(**arguments)
