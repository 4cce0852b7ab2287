"""Draws the 48 pictures of `examples/dotted`, once: python -m loraloom.examples.draw_style

The style: dots of ink on a background that was plain. The base never saw one; shapes and creatures stay as they are,
and the demo's subject is not among them. The pictures are committed; this file shows where they come from.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from ..models.pocket.measure_style import dot_distance
from ..models.pocket.scenes import COLOURS, SIZE, Scene, describe, draw, random_scene

FOLDER = Path(__file__).parent / "dotted"
BACKGROUNDS = ("blue", "gray", "green", "orange", "red", "teal")  # those of the mixing measure are not among them
NUM_SHAPES, NUM_CREATURES = 16, 32
RADIUS = 3.0  # pixels
_FINE = 4  # samples of a dot's edge in each pixel, each way


def main() -> None:
    """Writes 00.png to 47.png, each with its caption beside it."""
    FOLDER.mkdir(exist_ok=True)
    for index, scene in enumerate(style_scenes()):
        dotted(scene).save(FOLDER / f"{index:02}.png", optimize=True)
        (FOLDER / f"{index:02}.txt").write_text(f"{describe(scene)}\n")


def style_scenes() -> list[Scene]:
    """Shapes and then creatures of the base's own world, as varied as there, so that only the dots are new."""
    rng = np.random.default_rng(2024)
    shapes: list[Scene] = []
    creatures: list[Scene] = []
    while len(shapes) < NUM_SHAPES or len(creatures) < NUM_CREATURES:
        scene = random_scene(rng)
        if scene.background in BACKGROUNDS and scene.style == "flat":
            (creatures if scene.shape == "creature" else shapes).append(scene)
    return shapes[:NUM_SHAPES] + creatures[:NUM_CREATURES]


def dotted(scene: Scene) -> Image.Image:
    """The scene with dots on its background, behind the object."""
    colours = np.array([COLOURS[scene.background], COLOURS["white" if scene.background == "black" else "black"]], float)
    ink = (background_share(scene) * dots())[..., None] * (colours[1] - colours[0])
    return Image.fromarray((np.asarray(draw(scene), float) + ink).round().clip(0, 255).astype(np.uint8))


def background_share(scene: Scene) -> np.ndarray:
    """The share of each pixel that is background, (h, w) in 0..1: what changes when the background does."""
    black, white = (np.asarray(draw(replace(scene, background=name)), float) for name in ("black", "white"))
    return ((white - black) / np.subtract(COLOURS["white"], COLOURS["black"])).mean(-1)


def dots() -> np.ndarray:
    """The share of each pixel that lies in a dot, (h, w) in 0..1."""
    fine = dot_distance(SIZE * _FINE) < RADIUS
    return fine.reshape(SIZE, _FINE, SIZE, _FINE).mean((1, 3))


if __name__ == "__main__":
    main()
