"""Presets by size of the card: their arithmetic is written in them, adds up, and leaves room on the card."""

import re
from pathlib import Path

import pytest

import loraloom.configs
from loraloom.configs.loader import load_config

pytestmark = pytest.mark.slow

FOLDER = Path(loraloom.configs.__file__).parent
PRESETS = sorted(FOLDER.glob("*/lora-*gb.yaml"))
ROOM = 0.81
"""Of the card, at most this much by arithmetic: the rest is for CUDA, workspaces and fragmentation."""


def told(preset: Path) -> list[float]:
    """The figures of the comment: base, adapter, gradient, optimiser, activations, sum, images, verifying."""
    comment = "".join(line for line in preset.read_text().splitlines() if line.startswith("#"))
    assert "Not measured: no GPU of this size was at hand." in comment
    return [float(figure) for figure in re.findall(r"\b\d+\.\d\d\b", comment)]


def size_of(preset: Path) -> int:
    return int(preset.stem.removeprefix("lora-").removesuffix("gb"))


def test_there_is_one_for_each_size_and_family() -> None:
    names = {(preset.parent.name, size_of(preset)) for preset in PRESETS}
    assert names == {(family, size) for family in ("sd1", "sdxl") for size in (8, 12, 16, 24)}


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: f"{preset.parent.name}/{preset.stem}")
def test_it_fits_by_its_own_arithmetic(preset: Path) -> None:
    *held, together, images, verifying = told(preset)
    assert len(held) == 5
    assert sum(held) == pytest.approx(together, abs=0.03)
    needed = [together, verifying, *([images] if load_config(preset).validation.prompts else [])]
    assert max(needed) <= ROOM * size_of(preset)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: f"{preset.parent.name}/{preset.stem}")
def test_it_is_used_by_its_name(preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(
        f"extends: {preset.parent.name}/{preset.stem}\n"
        "data: {sources: [{path: cats, caption: a cat}]}\noutput: {dir: runs/cats}\n"
    )
    mine, its_own = load_config("mine.yaml"), load_config(preset)
    assert (mine.loop, mine.adapter) == (its_own.loop, its_own.adapter)
    assert [source.model_dump()["path"] for source in mine.data.sources] == ["cats"]


@pytest.mark.slow
def test_the_figures_are_those_of_the_benchmark() -> None:
    from loraloom.benchmarks.memory import COLUMNS, GIB, needs_of

    preset = FOLDER / "sd1" / "lora-8gb.yaml"
    needs = needs_of(load_config(preset))
    assert [round(needs[column] / GIB, 2) for column in COLUMNS] == told(preset)
