"""The batch script, run for real with small stand-ins for Slurm's own commands."""

import json
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from loraloom.configs.command import run_command
from loraloom.launch.slurm import main
from loraloom.train.__main__ import main as train

COMMANDS = {
    "scontrol": """#!/bin/bash
if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$(dirname "$0")/requeued"; fi
""",
    "srun": """#!/bin/bash
exec "$@"
""",
}


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """An environment in which one node answers."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in COMMANDS.items():
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    own = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_NODEID": "0",
        "SLURM_JOB_NODELIST": "n",
    }
    return os.environ | own


def script_of(config: Path, *arguments: str) -> Path:
    out = config.parent / "job.sbatch"
    assert main([str(config), "--gpus", "0", "--out", str(out), *arguments]) == 0
    return out


@pytest.mark.slow
def test_a_job_whose_time_is_up_saves_is_queued_again_and_ends_with_the_same_bytes(write_config, cluster, tmp_path):
    sections = {"loop": {"steps": 30, "threads": 1}, "checkpoint": {"every": 100}}
    whole, cut = write_config("whole", **sections), write_config("cut", **sections)
    assert train([str(whole)]) == 0
    script, run = script_of(cut), tmp_path / "cut"
    job = subprocess.Popen(["bash", str(script)], env=cluster, stdout=subprocess.PIPE, text=True)
    history = run / "logs" / "history.jsonl"
    while not (history.is_file() and len(history.read_text().splitlines()) >= 5):
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 0
    assert "stopped, exit code" in said
    assert (tmp_path / "bin/requeued").read_text() == "requeue 7\n"
    assert json.loads((run / "run.json").read_text())["step"] < 30
    again = subprocess.run(["bash", str(script)], env=cluster, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "done, exit code 0" in again.stdout
    assert (tmp_path / "bin/requeued").read_text() == "requeue 7\n"
    name = "tiny.safetensors"
    assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_script_asks_for_what_was_wanted(write_config, tmp_path, capsys):
    config = write_config(loop={"batch_size": 8})
    out = tmp_path / "job.sbatch"
    arguments = [str(config), "--nodes", "2", "--gpus", "4", "--time", "01:00:00", "--out", str(out), "adapter.rank=2"]
    assert main(arguments) == 0
    assert f"sbatch {out}" in capsys.readouterr().out
    text = out.read_text()
    for line in ("--nodes=2", "--gpus-per-node=4", "--time=01:00:00", "--signal=B:USR1@300", "--requeue"):
        assert f"#SBATCH {line}\n" in text
    assert "--multi_gpu --num_processes 8 --num_machines 2 --machine_rank $SLURM_NODEID" in text
    assert f"set -- {config} adapter.rank=2" in text
    assert subprocess.run(["bash", "-n", str(out)]).returncode == 0


def test_several_nodes_without_gpus_are_brought_together(write_config):
    text = script_of(write_config(loop={"batch_size": 4}), "--nodes", "2").read_text()
    assert "exec env ACCELERATE_USE_CPU=true" in text
    assert "torch.distributed.run --nnodes 2 --nproc_per_node 1 --node_rank $SLURM_NODEID" in text


def test_a_batch_that_cannot_be_shared_is_refused(write_config, capsys):
    assert run_command(main, [str(write_config(loop={"batch_size": 4})), "--nodes", "3"]) == 2
    assert "cannot be shared by 3 processes" in capsys.readouterr().err


HOSTILE = ["it's", 'say "x" & y', "$(touch pwned)", "; touch pwned #", "\\", "100%j", "-rf 犬"]
"""Names of folders that a shell or Slurm would take for something else."""


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_value_in_the_script_is_never_a_command(write_config, cluster, tmp_path, monkeypatch, name):
    """The script is run, with a stand-in for srun that tells what it was given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/nowhere")
    (tmp_path / "bin/srun").write_text('#!/bin/bash\nprintf "%s\\0" "$@" > given\n')
    caption = f"data.sources.0.caption={json.dumps(name + chr(10) + 'touch pwned')}"
    script = script_of(write_config(), f"output.dir={json.dumps(f'./{name}')}", caption)
    text = script.read_text()
    done = subprocess.run(["bash", str(script)], env=cluster, capture_output=True, text=True)
    assert f"{name}: unknown, exit code 0" in done.stdout
    assert not (tmp_path / "pwned").exists()
    given = (tmp_path / "given").read_text().split("\0")
    assert given[given.index("loraloom") + 2 :] == [f"output.dir={json.dumps(f'./{name}')}", caption, ""]
    (log,) = [line for line in text.splitlines() if line.startswith("#SBATCH --output=")]
    assert (
        shlex.split(log.removeprefix("#SBATCH --output="))[0].replace("\\\\", "\\").replace("%%", "%")
        == f"{name}.slurm.log"
    )
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert sum("Written by" in line for line in comments) == 1


@pytest.mark.parametrize("path", ["runs/a\ntouch pwned\n#", "a\rb", "a\x1b[2J", "a\u202eb"])
def test_what_a_directive_cannot_hold_is_refused(write_config, capsys, path):
    out = write_config().parent / "job.sbatch"
    assert run_command(main, [str(write_config()), f"output.dir={json.dumps(path)}", "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert ("no way to write" in line) if "\u202e" in path else ("a path with the control character" in line)
    assert not out.exists()


@pytest.mark.parametrize("time", ["1\n#SBATCH --wrap=x", "soon", "1:2:3:4", "$(x)"])
def test_a_time_is_a_time(write_config, capsys, time):
    with pytest.raises(SystemExit):
        run_command(main, [str(write_config()), "--time", time])
    assert "is no time" in capsys.readouterr().err
