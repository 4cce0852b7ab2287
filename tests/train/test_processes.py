"""Several processes, their workers, their launcher: what one of them meets is said once, and all of them end."""

import fcntl
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from loraloom import launch
from loraloom.configs.command import run_command
from loraloom.configs.loader import load_config
from loraloom.data.cache import CacheError, Store
from loraloom.train import build
from loraloom.train.__main__ import main
from loraloom.train.build import build_trainer
from loraloom.train.callback import Callback
from loraloom.train.footprint import LOCK
from loraloom.train.journal import Journal
from loraloom.train.launched import REFUSED, UNUSED, check_environment
from loraloom.train.run_folder import is_locked, locked
from loraloom.train.state import newest_sound_checkpoint

BREAKING = """
import os, signal, socket, sys
from loraloom.configs.command import run_command
from loraloom.train import build
from loraloom.train.__main__ import main
from loraloom.train.callback import Callback

who, how = int(os.environ["WHO"]), os.environ["HOW"]
if how == "elsewhere" and os.environ["RANK"] == "1":
    socket.gethostname = lambda: "another machine"
    sys.argv += ["output.dir=elsewhere"]

class Break(Callback):
    def on_step(self, run):
        if run.step == 3 and run.accelerator.process_index == who:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            run.optimizer = None

whole = build._make_callbacks
build._make_callbacks = lambda held_out: [*whole(), Break()]
sys.exit(run_command(main))
"""


@pytest.fixture
def two(start, tmp_path):
    """Starts a program in two processes, and answers with their exit codes and what they said as errors."""

    def two(program: str, *arguments: str, agent: bool = False, **environment: str) -> tuple[list[int], list[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        if agent:  # the store is that of the launcher, as with torchrun and accelerate
            store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
            environment |= {"TORCHELASTIC_USE_AGENT_STORE": str(store is not None)}
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment}
        both = [
            start(program, *arguments, environment=shared | {"RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")
        ]
        codes = [process.wait(100) for process in both]
        said = "".join(process.said for process in both)
        assert "Traceback" not in said, said[-3000:]
        return codes, [line for line in said.replace("\r", "\n").splitlines() if line.startswith("error:")]

    return two


LOOP = {"loop": {"steps": 6, "batch_size": 2, "threads": 1}, "checkpoint": {"every": 2}}


@pytest.mark.slow
def test_a_bad_input_is_one_line_of_one_process(two, write_config, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(folder / "good.png")
    (folder / "bad.png").write_bytes((folder / "good.png").read_bytes()[:50])
    config = write_config(data={"sources": [{"path": str(folder), "caption": "x"}]}, **LOOP)
    asked = ["--prompt", "x", "--out", str(tmp_path / "out"), "--base", str(tmp_path / "nowhere")]
    for program, arguments, words in (
        ("loraloom.train", [str(config)], "bad.png"),
        ("loraloom.inference", asked, "nowhere"),
    ):
        codes, lines = two(program, *arguments, agent=True)
        assert codes == [2, 2]
        assert len(lines) == 1, lines
        assert words in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "how", "codes", "words"),
    [
        ("0", "break", [70, 70], "AttributeError"),
        ("1", "kill", [3, -9], "process 1 of 2 has died"),
        ("0", "kill", [-9, 3], "process 0 of 2 has died"),
        ("1", "elsewhere", [2, 2], "not the same folder on another machine"),
    ],
)
def test_what_ends_one_process_ends_the_others(two, write_config, tmp_path, who, how, codes, words):
    """Said once; run.json is true, whoever is left to write it, and the checkpoint is sound."""
    program, config = tmp_path / "breaking.py", write_config(**LOOP)
    program.write_text(BREAKING)
    before = time.monotonic()
    found, lines = two(str(program), str(config), WHO=who, HOW=how)
    assert time.monotonic() - before < 60
    assert found == codes
    assert len(lines) == 1, lines
    assert words in lines[0]
    if how != "elsewhere":
        record = json.loads((tmp_path / "run/run.json").read_text())
        assert (record["state"], record["exit_code"]) == ("failed", max(codes))
        assert words in record["message"]
        assert newest_sound_checkpoint(tmp_path / "run") == (tmp_path / "run/checkpoints/step-000002", [])


@pytest.mark.slow
def test_a_launcher_that_ends_takes_its_process_with_it_after_a_checkpoint(write_config, tmp_path):
    """accelerate's hands no signal on to a single process."""
    config = write_config(loop={"steps": 2000, "batch_size": 2}, checkpoint={"every": 2000})
    settings = Path(launch.__file__).with_name("accelerate") / "cpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(settings)]
    with (tmp_path / "said.txt").open("w") as said:
        process = subprocess.Popen([*command, "-m", "loraloom.train", str(config)], stdout=said, stderr=said)
    wait_for(lambda: (tmp_path / "run/logs/history.jsonl").is_file(), 120)
    process.terminate()
    assert process.wait(30) == -signal.SIGTERM
    wait_for(lambda: json.loads((tmp_path / "run/run.json").read_text())["state"] == "stopped", 60)
    assert newest_sound_checkpoint(tmp_path / "run")[1] == []
    assert "SIGTERM: saved" in (tmp_path / "said.txt").read_text()


def wait_for(condition, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_world_that_accelerate_does_not_see_is_refused(write_config, monkeypatch, capsys, rank):
    config = write_config(loop={"steps": 1})
    build.make_accelerator(load_config(config))  # one process, whatever the variables say now
    for name, value in {"WORLD_SIZE": "2", "RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert run_command(main, [str(config)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (rank == "0")
    assert all("has started 2 processes, and accelerate sees 1" in line for line in lines)
    assert not (config.parent / "run").exists()


@pytest.mark.slow
def test_variables_of_accelerate_change_no_training(write_config, monkeypatch, capsys):
    def weights() -> list[torch.Tensor]:
        trainer = build_trainer(load_config(write_config(loop={"steps": 1})), overwrite=True)
        trainer.callbacks = []
        trainer.train_step()
        return [parameter.detach().clone() for parameter in trainer.run.trained()]

    before = weights()
    for name, value in zip(UNUSED, ("4", "INDUCTOR", "bf16"), strict=True):
        monkeypatch.setenv(name, value)
    after = weights()
    said = capsys.readouterr().err
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert all(f"{name}=" in said for name in UNUSED)


@pytest.mark.parametrize("name", [*REFUSED, "ACCELERATE_TORCH_DEVICE"])
def test_what_no_run_can_honour_is_refused(name):
    with pytest.raises(ValueError, match=name):
        check_environment({name: "true"})
    if name.endswith("DEVICE"):
        with pytest.raises(ValueError, match=f"{name}=meta: torch finds no such device"):
            check_environment({name: "meta"})
    check_environment({name: "cpu"} if name.endswith("DEVICE") else {name: "false"})


@pytest.mark.slow
def test_a_killed_worker_is_one_line(write_config, monkeypatch, capsys):
    class Kill(Callback):
        def on_step(self, run):
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    whole = build._make_callbacks
    monkeypatch.setattr(build, "_make_callbacks", lambda held_out: [*whole(), Kill()])
    data = {"workers": 2, "cache": {"latents": False}}
    config = write_config(data=data, loop={"steps": 50}, checkpoint={"every": 1, "keep": 1})
    assert run_command(main, [str(config)]) == 3
    assert not multiprocessing.active_children(), "Python would wait for it at its end"
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert "a data worker was ended from outside (by SIGKILL)" in lines[0]
    record = json.loads((config.parent / "run/run.json").read_text())
    assert (record["state"], record["exit_code"]) == ("failed", 3)


def test_who_asks_whether_a_run_lives_keeps_none_from_starting(tmp_path):
    (tmp_path / LOCK).touch()
    with (tmp_path / LOCK).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        threading.Timer(0.1, lambda: fcntl.flock(file, fcntl.LOCK_UN)).start()
        with locked(tmp_path, main=True):
            assert is_locked(tmp_path)


def test_lines_wait_for_their_folder_and_are_counted_where_it_does_not_come_back(tmp_path, capsys):
    journal = Journal(tmp_path / "logs" / "history.jsonl")
    journal.add({"step": 1})
    (tmp_path / "logs").rename(tmp_path / "moved")
    journal.add({"step": 2})
    assert (tmp_path / "logs/history.jsonl").read_text() == '{"step": 2}\n'
    (tmp_path / "logs").rename(tmp_path / "again")
    (tmp_path / "logs").write_text("a file in its place")
    for step in (3, 4):
        journal.add({"step": step})
    journal.close()
    assert "2 lines could not be written" in capsys.readouterr().out


def test_a_shard_that_is_cut_while_it_is_mapped_ends_no_process(tmp_path):
    store = Store(tmp_path)
    keys = [f"{k:064x}" for k in range(8)]
    store.fill(keys, lambda key: {"x": torch.ones(4096)})
    store.get(keys[0])
    (file,) = tmp_path.glob("*.safetensors")
    os.truncate(file, 1000)
    with pytest.raises(CacheError, match="are left"):
        store.get(keys[-1])
