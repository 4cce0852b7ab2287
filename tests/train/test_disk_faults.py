"""Disks that are full or refuse to be written, and kills within a save: what was saved stays, training goes on."""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loraloom.configs.command import run_command
from loraloom.configs.loader import load_config
from loraloom.train import state
from loraloom.train.__main__ import main
from loraloom.train.build import build_trainer
from loraloom.train.callback import Callback
from loraloom.train.callbacks.checkpoint import Checkpoints
from loraloom.train.callbacks.export import _load_best
from loraloom.train.callbacks.requests import Requests
from loraloom.train.journal import Journal
from loraloom.train.run_folder import read_history
from loraloom.train.state import (
    SaveError,
    checkpoint_bytes,
    find_damage,
    newest_sound_checkpoint,
    save_checkpoint,
)

pytestmark = pytest.mark.slow

FILES = (
    *("adapter_text_encoder.safetensors", "adapter_unet.safetensors", "optimizer.bin", "scheduler.bin"),
    *("random_states_0.pkl", "run_state.json", "manifest.json"),
)
HERE = f"tmp-{socket.gethostname()}-{os.getpid()}"


@pytest.fixture(autouse=True)
def nobody_waits_for_the_disk(monkeypatch):
    """What was written outlives a kill without it."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def trainer_of(write_config, *callbacks: Callback, name="run", **sections):
    trainer = build_trainer(load_config(write_config(name, **sections)), overwrite=True)
    trainer.callbacks = list(callbacks)
    return trainer


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class At(Callback):
    """Does something after a step, before anything else."""

    def __init__(self, **actions):
        self.actions = {int(step.removeprefix("step")): action for step, action in actions.items()}

    def on_step(self, run):
        self.actions.get(run.step, lambda: None)()


@contextlib.contextmanager
def no_room_for(name: str, size: int, monkeypatch) -> Iterator[None]:
    """The disk is full when this file of a checkpoint is written: really, by the kernel's own answer."""
    with monkeypatch.context() as patched:
        if name.endswith(".safetensors"):  # comes before all larger files
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, hard))
        else:
            begin, target = state._begin, f"{name}.{HERE}" if name in ("manifest.json", "latest") else name

            def begin_with_a_full_device(run, unfinished):
                begin(run, unfinished)
                folder = unfinished.parent if name == "latest" else unfinished
                (folder / target).symlink_to("/dev/full")

            patched.setattr(state, "_begin", begin_with_a_full_device)
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_a_disk_that_is_full_at_any_file_of_a_save_costs_only_that_save(write_config, monkeypatch, capsys):
    trainer = trainer_of(write_config, loop={"steps": 30}, checkpoint={"keep": 30})
    run, folder = trainer.run, trainer.run.folder / "checkpoints"
    saver = Checkpoints()
    saver.on_start(run)
    trainer.train_step()
    first = save_checkpoint(run)
    assert names(first) == sorted(FILES)
    for name in FILES:
        trainer.train_step()
        before, run.save = content(folder), True
        with no_room_for(name, (first / name).stat().st_size, monkeypatch):
            saver.on_step(run)
        said = capsys.readouterr().out
        assert "training goes on" in said, name
        assert f"the newest checkpoint is step-{run.step - 1:06d}" in said, said
        assert content(folder) == before, name
        trainer.train_step()
        run.save = True
        saver.on_step(run)
        assert newest_sound_checkpoint(run.folder) == (folder / f"step-{run.step:06d}", [])
        assert (folder / "latest").read_text() == f"step-{run.step:06d}"


def test_a_checkpoint_is_sound_even_if_nothing_can_point_to_it(write_config, monkeypatch, capsys):
    trainer = trainer_of(write_config, checkpoint={"keep": 1})
    for _ in range(2):
        trainer.train_step()
        with no_room_for("latest" if trainer.run.step == 2 else "nothing", 0, monkeypatch):
            save_checkpoint(trainer.run)
    folder = trainer.run.folder / "checkpoints"
    assert "step-000002 is saved, but" in capsys.readouterr().out
    assert (folder / "latest").read_text() == "step-000001"
    assert [find_damage(folder / f"step-00000{step}") for step in (1, 2)] == [None, None]


def test_too_little_room_is_known_before_anything_is_written(write_config, monkeypatch, capsys):
    free = dict.fromkeys((1, 2), 10_000)
    monkeypatch.setattr(
        state.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, free.get(trainer.run.step, 10**12))
    )
    trainer = trainer_of(write_config, Checkpoints(), loop={"steps": 3}, checkpoint={"every": 1})
    trainer.fit()
    warnings = [line for line in capsys.readouterr().out.splitlines() if "no checkpoint is saved" in line]
    assert len(warnings) == 2
    assert "step 1: no checkpoint is saved (" in warnings[0]
    assert "MiB are needed and 0.0 MiB are free" in warnings[0]
    assert "touch" in warnings[0]
    assert names(trainer.run.folder / "checkpoints") == ["latest", "step-000003"]
    assert trainer.run.unsaved is None


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}, {"name": "torch.optim.SGD"}])
def test_the_room_that_is_asked_for_is_what_a_checkpoint_takes(write_config, options):
    trainer = trainer_of(write_config, optimizer=options)
    trainer.train_step()
    size = sum(file.stat().st_size for file in save_checkpoint(trainer.run).iterdir())
    assert size <= checkpoint_bytes(trainer.run) <= 2 * size + state.SMALL_FILES


def test_a_run_that_has_to_stop_and_cannot_save_ends_with_3(write_config, monkeypatch, capsys):
    def stop():
        monkeypatch.setattr(os, "replace", refuse)
        os.kill(os.getpid(), signal.SIGTERM)

    def refuse(*_):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    config = write_config(checkpoint={"every": 1})
    with monkeypatch.context() as patched:
        patched.setattr(
            "loraloom.train.build._make_callbacks", lambda held_out: [At(step3=stop), Requests(), Checkpoints()]
        )
        assert run_command(main, [str(config)]) == 3
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("error: SIGTERM: step 3: no checkpoint is saved (Disk quota exceeded")
    assert "newest checkpoint is step-000002, and the steps after it are lost" in line
    folder = config.parent / "run"
    assert newest_sound_checkpoint(folder)[0].name == "step-000002"
    assert not list((folder / "checkpoints").glob("*.tmp"))


def test_an_adapter_without_its_last_checkpoint_ends_with_6(write_config, monkeypatch, capsys):
    monkeypatch.setattr(state, "checkpoint_bytes", lambda run: 10**18 if run.step == 2 else 0)
    config = write_config(loop={"steps": 2}, checkpoint={"every": 1})
    assert run_command(main, [str(config)]) == 6
    folder = config.parent / "run"
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(said) == 1
    assert "wrote and verified tiny.safetensors, tiny.kohya.safetensors, but no checkpoint of step 2" in said[0]
    assert (folder / "tiny.safetensors").is_file()
    assert json.loads((folder / "run.json").read_text())["exit_code"] == 6
    assert newest_sound_checkpoint(folder)[0].name == "step-000001"


def test_the_best_weights_are_not_looked_for_where_they_could_not_be_saved(write_config, capsys):
    run = trainer_of(write_config).run
    run.step, run.best = 2, state.Best(1, 0.5)
    _load_best(run)
    assert "step-000001, the best one: its manifest is missing" in capsys.readouterr().out
    assert "weights" not in run.facts


@contextlib.contextmanager
def mounted(*arguments: str, at: Path) -> Iterator[None]:
    """A mount that only root may make."""
    if os.geteuid() != 0 or subprocess.run(["mount", *arguments, str(at)], capture_output=True).returncode != 0:
        pytest.skip("mounts need root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


def test_a_full_disk_loses_no_line_and_nothing_that_was_saved(write_config, tmp_path, capsys):
    """A real one, from step 3 to step 6, on which also the curve and the pictures lie."""
    disk = tmp_path / "disk"
    disk.mkdir()
    ballast, run = disk / "ballast", disk / "run"

    def fill_up():
        with (run / "logs/history.jsonl").open("a") as history:
            history.write("\n" * (-history.tell() % resource.getpagesize()))  # its last page has room for lines
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as stream:
            while stream.write(bytes(4096)):
                pass

    with mounted("-t", "tmpfs", "-o", "size=8m", "none", at=disk), pytest.MonkeyPatch.context() as patched:
        from loraloom.train import build

        whole = build._make_callbacks()
        patched.setattr(build, "_make_callbacks", lambda held_out: [At(step3=fill_up, step6=ballast.unlink), *whole])
        config = write_config(
            loop={"steps": 8},
            checkpoint={"every": 2},
            validation={"prompts": ["a"], "num_images": 1, "steps": 1, "every": 4, "at_start": False},
            output={"dir": str(run)},
            trackers=["tensorboard"],
        )
        assert run_command(main, [str(config)]) == 0
        said = capsys.readouterr().out
        assert said.count("history.jsonl cannot be written (No space left on device") == 1
        assert said.count("step 4: no checkpoint is saved") == 1
        assert said.count("pictures of step 4 cannot be written") == 1
        assert [entry["step"] for entry in read_history(run / "logs/history.jsonl")] == list(range(1, 9))
        assert names(run / "checkpoints") == ["latest", "step-000002", "step-000006", "step-000008"]
        assert all(find_damage(path) is None for path in (run / "checkpoints").glob("step-*"))
        assert [path.parent.name for path in (run / "samples").glob("*/samples.json")] == ["step-000008"]
        assert (run / "report.html").is_file()


def test_an_output_folder_that_becomes_read_only_ends_with_3_at_the_end(write_config, capsys):
    config = write_config(
        loop={"steps": 5},
        checkpoint={"every": 1},
        validation={"prompts": ["a"], "num_images": 1, "steps": 1, "every": 4, "at_start": False},
    )
    folder = config.parent / "run"
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patched:
        from loraloom.train import build

        def freeze():
            stack.enter_context(mounted("--bind", str(folder), at=folder))
            subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)

        whole = build._make_callbacks()
        patched.setattr(build, "_make_callbacks", lambda held_out: [At(step3=freeze), *whole])
        assert run_command(main, [str(config)]) == 3
    captured = capsys.readouterr()
    said, errors = captured.out, [line for line in captured.err.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert "the adapter was trained but cannot be written" in errors[0]
    assert "the newest checkpoint is step-000002: the rest is lost" in errors[0]
    assert "Read-only file system" in errors[0]
    assert said.count("no checkpoint is saved (Read-only file system") == 3
    assert said.count("history.jsonl cannot be written") == 1
    assert "Traceback" not in captured.err + said
    assert newest_sound_checkpoint(folder)[0].name == "step-000002"
    assert main(["--resume", str(folder)]) == 0


def test_a_kill_at_any_line_of_a_save_leaves_a_checkpoint_that_loads(write_config):
    """In a copy of the process that is killed at one of 16 places, evenly spread over all lines of our own."""
    trainer = trainer_of(write_config, loop={"steps": 99}, checkpoint={"keep": 2})
    run, folder, known, found = trainer.run, trainer.run.folder / "checkpoints", {}, []
    for step in (1, 2, 3):
        trainer.train_step()
        known[step] = copied(run.adapters.states())
        if step < 3:
            save_checkpoint(run)
    before = Path(shutil.copytree(folder, run.folder / "before"))
    total = lines_of_a_save(run)
    for place in range(0, total, total // 16):
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
        save_and_die(run, place)
        checkpoint, _ = newest_sound_checkpoint(run.folder)
        found.append(json.loads((checkpoint / "run_state.json").read_text())["step"])
        for part, state_of_part in known[found[-1]].items():
            saved = load_file(checkpoint / f"adapter_{part}.safetensors")
            assert saved.keys() == state_of_part.keys()
            assert all(torch.equal(saved[name], tensor) for name, tensor in state_of_part.items())
        assert find_damage(folder / (folder / "latest").read_text()) is None
        save_checkpoint(run)  # what the kill has left is no hindrance
        assert newest_sound_checkpoint(run.folder) == (folder / "step-000003", [])
        assert not list(folder.glob("*.tmp"))
    assert found == sorted(found)
    assert set(found) == {2, 3}


def copied(states) -> dict[str, dict[str, torch.Tensor]]:
    return {part: {name: t.detach().clone() for name, t in state_of.items()} for part, state_of in states.items()}


OURS = tuple(map(os.path.normpath, (state.__file__, sys.modules["loraloom.configs.files"].__file__ or "")))


def lines_of_a_save(run) -> int:
    """How many lines of our own a save executes; it leaves its checkpoint."""
    count = 0

    def on_line(frame, event, argument):
        nonlocal count
        count += event == "line"
        return on_line

    sys.settrace(lambda frame, *_: on_line if frame.f_code.co_filename in OURS else None)
    try:
        save_checkpoint(run)
    finally:
        sys.settrace(None)
    return count


def save_and_die(run, place: int) -> None:
    """Saves in a copy of this process, which kills itself before line number `place`."""
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        return
    left = place

    def on_line(frame, event, argument):
        nonlocal left
        if event == "line":
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
        return on_line

    sys.settrace(lambda frame, *_: on_line if frame.f_code.co_filename in OURS else None)
    with contextlib.suppress(BaseException):
        save_checkpoint(run)
    os._exit(1)


def test_lines_that_a_disk_refuses_are_written_later(tmp_path, monkeypatch, capsys):
    journal = Journal(tmp_path / "logs" / "a.jsonl")
    journal.add({"step": 1})
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.file.stat().st_size + 5, hard))  # takes part of a line
    try:
        journal.add({"step": 2})
        journal.add({"step": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
    assert journal.file.read_text() == '{"step": 1}\n'
    assert capsys.readouterr().out.count("warning") == 1
    journal.add({"step": 4})
    assert [entry["step"] for entry in read_history(journal.file)] == [1, 2, 3, 4]


def test_half_a_line_of_a_killed_run_is_cut_off(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"step": 1}\n{"st')
    Journal(file).add({"step": 2})
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.slow
def test_a_log_on_a_full_disk_ends_nothing(start, write_config):
    """Nor does it change the exit code, where there is an error that cannot be told."""
    config, full = str(write_config(loop={"steps": 2})), Path("/dev/full")
    for expected, more in ((0, "output.formats=[loraloom]"), (3, "optimizer.learning_rate=1e30")):
        assert start("loraloom.train", config, more, "--overwrite", log=full).wait() == expected


TWO = """
import errno, os, sys
import torch
from loraloom.configs.command import run_command
from loraloom.train import state
from loraloom.train.__main__ import main
rank, sync, write = int(os.environ["RANK"]), state.sync, torch.save
saves = {"number": 0}
def failing_sync(path):
    if rank == 0 and path.name == "run_state.json":
        saves["number"] += 1
        if saves["number"] == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    sync(path)
def failing_write(content, file):
    if str(file).endswith("step-000002.tmp/random_states_1.pkl"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    write(content, file)
state.sync, torch.save = failing_sync, failing_write
sys.exit(run_command(main))
"""


@pytest.mark.slow
def test_all_processes_go_on_when_the_disk_of_one_refuses(run_two, write_config, tmp_path):
    """Step 1 fails on the main process, step 2 on the other; step 3 is saved."""
    script = tmp_path / "two.py"
    script.write_text(TWO)
    config = write_config(loop={"steps": 3, "batch_size": 2, "threads": 1}, checkpoint={"every": 1})
    said = run_two(str(script), str(config))
    assert said.count("step 1: no checkpoint is saved (No space left on device)") == 1
    assert said.count("step 2: no checkpoint is saved (Input/output error)") == 1
    assert names(config.parent / "run/checkpoints") == ["latest", "step-000003"]


def test_an_error_of_any_process_is_a_save_error(write_config, monkeypatch):
    """Where two processes gather what happened, the other one's error counts too."""
    trainer = trainer_of(write_config)
    trainer.train_step()
    monkeypatch.setattr(type(trainer.run.accelerator), "num_processes", 2)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: [*own, SaveError("No space left on device")])
    with pytest.raises(SaveError, match="No space left"):
        save_checkpoint(trainer.run)
    assert not list((trainer.run.folder / "checkpoints").iterdir())
