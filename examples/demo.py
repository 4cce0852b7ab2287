"""make demo: trains the DreamBooth adapter of configs/pocket/dreambooth.yaml, uses it, looks at it and scores it.

    python -m loraloom.examples.demo             one training, 64 scored images
    python -m loraloom.examples.demo --scores    also without prior preservation, 32 seeds for each score

Scores are measured in pixels (models/pocket/measure.py), so they need no other model and no opinion.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..configs.command import run_command
from ..configs.loader import load_config
from ..configs.words import not_on_path
from ..inference.__main__ import main as sample
from ..inference.engine import Engine, Request
from ..inference.weighted_file import AdapterFile
from ..models.pocket.measure import background_colour, object_colour, shape_of, subject_score
from ..models.pocket.scenes import SUBJECT, describe
from ..train.__main__ import main as train

CONFIG = "configs/pocket/dreambooth.yaml"
RUN, RUN_WITHOUT_PRIOR = Path("runs/demo"), Path("runs/demo-without-prior")
SUBJECT_PROMPT, CLASS_PROMPT = "a sks creature", "a creature"
NEW_BACKGROUNDS = ("yellow", "purple", "brown")  # not among the instance images
UNRELATED = (
    ("red", "star", "yellow"),
    ("blue", "circle", "white"),
    ("green", "heart", "pink"),
    ("yellow", "moon", "black"),
    ("purple", "square", "orange"),
    ("black", "triangle", "green"),
)
TABLE, PICTURE = Path("docs/demo-scores.md"), Path("docs/before_after.png")


@dataclass(frozen=True)
class Counts:
    """How many images each score is taken from."""

    subject: int  # for each of the three backgrounds
    drift: int
    unrelated: int  # for each of the six prompts


DEMO = Counts(subject=3, drift=10, unrelated=3)  # 2 * 3 * 3 + 10 + 2 * 6 * 3 = 64 images
THOROUGH = Counts(subject=32, drift=32, unrelated=16)


def main(arguments: Sequence[str]) -> int:
    """Trains, samples, scores, and says where to look."""
    parser = argparse.ArgumentParser(prog="python -m loraloom.examples.demo", description=__doc__)
    parser.add_argument("--scores", action="store_true", help="also train without prior preservation, 32 seeds a score")
    thorough = parser.parse_args(list(arguments)).scores

    if was_interrupted():
        run_verb("resume", train, [str(RUN)], before=["--resume"])
    else:
        run_verb("train", train, [CONFIG, "--overwrite"])
    adapter = RUN / "sks.safetensors"
    prompt = f"{SUBJECT_PROMPT} on a blue background"
    wanted = ["--prompt", prompt, "--seed", "1", "--num-images", "4", "--out", str(RUN / "images"), "--overwrite"]
    run_verb("sample", sample, ["--base", "pocket", "--adapter", f"{adapter}:1.0", *wanted])

    base, adapted = Engine.load("pocket"), engine_with(adapter)
    sheet = before_after(base, adapted)
    sheet.save(RUN / "before_after.png")
    scores = measure(base, adapted, THOROUGH if thorough else DEMO)
    scores["train_seconds"] = round(json.loads((RUN / "run.json").read_text())["train_seconds"], 2)
    if thorough:
        without = "data.sources=[{path: examples/sks, caption: a sks creature}]"
        rest = ["loop.batch_size=2", f"output.dir={RUN_WITHOUT_PRIOR}", "--overwrite"]
        run_verb("train", train, [CONFIG, without, *rest])
        drift = class_drift(engine_with(RUN_WITHOUT_PRIOR / "sks.safetensors"), THOROUGH.drift)
        scores["class_drift_without_prior"] = round(drift, 3)
    (RUN / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    if thorough:
        TABLE.write_text(scores_page(scores))
        sheet.save(PICTURE, optimize=True)
        print(f"wrote {TABLE} and {PICTURE}")
    print(explain(scores))
    if where := not_on_path():
        print(where)
    return 0


def was_interrupted() -> bool:
    """Whether this very training was stopped, by Ctrl-C say, with a checkpoint to go on from."""
    if not (RUN / "run.json").is_file() or not (RUN / "checkpoints" / "latest").is_file():
        return False
    if json.loads((RUN / "run.json").read_text()).get("state") != "stopped":
        return False
    was, now = load_config(RUN / "config.yaml"), load_config(CONFIG)
    same = all(getattr(was, key) == getattr(now, key) for key in ("data", "adapter", "noise", "loss", "optimizer"))
    return same and was.loop.steps == now.loop.steps


def run_verb(verb: str, command, arguments: list[str], before: Sequence[str] = ()) -> None:
    """Shows the command as a user would type it, runs it, and stops the demo if it fails."""
    print("$ loraloom", verb, *(f"'{word}'" if " " in word else word for word in arguments), flush=True)
    if code := command([*before, *arguments]):
        sys.exit(code)


def engine_with(adapter: Path) -> Engine:
    """The embedded base with an adapter."""
    engine = Engine.load("pocket")
    engine.attach([AdapterFile(adapter)])
    return engine


# ---------------------------------------------------------------------------- scores


def measure(base: Engine, adapted: Engine, counts: Counts) -> dict[str, float]:
    """All scores but the time; fractions or means in [0, 1]."""
    described = [describe_subject(background) for background in NEW_BACKGROUNDS]
    named = [f"{SUBJECT_PROMPT} on a {background} background" for background in NEW_BACKGROUNDS]
    subject_base, background_base = subject_and_background(base, described, counts.subject)
    subject_adapter, background_adapter = subject_and_background(adapted, named, counts.subject)
    scores = {
        "subject_base": subject_base,
        "subject_adapter": subject_adapter,
        "background_base": background_base,
        "background_adapter": background_adapter,
        "class_drift": class_drift(adapted, counts.drift),
        "unrelated_base": unrelated_kept(base, counts.unrelated),
        "unrelated_adapter": unrelated_kept(adapted, counts.unrelated),
    }
    return {name: round(value, 3) for name, value in scores.items()}


def describe_subject(background: str) -> str:
    """Everything that words can say of the subject."""
    said = describe(SUBJECT, background=False).removesuffix("one eye")
    return f"{said}a {SUBJECT.belly} belly and one eye on a {background} background"


def subject_and_background(engine: Engine, prompts: Sequence[str], num_images: int) -> tuple[float, float]:
    """Mean subject score, and the fraction of pictures on the background that the prompt names."""
    pictures = pictures_of(engine, prompts, num_images)
    named = [background for background in NEW_BACKGROUNDS for _ in range(num_images)]
    right = [background_colour(picture) == name for picture, name in zip(pictures, named, strict=True)]
    return mean(map(subject_score, pictures)), mean(right)


def class_drift(engine: Engine, num_images: int) -> float:
    """Mean subject score of the bare class prompt: how much every creature has become the subject."""
    return mean(map(subject_score, pictures_of(engine, [CLASS_PROMPT], num_images)))


def unrelated_kept(engine: Engine, num_images: int) -> float:
    """Fraction of pictures of coloured shapes with both the colour and the shape that the prompt names."""
    prompts = [f"a {colour} {shape} on a {background} background" for colour, shape, background in UNRELATED]
    pictures = pictures_of(engine, prompts, num_images)
    wanted = [(colour, shape) for colour, shape, _ in UNRELATED for _ in range(num_images)]
    return mean((object_colour(p), shape_of(p)) == pair for p, pair in zip(pictures, wanted, strict=True))


def pictures_of(engine: Engine, prompts: Sequence[str], num_images: int) -> list[np.ndarray]:
    """`num_images` pictures of each prompt, seeds 100, 101, …"""
    images = engine.generate(Request.repeat(prompts, num_images, seed=100), progress="scoring")
    return [np.asarray(image) for image in images]


def mean(values) -> float:
    """Of numbers or truths."""
    return float(np.mean(list(values)))


# ---------------------------------------------------------------------------- pictures and words


def before_after(base: Engine, adapted: Engine, num_images: int = 2, zoom: int = 2) -> Image.Image:
    """One column for each prompt; above without the adapter, below with it, from the same seeds."""
    prompts = [f"{SUBJECT_PROMPT} on a {background} background" for background in NEW_BACKGROUNDS]
    prompts += [CLASS_PROMPT, "a red star on a yellow background"]
    request = Request.repeat(prompts, num_images, seed=1)
    rows = [engine.generate(request, progress="before and after") for engine in (base, adapted)]
    side, gap, margin, title = rows[0][0].width * zoom, 4, 70, 40
    width = margin + len(rows[0]) * (side + gap)
    sheet = Image.new("RGB", (width, title + 2 * (side + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, prompt in enumerate(prompts):
        words = prompt.replace(" on a ", "\non a ")
        pen.multiline_text((margin + index * num_images * (side + gap) + 2, 3), words, fill="black", font_size=13)
    for row, (images, name) in enumerate(zip(rows, ("before", "after"), strict=True)):
        top = title + row * (side + gap)
        pen.text((8, top + side // 2 - 8), name, fill="black", font_size=16)
        for column, image in enumerate(images):
            enlarged = image.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (margin + column * (side + gap), top))
    return sheet


MEANINGS = {
    "subject_base": ("the subject, described to the base in words", "at most 0.3: words do not reach it"),
    "subject_adapter": ("the subject by its name, with the adapter", "at least 0.8: it was learnt"),
    "background_base": ("backgrounds as named, base", "for comparison"),
    "background_adapter": ("backgrounds as named, with the adapter", "at least 0.9 of the base's"),
    "class_drift": (f'"{CLASS_PROMPT}" turning into the subject', "at most 0.1: other creatures are kept"),
    "class_drift_without_prior": ("the same, trained without class images", "at least twice that with them"),
    "unrelated_base": ("shapes and their colours as named, base", "for comparison"),
    "unrelated_adapter": ("shapes and their colours as named, with the adapter", "at least 0.9 of the base's"),
    "train_seconds": ("seconds in training steps", ""),
}


def explain(scores: dict[str, float]) -> str:
    """The scores with what they mean, and where to look."""
    lines = [
        f"  {scores[name]:6.3g}  {what} ({bar})".replace(" ()", "")
        for name, (what, bar) in MEANINGS.items()
        if name in scores and name != "train_seconds"
    ]
    files = [
        f"  {RUN / 'before_after.png'}   the same seeds without and with the adapter",
        f"  {RUN / 'report.html'}        curves, validation images, config",
        f"  {RUN / 'images' / 'grid.png'}     images of `loraloom sample`",
        f"  {RUN / 'sks.safetensors'} (diffusers) and {RUN / 'sks.kohya.safetensors'} (kohya)",
    ]
    took = ["", f"{scores['train_seconds']:.3g} {MEANINGS['train_seconds'][0]}"] if "train_seconds" in scores else []
    return "\n".join([*took, "", "Scores, from 0 to 1:", *lines, "", "Look at:", *files])


def scores_page(scores: dict[str, float]) -> str:
    """docs/demo-scores.md."""
    rows = [f"| {what} | {scores[name]:g} | {bar} |" for name, (what, bar) in MEANINGS.items() if name in scores]
    return "\n".join(
        [
            "# The demo, scored",
            "",
            "Written by `make demo-scores`: DreamBooth on six pictures of one creature, on the embedded base, with",
            f"and without prior preservation. Each score is a mean over {THOROUGH.subject} seeds of each prompt",
            f"(shapes: {THOROUGH.unrelated});",
            "the features are measured in pixels (`models/pocket/measure.py`). With another number of threads the",
            "bits differ, and with them single images.",
            "",
            "![the same seeds without and with the adapter](before_after.png)",
            "",
            "| measured | value | wanted |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
