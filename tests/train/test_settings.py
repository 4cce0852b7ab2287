"""What a resumed run may change, and what it may not, by whatever way it was changed."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from loraloom.configs.command import run_command
from loraloom.configs.loader import load_config
from loraloom.train.__main__ import main
from loraloom.train.replay import main as replay
from loraloom.train.run_folder import STATE
from loraloom.train.settings import changed, deciding, saved_settings

pytestmark = pytest.mark.slow

EDITS = {
    "optimizer.learning_rate": 5.0,
    "adapter.alpha": 400.0,
    "loop.seed": 7,
    "loop.batch_size": 4,
    "optimizer.name": "adafactor",
    "data.resolution": 64,
    "data.sources.0.caption": "another",
    "adapter.alpha_pattern": {"attn1": 2.0, "to_k": 64.0},
    "adapter.options.dropout": 0.5,
    "noise.offset": 0.1,
    "model.dtype": "bf16",
}
"""Settings that decide weights, one of each kind."""


@pytest.fixture(scope="module")
def trained(config_writer, photos, tiny_base, tmp_path_factory) -> Path:
    """The run folder of two steps, with images, base and first adapter of its own, and a checkpoint of each step."""
    folder = tmp_path_factory.mktemp("settings")
    shutil.copytree(photos, folder / "imgs")
    shutil.copytree(tiny_base, folder / "base")
    sections = {
        "model": {"base": str(folder / "base")},
        "data": {"sources": [{"path": str(folder / "imgs"), "caption": "a sks creature"}]},
        "adapter": {"alpha_pattern": {"to_k": 64.0, "attn1": 2.0}},
        "loop": {"steps": 2, "batch_size": 2, "threads": 1},
        "checkpoint": {"every": 1},
    }
    assert main([str(config_writer(folder, "run", **sections))]) == 0
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def edit(run: Path, key: str, value: object) -> None:
    """As with an editor."""
    file = run / "config.yaml"
    content = place = yaml.safe_load(file.read_text())
    *sections, last = key.split(".")
    for section in sections:
        place = place[int(section) if section.isdigit() else section]
    place[last] = value
    file.write_text(yaml.safe_dump(content, sort_keys=False))


def make_old(run: Path) -> None:
    """Checkpoints as they were before they kept settings."""
    for state in run.glob(f"checkpoints/*/{STATE}"):
        values = json.loads(state.read_text())
        del values["settings"]
        state.write_text(json.dumps(values))


@pytest.mark.parametrize("how", ["new", "old"])
def test_an_edited_config_is_refused_for_what_decides_the_weights(run, how, capsys):
    """Each edit alone, with the key and both values; old checkpoints by the record of what the run has written."""
    if how == "old":
        make_old(run)
    before = (run / "config.yaml").read_text()
    for key, value in EDITS.items():
        if how == "old" and key == "adapter.alpha_pattern":  # in another order, which old records do not know
            continue
        edit(run, key, value)
        assert run_command(main, ["--resume", str(run), "loop.steps=3"]) == 2, key
        *lines, advice = capsys.readouterr().err.splitlines()
        assert lines, key
        assert all(line.startswith(f"error: {key}") and "cannot become" in line for line in lines), lines
        assert "another output.dir" in advice
        (run / "config.yaml").write_text(before)
    edit(run, "loop.seed", 7)
    if how == "new":
        assert run_command(replay, ["--step", "2", str(run)]) == 2
        assert "loop.seed was 0" in capsys.readouterr().err


def test_settings_of_other_versions_are_compared_as_far_as_both_know_them(run):
    then = saved_settings(run)
    assert then is not None
    now = deciding(load_config(run / "config.yaml"))
    assert changed(then, now) == []
    assert changed({k: v for k, v in then.items() if k != "noise.offset"}, now) == []  # newer, at its default
    assert changed({k: v for k, v in then.items() if k != "loop.batch_size"}, now) != []
    assert changed(then | {"noise.no_longer_there": 1}, now) == []
    source = {f"data.sources.1.{key}": 1 for key in ("share", "caption")}
    assert len(changed(then | source, now)) == len(changed(then, now | source)) == 2


def test_a_run_goes_on_from_where_base_and_images_lie_now(run, trained, tmp_path, capsys):
    """And says which files it will replace; what lies there must be the same."""
    for name in ("base", "imgs"):
        shutil.copytree(trained.parent / name, tmp_path / "elsewhere" / name)
    moved = [f"data.sources.0.path={tmp_path}/elsewhere/imgs", f"model.base={tmp_path}/elsewhere/base"]
    assert main(["--resume", str(run), *moved, "loop.steps=3"]) == 0
    said = capsys.readouterr().out
    assert "tiny.safetensors, tiny.kohya.safetensors of step 2 will be replaced" in said

    scheduler = tmp_path / "elsewhere/base/scheduler/scheduler_config.json"
    values = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps(values | {"_diffusers_version": "0.0.0"}))
    (file,) = (tmp_path / "elsewhere/base/unet").glob("*.safetensors")
    weights = load_file(file)
    weights["conv_in.bias"][0] += 1
    save_file(weights, file)
    next((tmp_path / "elsewhere/imgs").glob("*.png")).unlink()
    scheduler.write_text(json.dumps(values | {"beta_end": 0.02}))
    assert run_command(main, ["--resume", str(run), "loop.steps=4"]) == 2
    *lines, advice = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all("changed since the checkpoint was saved" in line for line in lines)
    assert f"adapter.start_from={run / 'tiny.safetensors'}" in advice


def test_the_adapter_from_which_a_run_began_may_be_gone(write_config, trained, tmp_path, capsys):
    start = Path(shutil.copy(trained / "tiny.safetensors", tmp_path / "first.safetensors"))
    patterns = {"alpha_pattern": {"to_k": 64.0, "attn1": 2.0}}
    config = write_config(adapter={"start_from": str(start)} | patterns, loop={"steps": 1, "batch_size": 2})
    assert main([str(config)]) == 0
    began = json.loads(read_base(tmp_path / "run/tiny.safetensors"))["start_from"]
    start.unlink()
    assert main(["--resume", str(tmp_path / "run"), "loop.steps=2"]) == 0
    assert json.loads(read_base(tmp_path / "run/tiny.safetensors"))["start_from"] == began


def read_base(file: Path) -> str:
    """Of the record in a header."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return opened.metadata()["loraloom.base"]


@pytest.mark.parametrize("odd", [1e308, "x", None, [5, None], {"a": 1}])
def test_a_damaged_order_of_patterns_is_a_change_and_no_crash(odd):
    now = {"adapter.rank_pattern": ["a"], "adapter.rank_pattern.a": 4}
    assert changed({"adapter.rank_pattern": odd, "adapter.rank_pattern.a": 8}, now)
