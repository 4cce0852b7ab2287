"""Sampling: the picture depends on its prompt and seed alone, and says in its file how it was made."""

import numpy as np
import pytest
from PIL import Image

from loraloom.configs.errors import UserError, run_command
from loraloom.inference.__main__ import main
from loraloom.inference.engine import MICRO_BATCH, Engine, Request
from loraloom.inference.pictures import image_grid
from loraloom.inference.schedulers import SCHEDULERS


@pytest.fixture(scope="module")
def engine(tiny_base) -> Engine:
    return Engine.load(str(tiny_base))


def pixels(images) -> list[bytes]:
    return [image.tobytes() for image in images]


def test_an_image_does_not_depend_on_how_many_are_made(engine):
    few = engine.generate(Request.repeat(["a star"], 2, seed=3, steps=2))
    many = engine.generate(Request.repeat(["a star"], MICRO_BATCH + 2, seed=3, steps=2))
    assert pixels(many)[:2] == pixels(few)
    assert len(set(pixels(many))) == MICRO_BATCH + 2


def test_prompt_guidance_and_steps_each_matter(engine):
    def one(prompt="a star", **options):
        return pixels(engine.generate(Request([prompt], [0], **{"steps": 2, **options})))[0]

    assert len({one(), one("a heart"), one(guidance=8.0), one(steps=3), one(negative_prompt="a moon")}) == 5


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_samples(tiny_base, name):
    engine = Engine.load(str(tiny_base), scheduler=name)
    image = np.asarray(engine.generate(Request(["a star"], [0], steps=3))[0])
    assert image.shape == (32, 32, 3)
    assert type(engine.pipeline.scheduler).__name__ == SCHEDULERS[name].kind


def test_an_unknown_scheduler_is_answered_with_the_list(tiny_base):
    with pytest.raises(UserError, match=r'did you mean "euler".*dpmsolver\+\+'):
        Engine.load(str(tiny_base), scheduler="eulr")


def test_the_grid_has_a_row_for_each_prompt():
    images = [Image.new("RGB", (8, 8), "black")] * 6
    assert image_grid(images, columns=3).size == (24, 16)


def test_the_command_writes_images_that_name_their_request(tiny_base, tmp_path, capsys):
    arguments = ["--base", str(tiny_base), "--prompt", "a star", "--num-images", "2", "--steps", "2", "--seed", "7"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    with Image.open(tmp_path / "0001.png") as image:
        assert image.text["prompt"] == "a star"  # type: ignore[attr-defined]
        assert image.text["seed"] == "8"  # type: ignore[attr-defined]
    assert (tmp_path / "grid.png").exists()
    assert "2 images" in capsys.readouterr().out


@pytest.mark.parametrize("adapter", ["missing.safetensors", "missing.safetensors:0.5"])
def test_a_missing_adapter_is_one_line(tiny_base, tmp_path, capsys, adapter):
    arguments = ["--base", str(tiny_base), "--adapter", adapter, "--prompt", "x", "--out", str(tmp_path)]
    assert run_command(main, arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "missing.safetensors" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resolution", "30"], "no multiple of 8"),
        (["--device", "cuda:99"], "cannot be used"),
        (["--device", "nonsense"], "cannot be used"),
        (["--adapter", "x.safetensors:nan"], "not a finite number"),
        (["--scheduler", "eulr"], "euler"),
    ],
)
def test_arguments_that_cannot_be_are_one_line(tiny_base, tmp_path, capsys, arguments, words):
    assert run_command(main, ["--base", str(tiny_base), "--prompt", "x", "--out", str(tmp_path), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_missing_base_is_one_line(tmp_path, capsys):
    assert run_command(main, ["--base", "./nowhere", "--prompt", "x", "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nowhere" in line
