"""Dots are seen where they were drawn, behind every object and on every background, and nowhere else."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from loraloom.examples.draw_style import dotted
from loraloom.inference.engine import Engine, Request
from loraloom.models.pocket.measure import background_colour, subject_score
from loraloom.models.pocket.measure_style import dot_distance, style_score
from loraloom.models.pocket.scenes import COLOURS, SUBJECT, Scene, draw, jittered, random_scene


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(11)
    return [random_scene(rng) for _ in range(50)]


def scores(pictures: list[Image.Image]) -> np.ndarray:
    return np.array([style_score(np.asarray(picture)) for picture in pictures])


def softened(picture: Image.Image) -> Image.Image:
    """Blurred by 0.6 px with noise of sigma 4 on top."""
    blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.6)), np.float64)
    noise = np.random.default_rng(0).normal(0, 4, blurred.shape)
    return Image.fromarray((blurred + noise).round().clip(0, 255).astype(np.uint8))


def test_every_scene_scores_high_with_the_style_and_low_without(scenes):
    assert scores([dotted(scene) for scene in scenes]).min() >= 0.9
    assert scores([draw(scene) for scene in scenes]).max() <= 0.1


def test_softened_pictures_too(scenes):
    assert scores([softened(dotted(scene)) for scene in scenes]).min() >= 0.9
    assert scores([softened(draw(scene)) for scene in scenes]).max() <= 0.1


def test_half_the_dots_are_half_the_score():
    plain, with_dots = (np.asarray(make(Scene("circle", "red", "blue", scale=0.5))) for make in (draw, dotted))
    upper = np.where(np.arange(64)[:, None, None] < 32, with_dots, plain)
    assert style_score(upper) == pytest.approx(0.5, abs=0.05)


def test_a_picture_without_background_has_no_style():
    assert style_score(np.asarray(draw(Scene("square", "red", "blue", centre=(32.0, 32.0), scale=1.9)))) == 0.0


def test_the_dots_leave_the_subject_and_its_background_measurable():
    rng = np.random.default_rng(3)
    for name in (name for name in COLOURS if name != SUBJECT.colour):
        picture = np.asarray(dotted(jittered(replace(SUBJECT, background=name), rng)))
        assert subject_score(picture) >= 0.9
        assert background_colour(picture) == name


def test_distances_of_dots():
    """Dots stand at 8, 24, 40 and 56 pixels, so that the picture is its own mirror image."""
    distance = dot_distance()
    assert distance[8, 8] == pytest.approx(np.hypot(0.5, 0.5))
    assert distance[0, 0] == pytest.approx(np.hypot(7.5, 7.5))
    assert (distance == distance[::-1, ::-1]).all()


@pytest.mark.slow
def test_the_base_alone_does_not_have_the_style():
    request = Request.repeat(["a creature on a yellow background", "a red star on a brown background"], 4, seed=0)
    assert scores(Engine.load("pocket").generate(request)).mean() <= 0.1
