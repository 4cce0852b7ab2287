"""Guidance that ends early, on the embedded base: what it saves, and what it changes in the pictures.

    python -m loraloom.benchmarks.callbacks

Calls take turns, so that what else the machine does falls on all of them; times are medians, and ratios medians of the
ratios of neighbours. Pictures are scored in their pixels (models/pocket/measure.py): are colour, shape and background
those that the prompt names?
"""

import statistics
import time

import numpy as np
import torch
from tqdm import tqdm

from ..examples.demo import UNRELATED
from ..inference.callbacks.dynamic_guidance import DynamicGuidance
from ..inference.engine import MICRO_BATCH, Engine, Request
from ..models.pocket.measure import background_colour, object_colour, shape_of

PROMPTS = [f"a {colour} {shape} on a {background} background" for colour, shape, background in UNRELATED]
UNTIL = (None, 1.0, 0.8, 0.6, 0.4)  # None: without the callback
SEEDS = range(100, 100 + 2 * MICRO_BATCH)  # of each prompt
STEPS, GUIDANCE = 20, 4.0


def main() -> None:
    """Prints a Markdown table."""
    results = take_turns(Engine.load("pocket"))
    seconds = {until: times for until, (times, _) in results.items()}
    pictures = {until: np.stack(shown) for until, (_, shown) in results.items()}
    print(
        f"pocket, 64 px, {STEPS} steps, guidance {GUIDANCE:g}, {MICRO_BATCH} images a call, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; {len(pictures[None])} pictures each\n"
    )
    print("| guidance until | s a call | ratio | pixel difference, of 255 | as named |\n|---|---:|---:|---:|---:|")
    for until in UNTIL:
        name = "no callback" if until is None else f"{until:g}"
        apart = np.abs(pictures[until].astype(float) - pictures[None]).mean()
        share = share_as_named(pictures[until])
        ratio = statistics.median(one / none for one, none in zip(seconds[until], seconds[None], strict=True))
        print(f"| {name} | {statistics.median(seconds[until]):.2f} | {ratio:.2f} | {apart:.1f} | {share:.0%} |")


def take_turns(engine: Engine) -> dict[float | None, tuple[list[float], list[np.ndarray]]]:
    """Seconds of each call, with encoding and decoding, and its pictures, (64, 64, 3) uint8, prompt by prompt."""
    results = {until: ([], []) for until in UNTIL}
    sample(engine, Request(PROMPTS[:1], [0], steps=1), 0.5)  # the first call is slower
    for prompt in tqdm(PROMPTS, unit="prompt", leave=False):
        for first in SEEDS[::MICRO_BATCH]:
            request = Request.repeat([prompt], MICRO_BATCH, first, steps=STEPS, guidance=GUIDANCE)
            for until, (seconds, pictures) in results.items():
                started = time.perf_counter()
                pictures += sample(engine, request, until)
                seconds.append(time.perf_counter() - started)
    return results


def sample(engine: Engine, request: Request, until: float | None) -> list[np.ndarray]:
    """Pictures of a request with guidance until a fraction of the steps, or without the callback."""
    callbacks = [] if until is None else [DynamicGuidance(until)]
    return [np.asarray(image) for image in engine.generate(request, callbacks=callbacks)]


def share_as_named(pictures: np.ndarray) -> float:
    """The fraction of pictures with all of colour, shape and background that their prompt names."""
    wanted = [named for named in UNRELATED for _ in SEEDS]
    found = [(object_colour(each), shape_of(each), background_colour(each)) for each in pictures]
    return sum(one == other for one, other in zip(found, wanted, strict=True)) / len(wanted)


if __name__ == "__main__":
    main()
