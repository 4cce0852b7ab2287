"""Scores a pocket folder: does it draw what prompts name, and how well does its VAE keep a picture?

    python -m loraloom.models.pocket.check --base models/pocket/weights

Samples fixed prompts with plain diffusers, measures the pictures with `measure`, and compares with the bars
that the embedded base must reach. Exit code 0 when every bar is reached, 1 when not, 2 for unusable input.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from ...configs.command import run_command
from ...configs.errors import UserError
from ...configs.marked import fill_marked
from . import FOLDER
from .build import draw_scenes, to_pixels
from .measure import background_colour, object_colour, shape_of
from .scenes import BODIES, BODY_COLOURS, COLOURS, HEADS, SHAPES, SIZE, STYLES, Scene, describe

BATCH = 8
NUM_UNSEEN = 200
_FIRST_UNSEEN = 1_000_000  # far beyond the indices of the scenes that `build` trains on
_TABLE = "scores"


@dataclass(frozen=True, slots=True)
class Score:
    """One line of the table: a value that must reach its bar, in `unit` ("%" or "dB")."""

    name: str
    value: float
    bar: float
    unit: str

    @property
    def passed(self) -> bool:
        return self.value >= self.bar


# ---------------------------------------------------------------------------- prompts


def fixed_prompts(num: int = 200) -> tuple[list[str], list[Scene]]:
    """The first `num` of an endless list of prompts and what each names; of every five, three ask for a shape.

    The first 200 hold every shape in every colour, every creature colour, and every background.
    """
    scenes = [_shape(3 * (i // 5) + i % 5) if i % 5 < 3 else _creature(2 * (i // 5) + i % 5 - 3) for i in range(num)]
    return [describe(scene, style=i % 7 < 3) for i, scene in enumerate(scenes)], scenes


def _shape(index: int) -> Scene:
    turn, shape = divmod(index, len(SHAPES))
    names = tuple(COLOURS)
    colour = names[(turn + shape) % len(names)]
    return Scene(SHAPES[shape], colour, _background(colour, 3 * turn + 5 * shape), STYLES[turn % 2])


def _creature(index: int) -> Scene:
    turn, colour = divmod(index, len(BODY_COLOURS))
    return Scene(
        "creature",
        BODY_COLOURS[colour],
        _background(BODY_COLOURS[colour], 4 * turn + 7 * colour),
        STYLES[(turn + colour) % 2],
        body=BODIES[(turn + colour) % len(BODIES)],
        head=HEADS[(turn + colour // 2) % len(HEADS)],
        num_eyes=1 + (2 * turn + colour) % 3,
    )


def _background(colour: str, index: int) -> str:
    others = [name for name in COLOURS if name != colour]
    return others[index % len(others)]


# ---------------------------------------------------------------------------- sampling and measuring


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    """The folder in plain diffusers, fp32, with DPM-Solver++ and no progress bar of its own."""
    if not (folder / "model_index.json").is_file():
        raise UserError(f"no pipeline in {folder}: train one with python -m loraloom.models.pocket.build")
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_prompts(
    pipeline: StableDiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], steps: int = 20
) -> np.ndarray:
    """One picture per prompt, (n, 64, 64, 3) uint8, with the pipeline's scheduler at guidance 4.

    Each picture starts from noise of its own seed, so it does not depend on its neighbours in the batch.
    """
    pictures = []
    for first in tqdm(range(0, len(prompts), BATCH), desc="sampling", unit="batch"):
        output = pipeline(
            prompt=list(prompts[first : first + BATCH]),
            num_inference_steps=steps,
            guidance_scale=4.0,
            height=SIZE,
            width=SIZE,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[first : first + BATCH]],
        )
        pictures += [np.asarray(image.convert("RGB")) for image in output.images]  # type: ignore[union-attr]
    return np.stack(pictures)


def score_pictures(pictures: np.ndarray, scenes: Sequence[Scene]) -> dict[str, float]:
    """Shares 0..1 of pictures that have the scene's background, its colour and (of shapes only) its shape."""
    pairs = list(zip(pictures, scenes, strict=True))
    found = {
        "background": [background_colour(picture) == scene.background for picture, scene in pairs],
        "colour": [object_colour(picture) == scene.colour for picture, scene in pairs],
        "shape": [shape_of(picture) == scene.shape for picture, scene in pairs if scene.shape in SHAPES],
    }
    return {name: sum(hits) / len(hits) for name, hits in found.items() if hits}


@torch.no_grad()
def round_trip(pipeline: StableDiffusionPipeline, pictures: np.ndarray) -> np.ndarray:
    """Pictures through the VAE and back, (n, 64, 64, 3) uint8 to floats in 0..1."""
    chunks = []
    for pixels in to_pixels(pictures).split(BATCH):
        latents = pipeline.vae.encode(pixels).latent_dist.mean
        chunks.append(pipeline.vae.decode(latents).sample)
    return torch.cat(chunks).add(1).div(2).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def mean_psnr(pictures: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of floats in 0..1, (n, h, w, 3), per picture and then averaged."""
    errors = np.square(pictures.astype(np.float64) - reference).mean((1, 2, 3))
    return float((-10 * np.log10(np.maximum(errors, 1e-10))).mean())


# ---------------------------------------------------------------------------- report


def rate(shares: dict[str, float], psnr: float) -> list[Score]:
    """The table's lines: `score_pictures` and `mean_psnr` beside their bars."""
    bars = {"background": 95.0, "colour": 92.0, "shape": 85.0}
    scores = [Score(f"{name} as named", 100 * share, bars[name], "%") for name, share in shares.items()]
    return [*scores, Score("VAE round trip, PSNR", psnr, 26.0, "dB")]


def as_markdown(scores: Sequence[Score]) -> str:
    """A table with a line for each score."""
    lines = ["| measured | value | bar | |", "|---|---:|---:|---|"]
    for score in scores:
        value, bar = f"{score.value:.1f} {score.unit}", f"{score.bar:.0f} {score.unit}"
        lines.append(f"| {score.name} | {value} | {bar} | {'pass' if score.passed else '**fail**'} |")
    return "\n".join(lines) + "\n"


def contact_sheet(pictures: np.ndarray, prompts: Sequence[str], columns: int = 8, zoom: int = 2) -> Image.Image:
    """Pictures in rows, each enlarged, with its prompt in small letters below."""
    side, text, gap = SIZE * zoom, 46, 6
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + text + gap) + gap), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(9)
    for i, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        x, y = gap + i % columns * (side + gap), gap + i // columns * (side + text + gap)
        sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST), (x, y))
        pen.multiline_text((x, y + side + 1), textwrap.fill(prompt, 28), fill="black", font=font, spacing=1)
    return sheet


def round_trip_strip(pictures: np.ndarray, decoded: np.ndarray, zoom: int = 2) -> Image.Image:
    """Two rows: pictures as drawn, and below each what the VAE makes of it."""
    below = (decoded * 255).round().astype(np.uint8)
    strip = np.concatenate([np.concatenate(list(row), axis=1) for row in (pictures, below)], axis=0)
    height, width = strip.shape[:2]
    return Image.fromarray(strip).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)


# ---------------------------------------------------------------------------- command


def main(arguments: Sequence[str]) -> int:
    args = _parser().parse_args(arguments)
    if args.num_prompts < 1:
        raise UserError(f"--num-prompts is {args.num_prompts}: at least 1 picture is needed")
    card = args.card.read_text() if args.card else ""
    if args.card:
        fill_marked(card, _TABLE, "")  # an unusable card is found before the minutes of sampling
    pipeline = load_pipeline(args.base)
    prompts, scenes = fixed_prompts(args.num_prompts)
    pictures = sample_prompts(pipeline, prompts, range(args.num_prompts))
    unseen = draw_scenes(seed=0, count=NUM_UNSEEN, first=_FIRST_UNSEEN)[1]
    decoded = round_trip(pipeline, unseen)
    scores = rate(score_pictures(pictures, scenes), mean_psnr(decoded, unseen / 255.0))
    table = as_markdown(scores)
    args.out.mkdir(parents=True, exist_ok=True)
    contact_sheet(pictures[:48], prompts[:48]).save(args.out / "samples.png")
    round_trip_strip(unseen[:12], decoded[:12]).save(args.out / "vae.png")
    (args.out / "scores.md").write_text(table)
    if args.json:
        args.json.write_text(json.dumps(_as_dict(scores), indent=1) + "\n")
    if args.card:
        args.card.write_text(fill_marked(card, _TABLE, table))
    print(f"{table}\nwrote {args.out}/scores.md, samples.png and vae.png")
    return 0 if all(score.passed for score in scores) else 1


def _as_dict(scores: Sequence[Score]) -> dict[str, dict[str, object]]:
    return {s.name: {"value": s.value, "bar": s.bar, "unit": s.unit, "passed": s.passed} for s in scores}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loraloom.models.pocket.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--base", type=Path, default=FOLDER, help="pipeline folder (the embedded base)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/pocket-check"), help="for table and pictures (%(default)s)"
    )
    parser.add_argument("--json", type=Path, help="file to write the scores to as JSON as well")
    parser.add_argument("--card", type=Path, help=f"model card whose table of {_TABLE} is replaced")
    parser.add_argument("--num-prompts", type=int, default=200, help="of the fixed list (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
