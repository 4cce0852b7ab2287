"""Optimisers, groups, schedules and averages."""

import importlib.util
import math

import pytest
import torch
from torch import nn

from loraloom.configs.choices import names
from loraloom.configs.errors import UserError
from loraloom.configs.loader import load_config
from loraloom.configs.schema import OptimizerSection
from loraloom.train.build import build_trainer
from loraloom.train.ema import Ema
from loraloom.train.optim import drop_stopped, make_optimizer, make_schedule

INSTALLED = [
    name for name in names("train.optimizers") if name != "adamw_8bit" or importlib.util.find_spec("bitsandbytes")
]


class Adapters:
    """Two parts with a LoRA of 3 values each."""

    def __init__(self):
        self.named = {
            part: {f"x.lora_{side}.weight": nn.Parameter(torch.full((3,), 1.0)) for side in "AB"}
            for part in ("unet", "te")
        }

    def named_parameters(self):
        return self.named

    def backward(self, value=1.0):
        for part in self.named.values():
            for parameter in part.values():
                parameter.grad = torch.full_like(parameter, value)


def made(**section):
    adapters = Adapters()
    return adapters, make_optimizer(adapters, OptimizerSection(**section))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*INSTALLED, "torch.optim.RAdam", "torch.optim.SGD"])
def test_every_optimiser_goes_downhill(name):
    adapters, optimizer = made(name=name, learning_rate=1.0 if name == "prodigy" else 1e-2, weight_decay=0.0)
    first = adapters.named["unet"]["x.lora_A.weight"]
    for _ in range(30):
        optimizer.zero_grad()
        (sum(p.square().sum() for part in adapters.named.values() for p in part.values())).backward()
        optimizer.step()
    assert first.abs().max() < 1


def test_nothing_takes_the_place_of_what_is_not_there(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "prodigyopt" else found(name))
    with pytest.raises(UserError, match=r"prodigyopt is not installed; pip install 'loraloom\[prodigy\]'"):
        made(name="prodigy")
    with pytest.raises(UserError, match="cannot be imported"):
        made(name="no.such.Optimizer")
    with pytest.raises(UserError, match=r"optimizer\.options: torch\.optim\.SGD does not take them .*momentun"):
        made(name="torch.optim.SGD", options={"momentun": 0.9})
    with pytest.raises(UserError, match=r"does not work on cpu here .*closure"):
        made(name="torch.optim.LBFGS")  # wants a closure, and one group
    with pytest.raises(UserError, match="one learning rate"):
        monkeypatch.undo()
        made(name="prodigy", parts={"te": {"learning_rate": 0.1}})


def test_groups_have_rates_and_decays_of_their_own():
    own = {"te": {"learning_rate": 1e-5, "weight_decay": 0.5, "stop_after": 7}}
    _, optimizer = made(learning_rate=1e-4, weight_decay=0.1, parts=own)
    found = [(g["name"], g["lr"], g["weight_decay"], g["stop_after"], len(g["params"])) for g in optimizer.param_groups]
    assert found == [("unet", 1e-4, 0.1, None, 2), ("te", 1e-5, 0.5, 7, 2)]


def test_lora_plus_gives_b_a_higher_rate():
    _, optimizer = made(learning_rate=1e-4, lora_plus_ratio=16)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"unet": 1e-4, "unet/B": 16e-4, "te": 1e-4, "te/B": 16e-4}


def test_a_stopped_part_moves_no_more_and_does_not_count_for_clipping():
    adapters, optimizer = made(weight_decay=0.1, parts={"te": {"stop_after": 2}})
    for step in range(4):
        weights = {part: named["x.lora_A.weight"] for part, named in adapters.named.items()}
        before = {part: weight.clone() for part, weight in weights.items()}
        adapters.backward(3.0)
        drop_stopped(optimizer, step)
        norm = nn.utils.clip_grad_norm_([p for named in adapters.named.values() for p in named.values()], 1e9)
        assert norm.item() == pytest.approx(3 * math.sqrt(12 if step < 2 else 6))
        optimizer.step()
        moved = {
            part: not torch.equal(named["x.lora_A.weight"], before[part]) for part, named in adapters.named.items()
        }
        assert moved == {"unet": True, "te": step < 2}


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, [1, 1, 1, 1, 1, 1, 1, 1]),
        ({"warmup_steps": 2}, [0, 0.5, 1, 1, 1, 1, 1, 1]),
        ({"schedule": "linear"}, [k / 8 for k in range(8, 0, -1)]),
        ({"schedule": "cosine"}, [0.5 + 0.5 * math.cos(math.pi * k / 8) for k in range(8)]),
        ({"schedule": "cosine_with_restarts", "schedule_cycles": 2}, [1, 0.8535534, 0.5, 0.1464466] * 2),
        ({"schedule": "polynomial", "schedule_power": 2.0}, [(k / 8) ** 2 for k in range(8, 0, -1)]),
        ({"schedule": "piecewise_constant", "schedule_rules": "1:3,0.1:6,0.01"}, [1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01]),
    ],
)
def test_schedules(section, expected):
    _, optimizer = made(learning_rate=1.0, **section)
    schedule, rates = make_schedule(optimizer, OptimizerSection(learning_rate=1.0, **section), 8), []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected, abs=1e-5)


def test_averages_follow_the_formula_and_can_be_swapped_in():
    weight = nn.Parameter(torch.tensor([0.0]))
    named = {"unet": {"w": weight}}
    ema, expected = Ema(named, 0.5), 0.0
    for step, value in enumerate((1.0, 2.0, 4.0, 8.0), start=1):
        weight.data = torch.tensor([value])
        ema.update(named, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert ema.averages["unet"]["w"].item() == pytest.approx(expected)
    with ema.swapped(named):
        assert weight.item() == pytest.approx(expected)
    assert weight.item() == 8.0
    assert ema.averages["unet"]["w"].item() == pytest.approx(expected)
    with pytest.raises(UserError, match="do not fit"):
        ema.load("unet", {"other": torch.zeros(1)})


def trainer_of(write_config, name="run", **sections):
    trainer = build_trainer(load_config(write_config(name, **sections)), overwrite=True)
    trainer.callbacks = []
    return trainer


def test_gradients_of_checkpointing_are_the_same_to_the_bit(write_config):
    losses = {}
    for on in (False, True):
        loop = {"steps": 3, "gradient_checkpointing": on}
        trainer = trainer_of(write_config, f"run{on}", loop=loop, adapter={"options": {"dropout": 0.3}})
        losses[on] = [trainer.train_step()[0].loss for _ in range(3)]
        kinds = [
            module for module in trainer.run.parts["unet"].modules() if getattr(module, "gradient_checkpointing", False)
        ]
        assert bool(kinds) == on
    assert losses[False] == losses[True]


def test_what_is_exported_is_the_average(write_config):
    trainer = trainer_of(write_config, optimizer={"ema_decay": 0.9, "learning_rate": 1e-2}, loop={"steps": 3})
    for _ in range(3):
        trainer.train_step()
    run = trainer.run
    last = run.adapters.states()["unet"]
    with run.exported():
        average = run.adapters.states()["unet"]
        assert not any(module.training for module in run.adapters.carriers.values())
    assert any(not torch.equal(average[name], last[name]) for name in last)
    assert all(torch.equal(tensor, last[name]) for name, tensor in run.adapters.states()["unet"].items())
    assert all(module.training for module in run.adapters.carriers.values())
    assert run.ema is not None
    assert torch.equal(next(iter(run.ema.averages["unet"].values())), next(iter(average.values())))


def test_a_schedule_free_optimiser_exports_its_average(write_config):
    trainer = trainer_of(write_config, optimizer={"name": "schedule_free", "learning_rate": 1e-2}, loop={"steps": 3})
    for _ in range(3):
        trainer.train_step()
    run = trainer.run
    before = run.adapters.states()["unet"]
    before = {name: tensor.clone() for name, tensor in before.items()}
    with run.exported():
        assert any(not torch.equal(tensor, before[name]) for name, tensor in run.adapters.states()["unet"].items())
    for name, tensor in run.adapters.states()["unet"].items():
        torch.testing.assert_close(tensor, before[name])
