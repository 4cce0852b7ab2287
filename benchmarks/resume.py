"""Kills a run at random moments, resumes it, and compares what it ends with: python -m loraloom.benchmarks.resume

The run is the shipped demo, shorter, with everything on that is drawn or averaged: LoRA with dropout on UNet and text
encoder, EMA, shuffled and dropped captions, class images, accumulation. Half of the kills come at a random time of the
training, half at a random time of a random save.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml
from safetensors.torch import load_file

STEPS = 40
TYPICAL_SAVE = 0.06  # seconds


@dataclass(frozen=True, slots=True)
class Kill:
    """What a kill met."""

    wanted: str  # "training" or "save"
    step: int  # last one in the history
    unfinished: str  # checkpoint that was being written, or ""
    resumed_from: str
    equal: bool


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = write_config(folder)
        reference = folder / "reference"
        assert train(config, reference).wait() == 0
        print(f"{STEPS} steps of pocket/dreambooth, killed by SIGKILL and resumed\n")
        print("| kill | aimed at | last step | in a save | resumed from | final tensors |")
        print("|---|---|---|---|---|---|")
        kills = []
        for number in range(options.kills):
            found = kill(config, reference, folder / f"run-{number}", "save" if number % 2 else "training", draw)
            kills.append(found)
            cells = [number + 1, found.wanted, found.step, found.unfinished or "no", found.resumed_from]
            print("|", " | ".join(map(str, [*cells, "equal" if found.equal else "DIFFERENT"])), "|", flush=True)
        equal, inside = sum(kill.equal for kill in kills), sum(bool(kill.unfinished) for kill in kills)
        print(f"\n{equal} of {len(kills)} bit-equal; {inside} kills inside a save; none after the end")
        sys.exit(equal < len(kills))


def write_config(folder: Path) -> Path:
    """Six pictures of the demo, with tags."""
    photos = folder / "photos"
    shutil.copytree(Path(__file__).parents[1] / "examples/sks", photos)
    for index, image in enumerate(sorted(photos.glob("*.png"))):
        image.with_suffix(".txt").write_text(f"sks creature, picture {index}, plain background\n")
    config = {
        "extends": "pocket/dreambooth",
        "data": {
            "sources": [
                {"path": str(photos), "share": 0.5},
                {"prior": "a creature", "count": 8, "steps": 4, "share": 0.25},
                {"prior": "a flat drawing", "count": 4, "steps": 4, "share": 0.25},
            ],
            "captions": {"shuffle": True, "keep_tokens": 1, "dropout": 0.2},
            "cache": {"dir": str(folder / "cache")},
        },
        "adapter": {"options": {"dropout": 0.1}},
        "noise": {"offset": 0.05},
        "optimizer": {"ema_decay": 0.95},
        "loop": {"steps": STEPS, "batch_size": 4, "micro_batch": 2, "threads": os.cpu_count() or 1},
        "checkpoint": {"every": 4},
        "validation": {"prompts": []},
        "trackers": [],
        "output": {"dir": "replaced"},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file


def train(config: Path, folder: Path, *more: str) -> subprocess.Popen[bytes]:
    """A run in a process of its own."""
    command = [sys.executable, "-m", "loraloom.train", str(config), f"output.dir={folder}", *more]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill(config: Path, reference: Path, folder: Path, wanted: str, draw: random.Random) -> Kill:
    """Starts, kills and resumes one run."""
    while True:
        for prior in reference.glob("prior-*"):
            shutil.copytree(prior, folder / prior.name)
        process = train(config, folder)
        if wanted == "training":
            wait_for(process, partial(has_come_to, folder, draw.randrange(1, STEPS)))
            time.sleep(draw.random() * 0.2)
        else:
            wait_for(process, partial(is_saving, folder, draw.randrange(STEPS - 4)))
            time.sleep(draw.random() * TYPICAL_SAVE)
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL and last_step(folder) < STEPS:
            break
        shutil.rmtree(folder)  # it had ended already: once more
    step, unfinished = last_step(folder), [path.name for path in (folder / "checkpoints").glob("*.tmp")]
    sound = sorted(path.name for path in (folder / "checkpoints").glob("step-*") if not path.name.endswith(".tmp"))
    command = ["--resume", str(folder)] if sound else [str(config), f"output.dir={folder}", "--overwrite"]
    done = subprocess.run([sys.executable, "-m", "loraloom.train", *command], capture_output=True)
    equal = done.returncode == 0 and final(folder) == final(reference)
    if equal:
        shutil.rmtree(folder)
    else:
        print(done.stderr.decode()[-2000:], file=sys.stderr)
    return Kill(
        wanted, step, unfinished[0].removesuffix(".tmp") if unfinished else "", sound[-1] if sound else "start", equal
    )


def wait_for(process: subprocess.Popen[bytes], condition) -> None:
    """Until it holds or the process has ended."""
    while process.poll() is None and not condition():
        time.sleep(0.001)


def has_come_to(folder: Path, step: int) -> bool:
    """Whether so many steps are done."""
    return last_step(folder) >= step


def is_saving(folder: Path, after: int) -> bool:
    """Whether a checkpoint of a step after this one is being written."""
    unfinished = [path.stem for path in (folder / "checkpoints").glob("step-*.tmp")]
    return any(int(name.removeprefix("step-")) > after for name in unfinished)


def last_step(folder: Path) -> int:
    """Of the history; 0 before the first."""
    file = folder / "logs" / "history.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


def final(folder: Path) -> dict[str, bytes]:
    """All tensors of the last checkpoint and of the exported files."""
    files = [*(folder / "checkpoints" / f"step-{STEPS:06d}").glob("*.safetensors"), *folder.glob("*.safetensors")]
    return {
        f"{file.name}/{name}": tensor.numpy().tobytes()
        for file in sorted(files)
        for name, tensor in sorted(load_file(file).items())
    }


if __name__ == "__main__":
    main()
