"""Buckets: within their area, near in aspect, never enlarging too much, and a function of each size alone."""

import math
import time
import tracemalloc
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.data.buckets import BucketRules, bucket_of, buckets_of, check_rules, default_step, level_sizes

SD1 = BucketRules(resolution=512, step=64, max_upscale=2.0, max_aspect=4.0, enabled=True)
sides = st.integers(1, 3000)
image_sizes = st.lists(st.tuples(sides, sides), min_size=1, max_size=20)
limits = st.sampled_from([1.0, 1.1, 1.5, 2.0, 3.0, 4.0, 7.3])


@st.composite
def any_rules(draw, squares_too: bool = True) -> BucketRules:
    step = draw(st.sampled_from([1, 8, 16, 20, 64]))
    resolution = draw(st.integers(step, 16 * step))
    return BucketRules(resolution, step, draw(limits), draw(limits), not squares_too or draw(st.booleans()))


def aspect_of(width: int, height: int) -> Fraction:
    """Long side to short side."""
    return Fraction(max(width, height), min(width, height))


def expected(width: int, height: int, rules: BucketRules) -> tuple[int, int] | None:
    """The rules word for word, in exact numbers."""
    if max(width, height) / min(width, height) > rules.max_aspect:
        return None
    image = Fraction(width, height)
    for level in [*range(rules.resolution, rules.step, -rules.step), rules.step]:
        distances = {(w, h): max(image / Fraction(w, h), Fraction(w, h) / image) for w, h in level_sizes(level, rules)}
        w, h = min(distances, key=lambda size: (distances[size], -size[0] * size[1], -size[0]))
        if max(w / width, h / height) <= rules.max_upscale:
            return w, h
    return None


@given(st.tuples(sides, sides), any_rules())
@settings(max_examples=200, deadline=None)
def test_the_bucket_is_the_nearest_of_the_first_level_that_the_image_can_fill(size, rules):
    assert bucket_of(*size, rules) == expected(*size, rules)


@given(any_rules(squares_too=False))
@settings(max_examples=50, deadline=None)
def test_a_level_has_every_side_with_the_longest_other_side_that_fits(rules):
    buckets = level_sizes(rules.resolution, rules)
    step, area = rules.step, rules.resolution**2
    square = rules.resolution // step * step
    assert len(set(buckets)) == len(buckets)
    assert (square, square) in buckets
    for width, height in buckets:
        assert width % step == height % step == 0
        assert 0 < width * height <= area
        assert max(width, height) / min(width, height) <= rules.max_aspect
        assert (height, width) in buckets
        assert width == height or area < max(width * (height + step), (width + step) * height)
    for width in range(step, area // step + 1, step):
        height = area // width // step * step
        if aspect_of(width, height) <= rules.max_aspect:
            assert (width, height) in buckets
    areas = [width * height for width, height in buckets]
    assert all(area != following for area, following in pairwise(areas))  # what ties between neighbours rest on


def test_the_level_of_stable_diffusion():
    units = [(w // 64, h // 64) for w, h in level_sizes(512, SD1) if w >= h]
    assert units == [(8, 8), (9, 7), (10, 6), (11, 5), (12, 5), (13, 4), (14, 4), (15, 4), (16, 4)]
    assert level_sizes(500, BucketRules(500, 64, 2.0, 4.0, enabled=False)) == [(448, 448)]


@given(image_sizes, any_rules())
@settings(max_examples=200, deadline=None)
def test_buckets_keep_their_limits_and_every_acceptable_image_gets_one(sizes, rules):
    for (width, height), (w, h) in zip(sizes, buckets_of(np.array(sizes), rules).tolist(), strict=True):
        long_enough = min(width, height) * rules.max_upscale >= rules.step * (1 + 1e-12)
        too_small = min(width, height) * rules.max_upscale < rules.step * (1 - 1e-12)
        too_long = max(width, height) / min(width, height) > rules.max_aspect
        if too_small or too_long:
            assert (w, h) == (0, 0)
        elif long_enough:
            assert w >= rules.step and h >= rules.step
        if w:
            assert w % rules.step == h % rules.step == 0
            assert w * h <= rules.resolution**2
            assert w / width <= rules.max_upscale and h / height <= rules.max_upscale
            assert rules.enabled or w == h


@given(image_sizes, any_rules(), st.randoms())
@settings(max_examples=100, deadline=None)
def test_a_bucket_depends_on_its_own_image_alone(sizes, rules, random):
    buckets = buckets_of(np.array(sizes, dtype=np.int32), rules).tolist()
    alone = [bucket_of(*size, rules) or (0, 0) for size in sizes]
    assert [tuple(bucket) for bucket in buckets] == alone
    order = random.sample(range(len(sizes)), len(sizes))
    assert buckets_of(np.array(sizes)[order], rules).tolist() == [buckets[index] for index in order]


@given(st.tuples(sides, sides), any_rules())
@settings(max_examples=100, deadline=None)
def test_a_turned_image_gets_the_turned_bucket(size, rules):
    upright, turned = bucket_of(*size, rules), bucket_of(*size[::-1], rules)
    assert turned == (upright and upright[::-1])


@given(st.integers(8, 40), st.integers(0, 7), limits, st.floats(0, 1), st.booleans())
@settings(max_examples=200, deadline=None)
def test_the_aspect_of_a_bucket_is_near_that_of_its_image(steps, more, max_aspect, how_long, wide):
    rules = BucketRules(8 * steps + more, 8, 1.0, max_aspect, enabled=True)
    short = 10_000  # large, so that every aspect can be had and nothing is enlarged
    long = int(short * max_aspect**how_long)
    width, height = (long, short) if wide else (short, long)
    bucket = bucket_of(width, height, rules)
    assert bucket is not None
    error = max(width / height / (bucket[0] / bucket[1]), bucket[0] / bucket[1] / (width / height))
    first, reach = 1 + 1 / steps, steps / math.sqrt(max_aspect)
    longest = max(Fraction(w, h) for w, h in level_sizes(rules.resolution, rules))
    if aspect_of(width, height) <= longest:
        assert error <= math.sqrt(first * (1 + 1 / (reach - 1 / 2))) + 1e-9
    elif reach > 3 / 2:
        assert error <= first * (1 + 1 / (reach - 3 / 2))


def test_eight_steps_and_the_default_longest_aspect_cut_off_at_most_a_sixth():
    widths = np.arange(2500, 40_001)
    sizes = np.stack([widths, np.full_like(widths, 10_000)], axis=1)
    buckets = buckets_of(sizes, SD1)
    ratio = (sizes[:, 0] / sizes[:, 1]) / (buckets[:, 0] / buckets[:, 1])
    lost = 1 - np.minimum(ratio, 1 / ratio)
    assert 0.1 < lost.max() < 1 / 6


@pytest.mark.parametrize(
    ("size", "changes", "bucket"),
    [
        ((512, 512), {}, (512, 512)),
        ((4000, 3000), {}, (576, 448)),
        ((3000, 4000), {}, (448, 576)),
        ((256, 256), {}, (512, 512)),
        ((255, 256), {}, (448, 448)),
        ((64, 64), {}, (128, 128)),
        ((32, 32), {}, (64, 64)),
        ((31, 32), {}, None),
        ((32, 120), {}, (64, 64)),
        ((400, 100), {}, (768, 192)),
        ((401, 100), {}, None),
        ((401, 100), {"enabled": False}, None),
        ((400, 100), {"enabled": False}, (192, 192)),
        ((115, 100), {"max_aspect": 1.15}, (192, 192)),
        ((110, 100), {"max_upscale": 1.1, "enabled": False, "step": 10, "resolution": 200}, (110, 110)),
        ((0, 0), {}, None),
        ((900, 300), {"step": 64, "max_upscale": 1.0}, (832, 256)),
        ((70, 180), {"resolution": 116, "max_upscale": 1.0}, (64, 64)),  # 64 x 192 is nearer but higher
    ],
)
def test_known_sizes(size, changes, bucket):
    rules = BucketRules(**{**vars(SD1), **changes})
    assert bucket_of(*size, rules) == bucket


@pytest.mark.parametrize("turn", [1, -1])
def test_a_tie_goes_to_the_larger_area(turn):
    """1:4 and 1:9 are the neighbours of 1:6 at four steps."""
    rules = BucketRules(32, 8, 1.0, 10.0, enabled=True)
    assert bucket_of(*(100, 600)[::turn], rules) == (16, 64)[::turn]
    assert bucket_of(*(10_000, 60_001)[::turn], rules) == (8, 72)[::turn]


def test_unread_images_have_no_buckets():
    with np.errstate(all="raise"):
        assert buckets_of(np.array([[0, 0], [512, 512], [0, 9]]), SD1).tolist() == [[0, 0], [512, 512], [0, 0]]
    assert buckets_of(np.zeros((0, 2), dtype=np.int32), SD1).shape == (0, 2)


def test_a_million_sizes_are_quick_and_small():
    sizes = np.random.default_rng(0).integers(20, 6000, (1_000_000, 2), dtype=np.int32)
    tracemalloc.start()
    start = time.process_time()
    found = buckets_of(sizes, SD1)
    seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.dtype == np.int32
    assert seconds < 3
    assert peak < 150e6


@pytest.mark.parametrize(
    ("resolution", "multiple", "step"),
    [(512, 8, 64), (512, 64, 64), (1024, 64, 128), (768, 64, 128), (64, 8, 8), (32, 8, 8), (200, 8, 24), (100, 16, 16)],
)
def test_the_default_step_is_an_eighth(resolution, multiple, step):
    assert default_step(resolution, multiple) == step


@given(st.integers(16, 4096), st.sampled_from([1, 2, 8, 16, 32, 64]))
@settings(max_examples=100, deadline=None)
def test_the_default_step_is_a_multiple_near_an_eighth(resolution, multiple):
    step = default_step(resolution, multiple)
    assert step >= multiple
    assert step % multiple == 0
    assert step == multiple or abs(step - resolution / 8) <= multiple / 2


def test_rules_that_a_model_cannot_take_are_named():
    assert check_rules(SD1, 8) == check_rules(SD1, 64) == check_rules(BucketRules(64, 64, 2.0, 4.0, True), 8) == []
    (problem,) = check_rules(BucketRules(512, 100, 2.0, 4.0, True), 8)
    assert problem.startswith("data.buckets.step: 100 is no multiple of 8")
    assert problem.endswith("take 96 or 104")
    (problem,) = check_rules(BucketRules(512, 5, 2.0, 4.0, True), 8)
    assert problem.endswith("take 8")
    (problem,) = check_rules(BucketRules(32, 64, 2.0, 4.0, True), 8)
    assert problem.startswith("data.resolution: 32")
    assert len(check_rules(BucketRules(32, 65, 2.0, 4.0, True), 8)) == 2
