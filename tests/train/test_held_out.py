"""Validation: held-out loss, best checkpoint, early stop, and pictures with settings of their own."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from loraloom.configs.command import run_command
from loraloom.configs.loader import load_config
from loraloom.data.draws import Draws
from loraloom.train.__main__ import main
from loraloom.train.build import build_trainer
from loraloom.train.callbacks.held_out import HeldOut, HeldOutLoss
from loraloom.train.run_folder import read_history

pytestmark = pytest.mark.slow


@pytest.fixture
def views(tmp_path):
    """Three further pictures in two buckets."""
    folder = tmp_path / "views"
    folder.mkdir()
    for index, size in enumerate([(40, 40), (40, 40), (80, 40)]):
        pixels = np.random.default_rng(100 + index).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return {"path": str(folder), "caption": "a sks creature"}


def trainer_of(write_config, views, name="run", **sections):
    validation = {"sources": [views], "timesteps": 4, "every": 2} | sections.pop("validation", {})
    config = load_config(write_config(name, validation=validation, **sections))
    return build_trainer(config, overwrite=True)


def held_out_of(trainer) -> HeldOut | None:
    return next(each.held_out for each in trainer.callbacks if isinstance(each, HeldOutLoss))


def test_the_loss_is_that_of_fixed_noise_on_a_fixed_grid(write_config, views):
    trainer = trainer_of(write_config, views, adapter={"options": {"dropout": 0.5}})
    run, held_out = trainer.run, held_out_of(trainer)
    assert held_out is not None
    trainer.callbacks = []
    assert held_out.noise.grid(4).tolist() == [125, 375, 625, 875]
    first, again = held_out.losses(run), held_out.losses(run)
    assert first == again
    assert first.keys() == {"", "views"}
    by_hand = []
    scheduler, device = run.parts["scheduler"], torch.device("cpu")
    for number, image in enumerate(held_out.images):
        noise = Draws(0, range(4 * number, 4 * number + 4)).normal("held out", image.latents.shape)
        timesteps = torch.tensor([125, 375, 625, 875])
        latents = scheduler.add_noise(image.latents.expand(4, *image.latents.shape), noise, timesteps)
        with torch.no_grad():
            embeds = run.encode(["a sks creature"]).prompt_embeds.expand(4, -1, -1)
            run.parts["unet"].eval()
            predicted = run.parts["unet"](latents.to(device), timesteps, embeds).sample
            run.parts["unet"].train()
        by_hand.append((predicted - noise).square().mean().item())
    assert first[""] == pytest.approx(sum(by_hand) / 3, rel=1e-5)
    trainer.train_step()
    trainer.train_step()
    assert held_out.losses(run) != first


def test_it_does_not_touch_what_is_trained(write_config, views):
    plain, watched = (
        trainer_of(write_config, views, name, validation={"sources": sources})
        for name, sources in (("plain", []), ("watched", [views]))
    )
    losses = []
    for trainer in (plain, watched):
        found, held_out = [], held_out_of(trainer)
        trainer.callbacks = []
        for _ in range(3):
            if held_out is not None:
                held_out.losses(trainer.run)
            found.append(trainer.train_step()[0].loss)
        losses.append(found)
    assert losses[0] == losses[1]


def scripted(monkeypatch, values):
    """The held-out loss of each validation in turn, as if the run overfitted."""
    given = iter(values)
    monkeypatch.setattr(HeldOut, "losses", lambda self, run: {"": next(given), "views": 0.5})


def test_a_run_that_gets_no_better_ends_and_its_best_weights_are_kept(write_config, views, monkeypatch, capsys):
    scripted(monkeypatch, [3.0, 2.0, 1.0, 1.5, 1.6, 0.1])
    config = write_config(
        validation={"sources": [views], "every": 2, "patience": 2},
        loop={"steps": 40},
        checkpoint={"every": 100, "keep": 1},
        output={"weights": "best", "name": "tiny"},
    )
    assert main([str(config)]) == 0
    folder = config.parent / "run"
    record = json.loads((folder / "run.json").read_text())
    assert (record["state"], record["step"], record["best"]) == ("done", 8, {"step": 4, "held_out": 1.0})
    assert record["ended"] == "the held-out loss was best at step 4, 2 validations ago"
    assert record["weights"] == "of step 4"
    kept = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    assert kept == ["step-000004", "step-000008"]
    best = load_file(folder / "checkpoints/step-000004/adapter_unet.safetensors")
    exported = load_file(folder / "tiny.safetensors")
    for name, tensor in best.items():
        scale = 2.0 if "lora_B" in name else 1.0  # alpha 8 / rank 4 is folded into B
        assert torch.equal(exported[f"unet.{name}"], scale * tensor)
    curve = [(entry["step"], entry["held_out"]) for entry in read_history(folder / "logs/held_out.jsonl")]
    assert curve == [(0, 3.0), (2, 2.0), (4, 1.0), (6, 1.5), (8, 1.6)]
    assert "Held-out loss" in (folder / "report.html").read_text()


def test_a_resumed_run_remembers_what_was_best(write_config, views, monkeypatch):
    scripted(monkeypatch, [3.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    config = write_config(validation={"sources": [views], "every": 2}, loop={"steps": 4}, checkpoint={"every": 2})
    assert main([str(config)]) == 0
    folder = config.parent / "run"
    assert main(["--resume", str(folder), "loop.steps=8"]) == 0
    assert json.loads((folder / "run.json").read_text())["best"] == {"step": 2, "held_out": 1.0}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"validation": {"patience": 2}}, "give held-out images as `sources`"),
        ({"output": {"weights": "best"}}, "give images as `validation.sources`"),
        ({"validation": {"sources": [{"prior": "x"}]}}, "cannot be class images"),
        ({"validation": {"sources": [{"path": "nowhere", "caption": "x"}]}}, "validation.sources: nowhere"),
    ],
)
def test_what_cannot_be_validated_is_refused(write_config, sections, words, capsys):
    assert run_command(main, [str(write_config(**sections))]) == 2
    assert words in capsys.readouterr().err


def test_prompts_may_have_settings_of_their_own_and_begin_with_the_base(write_config, tmp_path, tiny_base):
    from loraloom.inference.__main__ import main as sample

    own = {"prompt": "a red star", "negative_prompt": "a moon", "steps": 3, "guidance": 2.0, "seed": 7}
    config = write_config(
        validation={"prompts": ["a moon", own], "num_images": 2, "steps": 2, "every": 100},
        optimizer={"learning_rate": 3e-2},
        loop={"steps": 3},
    )
    assert main([str(config)]) == 0
    folder = config.parent / "run"

    def images(step: int) -> list[np.ndarray]:
        found = folder / "samples" / f"step-{step:06d}"
        return [
            np.asarray(Image.open(found / each["file"])) for each in json.loads((found / "samples.json").read_text())
        ]

    def remade(*arguments: str) -> list[np.ndarray]:
        out = tmp_path / "again"
        words = ["--base", str(tiny_base), "--num-images", "2", "--resolution", "32", "--out", str(out), "--overwrite"]
        assert sample([*words, *arguments]) == 0
        return [np.asarray(Image.open(out / f"{index:04d}.png")) for index in range(2)]

    settings = [
        "--prompt",
        "a red star",
        "--negative-prompt",
        "a moon",
        "--steps",
        "3",
        "--guidance",
        "2",
        "--seed",
        "7",
    ]
    adapter = ["--adapter", str(folder / "tiny.safetensors")]
    for step, rest in ((0, []), (3, adapter)):
        assert all((a == b).all() for a, b in zip(images(step)[2:], remade(*settings, *rest), strict=True))
        plain = remade("--prompt", "a moon", "--steps", "2", *rest)
        assert all((a == b).all() for a, b in zip(images(step)[:2], plain, strict=True))
