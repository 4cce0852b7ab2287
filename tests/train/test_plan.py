"""The plan: what would happen, and nothing does."""

import pytest

from loraloom.configs.errors import run_command
from loraloom.train.plan import main


def test_the_plan_says_what_is_trained_and_written(write_config, photos, capsys):
    sources = [{"path": str(photos), "caption": "x", "share": 0.5}, {"prior": "a creature", "count": 4, "share": 0.5}]
    config = write_config(data={"sources": sources}, validation={"prompts": ["x"], "every": 5})
    assert main([str(config), "adapter.rank=2"]) == 0
    text = capsys.readouterr().out
    assert "rank: 2\n" in text
    assert "weight_decay: 0.01  # default" in text
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert f"{photos.name} 6 10 50% 1.7 times 1 0..10" in rows  # 10 steps of 2, half of 20 samples over 6 images
    assert "prior 4 10 50% 2.5 times 1 0..10" in rows
    assert "unet: 128 modules (attention)" in text  # 16 transformer blocks, as in SD 1.x, with 8 targets each
    assert "text_encoder: 8 modules (attention)" in text
    assert "10 optimiser steps of 2 samples = 20 samples" in text
    assert "4 validation images every 5 steps" in text
    assert "tiny.kohya.safetensors" in text
    assert not (config.parent / "run").exists()


@pytest.mark.parametrize("words", ["data.resolution=36", "adapter.parts={vae: attention}", "model.base=./nowhere"])
def test_a_plan_that_cannot_be_is_refused(write_config, words, capsys):
    assert run_command(main, [str(write_config()), words]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
