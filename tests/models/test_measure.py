"""Pictures whose scene is known are measured right: as drawn, and softened as a VAE softens them."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from loraloom.models.pocket.measure import (
    background_colour,
    largest_part,
    object_colour,
    shape_of,
    subject_features,
    subject_score,
    to_lab,
)
from loraloom.models.pocket.scenes import (
    BODY_COLOURS,
    COLOURS,
    SHAPES,
    SUBJECT,
    Scene,
    draw,
    jittered,
    random_scene,
)

pytestmark = pytest.mark.slow

Look = Callable[[Scene], np.ndarray]
SUBJECT_BACKGROUNDS = tuple(name for name in COLOURS if name != SUBJECT.colour)


def drawn(scene: Scene) -> np.ndarray:
    return np.asarray(draw(scene))


def softened(scene: Scene) -> np.ndarray:
    """Blurred by 0.6 px with noise of sigma 4 on top."""
    blurred = np.asarray(draw(scene).filter(ImageFilter.GaussianBlur(0.6)), np.float64)
    noise = np.random.default_rng(0).normal(0, 4, blurred.shape)
    return (blurred + noise).round().clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module", params=[drawn, softened], ids=lambda look: look.__name__)
def look(request: pytest.FixtureRequest) -> Look:
    return request.param


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(7)
    return [random_scene(rng) for _ in range(200)]


def subjects(count: int, seed: int = 3) -> list[Scene]:
    """The subject at random places and sizes, on every background but its own colour in turn."""
    rng = np.random.default_rng(seed)
    backgrounds = (SUBJECT_BACKGROUNDS[i % len(SUBJECT_BACKGROUNDS)] for i in range(count))
    return [jittered(replace(SUBJECT, background=background), rng) for background in backgrounds]


# ---------------------------------------------------------------------------- colours and shapes


def test_random_scenes_are_measured_as_they_were_drawn(scenes: list[Scene], look: Look):
    pictures = [(scene, look(scene)) for scene in scenes]
    shapes = [(scene, picture) for scene, picture in pictures if scene.shape in SHAPES]
    assert np.mean([background_colour(picture) == scene.background for scene, picture in pictures]) == 1.0
    assert np.mean([object_colour(picture) == scene.colour for scene, picture in pictures]) >= 0.99
    assert len(shapes) > 70
    assert np.mean([shape_of(picture) == scene.shape for scene, picture in shapes]) >= 0.97


@pytest.mark.parametrize("colour", COLOURS)
def test_every_colour_is_named_on_every_other(colour: str):
    for index, background in enumerate(name for name in COLOURS if name != colour):
        style = ("flat", "outlined")[index % 2]
        picture = drawn(Scene(SHAPES[index % len(SHAPES)], colour, background, style, centre=(32.0, 32.0)))
        assert (object_colour(picture), background_colour(picture)) == (colour, background)


def test_creatures_are_none_of_the_shapes(scenes: list[Scene], look: Look):
    creatures = [scene for scene in scenes if scene.shape == "creature"]
    assert np.mean([shape_of(look(scene)) is None for scene in creatures]) >= 0.9


@pytest.mark.parametrize("colour", ["white", "black", "teal"])
def test_an_empty_picture_has_a_background_and_nothing_else(colour: str):
    picture = np.full((64, 64, 3), COLOURS[colour], np.uint8)
    assert background_colour(picture) == colour
    assert object_colour(picture) is None
    assert shape_of(picture) is None
    assert subject_score(picture) == 0.0


def test_a_picture_of_the_subjects_colour_alone_is_not_the_subject():
    assert subject_score(np.full((64, 64, 3), COLOURS[SUBJECT.colour], np.uint8)) == 0.0


def test_lab_of_known_colours():
    """White and black by definition; sRGB red as tabulated for D65."""
    found = to_lab(np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0]]))
    np.testing.assert_allclose(found, [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20]], atol=0.05)


def test_the_largest_part_is_the_one_with_most_pixels():
    mask = np.array([[1, 1, 0, 1], [0, 0, 0, 1], [0, 1, 0, 1]], bool)
    expected = np.array([[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1]], bool)
    np.testing.assert_array_equal(largest_part(mask), expected)
    assert not largest_part(np.zeros((3, 3), bool)).any()


# ---------------------------------------------------------------------------- the subject


def test_the_subject_scores_high_on_every_background(look: Look):
    scores = np.array([subject_score(look(scene)) for scene in subjects(66)])
    assert scores.mean() >= 0.95
    assert np.percentile(scores, 5) >= 0.9


NEAR_MISSES = {
    "no belly": [{"belly": None}],
    "other belly": [{"belly": name} for name in COLOURS if name not in (SUBJECT.colour, SUBJECT.belly)],
    "two eyes": [{"num_eyes": 2}],
    "three eyes": [{"num_eyes": 3}],
    "other body": [{"colour": name} for name in BODY_COLOURS if name not in (SUBJECT.colour, SUBJECT.belly)],
}


@pytest.mark.parametrize("changes", NEAR_MISSES.values(), ids=NEAR_MISSES.keys())
def test_whatever_differs_in_one_feature_scores_low(changes: list[dict[str, object]], look: Look):
    scenes = [replace(scene, **changes[i // 11 % len(changes)]) for i, scene in enumerate(subjects(66, seed=4))]  # type: ignore[arg-type]
    scores = np.array([subject_score(look(scene)) for scene in scenes if scene.colour != scene.background])
    assert scores.mean() <= 0.1
    assert np.percentile(scores, 95) <= 0.3


def test_random_scenes_score_low(scenes: list[Scene], look: Look):
    scores = np.array([subject_score(look(scene)) for scene in scenes])
    assert scores.mean() <= 0.05
    assert np.percentile(scores, 95) <= 0.3


def test_each_feature_alone_tells_its_near_miss():
    """A change turns down the feature that it concerns, and leaves the others."""
    for change, feature in (({"belly": "blue"}, "belly_colour"), ({"num_eyes": 2}, "one_eye")):
        features = subject_features(drawn(replace(SUBJECT, background="gray", **change)))  # type: ignore[arg-type]
        assert features.pop(feature) == 0.0
        assert features["body"] == 1.0
    assert set(subject_features(drawn(replace(SUBJECT, background="gray"))).values()) == {1.0}


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_any_picture_gets_features_between_0_and_1(seed: int):
    rng = np.random.default_rng(seed)
    names = rng.integers(len(COLOURS), size=(8, 8))
    blocks = Image.fromarray(np.array(list(COLOURS.values()), np.uint8)[names])
    picture = np.asarray(blocks.resize((64, 64), Image.Resampling.NEAREST))
    assert all(0.0 <= value <= 1.0 for value in subject_features(picture).values())
    assert object_colour(picture) in (None, *COLOURS)
    assert shape_of(picture) in (None, *SHAPES)
