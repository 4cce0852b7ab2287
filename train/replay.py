"""loraloom replay RUN --step N: one step of a run again, with its images, captions, timesteps and losses."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..configs.arguments import Parser, path_text, positive
from ..configs.command import run_command
from ..configs.errors import UserError
from ..configs.imports import importing
from ..configs.loader import load_config
from ..configs.ownership import check_file, writing
from ..configs.plain import plain
from ..configs.progress import Bar
from .footprint import RUN
from .run_folder import read_history
from .settings import check_settings

if TYPE_CHECKING:
    from ..configs.schema import RunConfig
    from ..data.dataset import Dataset
    from .trainer import Trainer

HELP = """\
Run one step of a run again, as it was, and show what it was made of. The weights of that step come
from the newest checkpoint before it, trained on from there; nothing in the run folder is changed
but for the picture, RUN/replay/step-N.png."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """One sample of the step."""

    position: int
    source: str
    file: str
    caption: str
    bucket: tuple[int, int]
    timestep: int
    loss: float  # before any weight


def main(arguments: Sequence[str]) -> int:
    """Prints the samples of the step, and whether its loss is that of the history."""
    parser = Parser(prog="loraloom replay", description=HELP)
    parser.add_argument("run", type=path_text, help="run folder")
    parser.add_argument("--step", type=positive, required=True, help="step, counted from 1 as in the history")
    options = parser.parse_args(list(arguments))
    folder = Path(options.run)
    samples, loss, picture = replay(folder, options.step)
    for sample in samples:
        width, height = sample.bucket
        print(
            f"{plain(f'{sample.file} ({sample.source})')}, {width} x {height}, "
            f"timestep {sample.timestep}, loss {sample.loss:.6f}"
        )
        print(f"    {sample.caption!r}")
    print(f"loss of the step: {loss:.6f}{_beside_history(folder, options.step, loss)}")
    print(f"wrote {picture}")
    return 0


def replay(folder: Path, step: int) -> tuple[list[Replayed], float, Path]:
    """The samples of a step, its loss, and a picture of them; UserError if the run has no such step."""
    config = _config_of(folder)
    if step > config.loop.steps:
        raise UserError(f"--step {step}: {folder} has {config.loop.steps} steps")
    from .pages.contact_sheet import Tile, contact_sheet

    picture = folder / "replay" / f"step-{step:06d}.png"
    check_file(picture, folder, RUN)
    trainer, dataset = _trainer_before(config, folder, step)
    samples: list[Replayed] = []
    tiles: list[Tile] = []
    total = 0.0
    with trainer:
        batches = [next(trainer.batches) for _ in range(trainer.accumulation)]
    for batch in batches:
        losses, timesteps = trainer.forward(batch), trainer.timesteps(batch)
        total += losses.total.item()
        for index, sample in enumerate(batch.samples):
            loss, bucket = losses.per_sample[index].item(), sample.geometry.target
            names = batch.sources[index], batch.files[index]
            samples.append(Replayed(sample.position, *names, sample.caption, bucket, timesteps[index], loss))
            pixels, _ = dataset.pixels(sample.source, sample.image, sample.geometry)
            tiles.append(
                Tile(pixels, [sample.caption or "(no words)", f"timestep {timesteps[index]}, loss {loss:.4f}"])
            )
    picture.parent.mkdir(exist_ok=True)
    sheet = contact_sheet(f"step {step}: loss {total:.4f}", tiles, samples[0].bucket)
    with writing(picture, folder, RUN) as new:
        sheet.save(new, format="PNG")
    return samples, total, picture


def _config_of(folder: Path) -> "RunConfig":
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: is no run folder (it holds no config.yaml)")
    config = load_config(folder / "config.yaml")
    return config.model_copy(update={"output": config.output.model_copy(update={"dir": str(folder)}), "trackers": []})


def _trainer_before(config: "RunConfig", folder: Path, step: int) -> "tuple[Trainer, Dataset]":
    """A trainer at the step before, without callbacks, and its images."""
    from .preflight import preflight

    check_settings(folder, config, config)
    images = preflight(config)
    with importing():
        from .build import assemble, make_accelerator, prepare
        from .state import sound_checkpoint_before

    accelerator = make_accelerator(config)
    ready = prepare(config, accelerator, images)
    trainer = assemble(ready, accelerator, checkpoint=sound_checkpoint_before(folder, step), writes=False)
    trainer.callbacks = []
    first = trainer.run.step
    try:
        for _ in Bar(range(first, step - 1), desc=f"from step {first} to {step - 1}", unit="step", disable=None):
            trainer.train_step()
    except BaseException:
        trainer.close()
        raise
    return trainer, ready.dataset


def _beside_history(folder: Path, step: int, loss: float) -> str:
    entry = next((entry for entry in read_history(folder / "logs" / "history.jsonl") if entry["step"] == step), None)
    if entry is None or "loss" not in entry:
        return " (the history does not tell it)"
    then = math.nan if entry["loss"] is None else entry["loss"]
    same = then == loss or (math.isnan(then) and not math.isfinite(loss))
    return ", as in the history" if same else f", {then:.6f} in the history: another machine, threads or versions"


if __name__ == "__main__":
    sys.exit(run_command(main))
