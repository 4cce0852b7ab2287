"""The check of the embedded base: fixed prompts, scores against bars, and the card's table."""

from dataclasses import replace

import numpy as np
import pytest

from loraloom.configs.errors import UserError
from loraloom.configs.marked import fill_marked
from loraloom.models.pocket import check
from loraloom.models.pocket.scenes import BODY_COLOURS, COLOURS, SHAPES, draw


def test_the_fixed_prompts_cover_the_world():
    prompts, scenes = check.fixed_prompts()
    shapes = [scene for scene in scenes if scene.shape in SHAPES]
    creatures = [scene for scene in scenes if scene.shape == "creature"]
    assert (len(prompts), len(shapes), len(creatures)) == (200, 120, 80)
    assert {(scene.shape, scene.colour) for scene in shapes} == {(s, c) for s in SHAPES for c in COLOURS}
    assert {scene.colour for scene in creatures} == set(BODY_COLOURS)
    assert {scene.background for scene in shapes} == {scene.background for scene in creatures} == set(COLOURS)
    assert all(scene.colour != scene.background for scene in scenes)
    assert 50 < sum("drawing" in prompt for prompt in prompts) < 150
    assert check.fixed_prompts(10) == (prompts[:10], scenes[:10])


def test_drawn_pictures_score_full_and_swapped_ones_do_not():
    scenes = [replace(scene, centre=(32.0, 33.0)) for scene in check.fixed_prompts(40)[1]]
    pictures = np.stack([np.asarray(draw(scene)) for scene in scenes])
    assert check.score_pictures(pictures, scenes) == {"background": 1.0, "colour": 1.0, "shape": 1.0}
    swapped = check.score_pictures(np.roll(pictures, 1, axis=0), scenes)
    assert max(swapped.values()) < 0.4
    assert "shape" not in check.score_pictures(pictures[3:5], scenes[3:5]), "no shape among creatures"


def test_psnr_on_paper():
    """An error of 0.1 everywhere is 20 dB, of 0.01 is 40 dB: 30 on average."""
    reference = np.zeros((2, 4, 4, 3))
    errors = reference + np.array([0.1, 0.01]).reshape(2, 1, 1, 1)
    assert check.mean_psnr(errors, reference) == pytest.approx(30.0)


def test_a_score_passes_at_its_bar_and_the_table_says_so():
    scores = check.rate({"background": 0.95, "colour": 0.91, "shape": 0.9}, psnr=26.0)
    assert [score.passed for score in scores] == [True, False, True, True]
    table = check.as_markdown(scores)
    assert "| background as named | 95.0 % | 95 % | pass |" in table
    assert "| colour as named | 91.0 % | 92 % | **fail** |" in table


def test_the_cards_table_is_replaced_and_nothing_else():
    card = "before\n<!-- scores -->\nold\n<!-- /scores -->\nafter\n"
    once = fill_marked(card, "scores", "| new |\n")
    assert once == "before\n<!-- scores -->\n| new |\n<!-- /scores -->\nafter\n"
    assert fill_marked(once, "scores", "| new |\n") == once
    with pytest.raises(UserError, match="<!-- scores -->"):
        fill_marked("no markers", "scores", "| new |\n")


def test_a_folder_without_a_pipeline_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"no pipeline in .*pocket\.build"):
        check.main(["--base", str(tmp_path)])
