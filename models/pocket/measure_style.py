"""How much a picture shows the style of `examples/dotted`, measured in its pixels: ink dots on the background.

Pure functions of uint8 arrays (64, 64, 3), as in `measure`, which looks at what stands in front of the dots.
"""

import numpy as np

from .measure import object_mask, to_lab
from .scenes import SIZE

PERIOD = 16  # pixels from dot to dot, each way; four places of the latents
_INNER = 2.0  # pixels from a dot's centre that are surely ink; dots have a radius of 3
_NEAR = 5.0  # pixels from a dot's centre where no object may be, if the place is to count
_AROUND = (5.5, 8.0)  # pixels from a dot's centre that are background, but for the object
_NO_DOT, _DOT = 5.0, 12.0  # CIELAB distance of a dot from what is around it; as drawn 28 (on brown) and more
_MIN_PLACES = 4  # of the 16 that the object must leave free: less is no background


def style_score(picture: np.ndarray) -> float:
    """The share of the free places of the grid where there is a dot, 0 (a plain background) .. 1 (as drawn).

    Places that the object covers do not count; 0 where it leaves fewer than four.
    """
    lab, free = to_lab(picture), ~object_mask(picture)
    places = [distance for distance in _place_distances() if free[distance < _NEAR].all()]
    found = [_dot_contrast(lab, distance, free) for distance in places]
    if len(found) < _MIN_PLACES:
        return 0.0
    return float(np.clip((np.array(found) - _NO_DOT) / (_DOT - _NO_DOT), 0.0, 1.0).mean())


def dot_distance(size: int = SIZE) -> np.ndarray:
    """Distance of every pixel of a picture of `size` x `size` from the nearest dot's centre, in 64ths, (size, size)."""
    offset = (np.arange(size) + 0.5) * SIZE / size % PERIOD - PERIOD / 2
    return np.hypot(offset[:, None], offset)


def _place_distances() -> list[np.ndarray]:
    """The distance of every pixel from the centre of each place of the grid, each (h, w)."""
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
    centres = np.arange(PERIOD / 2, SIZE, PERIOD)
    return [np.hypot(rows - y, columns - x) for y in centres for x in centres]


def _dot_contrast(lab: np.ndarray, distance: np.ndarray, free: np.ndarray) -> float:
    """CIELAB distance of a place's middle from the median of the background around it."""
    around = np.median(lab[(distance > _AROUND[0]) & (distance < _AROUND[1]) & free], axis=0)
    return float(np.linalg.norm(np.median(lab[distance < _INNER], axis=0) - around))
