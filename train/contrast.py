"""Whether validation pictures have collapsed to nearly one colour, beside what the base made of the same prompts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..configs.words import counted

if TYPE_CHECKING:
    from PIL.Image import Image

    from .run_folder import Picture

FLAT = 6.0
"""Standard deviation, of 255, below which a picture is nearly one colour."""
FADED = 0.3
"""The same as a part of that of the base's picture."""
CELLS = 16
"""Each way, in which a picture is looked at: what is large counts, texture and the two cells at its edge do not."""


def contrast(image: "Image") -> float:
    """Standard deviation of the colours in the middle of a picture, of 255, in the channel that differs most."""
    import numpy as np
    from PIL.Image import Resampling

    cells = np.asarray(image.convert("RGB").resize((CELLS, CELLS), Resampling.BOX), dtype=np.float32)
    return round(float(cells[2:-2, 2:-2].std(axis=(0, 1)).max()), 1)


def collapsed(pictures: "Sequence[Picture]", base: "Sequence[Picture]") -> str | None:
    """One line where pictures of a validation are nearly one colour and those of the base, if it made any, are not."""
    before = {(each.prompt, each.seed): each.contrast for each in base if each.contrast is not None}
    flat: list[tuple[float, float | None]] = []
    for each in pictures:
        was = before.get((each.prompt, each.seed))
        had_some = was is None or was >= FLAT
        if each.contrast is not None and had_some and each.contrast < max(FLAT, FADED * (was or 0.0)):
            flat.append((each.contrast, was))
    if not flat:
        return None
    now = sum(own for own, _ in flat) / len(flat)
    known = [was for _, was in flat if was is not None]
    beside = f", {sum(known) / len(known):.0f} before" if known else ""
    some = f"{len(flat)} of {counted(len(pictures), 'validation image')}"
    verb = "is" if len(flat) == 1 else "are"
    return f"{some} {verb} nearly one colour (contrast {now:.0f} of 255{beside}): {ADVICE}"


ADVICE = "what was learnt may have collapsed; try a lower optimizer.learning_rate, or fewer steps"
