"""Steps whose loss or gradients are not finite: never applied, named, and left out only if that is wanted."""

import json

import pytest
import torch

from loraloom.configs.command import run_command
from loraloom.configs.errors import TrainingError
from loraloom.configs.loader import load_config
from loraloom.train.__main__ import main
from loraloom.train.build import build_trainer
from loraloom.train.callback import Callback
from loraloom.train.callbacks.checkpoint import Checkpoints
from loraloom.train.callbacks.tracking import Tracking
from loraloom.train.guard import MOST_OVERFLOWS, Guard
from loraloom.train.run import SampleLoss, StepResult
from loraloom.train.run_folder import read_history
from loraloom.train.state import newest_sound_checkpoint

pytestmark = pytest.mark.slow


def broken(trainer, steps=(3,), where="loss"):
    """Makes the loss or a gradient of these steps (from 1) not a number, as a damaged kernel or an overflow does."""
    forward = trainer.forward

    def broken_forward(batch):
        losses = forward(batch)
        if trainer.run.step + 1 not in steps:
            return losses
        if where == "loss":
            per_sample = losses.per_sample.clone()
            per_sample[0] = torch.nan
            return type(losses)(losses.total * torch.nan, per_sample)
        losses.total.register_hook(lambda gradient: gradient * torch.inf)
        return losses

    trainer.forward = broken_forward
    return trainer


def trainer_of(write_config, name="run", **sections):
    trainer = build_trainer(load_config(write_config(name, trackers=[], **sections)), overwrite=True)
    trainer.callbacks = []
    return trainer


def weights(trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.run.trained()]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_such_a_step_ends_the_run_and_is_not_applied(write_config, where):
    trainer = broken(trainer_of(write_config), where=where)
    for _ in range(2):
        trainer.train_step()
    before = weights(trainer)
    with pytest.raises(TrainingError, match=r"step 3: .*rates: .*unet 0.01.*\.png.*guard\.on_fault: skip"):
        trainer.train_step()
    assert all(torch.equal(old, new) for old, new in zip(before, weights(trainer), strict=True))


def test_only_the_samples_to_blame_are_named(write_config):
    trainer = broken(trainer_of(write_config, loop={"batch_size": 4}))
    for _ in range(2):
        trainer.train_step()
    with pytest.raises(TrainingError) as raised:
        trainer.train_step()
    assert str(raised.value).count(".png") == 1


def test_such_a_step_can_be_left_out(write_config):
    trainer = broken(trainer_of(write_config, guard={"on_fault": "skip"}))
    trainer.callbacks = [Tracking()]
    steps = {}

    class Keep(Callback):
        def on_step(self, run):
            steps[run.step] = weights(trainer)

    trainer.callbacks.append(Keep())
    trainer.fit()
    run = trainer.run
    assert (run.step, run.skipped) == (10, 1)
    assert all(torch.equal(two, three) for two, three in zip(steps[2], steps[3], strict=True))
    assert any(not torch.equal(three, four) for three, four in zip(steps[3], steps[4], strict=True))
    (line,) = (run.folder / "quarantine.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert entry["step"] == 3
    assert len(entry["files"]) == 1
    history = {entry["step"]: entry for entry in read_history(run.folder / "logs" / "history.jsonl")}
    assert history[3]["loss"] is None
    assert history[4]["loss"] > 0


def test_no_more_are_left_out_than_allowed(write_config):
    trainer = broken(trainer_of(write_config, guard={"on_fault": "skip", "max_skips": 1}), steps=(2, 3))
    with pytest.raises(TrainingError, match=r"2 steps were left out, guard\.max_skips allows 1"):
        trainer.fit()


def test_a_rate_beyond_reason_ends_with_exit_code_3_and_the_last_checkpoint(write_config, capsys):
    config = write_config(checkpoint={"every": 1}, optimizer={"learning_rate": 1e30}, loop={"steps": 20})
    assert run_command(main, [str(config)]) == 3
    folder = config.parent / "run"
    assert "train anew with a lower learning rate, which a resumed run cannot change" in capsys.readouterr().err
    assert not list(folder.glob("*.safetensors"))
    assert newest_sound_checkpoint(folder)[1] == []
    assert run_command(main, ["--resume", str(folder), "optimizer.learning_rate=1e-4"]) == 2
    assert "optimizer.learning_rate was 1e+30 in this run and cannot become" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["adamw", "torch.optim.RAdam"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_faults_between_two_looks_change_nothing(write_config, name, where):
    """Fused AdamW leaves the step out on the device, others are asked to wait; the weights are the same to the bit."""
    optimizer = {"name": name, "learning_rate": 1e-2}
    states = {}
    for every in (1, 5):
        section = {"on_fault": "skip", "every": every}
        trainer = broken(
            trainer_of(write_config, f"by {every}", guard=section, optimizer=optimizer), steps=(2, 3), where=where
        )
        trainer.fit()
        states[every] = weights(trainer), trainer.run.skipped
        assert len((trainer.run.folder / "quarantine.jsonl").read_text().splitlines()) == 2
    assert states[1][1] == states[5][1] == 2
    assert all(torch.equal(one, other) for one, other in zip(states[1][0], states[5][0], strict=True))
    assert all(bool(weight.isfinite().all()) for weight in states[5][0])


def test_losses_are_read_together_and_nothing_is_lost_of_the_history(write_config):
    trainer = trainer_of(write_config, guard={"every": 4})
    trainer.callbacks = [Tracking()]
    seen: list[int] = []

    class Count(Callback):
        def on_results(self, run, results):
            seen.append(len(results))

    trainer.callbacks.append(Count())
    trainer.fit()
    assert seen == [4, 4, 2]
    history = read_history(trainer.run.folder / "logs" / "history.jsonl")
    assert [entry["step"] for entry in history] == list(range(1, 11))
    plain = trainer_of(write_config, "plain")
    assert [plain.train_step()[0].loss for _ in range(10)] == [entry["loss"] for entry in history]


def test_a_fault_that_nobody_has_seen_ends_the_run_before_a_checkpoint(write_config):
    trainer = broken(trainer_of(write_config, guard={"every": 100}, checkpoint={"every": 4}))
    trainer.callbacks = [Checkpoints()]
    with pytest.raises(TrainingError, match="step 3: "):
        trainer.fit()
    assert trainer.run.step == 4
    assert not (trainer.run.folder / "checkpoints").exists()


class Scaled:
    """As much of a run as the guard looks at, with a gradient scaler."""

    accelerator = type("", (), {"scaler": object()})()


def results(loss: float, norm: float, count: int) -> list[StepResult]:
    return [StepResult(step, loss, [SampleLoss("x", "a.png", loss)], norm, {"unet": 1.0}, 0.1) for step in range(count)]


def test_an_overflow_that_the_scaler_absorbs_is_no_fault_but_ten_in_a_row_are():
    guard, run = Guard(), Scaled()
    overflow, fine = results(0.1, float("inf"), MOST_OVERFLOWS - 1), results(0.1, 1.0, 1)
    guard.look(run, [*overflow, *fine, *overflow])  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="step 0: gradients overflow fp16 for the 10th time in a row"):
        guard.look(run, overflow[:1])  # type: ignore[arg-type]
