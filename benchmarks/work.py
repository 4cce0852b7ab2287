"""What the contestants train: a base, images, settings, and for the bare loop the inputs of every step."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from PIL import Image

from ..configs.dtypes import DType
from .random_base import write_base

SKS = Path(__file__).parents[1] / "examples" / "sks"
CAPTION = "a sks creature"
RATE, DECAY, SEED = 1e-4, 0.01, 0
NO_CLIPPING = 1e9  # of gradients' norms: the bare loop has none, and the sums are made all the same


@dataclass(frozen=True, slots=True)
class Work:
    """The same for all contestants."""

    model: Literal["pocket", "sd1", "sdxl"]
    resolution: int  # pixels
    batch: int
    dtype: DType
    threads: int
    rank: int = 4
    steps: int = 50
    """Of a run that is made alone; the bare loop has the inputs of so many, and then begins anew."""

    def __str__(self) -> str:
        shapes = self.model if self.model == "pocket" else f"{self.model} shapes"
        threads = "one thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{shapes}, {self.resolution} px, batch {self.batch}, {self.dtype}, {threads}"


@dataclass(frozen=True, slots=True)
class Prepared:
    """The files of a work."""

    work: Work
    base: str  # folder, or pocket
    images: Path
    folder: Path
    inputs: Path
    runs: Path

    def run(self, contestant: str) -> Path:
        """The folder of what a contestant writes."""
        return self.runs / contestant.replace(", ", "-").replace(" ", "-")

    def in_turn(self) -> "Prepared":
        """The same, with other folders for what contestants write."""
        return replace(self, runs=_made(self.folder / "in-turn"))

    def config(self, name: str, **loop: Any) -> dict[str, Any]:
        """Of loraloom, for a contestant, with these settings of the loop."""
        work = self.work
        return {
            "model": {"base": self.base, "dtype": work.dtype},
            "data": {
                "resolution": work.resolution,
                "sources": [{"path": str(self.images), "caption": CAPTION}],
                "cache": {"dir": str(self.folder / "cache")},
            },
            "adapter": {"rank": work.rank, "alpha": work.rank, "parts": {"unet": "attention"}},
            "optimizer": {"learning_rate": RATE, "weight_decay": DECAY, "max_grad_norm": NO_CLIPPING},
            "loop": {"steps": 100_000, "batch_size": work.batch, "threads": work.threads, "seed": SEED} | loop,
            "checkpoint": {"every": 100_000},
            "output": {"dir": str(self.run(name)), "name": "sks", "formats": ["diffusers"]},
        }

    def write_config(self, name: str, **loop: Any) -> Path:
        """The same as a file."""
        file = self.run(name).with_suffix(".yaml")
        file.write_text(yaml.safe_dump(self.config(name, **loop), sort_keys=False))
        return file

    @property
    def start(self) -> Path:
        """The adapter of before the first step, in kohya's format."""
        return self.inputs.with_name("start.kohya.safetensors")

    def environment(self, peer: bool = False) -> dict[str, str]:
        """Of every contestant: threads, the device, and nothing from a hub. Peers have packages of their own."""
        own = {name: value for name, value in os.environ.items() if not (peer and name == "PYTHONPATH")}
        on_cpu = {} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"}
        return own | on_cpu | {"OMP_NUM_THREADS": str(self.work.threads), "HF_HUB_OFFLINE": "1"}


def prepare(work: Work, root: Path) -> Prepared:
    """Everything on the disk, and all caches filled; what is there already is kept."""
    digest = hashlib.sha256(json.dumps(asdict(work)).encode()).hexdigest()[:8]
    folder = _made(root / f"{work.model}-{work.resolution}-{work.batch}-{work.dtype}-{digest}")
    base = "pocket"
    if work.model != "pocket":
        base = str(root / f"{work.model}-{work.dtype}")
        write_base(work.model, Path(base), dtype=work.dtype)
    images = root / f"images-{work.resolution}"
    _write_images(_made(images), work.resolution)
    prepared = Prepared(work, base, images, folder, folder / "inputs.safetensors", _made(folder / "alone"))
    if not prepared.inputs.is_file():
        config = prepared.write_config("recorded", steps=work.steps)
        command = [sys.executable, "-m", "loraloom.benchmarks.inputs", str(config), str(prepared.inputs)]
        subprocess.run(command, check=True, env=prepared.environment())
    return prepared


def _write_images(folder: Path, size: int) -> None:
    for file in sorted(SKS.glob("*.png")):
        Image.open(file).resize((size, size), Image.Resampling.LANCZOS).save(folder / file.name)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
