"""The comparison's statistics and words, and that both sides get the same work."""

import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from loraloom.benchmarks import against_diffusers
from loraloom.benchmarks.against_diffusers import Contestant, Paired, Settings, our_config, prepare, results, theirs
from loraloom.configs.schema import RunConfig
from loraloom.inference.engine import Engine

PLAIN = Settings(example="0" * 64, steps=300, prior=False, text_encoder=False)
BOTH = Settings(example="0" * 64, steps=300, prior=True, text_encoder=True)


def test_the_standard_error_is_that_of_the_paired_differences():
    losses = Paired(ours=[11.0, 22.0, 33.0], theirs=[10.0, 20.0, 30.0])
    assert losses.differences == [1, 2, 3]
    assert losses.mean == 2
    assert losses.standard_error == pytest.approx(1 / 3**0.5)


@pytest.mark.parametrize(
    ("ours", "worse"),
    [
        ([1.0, 3.0], False),  # differences 0 and 2: mean 1, standard error 1
        ([1.1, 3.0], True),
        ([0.0, 0.5], False),
        ([1.0, 1.0], False),
    ],
)
def test_worse_means_by_more_than_one_standard_error(ours, worse):
    assert Paired(ours, [1.0, 1.0]).is_worse is worse


def test_the_table_shows_every_seed_and_the_means():
    table = results(PLAIN, 0.5, Paired(ours=[0.1, 0.3], theirs=[0.2, 0.3]))
    assert "| 0 | 0.100000 | 0.200000 | -0.100000 |" in table
    assert "| mean | 0.200000 | 0.250000 | -0.050000 |" in table
    assert "standard error 0.050000: loraloom is not worse by more than one" in table
    assert "has 0.500000, every training came below it" in table


def test_a_worse_adapter_and_one_that_learnt_nothing_are_said_aloud():
    losses = Paired(ours=[0.5, 0.6], theirs=[0.2, 0.3])
    assert "loraloom is WORSE" in results(PLAIN, 0.9, losses)
    assert "NOT EVERY TRAINING" in results(PLAIN, 0.55, losses)


@pytest.mark.parametrize("settings", [PLAIN, BOTH], ids=["plain", "with class images and text encoder"])
def test_both_see_the_same_number_of_samples_with_the_same_settings(tmp_path, settings):
    config = RunConfig.model_validate(our_config(tmp_path, settings))
    command = theirs(tmp_path, settings, tmp_path, tmp_path).command(7, tmp_path / "run")
    said = dict(pairwise(command))
    weights = {source.loss_weight for source in config.data.sources}
    shares = len(config.data.sources)
    assert config.loop.batch_size == int(said["--train_batch_size"]) * shares
    assert weights == {float(shares)}  # a mean over all samples times their kinds is the sum of the kinds' means
    assert config.adapter.rank == config.adapter.alpha == int(said["--rank"])
    assert config.optimizer.learning_rate == float(said["--learning_rate"])
    assert config.optimizer.weight_decay == float(said["--adam_weight_decay"])
    assert config.optimizer.max_grad_norm == float(said["--max_grad_norm"])
    assert config.optimizer.schedule == said["--lr_scheduler"]
    assert ("text_encoder" in config.adapter.parts) == ("--train_text_encoder" in command)


def test_a_folder_of_other_settings_is_refused(tmp_path):
    prepare(tmp_path, PLAIN)
    prepare(tmp_path, PLAIN)
    with pytest.raises(SystemExit, match="other settings"):
        prepare(tmp_path, Settings(PLAIN.example, 10, False, False))


def test_a_training_that_is_done_is_not_done_again_and_one_that_failed_leaves_nothing(tmp_path):
    script = "import sys, pathlib; run = pathlib.Path(sys.argv[1]); run.mkdir(); (run / 'it').write_text('x')"
    contestant = Contestant("one", lambda seed, run: [sys.executable, "-c", script, str(run)], "it", {})
    adapter = against_diffusers.train(tmp_path, contestant, 0)
    assert adapter.read_text() == "x"
    assert against_diffusers.train(tmp_path, contestant, 0) == adapter  # again, `mkdir` would fail
    failing = Contestant("two", lambda seed, run: [sys.executable, "-c", "1 / 0"], "it", {})
    with pytest.raises(SystemExit, match=r"ended with 1: see .*two-0\.log"):
        against_diffusers.train(tmp_path, failing, 0)
    assert not (tmp_path / "two-0.safetensors").exists()


def test_the_views_are_none_of_the_images():
    shown = {np.asarray(view).tobytes() for view in against_diffusers.views()}
    trained = {np.asarray(Image.open(file).convert("RGB")).tobytes() for file in against_diffusers.IMAGES.glob("*.png")}
    assert len(shown) == 20
    assert len(trained) == 6
    assert not shown & trained


def test_nothing_in_the_test_is_random(monkeypatch):
    monkeypatch.setattr(against_diffusers, "VIEWS", 1)
    first, second = Engine.load("pocket"), Engine.load("pocket")
    torch.manual_seed(1)
    loss = against_diffusers.held_out_loss(first)
    torch.manual_seed(2)
    assert against_diffusers.held_out_loss(second) == loss
    assert 0 < loss < 0.1
