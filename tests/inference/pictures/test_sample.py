"""`loraloom sample`: pictures that say how they were made, and are made again, taken up again, or made by two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from loraloom.configs.command import run_command
from loraloom.configs.errors import UserError
from loraloom.inference.__main__ import main
from loraloom.inference.engine import Engine
from loraloom.inference.pictures.png import request_in
from loraloom.inference.pictures.request import PictureRequest, file_hash, read_requests

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def adapter(tiny_base, make_adapter) -> Path:
    return make_adapter(tiny_base)


@pytest.fixture
def sample(tiny_base, tmp_path):
    """Runs the command into a folder and answers with its pictures, by their names."""

    def sample(*arguments: str, out: str = "out", base: bool = True) -> dict[str, np.ndarray]:
        common = ["--base", str(tiny_base)] if base else []
        assert main([*arguments, *common, "--out", str(tmp_path / out)]) == 0
        return pictures(tmp_path / out)

    return sample


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {file.name: np.asarray(Image.open(file)) for file in sorted(folder.glob("0*.png"))}


def same(one, other) -> bool:
    return bool((one == other).all())


SETTINGS = ["--steps", "3", "--seed", "7", "--scheduler", "euler", "--guidance", "6", "--resolution", "48x32"]


def test_a_picture_is_made_again_from_its_file(sample, adapter, tmp_path):
    words = ["--prompt", "a (red)1.4 star", "--weighted", "--negative-prompt", "a moon", "--guidance-until", "0.5"]
    first = sample(*words, *SETTINGS, "--adapter", f"{adapter}:0.7", "--num-images", "6")
    assert first["0005.png"].shape == (32, 48, 3)
    for name in ("0001.png", "0005.png"):
        again = sample("--from", str(tmp_path / "out" / name), out=f"again-{name}", base=False)
        assert list(again) == ["0000.png"]
        assert same(again["0000.png"], first[name])
    changed = sample("--from", str(tmp_path / "out/0001.png"), "--guidance", "2", out="changed", base=False)
    assert not same(changed["0000.png"], first["0001.png"])
    said = request_in(tmp_path / "out/0005.png")
    assert (said["seed"], said["place"], said["adapters"][0]["weight"]) == (12, 1, 0.7)
    assert len(said["adapters"][0]["sha256"]) == 64


def test_another_adapter_file_under_the_same_name_is_refused(sample, adapter, tiny_base, make_adapter, tmp_path):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(adapter.read_bytes())
    sample("--prompt", "x", "--steps", "1", "--num-images", "1", "--adapter", str(copy))
    request = request_in(tmp_path / "out/0000.png")
    other = make_adapter(tiny_base, seed=9)
    request["adapters"][0]["file"] = str(other)
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump({"requests": [request]}, sort_keys=False))
    with pytest.raises(UserError, match="another file"):
        sample(str(file), base=False)


def test_an_interrupted_batch_goes_on_where_it_stopped(sample, tmp_path, capsys):
    arguments = ["--prompt", "a star", "--prompt", "a moon", "--num-images", "5", "--steps", "2"]
    whole = sample(*arguments)
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("0*.png")}
    for name in ("0006.png", "0008.png"):
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out/0009.png").write_bytes(b"no picture of ours, which are whole or not there")
    for flag in ([], ["--overwrite"]):
        with pytest.raises(UserError, match=r"0009\.png: was changed since loraloom wrote it, so it is never replaced"):
            sample(*arguments, *flag)
    (tmp_path / "out/0009.png").unlink()
    capsys.readouterr()
    again = sample(*arguments)
    assert again.keys() == whole.keys()
    assert all(same(again[name], whole[name]) for name in whole)
    assert "5 were there already" in capsys.readouterr().out  # those of the first prompt
    now = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("0*.png")}
    assert sorted(name for name in kept if now[name] == kept[name]) == [f"000{k}.png" for k in range(5)]
    with pytest.raises(UserError, match="another request; give another --out, or --overwrite"):
        sample(*arguments, "--seed", "1")
    assert same(pictures(tmp_path / "out")["0000.png"], whole["0000.png"])
    other = sample(*arguments, "--seed", "1", "--overwrite")
    assert not same(other["0000.png"], whole["0000.png"])  # files of other requests are replaced


def test_another_picture_under_the_same_name_is_another_request(sample, tmp_path):
    start = tmp_path / "start.png"
    arguments = ["--prompt", "x", "--steps", "2", "--num-images", "1", "--image", str(start)]
    Image.new("RGB", (32, 32), "red").save(start)
    first = sample(*arguments)
    Image.new("RGB", (32, 32), "blue").save(start)
    file_hash.cache_clear()  # as in another process
    with pytest.raises(UserError, match="another request"):
        sample(*arguments)
    with pytest.raises(UserError, match=r"start\.png: is another file"):
        sample("--from", str(tmp_path / "out/0000.png"), base=False, out="again")
    assert not same(sample(*arguments, "--overwrite")["0000.png"], first["0000.png"])


def test_from_makes_as_many_as_are_asked_for(sample, tmp_path):
    first = sample("--prompt", "x", "--steps", "1", "--num-images", "3")
    again = sample("--from", str(tmp_path / "out/0001.png"), "--num-images", "2", base=False, out="again")
    assert [same(again[f"000{k}.png"], first[f"000{k + 1}.png"]) for k in range(2)] == [True, True]


def test_a_file_holds_many_requests(sample, adapter, tiny_base, tmp_path):
    blocks = {"unet": {"mid": 0.5, "up": {"block_1": [0.1, 0.2, 0.3]}}, "text_encoder": 0.4}
    content = {
        "base": str(tiny_base),
        "steps": 2,
        "requests": [
            {"prompt": "a star", "num_images": 2},
            {"prompt": "a star", "adapters": [{"file": str(adapter), "weight": blocks}]},
            {"prompt": "a star", "adapters": [{"file": str(adapter), "start": 0.5}], "fuse": False},
            {"prompt": "a star", "adapters": [{"file": str(adapter)}], "fuse": True},
            {"prompt": "a star", "seed": 1},
        ],
    }
    file = tmp_path / "requests.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    made = sample(str(file), base=False)
    assert len(made) == 6
    assert len({picture.tobytes() for name, picture in made.items() if name != "0005.png"}) == 5
    alone = sample("--prompt", "a star", "--steps", "2", "--seed", "1", "--num-images", "1", out="alone")
    assert same(made["0005.png"], alone["0000.png"])  # after an adapter was fused and taken out


def test_mistakes_in_a_file_come_all_at_once_with_their_lines(tmp_path):
    file = tmp_path / "requests.yaml"
    file.write_text("stps: 3\nrequests:\n  - {prompt: x, seed: -1}\n  - {promt: x, adapters: [{fil: a}]}\n  - 3\n")
    with pytest.raises(UserError) as told:
        read_requests(file, {})
    words = "\n".join(told.value.problems).replace(str(file), "F")
    for wanted in (
        'F:1: stps: unknown key (did you mean "steps"?)',
        "F:3: requests.0.seed: should be greater than or equal to 0, found -1",
        'F:4: requests.1.promt: unknown key (did you mean "prompt"?)',
        'F:4: requests.1.adapters.0.fil: unknown key (did you mean "file"?)',
        "F:5: should be a mapping with a prompt",
    ):
        assert wanted in words


def test_two_processes_make_what_one_makes(sample, tiny_base, tmp_path, monkeypatch):
    """Each its share of the forward passes; the launcher itself starts two below."""
    arguments = ["--prompt", "a star", "--num-images", "9", "--steps", "1"]
    whole = sample(*arguments, out="one")
    from loraloom.inference.pictures.batch import make, work_of
    from loraloom.inference.pictures.sampler import Sampler

    request = PictureRequest(prompt="a star", num_images=9, steps=1, base=str(tiny_base))
    folder = tmp_path / "two"
    folder.mkdir()
    for rank in (1, 0):
        sampler = Sampler()
        done = make(work_of([request], sampler, folder), sampler, "", rank, 2)
        assert (done.made, done.found) == ((4, 0) if rank else (5, 0))
    made = pictures(folder)
    assert made.keys() == whole.keys()
    assert all(same(made[name], whole[name]) for name in whole)


def test_accelerate_launch_spreads_the_pictures(sample, tiny_base, tmp_path):
    arguments = ["--prompt", "a star", "--num-images", "6", "--steps", "1", "--threads", "1"]
    threads = torch.get_num_threads()
    whole = sample(*arguments, out="one")
    torch.set_num_threads(threads)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["-m", "loraloom.inference", *arguments, "--base", str(tiny_base), "--out", str(tmp_path / "two")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}  # two processes on one CPU
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("6 images in") == done.stdout.count(", by 2 processes") == 1
    made = pictures(tmp_path / "two")
    assert made.keys() == whole.keys()
    assert all(same(made[name], whole[name]) for name in whole)


def test_a_prompt_that_would_be_cut_is_refused_with_the_option(tiny_base, tmp_path, capsys):
    arguments = ["--base", str(tiny_base), "--prompt", "star " * 80, "--steps", "1", "--out", str(tmp_path)]
    assert run_command(main, arguments) == 2
    assert "80 tokens and 75 fit: give token_windows: 2 (--token-windows 2)" in capsys.readouterr().err
    assert run_command(main, [*arguments, "--token-windows", "2", "--num-images", "1"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "say what to sample by one of"),
        (["--prompt", "x", "--from", "y.png"], "say what to sample by one of"),
        (["--from", "missing.png"], "there is no such file"),
        (["--prompt", "x", "--image", "missing.png"], "no such file"),
        (["--prompt", "x", "--strength", "2"], "less than or equal to 1"),
        (["--prompt", "x", "--guidance-until", "0"], "greater than 0"),
        (["--prompt", "x", "--control", "model"], "MODEL=IMAGE"),
        (["--prompt", "x", "--attention", "flsh"], 'did you mean "flash"'),
        (["missing.yaml"], "missing.yaml"),
    ],
)
def test_what_cannot_be_is_one_line(tiny_base, tmp_path, capsys, arguments, words):
    assert run_command(main, [*arguments, "--base", str(tiny_base), "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


@pytest.mark.parametrize(
    ("prompt", "words"),
    [('("a", "b").blend(1)', "cannot be read as a weighted prompt"), ("a cat.swap(dog)", ".swap() changes words")],
)
@pytest.mark.parametrize("place", ["prompt", "negative_prompt"])
def test_weights_that_cannot_be_read_are_told_before_anything_is_loaded(
    tmp_path, monkeypatch, capsys, place, prompt, words
):
    def load(*arguments: object, **options: object) -> None:
        pytest.fail("a base is loaded")

    monkeypatch.setattr(Engine, "load", load)
    file = tmp_path / "requests.yaml"
    requests = [{"prompt": "a star"}, {"prompt": "a moon", "weighted": True, place: prompt}]
    file.write_text(yaml.safe_dump({"requests": requests}, sort_keys=False))
    assert run_command(main, [str(file), "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err


def test_a_picture_of_others_says_so(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    assert run_command(main, ["--from", str(tmp_path / "plain.png"), "--out", str(tmp_path / "o")]) == 2
    assert "does not say how it was made" in capsys.readouterr().err


def test_the_request_of_a_picture_is_json_that_other_programs_read(sample, tmp_path):
    sample("--prompt", "a star", "--steps", "1", "--num-images", "1")
    with Image.open(tmp_path / "out/0000.png") as image:
        assert json.loads(image.info["loraloom"])["prompt"] == "a star"
        assert "torch" in image.info["software"]


def test_prompts_are_tried_one_after_the_other_into_one_folder(tiny_base, tmp_path, monkeypatch, capsys):
    """Without --out nothing is replaced and nothing refused; a batch that is there in part is taken up again."""
    monkeypatch.chdir(tmp_path)
    common = ["--base", str(tiny_base), "--steps", "1"]
    star, moon = [*common, "--prompt", "a star", "--num-images", "2"], [*common, "--prompt", "a moon"]
    assert main(star) == main([*moon, "--num-images", "2"]) == 0
    folder = tmp_path / "runs/samples"
    first = {file.name: file.read_bytes() for file in folder.glob("[!.]*")}
    assert sorted(first) == ["0000.png", "0001.png", "0002.png", "0003.png", "grid-0002.png", "grid.png"]
    (folder / "0003.png").unlink()
    capsys.readouterr()
    assert main([*moon, "--num-images", "2"]) == 0
    assert "2 images in runs/samples (0002.png to 0003.png)" in capsys.readouterr().out
    assert main([*star, "--num-images", "3"]) == main(["--from", str(folder / "0003.png")]) == 0
    assert main(["--from", str(folder / "0002.png")]) == main(["--from", str(folder / "0003.png")]) == 0
    assert {name: (folder / name).read_bytes() for name in first} == first
    assert [request_in(folder / f"000{k}.png")["seed"] for k in (4, 5, 6)] == [0, 1, 2]
    again = pictures(tmp_path / "runs/again")
    assert list(again) == ["0000.png", "0001.png"]
    assert same(again["0001.png"], pictures(folder)["0002.png"])


def test_what_was_chosen_stands_in_the_picture(tiny_base, tmp_path, capsys):
    arguments = ["--base", str(tiny_base), "--prompt", "x", "--steps", "1", "--num-images", "1"]
    assert main([*arguments, "--out", str(tmp_path), "--scheduler", "Euler a", "--device", "cpu"]) == 0
    assert "on the CPU, weights in fp32" in capsys.readouterr().err
    assert request_in(tmp_path / "0000.png")["dtype"] == "fp32"
    other = tmp_path / "other"
    assert main([*arguments, "--out", str(other), "--scheduler", "euler_ancestral", "--device", "cpu"]) == 0
    assert same(pictures(tmp_path)["0000.png"], pictures(other)["0000.png"])
