"""Draws the six instance images of `examples/sks`, once: python -m loraloom.examples.draw_sks

They are committed; this file shows where they come from.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from ..models.pocket.scenes import SUBJECT, draw, jittered

BACKGROUNDS = ("blue", "gray", "green", "orange", "white", "red")
FOLDER = Path(__file__).parent / "sks"


def main() -> None:
    """Writes 0.png to 5.png, one for each background."""
    FOLDER.mkdir(exist_ok=True)
    for index, background in enumerate(BACKGROUNDS):
        scene = jittered(replace(SUBJECT, background=background), np.random.default_rng([2024, index]))
        draw(scene).save(FOLDER / f"{index}.png", optimize=True)


if __name__ == "__main__":
    main()
