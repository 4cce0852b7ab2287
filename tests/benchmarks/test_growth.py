"""The tables of `benchmarks.growth`: their numbers on paper, and rows that really take turns."""

import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from loraloom.benchmarks import growth, growth_rows
from loraloom.benchmarks.growth import KINDS, measure, take_turns
from loraloom.benchmarks.growth_page import Growth, Ratio, Row, ratio, table
from loraloom.benchmarks.growth_rows import Ready, by_processes, environments, in_this_process, trainer
from loraloom.inference.engine import Engine


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Threads, determinism and the device are of the whole process: other tests keep theirs."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(growth_rows.THREADS)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)


def test_a_ratio_is_of_the_same_round():
    """The machine slows down fourfold and comes back: the medians differ by 1.2, the rounds say 1.3."""
    first, other = Row("first", 1, [10, 20, 10, 40, 20]), Row("other", 2, [11, 24, 13, 56, 30])
    found = ratio(other, first)
    assert (found.low, found.middle, found.high) == pytest.approx((1.14, 1.3, 1.46))  # of 1.1, 1.2, 1.3, 1.4, 1.5
    assert other.milliseconds / first.milliseconds == 1.2
    assert ratio(first, first) == Ratio(1, 1, 1)
    assert ratio(Row("once", 1, [3]), Row("once", 1, [2])) == Ratio(1.5, 1.5, 1.5)


def test_a_table():
    rows = [Row("one", 1, [1, 2, 3.456]), Row("many", 10_000, [2, 6, 6]), Row("all", 7, [2000, 3000, 1234])]
    assert table(Growth("Rank", "rank", "It grows.", rows)).splitlines() == [
        *("## Rank", "", "It grows.", ""),
        "| | rank | ms | ratio | spread |",
        "|---|---|---|---|---|",
        "| one | 1 | 2 | 1.00 |  |",
        "| many | 10,000 | 6 | 2.00 | 1.79 .. 2.80 |",
        "| all | 7 | 2,000 | 1500.00 | 585.65 .. 1900.00 |",
    ]


def fake(name: str, x: float, seconds: float, said: list) -> Ready:
    """A row whose turns take what they say: twice as long in each as in the one before."""

    def turn(steps: int) -> list[float]:
        said.append((name, steps))
        slower = 2.0 ** sum(name == own for own, _ in said[:-1])
        return [*[seconds * slower] * (steps - 1), 100.0]  # a hiccup at the end

    return Ready(name, x, turn)


def test_rows_take_turns_and_each_begins(monkeypatch):
    monkeypatch.setattr(growth, "TURN", 0.5)
    said: list[tuple[str, int]] = []
    turns = take_turns([fake("quick", 1, 0.1, said), fake("slow", 2, 0.15, said), fake("slowest", 3, 3, said)], 2)
    quick, slow, slowest = ("quick", 5), ("slow", 3), ("slowest", 1)
    assert said[:3] == [("quick", 3), ("slow", 3), ("slowest", 3)]  # all warm up before the first turn
    assert said[3:] == [quick, slow, slowest, slowest, slow, quick]
    assert turns == [[0.2, 0.4], [0.3, 0.6], [100, 100]]


def test_the_page_holds_every_growth_and_the_picture_is_drawn(tmp_path, monkeypatch, capsys):
    page, picture, said = tmp_path / "growth.md", tmp_path / "growth.png", []
    monkeypatch.setattr(growth, "PAGE", page)
    monkeypatch.setattr(growth, "PICTURE", picture)
    rows = lambda folder, stack: iter([fake("few", 1, 0.1, said), fake("many", 2, 0.2, said)])  # noqa: E731
    monkeypatch.setattr(growth, "KINDS", {name: replace(kind, rows=rows) for name, kind in KINDS.items()})
    assert growth.main(["--docs", "--rounds", "3"]) == 0
    text, said_aloud = page.read_text(), capsys.readouterr().out
    titles = [kind.title for kind in KINDS.values()]
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == titles
    assert all(kind.limit in text and kind.limit in said_aloud for kind in KINDS.values())
    assert text.count("| many | 2 | ") == len(KINDS) == 7
    assert "in 3 rounds" in text
    assert "80% of the rounds" in text
    assert "](growth.png)" in text
    with Image.open(picture) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    blue = (pixels == (0x25, 0x63, 0xEB)).all(axis=-1)
    cells = [cell for half in np.array_split(blue, 2) for cell in np.array_split(half, 4, axis=1)]
    assert [bool(cell.any()) for cell in cells] == [True] * 7 + [False]  # a line in each plot


def test_some_tables_alone_are_not_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(growth, "PAGE", tmp_path / "growth.md")
    monkeypatch.setattr(growth, "PICTURE", tmp_path / "growth.png")
    said: list[tuple[str, int]] = []
    alone = {name: replace(kind, rows=lambda *_: iter([fake("row", 1, 0.1, said)])) for name, kind in KINDS.items()}
    monkeypatch.setattr(growth, "KINDS", alone)
    assert growth.main(["--only", "batch", "images", "--rounds", "1"]) == 0
    told = capsys.readouterr().out
    assert [name for name, kind in KINDS.items() if f"## {kind.title}\n" in told] == ["batch", "images"]
    with pytest.raises(SystemExit):
        growth.main(["--only", "batch", "--docs"])
    assert "leave --only out" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_rows_of_a_real_table_are_as_large_as_they_say(tmp_path, monkeypatch):
    """Pictures of 64 px are enlarged where the row says so; 36 times the pixels take longer."""
    made = []
    monkeypatch.setattr(growth, "TURN", 0.1)
    monkeypatch.setattr(growth_rows, "SIDES", (32, 192))
    monkeypatch.setattr(growth_rows, "trainer", lambda *a, **k: made.append(trainer(*a, **k)) or made[-1])
    found = measure(KINDS["resolution"], rounds=2)
    assert [(row.name, row.x, len(row.turns)) for row in found.rows] == [("32 px", 32, 2), ("192 px", 192, 2)]
    assert ratio(found.rows[1], found.rows[0]).middle > 1.5
    small, large = (next(each.batches).moments.shape[-2:] for each in made)
    assert [6 * side for side in small] == [*large]


def test_trainers_side_by_side_train_as_alone(tmp_path):
    def losses(*trainers):
        return [[result.loss for own in trainers for result in own.train_step()] for _ in range(2)]

    alone = losses(trainer(tmp_path / "alone"))
    together = losses(trainer(tmp_path / "one"), trainer(tmp_path / "other", adapter={"rank": 64}))
    assert [first for first, _ in together] == [loss for (loss,) in alone]


def test_lists_of_images_are_read_by_nobody(monkeypatch, capsys):
    monkeypatch.setattr(growth, "TURN", 0.01)
    monkeypatch.setattr(growth_rows, "IMAGES", (100, 1_000))
    found = measure(KINDS["images"], rounds=2)
    assert [row.name for row in found.rows] == ["100 images", "1,000 images"]
    assert all(0 < milli < 1000 for row in found.rows for milli in row.turns)
    assert "warning" not in capsys.readouterr().err


@pytest.mark.slow
def test_adapters_are_counted(monkeypatch):
    engines, load = [], Engine.load
    monkeypatch.setattr(growth, "TURN", 0.1)
    monkeypatch.setattr(growth_rows, "ADAPTERS", (0, 2))
    monkeypatch.setattr(growth_rows.Engine, "load", lambda base: engines.append(load(base)) or engines[-1])
    found = measure(KINDS["adapters"], rounds=1)
    assert [(row.name, row.x) for row in found.rows] == [("0 adapters", 0), ("2 adapters", 2)]
    assert [len(engine.adapters.get_names()) for engine in engines] == [0, 2]


@pytest.mark.slow
def test_processes_wait_for_their_turn_and_end_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "TURN", 0.1)
    started = []
    popen = growth_rows.subprocess.Popen
    monkeypatch.setattr(growth_rows.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    with ExitStack() as stack:
        turns = take_turns([*by_processes(tmp_path, stack)], 2)
        assert len(started) == 3  # one alone, two together
        assert all(process.poll() is None for process in started)
    assert all(process.poll() is not None for process in started)
    assert [len(each) for each in turns] == [2, 2]


def test_two_processes_find_each_other():
    alone, (first, second) = environments(1), environments(2)
    assert "RANK" not in alone[0]
    assert [(each["RANK"], each["WORLD_SIZE"], each["OMP_NUM_THREADS"]) for each in (first, second)] == [
        ("0", "2", "1"),
        ("1", "2", "1"),
    ]
    assert first["MASTER_PORT"] == second["MASTER_PORT"]


def test_a_turn_is_so_many_steps():
    found = in_this_process(partial(time.sleep, 0.01), 4)
    assert len(found) == 4
    assert 0.01 <= min(found) < 0.1
