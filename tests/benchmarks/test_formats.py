"""The table of what adapter files lose: each cell is what it has to be."""

import pytest

from loraloom.benchmarks.formats import FAMILIES, FORMATS, VARIANTS, Cell, cell

EXACT = 1e-6
"""Relative error of a weight's change after writing and reading: float rounding where a scale is folded in."""
SAME = 1e-5
"""Error of what models say, where the reader is not ours."""
REFUSED = {
    ("DoRA of all", "diffusers"): "DoRA of a text encoder",
    ("LoHa", "diffusers"): "cannot hold loha",
    ("LoKr", "diffusers"): "cannot hold lokr",
    ("LoKr, factors whole", "diffusers"): "cannot hold lokr",
}
UNREAD = {
    ("DoRA of the UNet", "kohya"): "off by",  # diffusers leaves dora_scale out, with a warning
    ("DoRA of all", "kohya"): "off by",
    ("LoHa", "kohya"): "",
    ("LoKr", "kohya"): "",
    ("LoKr, factors whole", "kohya"): "",
}
CASES = [(kind, variant, form) for kind in FAMILIES for variant in VARIANTS for form in FORMATS]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "variant", "form"), CASES)
def test_a_cell_of_the_table(kind: str, variant: str, form: str):
    found = cell(kind, variant, form)
    if (variant, form) in REFUSED:
        assert found.refused is not None
        assert REFUSED[variant, form] in found.refused
        return
    assert found.refused is None
    assert found.lost is not None and found.lost <= EXACT
    assert found.apart is not None and found.apart <= SAME
    if (variant, form) in UNREAD:
        assert found.unread is not None
        assert UNREAD[variant, form] in found.unread
    else:
        assert found.unread is None


def test_a_cell_in_words():
    assert Cell(1e-7, 2e-6, "diffusers").words() == "1.0e-07; diffusers 2.0e-06"
    assert Cell(0.0, 0.0, "diffusers", "off by 1").words() == "0.0e+00; diffusers cannot: off by 1; ours 0.0e+00"
    assert Cell(refused="no place for x (unet a, unet b); write y").words() == "refused: no place for x; write y"
