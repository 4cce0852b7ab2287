"""`loraloom grid`: what stands in which cell, and the labelled picture of all."""

import numpy as np
import pytest
import yaml
from PIL import Image

from loraloom.configs.command import run_command
from loraloom.configs.errors import UserError
from loraloom.images.lettering import Lettering
from loraloom.inference.grid import main
from loraloom.inference.pictures.axes import Axis, axis_of, cells, lines
from loraloom.inference.pictures.labelled import GAP, MARGIN, labelled, wrapped
from loraloom.inference.pictures.png import request_in

TWO = {
    "prompt": "x",
    "adapters": [{"file": "runs/a/sks.safetensors"}, {"file": "vlk.kohya.safetensors", "weight": 0.3}],
}


def test_cells_are_every_combination_row_by_row():
    columns = lines([axis_of(["seed", "0", "1"]), axis_of(["guidance", "2.5", "4"])])
    rows = lines([axis_of(["prompt", "a star", "b"])])
    assert [line.label for line in columns] == [
        "seed 0, guidance 2.5",
        "seed 0, guidance 4",
        "seed 1, guidance 2.5",
        "seed 1, guidance 4",
    ]
    asked = list(cells({"steps": 3}, columns, rows))
    assert len(asked) == 8
    assert asked[5] == {"steps": 3, "prompt": "b", "seed": 0, "guidance": 4.0}


@pytest.mark.parametrize("name", ["weight:style.v2", "weight:2"])
def test_a_name_has_its_dots_and_two_of_a_name_are_told_apart_by_number(name):
    several = {
        "prompt": "x",
        "adapters": [{"file": f"{each}.safetensors"} for each in ("style.v1", "style.v2", "a/dog")],
    }
    (cell,) = cells(several, lines([Axis(name, ["0.5"])]), lines([]))
    assert [each.get("weight") for each in cell["adapters"]] == [None, 0.5, None]
    twice = several | {"adapters": [*several["adapters"], {"file": "b/dog.kohya.safetensors"}]}
    with pytest.raises(UserError, match="several adapters are called 'dog'"):
        list(cells(twice, lines([Axis("weight:dog", ["0.5"])]), lines([])))


@pytest.mark.parametrize("name", ["weight:vlk", "weight:2"])
def test_a_weight_is_of_the_adapter_that_is_named(name):
    (cell,) = cells(TWO, lines([Axis(name, ["0.5"])]), lines([]))
    assert cell["adapters"] == [{"file": "runs/a/sks.safetensors"}, {"file": "vlk.kohya.safetensors", "weight": 0.5}]
    assert TWO["adapters"][1]["weight"] == 0.3


def test_a_checkpoint_takes_the_place_of_the_file_and_keeps_its_weight():
    columns, rows = lines([Axis("weight", ["0.5"])]), lines([Axis("checkpoint", ["other.safetensors"])])
    (cell,) = cells({"prompt": "x"}, columns, rows)
    assert cell["adapters"] == [{"file": "other.safetensors", "weight": 0.5}]
    assert rows[0].label == "other"


def test_a_run_stands_for_its_checkpoints(tmp_path):
    for step in (10, 20):
        (tmp_path / f"checkpoints/step-{step:06d}").mkdir(parents=True)
        (tmp_path / f"checkpoints/step-{step:06d}/manifest.json").touch()
    (tmp_path / "config.yaml").touch()
    found = axis_of(["checkpoint", str(tmp_path), "b.safetensors"]).values
    assert [name.rpartition("/")[2] for name in found] == ["step-000010", "step-000020", "b.safetensors"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["wieght", "1"], 'did you mean "weight"'),
        (["seed"], "has no values"),
        (["seed", "x"], "'x' is no seed"),
        (["weight:sk", "1"], 'did you mean "sks"'),
        (["weight:3", "1"], "there are: sks, vlk"),
    ],
)
def test_axes_that_cannot_be_are_answered_with_what_can(words, told):
    with pytest.raises(UserError, match=told):
        list(cells(TWO, lines([axis_of(words)]), lines([])))


def test_the_picture_has_every_cell_in_its_place():
    colours = ["red", "green", "blue", "black", "white", "orange"]
    images = [Image.new("RGB", (100, 100), colour) for colour in colours]
    page = np.asarray(labelled(images, ["a", "b", "c"], ["one", "two"], "title", "note"))
    found = [tuple(page[-MARGIN - 18 - GAP - 50 - 104 * (1 - row), -MARGIN - GAP - 50 - 104 * (2 - column)])
             for row in range(2) for column in range(3)]  # fmt: skip
    assert found == [Image.new("RGB", (1, 1), colour).getpixel((0, 0)) for colour in colours]


def test_words_are_wrapped_and_never_lost_at_their_end():
    font = Lettering(13)
    found = wrapped("a very long prompt of words", font, 60)
    assert " ".join(found) == "a very long prompt of words"
    assert all(font.width(line) <= 60 for line in found)
    (cut,) = wrapped("x" * 50 + "end", font, 60)
    assert cut.startswith("…") and cut.endswith("end")


def test_long_words_of_other_letters_go_on_below():
    font = Lettering(13)
    lines = wrapped("赤い星の上に猫が座っている", font, 60)
    assert "".join(lines) == "赤い星の上に猫が座っている"
    assert len(lines) > 1


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["runs/a/checkpoints/step-000030", "runs/a/checkpoints/step-000060"], ["step-000030", "step-000060"]),
        (["runs/a/checkpoints/step-000030", "runs/b/checkpoints/step-000030"], ["a step-000030", "b step-000030"]),
        (
            ["x/r/checkpoints/step-1", "y/r/checkpoints/step-1", "y/r/checkpoints/step-2"],
            ["x r step-1", "y r step-1", "y r step-2"],
        ),
        (["a.safetensors", "b.safetensors"], ["a", "b"]),
        (["a/sks.safetensors", "b/sks.safetensors"], ["a sks", "b sks"]),
        (["a.safetensors", "a.safetensors"], ["a", "a"]),
    ],
)
def test_checkpoints_are_called_by_what_tells_them_apart(values, labels):
    assert [line.label for line in lines([Axis("checkpoint", values)])] == labels
    both = lines([Axis("checkpoint", values), Axis("seed", [1])])
    assert [line.label for line in both] == [f"{label}, seed 1" for label in labels]
    assert [line.chosen for line in both] == [(("checkpoint", value), ("seed", 1)) for value in values]
    assert [line.label for line in lines([])] == [""]


def test_the_command_writes_cells_and_grid_and_goes_on(tiny_base, make_adapter, tmp_path, capsys):
    adapter = make_adapter(tiny_base, name="mine")
    arguments = ["--base", str(tiny_base), "--adapter", str(adapter), "--prompt", "a star", "--steps", "1"]
    arguments += ["--x", "weight:mine", "0", "1", "--y", "seed", "3", "4", "--out", str(tmp_path)]
    assert main(arguments) == 0
    files = sorted((tmp_path / "cells").glob("*.png"))
    assert [request_in(file)["seed"] for file in files] == [3, 3, 4, 4]
    assert len({Image.open(file).tobytes() for file in files}) == 4
    with Image.open(tmp_path / "grid.png") as page:
        assert page.width > 2 * 96 and page.height > 2 * 96
    before = [file.stat().st_mtime_ns for file in files]
    assert main(arguments) == 0
    assert [file.stat().st_mtime_ns for file in files] == before
    assert "4 cells" in capsys.readouterr().out


def test_a_file_has_axes_and_what_all_cells_have_in_common(tiny_base, make_adapter, tmp_path):
    adapter = make_adapter(tiny_base, name="mine")
    content = {"base": str(tiny_base), "steps": 1, "adapters": [{"file": str(adapter)}], "seed": 5}
    content |= {"x": {"weight:mine": [0, 0.5]}, "y": {"prompt": ["a star", "a moon"], "guidance": [1, 4.0]}}
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    assert main([str(file), "--seed", "6", "--out", str(tmp_path / "out")]) == 0
    asked = [request_in(cell) for cell in sorted((tmp_path / "out/cells").glob("*.png"))]
    assert [(each["prompt"], each["seed"]) for each in asked] == [("a star", 6)] * 4 + [("a moon", 6)] * 4
    assert [each["adapters"][0].get("weight") for each in asked] == [0.0, 0.5] * 4
    assert main([str(file), "--x", "seed", "1", "2", "3", "--out", str(tmp_path / "other")]) == 0
    assert len([*(tmp_path / "other/cells").glob("*.png")]) == 12


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt: x\nx: 3\n", "should be axes with lists"),
        ("prompt: x\nstps: 3\n", 'stps: unknown key (did you mean "steps"?)'),
        ("prompt: x\nx: {sed: [1]}\n", 'did you mean "seed"'),
        ("prompt: x\nx: {seed: [1.5, null]}\n", "seed: should be a whole number"),
        ("prompt: x\nadapters: [a.safetensors]\nx: {weight: [1]}\n", "should be a list of mappings"),
        ("prompt: x\nnum_images: 2\n", "a cell is one picture"),
    ],
)
def test_mistakes_in_a_file_are_told(tmp_path, capsys, text, words):
    (tmp_path / "grid.yaml").write_text(text)
    assert run_command(main, [str(tmp_path / "grid.yaml"), "--out", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


def test_a_grid_without_a_prompt_is_one_line(tiny_base, tmp_path, capsys):
    assert run_command(main, ["--base", str(tiny_base), "--x", "seed", "0", "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "prompt: is missing; give --prompt" in line
