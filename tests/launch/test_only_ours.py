"""Every verb and flag beside files of others: each byte that was there and was not ours is there afterwards."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from loraloom.configs.command import run_command
from loraloom.launch.cli import run

pytestmark = pytest.mark.slow

STRANGERS = (
    *("notes.txt", "README.md", "dogma.safetensors", "dog-v1.safetensors", "samples/mine.png", "logs/mine.txt"),
    *("checkpoints/base.safetensors", "checkpoints/step-000001.zip", "dog/notes.txt", "dog.yaml.bak"),
)


def photos_into(folder: Path) -> None:
    folder.mkdir(parents=True)
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")


def config_into(file: Path, base: Path, **sections) -> None:
    content = {
        "model": {"base": str(base)},
        "data": {"resolution": 32, "sources": [{"path": "dog", "caption": "a sks dog"}]},
        "loop": {"steps": 2, "batch_size": 1, "threads": 1},
        "checkpoint": {"every": 1, "keep": 1},
        "validation": {"prompts": ["a dog"], "every": 2, "num_images": 1, "steps": 1},
        "output": {"dir": ".", "name": "dog"},
    }
    for name, values in sections.items():
        content[name] = content.get(name, {}) | values
    file.write_text(f"# mine\n{yaml.safe_dump(content)}")


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and not p.is_symlink()}


@pytest.fixture
def project(tmp_path, monkeypatch, tiny_base) -> Path:
    """As a newcomer has it: photos in `dog`, a config beside it that trains in the folder itself."""
    folder = tmp_path / "project"
    photos_into(folder / "dog")
    config_into(folder / "my.yaml", tiny_base)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_base) -> tuple[Path, dict[str, bytes]]:
    """That project with files of others and a finished run in it, and what was there before the run."""
    folder, here = tmp_path_factory.mktemp("trained") / "project", Path.cwd()
    photos_into(folder / "dog")
    config_into(folder / "my.yaml", tiny_base)
    for name in STRANGERS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"of others: {name}")
    before = bytes_in(folder)
    os.chdir(folder)
    try:
        assert run_command(run, ["train", "my.yaml"]) == 0
    finally:
        os.chdir(here)
    return folder, before


@pytest.fixture
def finished(trained, tmp_path, monkeypatch) -> tuple[Path, dict[str, bytes]]:
    """A copy of it, to be worked in."""
    folder = tmp_path / "project"
    shutil.copytree(trained[0], folder)
    monkeypatch.chdir(folder)
    return folder, trained[1]


def lost(before: dict[str, bytes]) -> list[str]:
    now = bytes_in(Path())
    return [path for path, content in before.items() if now.get(path) != content]


FULL = ("adapter.method=full", "optimizer.learning_rate=1e-6")
SAMPLE = ("--base", "{base}", "--prompt", "a", "--num-images", "1", "--steps", "1", "--resolution", "32")
BASE, FORCED = ("--base", "{base}"), ("--out", "dogma.safetensors", "--force")
GIVEN = ("--data", "dog", *BASE, "--caption", "a sks dog")
COMMANDS = [  # and the exit codes
    (("train", "my.yaml"), 2),
    (("train", "my.yaml", "--overwrite", *FULL), 2),
    (("train", "my.yaml", "--overwrite", "output.name=.."), 2),
    (("train", "my.yaml", "--overwrite", "output.name=."), 2),
    (("train", "my.yaml", "--overwrite", "output.name=checkpoints"), 2),
    (("train", "my.yaml", "--overwrite", "output.name=dogma"), 2),
    (("train", "my.yaml", "--overwrite", "data.sources.0.path=samples"), 2),
    (("plan", "my.yaml", *FULL), 2),
    (("plan", "my.yaml"), 0),
    (("cache", "my.yaml"), 0),
    (("preview", "my.yaml", "--out", "logs"), 0),
    (("preview", "my.yaml", "--out", "dog"), 2),
    (("replay", ".", "--step", "1"), 0),
    (("resume", "."), 0),
    (("runs", "."), 0),
    (("runs", "--compare", ".", "--out", "notes.txt"), 2),
    (("runs", "--compare", ".", "--out", "run.json"), 2),
    (("slurm", "my.yaml", "--out", "notes.txt"), 2),
    (("schema", "--out", "notes.txt"), 2),
    (("init", "--data", "dog", "--out", "notes.txt"), 2),
    (("init", "--data", "dog", "--out", "notes.txt", "--force"), 2),
    (("init", "--data", "dog", "--out", "my.yaml", "--force"), 2),
    (("reproduce", "dog.safetensors", *GIVEN, "--out", "notes.txt", "--force"), 2),
    (("adapter", "convert", "dog.safetensors", "--to", "peft", "--base", "{base}", "--out", "dog", "--force"), 2),
    (("adapter", "convert", "dog.safetensors", "--to", "kohya", *BASE, *FORCED), 2),
    (("adapter", "resize", "dog.safetensors", "--rank", "2", *BASE, *FORCED), 2),
    (("adapter", "merge", "dog.safetensors", "--base", "{base}", "--into-base", "--out", "dog", "--force"), 2),
    (("adapter", "merge", "dog.safetensors", "--base", "{base}", "--into-base", "--out", ".", "--force"), 2),
    (("adapter", "merge", "dog.safetensors", "--base", "{base}", "--into-base", "--out", "{base}", "--force"), 2),
    (("adapter", "extract", "{base}", "{base}", "--rank", "2", *FORCED), 2),
    (("convert", "{base}", *FORCED), 2),
    (("sample", *SAMPLE, "--out", "samples"), 0),
    (("sample", *SAMPLE, "--out", "dog", "--overwrite"), 0),
    (("grid", *BASE, "--prompt", "a", "--x", "seed", "0", *SAMPLE[-4:], "--out", "dog"), 2),
    (("push", ".", "--dry-run"), 0),
]  # fmt: skip


def test_no_verb_takes_what_others_have_put_there(finished, tiny_base):
    """All of them, one after the other, in a folder where photos, notes and a run lie side by side."""
    _, before = finished
    base = bytes_in(tiny_base)
    for arguments, code in COMMANDS:
        said = [word.format(base=tiny_base) for word in arguments]
        assert (arguments, run_command(run, said)) == (arguments, code)
        assert (arguments, lost(before)) == (arguments, [])
    assert bytes_in(tiny_base) == base


@pytest.mark.parametrize("record", [True, False], ids=["recorded", "of 0.1.0"])
def test_overwrite_removes_exactly_what_the_run_wrote(finished, record, capsys):
    folder, before = finished
    if not record:
        (folder / ".loraloom.jsonl").unlink()
    (folder / "samples/step-000002/later.txt").write_text("of others")
    (folder / "samples/step-000009").mkdir()
    shutil.copy(folder / "samples/step-000002/samples.json", folder / "samples/step-000009/mine.json")
    before |= {path: content for path, content in bytes_in(folder).items() if path.endswith(("later.txt", "mine.json"))}
    old = bytes_in(folder)
    assert run_command(run, ["train", "my.yaml", "--overwrite", "output.name=dog2", "loop.steps=1"]) == 0
    said = capsys.readouterr().out
    assert "--overwrite: removed what the old run wrote in .: checkpoints/" in said
    assert "--overwrite: left what that run did not write" in said
    assert lost(before) == []
    now = bytes_in(folder)
    assert now["dog.safetensors"] == old["dog.safetensors"], "results of another name are not the run's that begins"
    gone = {path for path in old if path not in now}
    assert {"checkpoints/step-000002/manifest.json", "samples/step-000002/grid.png"} <= gone
    assert not {path.partition("/")[0] for path in gone} - {"checkpoints", "samples", "logs"}
    if not record:
        return
    assert run_command(run, ["train", "my.yaml", "--overwrite", "output.name=dog2", *FULL, "loop.steps=1"]) == 0
    assert run_command(run, ["train", "my.yaml", "--overwrite", "output.name=dog2", *FULL, "loop.steps=1"]) == 0
    (folder / "dog2/unet/mine.txt").write_text("of others")
    assert run_command(run, ["train", "my.yaml", "--overwrite", "output.name=dog2", *FULL, "loop.steps=1"]) == 2
    assert lost(before) == []
    assert (folder / "dog2/unet/mine.txt").read_text() == "of others"


@pytest.mark.parametrize("flag", [(), ("--overwrite",)], ids=["fresh", "overwrite"])
@pytest.mark.parametrize(
    "path",
    [
        *("config.yaml", "run.json", "report.html", ".lock", "logs/history.jsonl", "logs/held_out.jsonl"),
        *("dog.safetensors", "dog.kohya.safetensors", "checkpoints/latest", "checkpoints/step-000001/w.bin"),
        *("samples/step-000000/grid.png", "samples/step-000000/samples.json", "samples/step-000002/00-a-dog-0.png"),
        *("checkpoints -> elsewhere", "logs -> elsewhere", "samples -> elsewhere", "run.json -> elsewhere/a.txt"),
        *("dog.safetensors -> nowhere", "logs/loraloom -> elsewhere", "config.yaml/a.txt"),
    ],
)
def test_what_is_in_the_way_of_a_first_run_is_named_and_stays(project, path, flag, capsys):
    name, arrow, target = path.partition(" -> ")
    elsewhere = project.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.txt").write_text("of others")
    (project / name).parent.mkdir(parents=True, exist_ok=True)
    if arrow:
        (project / name).symlink_to(project.parent / target)
    else:
        (project / name).write_text("of others")
    before = bytes_in(project.parent)
    assert run_command(run, ["train", "my.yaml", *flag]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "in its way: " in line
    assert name.partition("/")[0] in line
    assert bytes_in(project.parent) == before
    assert not arrow or (project / name).is_symlink()


def test_the_config_of_the_user_is_not_made_another(project, tiny_base):
    config_into(project / "config.yaml", tiny_base)
    before = bytes_in(project)
    for words in (["train", "config.yaml"], ["train", "config.yaml", "--overwrite"], ["plan", "config.yaml"]):
        assert run_command(run, words) == 2
        assert bytes_in(project) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adapter": {"method": "full"}}, "data.sources.0.path dog lies in dog"),
        ({"output": {"dir": "runs", "name": "base"}, "adapter": {"method": "full"}, "model": {"base": "runs/base"}},
         "model.base runs/base lies in runs/base"),
        ({"output": {"dir": "base/run"}, "model": {"base": "base"}}, "output.dir base/run lies in model.base base"),
        ({"data": {"resolution": 32, "sources": [{"path": "samples/good", "caption": "x"}]}}, "lies in samples"),
        ({"data": {"resolution": 32, "sources": [{"path": "link", "caption": "x"}]}}, "lies in samples"),
        ({"validation": {"sources": [{"path": "samples/good", "caption": "x"}]}}, "validation.sources.0.path"),
        ({"adapter": {"start_from": "dog.safetensors"}}, "adapter.start_from dog.safetensors lies in dog.safetensors"),
        ({"model": {"adapters": ["checkpoints/a.safetensors:0.5"]}}, "model.adapters checkpoints/a.safetensors"),
        ({"data": {"resolution": 32, "sources": [{"shards": "logs/*.tar", "caption": "x"}]}}, "data.sources.0.shards"),
        ({"output": {"name": "d" * 230}}, "output.name: has"),
    ],
)  # fmt: skip
def test_what_a_run_reads_lies_in_nothing_that_it_writes(project, tiny_base, change, words, capsys):
    for name in ("runs/base", "base"):
        shutil.copytree(tiny_base, name)
    photos_into(project / "samples/good")
    (project / "link").symlink_to("samples/good")
    for name in ("dog.safetensors", "checkpoints/a.safetensors", "logs/a.tar"):
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text("of others")
    base = Path(change.get("model", {}).get("base", tiny_base))
    config_into(project / "other.yaml", base, **change)
    before = bytes_in(project)
    for verb in (["plan"], ["train"], ["train", "--overwrite"]):
        assert run_command(run, [verb[0], "other.yaml", *verb[1:]]) == 2
        assert words in (said := capsys.readouterr().err) or "in its way" in said
    assert bytes_in(project) == before
    from loraloom.configs.loader import load_config
    from loraloom.train.footprint import misplaced_inputs, problems_of_names

    config = load_config("other.yaml")
    assert words in "\n".join([*misplaced_inputs(config), *problems_of_names(config)])


@pytest.mark.parametrize("name", ["0000.png", "grid.png"])
@pytest.mark.parametrize("what", ["notes", "a picture", "a link", "a folder"])
def test_pictures_are_written_over_nothing_of_others(tmp_path, tiny_base, monkeypatch, name, what, capsys):
    monkeypatch.chdir(tmp_path)
    target, precious = tmp_path / "out" / name, tmp_path / "precious.png"
    target.parent.mkdir()
    Image.new("RGB", (8, 8)).save(precious)
    if what == "a folder":
        target.mkdir()
        (target / "a.txt").write_text("of others")
    elif what == "a link":
        target.symlink_to(precious)
    else:
        target.write_bytes(b"notes" if what == "notes" else precious.read_bytes())
    before = bytes_in(tmp_path)
    words = [word.format(base=tiny_base) for word in SAMPLE]
    for flag in ([], ["--overwrite"]):
        assert run_command(run, ["sample", *words, "--out", "out", *flag]) == 2
        assert f"out/{name}: " in capsys.readouterr().err.splitlines()[-1]
        assert bytes_in(tmp_path) == before
        assert what != "a link" or target.is_symlink()


def test_a_grid_is_no_picture_of_sample_and_the_other_way_round(tmp_path, tiny_base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [word.format(base=tiny_base) for word in SAMPLE]
    grid = ["grid", *words[:2], "--prompt", "a", "--x", "seed", "0", "1", *words[-4:], "--out", "out"]
    assert run_command(run, grid) == 0
    drawn = Path("out/grid.png").read_bytes()
    assert run_command(run, ["sample", *words, "--out", "out"]) == 2
    assert Path("out/grid.png").read_bytes() == drawn
    assert run_command(run, ["sample", *words, "--out", "out", "--overwrite"]) == 0
    assert run_command(run, grid) == 2
    assert run_command(run, [*grid, "--overwrite"]) == 0
    assert Path("out/grid.png").read_bytes() == drawn


def test_what_is_no_request_is_left_where_it_is(tmp_path):
    from loraloom.configs.ownership import take_request

    (tmp_path / "stop").mkdir()
    (tmp_path / "save").write_text("my notes")
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to("empty")
    assert not any(take_request(tmp_path / name) for name in ("stop", "save", "link", "none"))
    assert take_request(tmp_path / "empty")
    assert sorted(os.listdir(tmp_path)) == ["link", "save", "stop"]
