"""The tables of `benchmarks.speed`, from a real run of all contestants that need no checkout."""

import json
from dataclasses import replace

import pytest

from loraloom.benchmarks import speed, speed_table
from loraloom.benchmarks.arithmetic import matrix_rate, step_flops
from loraloom.benchmarks.machine import machine_line
from loraloom.benchmarks.work import Work, prepare

pytestmark = pytest.mark.slow


def test_a_table_for_each_work_and_both_are_kept(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- speed -->\n<!-- /speed -->\nafter\n")
    monkeypatch.setattr(speed_table, "PAGE", page)
    monkeypatch.setattr(speed_table, "FIGURES", tmp_path / "speed.json")
    monkeypatch.setattr("loraloom.benchmarks.turns.TURN", 0.1)
    short = ["--rounds", "1", "--starts", "1", "--steps", "3", "--variants", "loraloom", "--docs", "--resolution", "32"]
    assert speed.main([*short, "--batch", "1", "--work", str(tmp_path / "work")]) == 0
    (measured,) = speed_table._stored()
    speed_table.write_docs([replace(measured, work=replace(measured.work, batch=2), machine="another")])
    speed_table.write_docs([measured])  # takes its own place again
    works = json.loads((tmp_path / "speed.json").read_text())["works"]
    assert [each["work"]["batch"] for each in works] == [1, 2]
    for each in works:
        assert [result["name"] for result in each["results"]] == ["bare", "loraloom", "bare, again"]
        assert {result["modules"] for result in each["results"]} == {56}
        assert all(result["seconds"] > 0 and result["losses_off"] <= 1e-5 for result in each["results"])
        assert 0 < each["results"][1]["overhead"] < 0.5
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert text.count("| loraloom |") == 2
    assert text.count(f"Machine: {machine_line()}.") == text.count("Machine: another.") == 1
    assert "pocket, 32 px, batch 2" in text
    assert "pocket, 32 px, batch 1" in capsys.readouterr().out


def test_arithmetic_of_a_step_is_that_of_its_products(tmp_path):
    """Counted on shapes alone; a batch of two is twice as much, and a matrix product is as fast as it is."""
    works = [Work("pocket", 32, batch, "fp32", 1, steps=1) for batch in (1, 2)]
    one, two = (step_flops(prepare(work, tmp_path)) for work in works)
    assert two == 2 * one
    assert 1e8 < one < 1e9  # 1.5 GFLOP at 64 px
    assert matrix_rate("fp32", 1) > 1e9


def test_on_a_gpu_the_suite_is_another(monkeypatch):
    options = speed._parser().parse_args(["--suite"])
    assert {work.model for work in speed.works_of(options)} == {"pocket", "sd1", "sdxl"}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    found = {(work.model, work.resolution, work.batch, work.dtype) for work in speed.works_of(options)}
    assert found == {(*shapes, batch, "bf16") for shapes in (("sd1", 512), ("sdxl", 1024)) for batch in (1, 4)}
