"""The mixing example: its pictures, its table, and that weights reach the pictures."""

import numpy as np
from PIL import Image

from loraloom.configs.loader import load_config
from loraloom.examples import demo, mixing
from loraloom.examples.draw_style import FOLDER, NUM_CREATURES, NUM_SHAPES, dotted, style_scenes
from loraloom.examples.mixing import Mix
from loraloom.models.pocket.measure_style import style_score
from loraloom.models.pocket.scenes import describe, is_held_out

MIXES = [
    Mix(0.0, 0.0, 0.0, 0.01, 0.0),
    Mix(0.0, 0.8, 0.02, 0.9, 0.0),
    Mix(1.0, 0.0, 0.95, 0.03, 0.0),
    Mix(1.0, 0.8, 0.8, 0.85, 0.75),
]


def test_the_style_s_pictures_are_what_is_drawn_and_never_the_subject():
    scenes = style_scenes()
    files = sorted(FOLDER.glob("*.png"))
    assert len(scenes) == len(files) == NUM_SHAPES + NUM_CREATURES
    assert not any(is_held_out(scene) for scene in scenes)
    assert not {scene.background for scene in scenes} & set(demo.NEW_BACKGROUNDS)
    for scene, file in zip(scenes, files, strict=True):
        picture = np.asarray(Image.open(file).convert("RGB"))
        assert (picture == np.asarray(dotted(scene))).all()
        assert file.with_suffix(".txt").read_text() == f"{describe(scene)}\n"
        assert style_score(picture) >= 0.9


def test_its_config_writes_the_adapter_that_the_example_mixes():
    output = load_config(mixing.STYLE_CONFIG).output
    assert f"{output.dir}/{output.name}.safetensors" == str(mixing.STYLE)


def test_the_table_has_a_row_for_each_weight_of_the_subject():
    assert mixing.table(MIXES).splitlines() == [
        "| subject \\ style | 0 | 0.8 |",
        "|---:|---|---|",
        "| 0 | 0.00 / 0.01 | 0.02 / 0.90 |",
        "| 1 | 0.95 / 0.03 | 0.80 / 0.85 |",
    ]


def test_the_conclusion_compares_the_best_pair_with_each_adapter_alone():
    words = mixing.conclusion(MIXES)
    assert words.startswith("Best together at 1 and 0.8: subject 0.80, style 0.85, both in 75% of the pictures.")
    assert words.endswith("the style scores 0.03, without the subject's the subject 0.02.")
    assert mixing.table(MIXES) in mixing.page(MIXES)
