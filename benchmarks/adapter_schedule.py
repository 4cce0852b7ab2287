"""What a schedule of an adapter's weight changes, on the embedded base: the subject against the base's composition.

    python -m loraloom.benchmarks.adapter_schedule --adapter runs/demo/sks.safetensors

The adapter is the demo's (`make demo`). Each schedule samples the same prompts and seeds. The subject score is that of
the demo, 0 to 1; beside it is how far a picture is from what the base alone makes of the same prompt and seed, the mean
over all pixels and channels of the absolute difference, 0 to 255: small where pose and background are the base's.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..configs.arguments import positive
from ..configs.command import run_command
from ..inference.callbacks.adapter_schedule import AdapterSchedule
from ..inference.engine import Engine, Request
from ..models.pocket.measure import subject_score

SCHEDULES: dict[str, Callable[[float], float]] = {
    "always 1": lambda fraction: 1.0,
    "1 in the first half": lambda fraction: 1.0 if fraction < 0.5 else 0.0,
    "1 in the second half": lambda fraction: 0.0 if fraction < 0.5 else 1.0,
    "0 to 1, linear": lambda fraction: fraction,
    "1 to 0, linear": lambda fraction: 1.0 - fraction,
    "always 0": lambda fraction: 0.0,
}
NAME = "subject"
PROMPTS = [f"a sks creature on a {background} background" for background in ("blue", "yellow", "green")]


def main(arguments: Sequence[str]) -> int:
    """Samples and prints the table."""
    options = _parser().parse_args(arguments)
    prompts = options.prompt or PROMPTS
    engine = Engine.load("pocket")
    engine.adapters.load_adapter(options.adapter, NAME)
    request = Request.repeat(prompts, options.num_images, seed=100, steps=options.steps)
    with engine.adapters.weighted({}):
        base = engine.generate(request, progress="the base alone")
    print(f"{len(base)} pictures each, {options.steps} steps: {', '.join(prompts)}\n")
    print("| weight in the UNet | subject score | pixels changed from the base |\n|---|---|---|")
    print(row("the base alone", base, base))
    for name, weight in SCHEDULES.items():
        images = engine.generate(request, callbacks=[AdapterSchedule(engine.adapters, {NAME: weight})], progress=name)
        print(row(name, images, base), flush=True)
    print("\nThe text encoder's part of the adapter has the weight 1 in all rows but the first.")
    return 0


def row(name: str, images: Sequence[Image.Image], base: Sequence[Image.Image]) -> str:
    """Means over the pictures."""
    pictures, others = ([np.asarray(image) for image in each] for each in (images, base))
    score = np.mean([subject_score(picture) for picture in pictures])
    changed = np.mean([pixel_difference(one, other) for one, other in zip(pictures, others, strict=True)])
    return f"| {name} | {score:.2f} | {changed:.1f} |"


def pixel_difference(one: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute difference of two uint8 arrays, 0 to 255."""
    return float(np.abs(one.astype(float) - other).mean())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loraloom.benchmarks.adapter_schedule", description=main.__doc__)
    parser.add_argument("--adapter", required=True, type=Path, help="adapter file of the demo's subject")
    parser.add_argument("--prompt", action="append", help="may be given again (the creature on three backgrounds)")
    parser.add_argument("--num-images", type=positive, default=16, help="of each prompt (16)")
    parser.add_argument("--steps", type=positive, default=20, help="denoising steps (20)")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main))
