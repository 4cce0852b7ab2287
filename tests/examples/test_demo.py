"""The demo's experiment, on the embedded base."""

import numpy as np
import pytest
from PIL import Image

from loraloom.configs.loader import load_config
from loraloom.examples import demo
from loraloom.examples.draw_sks import BACKGROUNDS, FOLDER
from loraloom.inference.engine import Engine
from loraloom.models.pocket.measure import background_colour, subject_score
from loraloom.train.fits import formats_of


def test_the_instance_images_show_the_subject_on_backgrounds_that_are_not_scored():
    pictures = [np.asarray(Image.open(file).convert("RGB")) for file in sorted(FOLDER.glob("*.png"))]
    assert len(pictures) == 6
    assert [background_colour(picture) for picture in pictures] == list(BACKGROUNDS)
    assert min(subject_score(picture) for picture in pictures) >= 0.9
    assert not set(BACKGROUNDS) & set(demo.NEW_BACKGROUNDS)


def test_the_description_says_everything_that_words_can():
    words = demo.describe_subject("green")
    assert words == "a pink round creature with antennae and a teal belly and one eye on a green background"


def test_the_demo_scores_64_images():
    counts = demo.DEMO
    assert 2 * 3 * counts.subject + counts.drift + 2 * len(demo.UNRELATED) * counts.unrelated == 64


def test_its_config_is_dreambooth_with_half_class_images():
    config = load_config(demo.CONFIG)
    assert [source.share for source in config.data.sources] == [0.5, 0.25, 0.25]
    assert set(config.adapter.parts) == {"unet", "text_encoder"}
    assert formats_of(config) == ["diffusers", "kohya"]


@pytest.mark.slow
def test_the_base_alone_scores_as_a_base_should():
    base = Engine.load("pocket")
    scores = demo.measure(base, base, demo.Counts(subject=1, drift=2, unrelated=1))
    assert set(scores) == {name for name in demo.MEANINGS if "without" not in name and name != "train_seconds"}
    assert scores["unrelated_base"] == scores["unrelated_adapter"]
    assert scores["unrelated_base"] >= 0.5
    assert scores["subject_base"] <= 0.3
    assert scores["class_drift"] <= 0.1


def test_the_explanation_names_every_score_and_where_to_look():
    scores = dict.fromkeys(demo.MEANINGS, 0.5)
    text = demo.explain(scores)
    assert "88.3 seconds in training steps" in demo.explain(scores | {"train_seconds": 88.3}).splitlines()
    assert all(what in text for what, _ in demo.MEANINGS.values())
    assert "runs/demo/before_after.png" in text
    assert demo.scores_page(scores).count("| 0.5 |") == len(demo.MEANINGS)


@pytest.mark.slow
def test_before_and_after_have_a_row_each():
    base = Engine.load("pocket")
    sheet = demo.before_after(base, base, num_images=1, zoom=1)
    pixels = np.asarray(sheet)
    assert isinstance(sheet, Image.Image)
    above, below = pixels[40:104, 70:], pixels[40 + 68 : 104 + 68, 70:]
    assert (above == below).all()
