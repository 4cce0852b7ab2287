"""DreamBooth by `loraloom train` against the example script of diffusers, on the embedded base, with paired seeds:

    python -m loraloom.benchmarks.against_diffusers --example PATH/train_dreambooth_lora.py --python PATH/bin/python

Both train a LoRA of the same shape from the same six images with the same settings, each in an environment of its own.
Each adapter is then read into the base by the inference engine and takes the same test: the squared error of the
predicted noise on views of the subject that nobody has trained on. Trainings that are done are not done again.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from tqdm import tqdm

from ..adapters.artifact import AdapterArtifact
from ..configs.arguments import positive
from ..configs.schema import NoiseSection
from ..data.draws import Draws
from ..data.transforms import to_tensor
from ..inference.engine import Engine, Request
from ..inference.weighted_file import AdapterFile
from ..models.encode import encode_image
from ..models.family import Conditioning
from ..models.noise.ddpm import DDPMNoise
from ..models.pocket import FOLDER
from ..models.pocket.scenes import COLOURS, SIZE, SUBJECT, draw, jittered

IMAGES = Path(__file__).parents[1] / "examples" / "sks"
CAPTION, CLASS_CAPTION = "a sks creature", "a creature"
RANK, RATE, DECAY, CLIP = 8, 1e-3, 0.01, 1.0
BATCH = 3  # of six images: the example's last batch of an epoch would be a smaller one otherwise
CLASS_IMAGES = 24
VIEWS, TIMESTEPS = 20, 16
THREADS = 1  # of every training and of the test: another number gives other bits


@dataclass(frozen=True, slots=True)
class Settings:
    """What both do; a work folder holds trainings of one of these."""

    example: str  # SHA-256 of the script
    steps: int
    prior: bool  # with class images
    text_encoder: bool  # trains as well


@dataclass(frozen=True, slots=True)
class Contestant:
    """A way to train."""

    name: str
    command: Callable[[int, Path], list[str]]  # from a seed and a folder for the run
    product: str  # adapter file in that folder
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Paired:
    """Losses of two contestants, seed by seed."""

    ours: Sequence[float]
    theirs: Sequence[float]

    @property
    def differences(self) -> list[float]:
        """Below zero where ours is better."""
        return [a - b for a, b in zip(self.ours, self.theirs, strict=True)]

    @property
    def mean(self) -> float:
        """Of the differences."""
        return statistics.fmean(self.differences)

    @property
    def standard_error(self) -> float:
        """Of that mean: s / sqrt(n), where s has n - 1 degrees of freedom."""
        return statistics.stdev(self.differences) / len(self.differences) ** 0.5

    @property
    def is_worse(self) -> bool:
        """Whether ours is worse by more than one standard error."""
        return self.mean > self.standard_error


def main() -> None:
    """Trains what is missing, prints the table, and exits with 1 where ours is worse or somebody did not learn."""
    options = _options()
    torch.set_num_threads(THREADS)
    example = Path(options.example).resolve()
    digest = hashlib.sha256(example.read_bytes()).hexdigest()
    settings = Settings(digest, options.steps, options.prior, options.text_encoder)
    work = Path(options.work).resolve()
    prepare(work, settings)
    python = Path(options.python).absolute()  # not resolved: a link in a virtual environment is what makes it one
    contestants = [ours(work, settings), theirs(work, settings, python, example)]
    base = held_out_loss(Engine.load("pocket"))
    losses = contest(work, contestants, range(options.seeds))
    table = results(settings, base, losses)
    print(table)
    if options.out:
        Path(options.out).write_text(table)
    sys.exit(losses.is_worse or not have_learnt(base, losses))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loraloom.benchmarks.against_diffusers", description=main.__doc__)
    parser.add_argument("--example", required=True, help="train_dreambooth_lora.py of diffusers")
    parser.add_argument("--python", required=True, help="interpreter of the environment that it runs in")
    parser.add_argument("--seeds", type=positive, default=5, help="trainings of each (5)")
    parser.add_argument("--steps", type=positive, default=300, help="optimiser steps of each training (300)")
    parser.add_argument("--prior", action="store_true", help="prior preservation with class images")
    parser.add_argument("--text-encoder", action="store_true", help="train the text encoder as well")
    parser.add_argument("--work", default="runs/against_diffusers", help="folder for the trainings")
    parser.add_argument("--out", help="file to write the table to")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds: a standard error needs at least 2")
    for name in ("example", "python"):  # the first training takes minutes, and neither is needed before its end
        if not Path(file := getattr(options, name)).is_file():
            parser.error(f"--{name}: there is no file {file}")
    return options


def prepare(work: Path, settings: Settings) -> None:
    """The images that both train on, in folders without anything else: the example opens every file."""
    work.mkdir(parents=True, exist_ok=True)
    note, text = work / "settings.json", json.dumps(asdict(settings), indent=1)
    if note.is_file() and note.read_text() != text:
        sys.exit(f"{work} holds trainings with other settings: remove it, or name another with --work")
    note.write_text(text)
    shutil.copytree(IMAGES, work / "images", dirs_exist_ok=True)
    if settings.prior and not (work / "class").is_dir():
        make_class_images(work / "class")


def make_class_images(folder: Path) -> None:
    """What the base without an adapter makes of the class; the folder is there with all of them or not at all."""
    unfinished = folder.with_suffix(".tmp")
    unfinished.mkdir(exist_ok=True)
    request = Request.repeat([CLASS_CAPTION], CLASS_IMAGES, seed=0)
    for index, image in enumerate(Engine.load("pocket").generate(request, progress="class images")):
        image.save(unfinished / f"{index:02}.png")
    unfinished.rename(folder)


# ---------------------------------------------------------------------------- training


def ours(work: Path, settings: Settings) -> Contestant:
    """`loraloom train`, in this environment."""
    config = work / "ours.yaml"
    config.write_text(yaml.safe_dump(our_config(work, settings), sort_keys=False))

    def command(seed: int, run: Path) -> list[str]:
        module = [sys.executable, "-m", "loraloom.train", str(config), "--overwrite"]
        return [*module, f"loop.seed={seed}", f"output.dir={run}"]

    return Contestant("loraloom", command, "sks.safetensors", dict(os.environ) | _EVERYWHERE)


def our_config(work: Path, settings: Settings) -> dict[str, Any]:
    """The example's settings, those that it has no argument for as well: alpha = rank and the start of A."""
    instance: dict[str, Any] = {"path": str(work / "images"), "caption": CAPTION}
    sources = [instance]
    if settings.prior:  # the example adds the two means, where ours is one mean over all samples: half of that sum
        instance |= {"share": 0.5, "loss_weight": 2.0}
        sources.append(instance | {"path": str(work / "class"), "caption": CLASS_CAPTION})
    parts = {"unet": "attention"} | ({"text_encoder": "attention"} if settings.text_encoder else {})
    return {
        "model": {"base": "pocket"},
        "data": {"resolution": SIZE, "sources": sources, "cache": {"dir": str(work / "cache")}},
        "adapter": {"rank": RANK, "alpha": RANK, "parts": parts, "options": {"init": "gaussian"}},
        "optimizer": {"learning_rate": RATE, "weight_decay": DECAY, "max_grad_norm": CLIP, "schedule": "constant"},
        "loop": {"steps": settings.steps, "batch_size": BATCH * len(sources), "threads": THREADS},
        "checkpoint": {"every": settings.steps},
        "trackers": [],
        "output": {"dir": "replaced", "name": "sks", "formats": ["diffusers"]},
    }


def theirs(work: Path, settings: Settings, python: Path, example: Path) -> Contestant:
    """The example, in its own environment."""
    arguments = [
        *("--pretrained_model_name_or_path", str(FOLDER), "--resolution", str(SIZE), "--center_crop"),
        *("--instance_data_dir", str(work / "images"), "--instance_prompt", CAPTION),
        *("--rank", str(RANK), "--learning_rate", str(RATE), "--adam_weight_decay", str(DECAY)),
        *("--lr_scheduler", "constant", "--lr_warmup_steps", "0", "--max_grad_norm", str(CLIP)),
        *("--train_batch_size", str(BATCH), "--max_train_steps", str(settings.steps), "--mixed_precision", "no"),
    ]
    if settings.prior:
        arguments += ["--with_prior_preservation", "--prior_loss_weight", "1", "--class_prompt", CLASS_CAPTION]
        arguments += ["--class_data_dir", str(work / "class"), "--num_class_images", str(CLASS_IMAGES)]
    if settings.text_encoder:
        arguments += ["--train_text_encoder"]

    def command(seed: int, run: Path) -> list[str]:
        return [str(python), str(example), *arguments, "--seed", str(seed), "--output_dir", str(run)]

    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return Contestant("diffusers", command, "pytorch_lora_weights.safetensors", own | _EVERYWHERE)


_EVERYWHERE = {"OMP_NUM_THREADS": str(THREADS), "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}


def train(work: Path, contestant: Contestant, seed: int) -> Path:
    """The adapter of one training, which is there already if an earlier call came to its end."""
    adapter = work / f"{contestant.name}-{seed}.safetensors"
    if not adapter.is_file():
        run, log = work / f"{contestant.name}-{seed}", work / f"{contestant.name}-{seed}.log"
        with log.open("w") as stream:
            command = contestant.command(seed, run)
            code = subprocess.run(command, stdout=stream, stderr=stream, env=contestant.environment).returncode
        if code:
            sys.exit(f"{contestant.name} with seed {seed} ended with {code}: see {log}")
        (run / contestant.product).rename(adapter)
    return adapter


def contest(work: Path, contestants: Sequence[Contestant], seeds: Sequence[int]) -> Paired:
    """Every contestant with every seed: trained, and tested."""
    losses: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    with tqdm(total=len(seeds) * len(contestants), unit="training") as bar:
        for seed in seeds:
            shapes = []
            for contestant in contestants:
                bar.set_description(f"{contestant.name}, seed {seed}")
                engine = Engine.load("pocket")
                artifact, *_ = engine.attach([AdapterFile(train(work, contestant, seed))])
                shapes.append(shapes_of(artifact))
                losses[contestant.name].append(held_out_loss(engine))
                bar.update()
            assert shapes[0] == shapes[1], "the two have trained LoRAs of other modules or ranks"
    return Paired(*losses.values())


def shapes_of(artifact: AdapterArtifact) -> dict[Any, Any]:
    """Of all tensors, by module."""
    return {key: {n: tuple(t.shape) for n, t in weights.tensors.items()} for key, weights in artifact.modules.items()}


# ---------------------------------------------------------------------------- the test


def views() -> list[Image.Image]:
    """The subject at other places and sizes than in the six images, on any background that is not of its colour."""
    backgrounds = [name for name in COLOURS if name != SUBJECT.colour]
    generators = [np.random.default_rng([2025, index]) for index in range(VIEWS)]
    return [draw(jittered(replace(SUBJECT, background=str(each.choice(backgrounds))), each)) for each in generators]


@torch.inference_mode()
def held_out_loss(engine: Engine) -> float:
    """Mean squared error of the predicted noise over all views and timesteps. Nothing in it is random.

    Latents are the mean of what the VAE says, timesteps the middles of equally long stretches, and the noise of each
    view at each timestep is the same in every call.
    """
    family, parts = engine.family, engine.parts
    noise = DDPMNoise(parts["scheduler"], NoiseSection())
    timesteps = noise.grid(TIMESTEPS)
    conditioning = Conditioning.stack([family.encode_prompts(parts, [CAPTION]).row(0)] * TIMESTEPS)
    geometry = torch.zeros(TIMESTEPS, 6)  # the embedded base's family has no size conditions
    losses = []
    for index, view in enumerate(views()):
        mean = encode_image(family, parts, to_tensor(view))[0]
        draws = Draws(0, range(index * TIMESTEPS, (index + 1) * TIMESTEPS))
        latents = mean.expand(TIMESTEPS, *mean.shape)
        noised = noise.noised(latents, draws.normal("held out", mean.shape), timesteps)
        predicted = family.predict(parts, noised, conditioning, geometry)
        losses.append((predicted - noised.target).square().mean().item())
    return statistics.fmean(losses)


# ---------------------------------------------------------------------------- words


def have_learnt(base: float, losses: Paired) -> bool:
    """Whether every training has come below the bare base."""
    return max(*losses.ours, *losses.theirs) < base


def results(settings: Settings, base: float, losses: Paired) -> str:
    """The table and the verdict, in Markdown."""
    means = [statistics.fmean(values) for values in (losses.ours, losses.theirs)]
    rows = [*zip(range(len(losses.ours)), losses.ours, losses.theirs, losses.differences, strict=True)]
    cells = [*rows, ("mean", *means, losses.mean)]
    return "\n".join(
        [
            title(settings),
            "",
            "| seed | loraloom | diffusers | difference |",
            "|---|---|---|---|",
            *(f"| {name} | {a:.6f} | {b:.6f} | {difference:+.6f} |" for name, a, b, difference in cells),
            "",
            verdict(base, losses),
            "",
        ]
    )


def title(settings: Settings) -> str:
    """What was trained, and how it was tested."""
    where = "UNet and text encoder" if settings.text_encoder else "UNet"
    images = f"{BATCH} images" + (f" and {BATCH} class images" if settings.prior else "")
    return (
        f"LoRA of rank {RANK} on the attention of {where}, {settings.steps} steps of {images} at a rate of {RATE:g}; "
        f"loss of {VIEWS} further views at {TIMESTEPS} timesteps"
    )


def verdict(base: float, losses: Paired) -> str:
    """How the two compare, and whether they have learnt at all."""
    worse = "WORSE" if losses.is_worse else "not worse"
    learnt = "every training came below it" if have_learnt(base, losses) else "NOT EVERY TRAINING came below it"
    return (
        f"difference {losses.mean:+.6f}, standard error {losses.standard_error:.6f}: loraloom is {worse} by more than "
        f"one standard error; the base without an adapter has {base:.6f}, {learnt}"
    )


if __name__ == "__main__":
    main()
