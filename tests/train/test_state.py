"""Checkpoints: what they hold, and that a run which was killed ends as one which was not."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file, save_file

from loraloom import launch
from loraloom.configs.command import run_command
from loraloom.configs.errors import UserError
from loraloom.configs.loader import load_config
from loraloom.configs.record import NAME as RECORD
from loraloom.train.__main__ import main
from loraloom.train.build import build_trainer
from loraloom.train.callback import Callback
from loraloom.train.callbacks.checkpoint import Checkpoints
from loraloom.train.callbacks.export import Export
from loraloom.train.callbacks.requests import Requests
from loraloom.train.replay import main as replay
from loraloom.train.state import find_damage, newest_sound_checkpoint, save_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(config_writer, tmp_path_factory) -> Path:
    """The run folder of ten steps without interruption, with checkpoints at 4, 8 and 10."""
    folder = tmp_path_factory.mktemp("trained")
    assert main([str(config_writer(folder, "finished"))]) == 0
    return folder / "finished"


@pytest.fixture
def finished(trained, tmp_path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(trained, tmp_path / "finished"))


def adapter_bytes(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("tiny.safetensors", "tiny.kohya.safetensors")}


def drop_newest(folder: Path) -> Path:
    """Leaves the run as a kill during step 9 or 10 would have left it."""
    for name in ("tiny.safetensors", "tiny.kohya.safetensors", "run.json"):
        (folder / name).unlink()
    return newest_sound_checkpoint(folder)[0]


def test_a_checkpoint_holds_adapter_weights_and_nothing_of_the_base(finished, tiny_base):
    checkpoint, _ = newest_sound_checkpoint(finished)
    sizes = {file.name: file.stat().st_size for file in checkpoint.iterdir()}
    print({name: f"{size / 1024:.0f} KiB" for name, size in sorted(sizes.items())})
    assert set(sizes) == {
        *("adapter_text_encoder.safetensors", "adapter_unet.safetensors", "manifest.json", "run_state.json"),
        *("optimizer.bin", "scheduler.bin", "random_states_0.pkl"),
    }
    base = sum(file.stat().st_size for file in tiny_base.rglob("*.safetensors"))
    weights = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
    assert weights < base / 5
    assert json.loads((checkpoint / "run_state.json").read_text())["step"] == 10


def test_resume_from_an_older_checkpoint_gives_the_same_bytes(finished):
    before = adapter_bytes(finished)
    (finished / "checkpoints/step-000010/optimizer.bin").write_bytes(b"cut off")
    drop_newest(finished)
    assert main(["--resume", str(finished)]) == 0
    assert adapter_bytes(finished) == before


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "manifest"])
def test_a_damaged_checkpoint_is_passed_over(finished, damage):
    newest = finished / "checkpoints/step-000010"
    file = newest / ("manifest.json" if damage == "manifest" else "adapter_unet.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "flipped":
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[: len(content) // 2])
    assert find_damage(newest)
    checkpoint, passed = newest_sound_checkpoint(finished)
    assert checkpoint.name == "step-000008"
    assert len(passed) == 1
    assert "step-000010" in passed[0]


def test_saving_after_a_damaged_checkpoint_keeps_what_is_sound(finished):
    """Back at step 8 because 10 is damaged: step 9, saved on a signal, must not give way to 10."""
    (finished / "checkpoints/step-000010/optimizer.bin").write_bytes(b"")
    config = load_config(finished / "config.yaml", [f"output.dir={finished}", "checkpoint.keep=1"])
    trainer = build_trainer(config, checkpoint=newest_sound_checkpoint(finished)[0])
    trainer.callbacks = []
    trainer.train_step()
    save_checkpoint(trainer.run)
    checkpoint, passed = newest_sound_checkpoint(finished)
    assert (checkpoint.name, passed) == ("step-000009", [])


def test_a_resumed_run_must_find_the_same_base(write_config, tiny_base, tmp_path, capsys):
    shutil.copytree(tiny_base, tmp_path / "base")
    config = write_config(model={"base": str(tmp_path / "base")}, loop={"steps": 1})
    assert main([str(config)]) == 0
    (file,) = (tmp_path / "base/unet").glob("*.safetensors")
    weights = load_file(file)
    weights["conv_in.bias"][0] += 1
    save_file(weights, file)
    assert run_command(main, ["--resume", str(tmp_path / "run"), "loop.steps=2"]) == 2
    assert "model.base: the weights of its unet were changed since" in capsys.readouterr().err


def test_checkpoints_are_ordered_by_number(finished):
    run = build_trainer(load_config(finished / "config.yaml", [f"output.dir={finished}"]), overwrite=True).run
    for run.step in (999_999, 1_000_000):
        save_checkpoint(run)
    assert newest_sound_checkpoint(finished)[0].name == "step-1000000"


@pytest.mark.parametrize("name", ["step-000020", "step-000010 (copy)", "epoch-3", "step-last"])
def test_a_checkpoint_under_another_name_is_no_checkpoint(finished, name):
    folder = finished / "checkpoints"
    shutil.copytree(folder / "step-000008", folder / name)
    checkpoint, passed = newest_sound_checkpoint(finished)
    assert checkpoint.name == "step-000010"
    assert [problem.partition(": ")[2] for problem in passed] == (
        ["it holds step 8, whatever its name says"] if name == "step-000020" else []
    )


def test_a_resumed_run_may_not_change_what_decides_its_weights(finished, capsys):
    assert run_command(main, ["--resume", str(finished), "adapter.rank=8", "data.resolution=64"]) == 2
    first, second, advice = capsys.readouterr().err.splitlines()
    assert "adapter.rank was 4" in first
    assert "data.resolution was 32" in second
    assert "output.dir" in advice
    assert main(["--resume", str(finished), "validation.every=3"]) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_saves_and_stops(write_config, number):
    class Interrupt(Callback):
        def on_step(self, run):
            if run.step == 3:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), signal.SIGHUP)  # a terminal that closes sends it twice

    as_found = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup
    before = signal.getsignal(number)
    trainer = build_trainer(load_config(write_config(checkpoint={"every": 100})))
    trainer.callbacks = [Interrupt(), Requests(), Checkpoints()]
    try:
        trainer.fit()
        assert (trainer.run.stop, trainer.run.step) == (number.name, 3)
        assert newest_sound_checkpoint(trainer.run.folder)[0].name == "step-000003"
        assert signal.getsignal(number) is before
    finally:
        signal.signal(signal.SIGHUP, as_found)


def test_nohup_outlives_its_terminal(write_config, monkeypatch):
    class HangUp(Callback):
        def on_step(self, run):
            os.kill(os.getpid(), signal.SIGHUP)

    trainer = build_trainer(load_config(write_config(loop={"steps": 2})))
    trainer.callbacks = [HangUp(), Requests()]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer.fit()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (trainer.run.stop, trainer.run.step) == (None, 2)


def test_a_trainer_in_a_thread_looks_at_files_and_leaves_what_is_no_request(write_config, capsys):
    """Folders, links and files with something in them are somebody's, whatever they are called."""

    class Ask(Callback):
        def on_step(self, run):
            if run.step == 1:
                (run.folder / "stop").mkdir()
                (run.folder / "save").write_text("notes that somebody wants to keep")
            elif run.step == 3:
                (run.folder / "stop").rmdir()
                (run.folder / "stop").touch()

    trainer = build_trainer(load_config(write_config(checkpoint={"every": 100})))
    trainer.callbacks = [Ask(), Requests(), Checkpoints()]
    thread = threading.Thread(target=trainer.fit)
    thread.start()
    thread.join()
    assert (trainer.run.stop, trainer.run.step) == ("stop", 3)
    assert capsys.readouterr().out.count("is no empty file") == 2
    assert (trainer.run.folder / "save").read_text() == "notes that somebody wants to keep"


def test_files_in_the_run_folder_save_and_stop(write_config):
    class Ask(Callback):
        def on_step(self, run):
            for step, name in ((2, "save"), (5, "stop")):
                if run.step == step:
                    (run.folder / name).touch()

    trainer = build_trainer(load_config(write_config(checkpoint={"every": 100})))
    trainer.callbacks = [Ask(), Requests(), Checkpoints()]
    trainer.fit()
    assert (trainer.run.stop, trainer.run.step) == ("stop", 5)
    saved = sorted(path.name for path in (trainer.run.folder / "checkpoints").glob("step-*"))
    assert saved == ["step-000002", "step-000005"]
    assert not [name for name in ("save", "stop") if (trainer.run.folder / name).exists()]


def test_a_checkpoint_is_saved_after_so_many_minutes(write_config, monkeypatch):
    clock = iter(range(0, 10_000, 60))
    monkeypatch.setattr("loraloom.train.callbacks.checkpoint.time.monotonic", lambda: next(clock))
    trainer = build_trainer(load_config(write_config(checkpoint={"every": 100, "minutes": 3}, loop={"steps": 9})))
    trainer.callbacks = [Checkpoints()]
    trainer.fit()
    saved = sorted(path.name for path in (trainer.run.folder / "checkpoints").glob("step-*"))
    assert saved == ["step-000003", "step-000006", "step-000009"]


def test_a_folder_in_which_someone_trains_is_refused(finished, capsys):
    with FileLock(finished / ".lock"):
        assert run_command(main, ["--resume", str(finished)]) == 2
    assert "another process" in capsys.readouterr().err


def test_no_checkpoint_at_all_is_said(tmp_path):
    with pytest.raises(UserError, match="no sound checkpoint"):
        newest_sound_checkpoint(tmp_path)


def test_a_run_that_was_killed_in_its_first_save_begins_again(trained, config_writer, tmp_path, capsys):
    config, folder = config_writer(tmp_path, "finished"), tmp_path / "finished"
    with build_trainer(load_config(config)) as trainer:
        trainer.callbacks = [each for each in trainer.callbacks if isinstance(each, Export)]
        trainer.callbacks[0].on_start(trainer.run)
        trainer.step()
    (folder / "checkpoints/step-000004.tmp").mkdir(parents=True)
    (folder / "checkpoints/step-000004.tmp/optimizer.bin").write_bytes(b"half")
    assert run_command(main, [str(config)]) == 2
    assert "loraloom resume" in capsys.readouterr().err
    assert main(["--resume", str(folder)]) == 0
    assert "begins again at its first step" in capsys.readouterr().out
    assert adapter_bytes(folder) == adapter_bytes(trained)


def test_a_finished_run_without_checkpoints_is_not_trained_again_by_resuming(finished, capsys):
    before = adapter_bytes(finished)
    shutil.rmtree(finished / "checkpoints")
    assert run_command(main, ["--resume", str(finished), "loop.steps=12"]) == 2
    assert "its checkpoints are gone" in capsys.readouterr().err
    assert adapter_bytes(finished) == before


def test_a_partial_checkpoint_is_never_taken_for_one(finished):
    (finished / "checkpoints/step-000010").rename(finished / "checkpoints/step-000010.tmp")
    assert newest_sound_checkpoint(finished)[0].name == "step-000008"


def test_only_the_newest_checkpoints_stay(write_config):
    config = write_config(checkpoint={"every": 2, "keep": 2}, loop={"steps": 6})
    assert main([str(config)]) == 0
    names = sorted(path.name for path in (config.parent / "run/checkpoints").iterdir())
    assert names == ["latest", "step-000004", "step-000006"]


def test_a_folder_with_a_run_is_not_trained_over(finished, write_config, capsys):
    assert run_command(main, [str(write_config("finished"))]) == 2
    assert "loraloom resume" in capsys.readouterr().err


def wait_for_step(folder: Path, step: int, process: Any) -> None:
    """Until the history says that this step is done."""
    history, deadline = folder / "logs/history.jsonl", time.monotonic() + 120
    while not history.exists() or len(history.read_text().splitlines()) < step:
        assert process.poll() is None, process.said
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.02)


LONGER = {"loop": {"steps": 24, "batch_size": 2}, "checkpoint": {"every": 4}}


@pytest.fixture(scope="module")
def uninterrupted(config_writer, tmp_path_factory) -> Path:
    """What the killed runs must end with."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert main([str(config_writer(folder, "whole", **LONGER))]) == 0
    return folder / "whole"


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_killed_process_resumes_to_the_same_bytes(start, write_config, uninterrupted, name):
    config = write_config("killed", **LONGER)
    process = start("loraloom.train", str(config))
    folder, step = config.parent / "killed", 5 + random.SystemRandom().randrange(13)  # another one each time
    print(f"{name} after step {step}")
    wait_for_step(folder, step, process)
    os.kill(process.pid, getattr(signal, name))
    code = process.wait(60)
    assert code == (5 if name == "SIGTERM" else -signal.SIGKILL)
    assert not (folder / "tiny.safetensors").exists()
    if name == "SIGTERM":
        state = json.loads((folder / "run.json").read_text())
        assert state["state"] == "stopped"
        assert newest_sound_checkpoint(folder)[0].name == f"step-{state['step']:06d}"
    assert main(["--resume", str(folder)]) == 0
    assert adapter_bytes(folder) == adapter_bytes(uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_does_not_take_the_workers(start, write_config, number):
    """As Ctrl-C, and clusters send it."""
    data = {"workers": 2, "cache": {"latents": False}}
    config = write_config("grouped", loop={"steps": 500, "batch_size": 2}, checkpoint={"every": 500}, data=data)
    process = start("loraloom.train", str(config), own_group=True)
    wait_for_step(config.parent / "grouped", 3, process)
    os.killpg(process.pid, number)
    assert process.wait(60) == 5, process.said
    assert "Traceback" not in process.said
    assert newest_sound_checkpoint(config.parent / "grouped")[1] == []


def test_accelerate_launch_trains_the_same(write_config, finished):
    config = write_config("launched")
    settings = Path(launch.__file__).with_name("accelerate") / "cpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(settings)]
    done = subprocess.run([*command, "-m", "loraloom.train", str(config)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert adapter_bytes(config.parent / "launched") == adapter_bytes(finished)


def test_two_processes_train_what_one_with_accumulation_trains(run_two, write_config, tmp_path):
    """From images in three buckets, with captions, crops and dropout that are drawn, averages, held-out images, and a
    cache for each run; and two go on from a checkpoint of one."""
    folder = tmp_path / "shapes"
    folder.mkdir()
    for index, size in enumerate([(40, 40), (80, 40), (40, 80), (44, 40), (84, 40)]):
        pixels = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"sks, tag {index}, small, round\n")
    data = {"sources": [{"path": str(folder)}], "captions": {"shuffle": True, "dropout": 0.2}}
    data |= {"crop": "random", "flip": 0.5, "variants": 3}
    options = {
        "loop": {"steps": 4, "batch_size": 4, "micro_batch": 2, "threads": 1},
        "adapter": {"options": {"dropout": 0.1}},
        "optimizer": {"ema_decay": 0.9, "parts": {"text_encoder": {"stop_after": 3}}},
        "validation": {"sources": [{"path": str(folder)}], "every": 2, "timesteps": 2},
        "checkpoint": {"every": 2},
    }
    one, two = (
        write_config(name, data=data | {"cache": {"dir": str(tmp_path / f"cache of {name}")}}, **options)
        for name in ("one", "two")
    )
    assert main([str(one)]) == 0
    run_two("loraloom.train", str(two))
    assert json.loads((tmp_path / "two/run.json").read_text())["processes"] == 2
    assert adapter_bytes(tmp_path / "one") == adapter_bytes(tmp_path / "two")
    curves = [(tmp_path / name / "logs/held_out.jsonl").read_text() for name in ("one", "two")]
    assert curves[0] == curves[1]
    assert len(curves[0].splitlines()) == 3

    shutil.copytree(tmp_path / "one", tmp_path / "three")
    shutil.rmtree(tmp_path / "three/checkpoints/step-000004")
    drop_newest(tmp_path / "three")
    run_two("loraloom.train", "--resume", str(tmp_path / "three"))
    assert adapter_bytes(tmp_path / "one") == adapter_bytes(tmp_path / "three")


@pytest.mark.parametrize("step", [1, 6, 10])
def test_a_step_can_be_replayed_alone(finished, step, capsys):
    before = {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()}
    assert replay(["--step", str(step), str(finished)]) == 0
    said = capsys.readouterr().out
    assert "as in the history" in said
    assert said.count("timestep") == 2
    picture, record = finished / "replay" / f"step-{step:06d}.png", finished / RECORD
    assert Image.open(picture).size[0] > 100
    assert before.pop(record) in record.read_bytes()
    new = (picture, record)
    assert {file: file.read_bytes() for file in finished.rglob("*") if file.is_file() and file not in new} == before


def test_a_step_that_there_is_not_cannot_be_replayed(finished, tmp_path, capsys):
    assert run_command(replay, ["--step", "11", str(finished)]) == 2
    assert "has 10 steps" in capsys.readouterr().err
    assert run_command(replay, ["--step", "1", str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err
