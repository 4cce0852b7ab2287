"""(width, height) -> bucket: one pure function, so that plan, cache and loader cannot disagree.

The level of a resolution R has, for each multiple of the step as one side, the longest other side with an area of
at most R^2, both ways round (NovelAI 2022, "Improvements on Stable Diffusion"), and the square. An image takes the
bucket of nearest aspect; where that would enlarge it too much, the one at R - step, and so on down to one step.

How far an image is from its bucket: let q = R // step and A = max_aspect. From the square outwards, the long side b
grows by one step at a time and the short side a = floor(R^2 / b) falls by at most one (in steps, as b >= q), so
neighbouring aspects differ by a factor of at most (b + 1) / b * a / (a - 1). The first is at most 1 + 1/q; from
a (b + 1) > q^2 and (b + 1) / (a - 1) <= A follows a - 1 > q / sqrt(A) - 1/2. An image between two buckets is thus
within sqrt((1 + 1/q) (1 + 1 / (q / sqrt(A) - 1/2))) of its bucket's aspect: 1.21 for eight steps and A = 4. Beyond
the last bucket it is less than one whole such step, where b <= A a gives a - 1 > q / sqrt(A) - 3/2.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

Size = tuple[int, int]  # width, height

TIE = 1e-12  # aspects whose distances from an image differ by less than this fraction are equally near


@dataclass(frozen=True)
class BucketRules:
    """What decides the bucket of a size."""

    resolution: int  # side in pixels of a square of the largest area
    step: int  # sides are multiples of it
    max_upscale: float  # largest factor that an image is enlarged by
    max_aspect: float  # longest image and bucket, long side to short side
    enabled: bool  # otherwise squares only


def default_step(resolution: int, multiple: int) -> int:
    """The multiple of the family's `multiple` that is nearest to an eighth of the resolution; at least one of it."""
    return max(1, (resolution + 4 * multiple) // (8 * multiple)) * multiple


def check_rules(rules: BucketRules, multiple: int) -> list[str]:
    """What is wrong with the rules for a family whose images have sides of this multiple, one line each."""
    problems = []
    if rules.step % multiple:
        below = rules.step // multiple * multiple
        near = " or ".join(str(step) for step in (below, below + multiple) if step)
        problems.append(
            f"data.buckets.step: {rules.step} is no multiple of {multiple}, which the model needs; take {near}"
        )
    if rules.resolution < rules.step:
        problems.append(
            f"data.resolution: {rules.resolution} is less than one bucket step of {rules.step}; "
            f"take a resolution of {rules.step} or more, or a smaller data.buckets.step"
        )
    return problems


def why_too_long(width: int, height: int, max_aspect: float) -> str | None:
    """What is wrong with an image of this shape; None if nothing is."""
    if max(width, height) <= max_aspect * min(width, height):
        return None
    return (
        f"{width} x {height} pixels is longer than {max_aspect:g} to 1; "
        "crop it, or allow more by `data.buckets.max_aspect`"
    )


def bucket_of(width: int, height: int, rules: BucketRules) -> Size | None:
    """Bucket of one image; None if it is longer than `max_aspect`, or too small to be enlarged to step x step."""
    found = buckets_of(np.array([[width, height]]), rules)[0]
    return (int(found[0]), int(found[1])) if found.any() else None


def buckets_of(sizes: np.ndarray, rules: BucketRules) -> np.ndarray:
    """(N, 2) int32 of the buckets of (N, 2) widths and heights; 0, 0 where there is none, as for a size of 0, 0."""
    found = np.zeros(sizes.shape, dtype=np.int32)
    left = np.flatnonzero(sizes.min(axis=1) > 0)
    aspects = sizes[left, 0] / sizes[left, 1]
    short_enough = np.maximum(aspects, sizes[left, 1] / sizes[left, 0]) <= rules.max_aspect
    left, aspects = left[short_enough], aspects[short_enough]
    for resolution in (*range(rules.resolution, rules.step, -rules.step), rules.step):
        if not len(left):
            break
        level, limits = _level(resolution, rules)
        nearest = level[np.searchsorted(limits, aspects)]
        fits = (nearest / sizes[left] <= rules.max_upscale).all(axis=1)
        found[left[fits]] = nearest[fits]
        left, aspects = left[~fits], aspects[~fits]
    return found


def level_sizes(resolution: int, rules: BucketRules) -> list[Size]:
    """The buckets of one level, from the tallest to the widest."""
    square, area = resolution // rules.step * rules.step, resolution**2
    sizes = {(square, square)}
    longest = min(math.ceil(resolution * math.sqrt(rules.max_aspect)), area // rules.step) if rules.enabled else 0
    for side in range(rules.step, longest + 1, rules.step):
        other = area // side // rules.step * rules.step
        if max(side / other, other / side) <= rules.max_aspect:
            sizes |= {(side, other), (other, side)}
    return sorted(sizes, key=lambda size: size[0] / size[1])


@lru_cache(maxsize=256)
def _level(resolution: int, rules: BucketRules) -> tuple[np.ndarray, np.ndarray]:
    """(K, 2) buckets of a level by rising aspect, and the (K - 1,) aspects from which on the next one is nearer.

    On a log scale the middle between two aspects is their geometric mean. A tie goes to the larger area; neighbours
    never have the same one. Division and square root are rounded the same everywhere, which logarithms are not.
    """
    sizes = np.array(level_sizes(resolution, rules), dtype=np.int32)
    aspects, areas = sizes[:, 0] / sizes[:, 1], sizes.astype(np.int64).prod(axis=1)
    to_the_next = np.where(areas[:-1] > areas[1:], 1 + TIE, 1 - TIE)
    return sizes, np.sqrt(aspects[:-1] * aspects[1:]) * to_the_next
