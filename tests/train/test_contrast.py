"""Pictures that have collapsed to one colour are told from those that never had more."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from loraloom.configs import machine
from loraloom.train.callbacks.progress import is_line_due
from loraloom.train.contrast import collapsed, contrast
from loraloom.train.run_folder import Picture


def picture(own: float, step: int, seed: int = 0) -> Picture:
    return Picture(None, "a cat", seed, step, own)  # type: ignore[arg-type]


def test_contrast_is_that_of_what_is_large_in_the_middle() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    plain, halves, framed = (np.full((64, 64, 3), (0, 200, 255), np.uint8) for _ in range(3))
    halves[:, :32, 1], halves[:, 32:, 1] = 0, 255
    framed[:6], framed[-6:], framed[:, :6], framed[:, -6:] = 0, 0, 0, 0
    assert [contrast(Image.fromarray(each)) for each in (plain, halves, framed)] == [0.0, 127.5, 0.0]
    assert contrast(Image.fromarray(noise)) < 30


@given(st.floats(0, 128), st.one_of(st.none(), st.floats(0, 128)))
def test_only_what_lost_its_contrast_is_said(now: float, before: float | None) -> None:
    said = collapsed([picture(now, 5)], [] if before is None else [picture(before, 0)])
    had_some = before is None or before >= 6
    assert bool(said) == (had_some and now < max(6.0, 0.3 * (before or 0)))
    assert said is None or ("\n" not in said and said.startswith("1 of 1 validation image is nearly one colour"))


def test_each_picture_is_compared_with_that_of_the_same_prompt_and_seed() -> None:
    base = [picture(60, 0, 0), picture(3, 0, 1)]
    assert collapsed([picture(4, 5, 0), picture(2, 5, 1)], base) == (
        "1 of 2 validation images is nearly one colour (contrast 4 of 255, 60 before): what was learnt may have "
        "collapsed; try a lower optimizer.learning_rate, or fewer steps"
    )
    assert collapsed([picture(50, 5, 0), picture(2, 5, 1)], base) is None


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 8),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "2,4"}, 2),  # OpenMP's list for nested regions
        ({"OMP_NUM_THREADS": "0"}, 8),
        ({"OMP_NUM_THREADS": "many"}, 8),
        ({"OMP_NUM_THREADS": "99999999"}, 8),
        ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}, 4),  # torchrun's, not the user's
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, 8),  # accelerate's
    ],
)
def test_threads_that_the_environment_asks_for(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: int
) -> None:
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machine, "cores", lambda: 8)
    assert machine.threads() == expected


@given(st.integers(1, 400), st.integers(1, 30))
def test_a_log_has_some_twenty_lines_and_the_last_step(steps: int, at_once: int) -> None:
    """However many steps are told of at once."""
    groups = [(first, min(first + at_once - 1, steps)) for first in range(1, steps + 1, at_once)]
    due = [last for first, last in groups if is_line_due(first, last, steps)]
    assert due[-1] == steps
    assert min(steps, 20, len(groups)) <= len(due) <= 41
