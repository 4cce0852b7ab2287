"""Two adapters in the same pictures: the demo's creature in front of the dots of configs/pocket/style.yaml.

    python -m loraloom.examples.mixing           trains what is not there yet, measures every pair of weights
    python -m loraloom.examples.mixing --docs    also writes docs/mixing.md and docs/mixing.png

Both are measured in pixels (`subject_score`, `style_score`), on backgrounds that the pictures of neither adapter have.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..configs.command import run_command
from ..inference.engine import Engine
from ..inference.grid import main as grid
from ..inference.mixing import adapter_title
from ..inference.weighted_file import AdapterFile
from ..models.pocket.measure import subject_score
from ..models.pocket.measure_style import style_score
from ..train.__main__ import main as train
from . import demo

STYLE_CONFIG = "configs/pocket/style.yaml"
SUBJECT, STYLE = demo.RUN / "sks.safetensors", Path("runs/style/dots.safetensors")
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
NUM_SEEDS = 8  # for each of the three backgrounds
PRESENT = 0.5  # the score from which on a single picture shows the subject, or the style
RUN, PAGE, PICTURE = Path("runs/mixing"), Path("docs/mixing.md"), Path("docs/mixing.png")


@dataclass(frozen=True, slots=True)
class Mix:
    """What the pictures of one pair of weights show; means in 0..1."""

    subject_weight: float
    style_weight: float
    subject: float
    style: float
    both: float  # fraction of the pictures that show the two together


def main(arguments: Sequence[str]) -> int:
    """Trains, measures, and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m loraloom.examples.mixing", description=__doc__)
    parser.add_argument("--docs", action="store_true", help=f"write {PAGE} and {PICTURE} as well")
    docs = parser.parse_args(list(arguments)).docs

    for config, adapter in ((demo.CONFIG, SUBJECT), (STYLE_CONFIG, STYLE)):
        if not adapter.exists():
            demo.run_verb("train", train, [config, "--overwrite"])
    mixes = measure(engine_with(SUBJECT, STYLE), WEIGHTS, NUM_SEEDS)
    print(table(mixes))
    print(conclusion(mixes))
    picture = draw(RUN)
    if docs:
        PAGE.write_text(page(mixes))
        shutil.copyfile(picture, PICTURE)
        print(f"wrote {PAGE} and {PICTURE}")
    print(f"look at {picture}")
    return 0


def draw(folder: Path) -> Path:
    """The grid of `loraloom grid`: one seed under every pair of weights."""
    axes = [("--x", SUBJECT), ("--y", STYLE)]
    words = [word for axis, file in axes for word in (axis, f"weight:{file.stem}", *(f"{w:g}" for w in WEIGHTS))]
    adapters = ["--adapter", str(SUBJECT), "--adapter", str(STYLE)]
    prompt = f"{demo.SUBJECT_PROMPT} on a {demo.NEW_BACKGROUNDS[0]} background"
    demo.run_verb(
        "grid", grid, [*adapters, "--prompt", prompt, *words, "--seed", "101", "--out", str(folder), "--overwrite"]
    )
    return folder / "grid.png"


def engine_with(*adapters: Path) -> Engine:
    """The embedded base with several adapters, whose weights are still to be chosen."""
    engine = Engine.load("pocket")
    engine.attach([AdapterFile(adapter) for adapter in adapters])
    return engine


def measure(engine: Engine, weights: Sequence[float], num_seeds: int) -> list[Mix]:
    """Every weight of the subject with every weight of the style."""
    return [measure_pair(engine, (subject, style), num_seeds) for subject in weights for style in weights]


def measure_pair(engine: Engine, weights: tuple[float, float], num_seeds: int) -> Mix:
    """The scores of `num_seeds` pictures on each background, with these weights of subject and style."""
    engine.pipeline.set_adapters([adapter_title(0), adapter_title(1)], list(weights))
    prompts = [f"{demo.SUBJECT_PROMPT} on a {background} background" for background in demo.NEW_BACKGROUNDS]
    pictures = demo.pictures_of(engine, prompts, num_seeds)
    scores = np.array([(subject_score(picture), style_score(picture)) for picture in pictures])
    subject, style = scores.mean(axis=0).round(3)
    return Mix(*weights, float(subject), float(style), round(demo.mean((scores >= PRESENT).all(axis=1)), 3))


def best(mixes: Sequence[Mix]) -> Mix:
    """The pair whose weaker score is the highest."""
    return max(mixes, key=lambda mix: min(mix.subject, mix.style))


# ---------------------------------------------------------------------------- words


def table(mixes: Sequence[Mix]) -> str:
    """Markdown: a row for each weight of the subject, a column for each of the style; cells as `subject / style`."""
    rows, columns = (sorted({weight(mix) for mix in mixes}) for weight in (_subject_weight, _style_weight))
    cells = {(mix.subject_weight, mix.style_weight): f"{mix.subject:.2f} / {mix.style:.2f}" for mix in mixes}
    lines = ["| subject \\ style | " + " | ".join(f"{column:g}" for column in columns) + " |"]
    lines.append("|---:|" + "---|" * len(columns))
    lines += [f"| {row:g} | " + " | ".join(cells[row, column] for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _subject_weight(mix: Mix) -> float:
    return mix.subject_weight


def _style_weight(mix: Mix) -> float:
    return mix.style_weight


def conclusion(mixes: Sequence[Mix]) -> str:
    """The best pair, and what is left of each score when its own weight is 0."""
    top = best(mixes)
    pairs = {(mix.subject_weight, mix.style_weight): mix for mix in mixes}
    alone, without = pairs[top.subject_weight, 0.0], pairs[0.0, top.style_weight]
    return (
        f"Best together at {top.subject_weight:g} and {top.style_weight:g}: subject {top.subject:.2f}, style "
        f"{top.style:.2f}, both in {top.both:.0%} of the pictures.\nWithout the style adapter the style scores "
        f"{alone.style:.2f}, without the subject's the subject {without.subject:.2f}."
    )


def page(mixes: Sequence[Mix]) -> str:
    """docs/mixing.md."""
    return "\n".join(
        [
            "# Two adapters, mixed",
            "",
            "Written by `python -m loraloom.examples.mixing --docs`: the creature of `configs/pocket/dreambooth.yaml`",
            "and the dots of `configs/pocket/style.yaml`, trained apart and used together, at every pair of weights.",
            f"The prompt is `{demo.SUBJECT_PROMPT} on a ... background`, with three backgrounds that their",
            f"pictures do not have and {NUM_SEEDS} seeds each. A cell is the mean subject score and the mean style",
            "score, from 0 (absent) to 1 (as drawn), of the same pictures (`measure.py`, `measure_style.py`).",
            "",
            table(mixes),
            "",
            conclusion(mixes),
            "",
            "![one seed under every pair of weights](mixing.png)",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
