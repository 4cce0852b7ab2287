"""`loraloom slurm CONFIG --nodes N`: a batch script that trains, saves before the time is up, and goes on by itself."""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ..configs.arguments import Parser, add_config, path_text, positive
from ..configs.command import run_command
from ..configs.errors import UserError
from ..configs.loader import load_config
from ..configs.ownership import write_file
from ..configs.plain import plain

HELP = """\
Write a batch script for Slurm that runs the same command as by hand, on several nodes. Some time (--warning)
before its time is up it asks the run to save and stop; what run.json says then decides: a stopped
run is queued again and resumes to the same bytes, a finished or failed one is not."""

SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
{gpus}#SBATCH --cpus-per-task={cpus}
#SBATCH --time={time}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={log}
#SBATCH --signal=B:USR1@{warning}
# Written by: {command}
# Lines for your cluster (partition, account, modules) go here.
set -u
export PYTHONSAFEPATH=1  # nothing is imported from this folder
run={run_word}

# a file asks the run to save and stop: signals do not get through every launcher
trap 'touch "$run/stop"' USR1 TERM

if [ -f "$run/config.yaml" ]; then
  set -- --resume "$run"
else
  set -- {arguments}
fi
export MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun bash -c {launch} loraloom "$@" &
training=$!
while kill -0 "$training" 2>/dev/null; do wait "$training"; code=$?; done

state=$({python} -c 'import json, sys; print(json.load(open(sys.argv[1]))["state"])' "$run/run.json" || echo unknown)
echo "$run: $state, exit code $code"
if [ "$state" = stopped ]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
[ "$state" = done ] && exit 0
exit "$code"
"""


def main(arguments: Sequence[str]) -> int:
    """Writes the script and says how to start it."""
    options = _parser().parse_intermixed_args(list(arguments))
    config = load_config(options.config, options.overrides)
    processes = options.nodes * max(1, options.gpus)
    if config.loop.batch_size % processes:
        raise UserError(f"loop.batch_size {config.loop.batch_size} cannot be shared by {processes} processes")
    run = Path(config.output.dir)
    if plain(run) != str(run):
        raise UserError(f"output.dir {run}: Slurm has no way to write a newline or control character into a path")
    out = Path(options.out or f"{run}.sbatch")
    words = [str(options.config), *options.overrides]
    text = SCRIPT.format(
        name=_directive(config.output.name),
        nodes=options.nodes,
        gpus=f"#SBATCH --gpus-per-node={options.gpus}\n" if options.gpus else "",
        cpus=options.cpus,
        time=options.time,
        warning=options.warning,
        log=_directive(f"{run}.slurm.log".replace("%", "%%")),
        run_word=shlex.quote(f"./{run}" if str(run).startswith("-") else str(run)),
        command=plain(shlex.join(["loraloom", "slurm", *map(str, arguments)])),
        arguments=shlex.join(words),
        launch=shlex.quote(f'exec {_launch(options.nodes, options.gpus)} -m loraloom.train "$@"'),
        python=shlex.quote(sys.executable),
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, text, by="slurm")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from error
    word = plain(shlex.quote(str(out)))
    print(f"wrote {word}: start it with `sbatch {word}` in this folder, which every node has to see")
    return 0


def _directive(value: str) -> str:
    """A value in a #SBATCH line, where a backslash escapes also within quotes."""
    return shlex.quote(value.replace("\\", "\\\\"))


def _duration(text: str) -> str:
    """The type of a time limit, as Slurm writes it."""
    if not re.fullmatch(r"\d+|\d+(:\d{1,2}){1,2}|\d+-\d+(:\d{1,2}){0,2}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is no time: MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS")
    return text


def _launch(nodes: int, gpus: int) -> str:
    """A launcher on each node; each knows its rank from Slurm. accelerate's brings no processes on CPUs together."""
    if not gpus and nodes > 1:
        machines = f"--nnodes {nodes} --nproc_per_node 1 --node_rank $SLURM_NODEID"
        place = "--master_addr $MASTER --master_port 29500"
        return f'env ACCELERATE_USE_CPU=true "{sys.executable}" -m torch.distributed.run {machines} {place}'
    machines = (
        f"--num_machines {nodes} --machine_rank $SLURM_NODEID --main_process_ip $MASTER --main_process_port 29500"
    )
    kind = ("--multi_gpu" if nodes * gpus > 1 else "--gpu_ids all") if gpus else "--cpu"
    accelerate = f"{shlex.quote(sys.executable)} -m accelerate.commands.launch"
    count = f"--num_processes {nodes * max(1, gpus)}"
    return " ".join(
        [accelerate, kind, count, *([machines] if nodes > 1 else []), "--mixed_precision no --dynamo_backend no"]
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="loraloom slurm", description=HELP)
    add_config(parser)
    parser.add_argument("--nodes", type=positive, default=1, help="machines (1)")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of each; 0 for the CPU (1)")
    parser.add_argument("--cpus", type=positive, default=8, help="cores of each task (8)")
    parser.add_argument(
        "--time", type=_duration, default="08:00:00", help="limit of one job, after which it is queued again (08:00:00)"
    )
    parser.add_argument("--warning", type=positive, default=300, help="seconds before the limit to save and stop (300)")
    parser.add_argument("--out", type=path_text, help="the script (<output.dir>.sbatch)")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
