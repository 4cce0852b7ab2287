"""The list of runs and their comparison: true states, numbers that are in the files, a page that asks for nothing."""

import fcntl
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from loraloom.configs.command import run_command
from loraloom.launch import cli
from loraloom.train.comparison import compare, short_names
from loraloom.train.facts import Measured
from loraloom.train.pages.comparison_page import comparison_page, shown_steps
from loraloom.train.pages.page import data_uri
from loraloom.train.pages.words import aligned, shortened
from loraloom.train.runs import HEAD, describe, find_runs, list_runs, look, main

CONFIG = {
    "model": {"base": "pocket", "family": "sd1"},
    "data": {"sources": [{"path": "examples/sks", "caption": "a sks creature"}]},
    "adapter": {"method": "lora", "rank": 4, "alpha": 8.0, "parts": {"unet": "attention"}},
    "optimizer": {"learning_rate": 0.001, "parts": {}},
    "loop": {"steps": 20, "batch_size": 2, "threads": 1},
    "validation": {"every": 10, "sources": []},
    "output": {"dir": "runs/x", "name": "x"},
}
RECORD = {
    "state": "done",
    "step": 20,
    "steps": 20,
    "train_seconds": 41.2,
    "processes": 1,
    "versions": {"torch": "2.6.0", "peft": "0.17.0"},
    "started": "2025-01-02T03:04:05+00:00",
}
PROMPTS = ["a sks creature", "two <script>alert(1)</script> & stars"]


def overlaid(base: dict, changes: dict) -> dict:
    """Dotted keys set; None as a value removes the key."""
    values = json.loads(json.dumps(base))
    for key, value in changes.items():
        *sections, last = key.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[last] = value
    return values


def write_lines(file: Path, entries: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def write_run(folder: Path, losses: list[float] | None = None, record: dict | None = None, **config: Any) -> Path:
    """A run folder: loss k of step k, two learning rates, half a second a step; `record` is laid over RECORD."""
    folder.mkdir(parents=True)
    changes = {key.replace("__", "."): value for key, value in config.items()}
    (folder / "config.yaml").write_text(yaml.safe_dump(overlaid(CONFIG, changes), sort_keys=False))
    (folder / "run.json").write_text(json.dumps(RECORD | (record or {})))
    rates = {"learning_rate/unet": 1e-3, "learning_rate/text_encoder": 5e-4}
    entries = [
        {"step": step, "loss": loss, "loss/sks": loss, **rates, "grad_norm": 0.5, "seconds": 0.5}
        for step, loss in enumerate(losses or [], start=1)
    ]
    write_lines(folder / "logs" / "history.jsonl", entries)
    return folder


def write_held_out(folder: Path, losses: dict[int, float]) -> None:
    entries = [{"step": step, "held_out": loss, "held_out/sks": loss} for step, loss in losses.items()]
    write_lines(folder / "logs" / "held_out.jsonl", entries)


def write_samples(folder: Path, step: int, shown: list[tuple[str, int]], colour: str = "red") -> list[Path]:
    samples = folder / "samples" / f"step-{step:06d}"
    samples.mkdir(parents=True)
    entries = [{"file": f"{k}.png", "prompt": prompt, "seed": seed} for k, (prompt, seed) in enumerate(shown)]
    for k, entry in enumerate(entries):
        Image.new("RGB", (8 + step, 8 + k), colour).save(samples / entry["file"])
    (samples / "samples.json").write_text(json.dumps(entries))
    return [samples / entry["file"] for entry in entries]


def write_checkpoint(folder: Path, step: int, *sources: tuple[str, int, str]) -> None:
    checkpoint = folder / "checkpoints" / f"step-{step:06d}"
    checkpoint.mkdir(parents=True)
    found = [{"name": name, "images": images, "sha256": digest * 32} for name, images, digest in sources]
    (checkpoint / "run_state.json").write_text(json.dumps({"step": step, "data": {"sources": found}}))


def tree(page: str) -> ElementTree.Element:
    """The page as XML: elements without an end are closed, attributes without a value get one, a script is text."""
    text = re.sub(r"<((?:meta|img|input|wbr)\b[^>]*)>", r"<\1/>", page).replace(" checked", ' checked=""')
    text = text.replace("<script>", "<script><![CDATA[").replace("</script>", "]]></script>")
    return ElementTree.fromstring(text.removeprefix("<!doctype html>"))


def page_of(*folders: Path) -> ElementTree.Element:
    return tree(comparison_page(compare(folders)))


def words(element: ElementTree.Element) -> str:
    return "".join(element.itertext())


def table(page: ElementTree.Element, title: str) -> list[list[str]]:
    """The rows below a heading, the names of the runs first."""
    sections = [section for section in page.iter("section") if words(section).startswith(title)]
    return [[words(cell) for cell in row] for section in sections for row in section.iter("tr")]


def charts(page: ElementTree.Element) -> dict[str, dict[str, dict]]:
    """Title to what the chart knows about the curve of each run."""
    found = {}
    for figure in page.iter("figure"):
        plots = [plot.get("data-chart") for plot in figure.iter("div") if plot.get("class") == "plot"]
        if plots:
            data = json.loads(plots[0] or "")
            found[words(next(figure.iter("h3")))] = {curve["name"]: curve for curve in data["series"]}
    return found


def rows_of(out: str) -> list[list[str]]:
    """Cells of the lines of a table for a terminal."""
    return [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]


# ------------------------------------------------------------------------------- the list


def test_the_table_has_the_newest_run_first_and_numbers_that_are_in_the_files(tmp_path, capsys):
    old = write_run(tmp_path / "old", [9.0] * 18 + [0.25, 0.75], {"started": "2025-01-02T23:30:00-02:00"})
    new = write_run(tmp_path / "deep" / "er" / "new", [3.0] * 5, {"state": "failed", "step": 5}, adapter__rank=16)
    newest = {"state": "stopped", "step": 1500, "steps": 2000, "started": "2025-01-03T01:31:00+00:00"}
    write_run(tmp_path / "newest", [1.0], newest | {"train_seconds": 725}, model__base="x" * 30 + "/stable-diffusion")
    write_held_out(old, {0: 0.5, 10: 0.125, 20: 0.25})
    assert main([str(tmp_path)]) == 0
    head, *rows = rows_of(capsys.readouterr().out)
    assert head == list(HEAD)
    base = "x" * 15 + "…" + "stable-diffusion"
    assert rows == [
        [
            str(tmp_path / "newest"),
            "stopped",
            "1,500/2,000",
            base,
            "lora, rank 4, alpha 8",
            "1",
            "12 min 5 s",
            "2025-01-03 01:31",
        ],
        [
            str(old),
            "done",
            "20/20",
            "pocket",
            "lora, rank 4, alpha 8",
            "0.5",
            "0.125 at step 10",
            "41.2 s",
            "2025-01-02 23:30",
        ],
        [str(new), "failed", "5/20", "pocket", "lora, rank 16, alpha 8", "3", "41.2 s", "2025-01-02 03:04"],
    ]


def test_json_says_the_same(tmp_path, capsys):
    folder = write_run(tmp_path / "a", [9.0] * 18 + [0.25, 0.75])
    write_held_out(folder, {0: 0.5, 10: 0.125, 20: 0.25})
    assert main([str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {
            "run": str(folder),
            "state": "done",
            "resumable": False,
            "step": 20,
            "steps": 20,
            "base": "pocket",
            "adapter": ["lora", "rank 4", "alpha 8"],
            "loss": 0.5,
            "held_out": {"step": 10, "loss": 0.125},
            "last_held_out": {"step": 20, "loss": 0.25},
            "seconds": 41.2,
            "started": RECORD["started"],
            "problem": None,
        }
    ]


def test_a_run_whose_lock_is_free_was_killed_and_stands_where_its_history_ends(tmp_path):
    """run.json of a run that goes on was written when it started, here from a checkpoint at step 3."""
    folder = write_run(tmp_path / "a", [1.0] * 8, {"state": "running", "step": 3, "train_seconds": 10.0})
    code = (
        f"from filelock import FileLock; lock = FileLock({str(folder / '.lock')!r}); lock.acquire(); print(); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "\n"
        assert (look(folder).state, look(folder).resumable) == ("running", False)
        process.kill()
    killed = look(folder)
    assert (killed.state, killed.resumable, killed.step, killed.seconds) == ("killed", False, 8, 12.5)
    write_checkpoint(folder, 3)
    assert look(folder).resumable
    assert list(describe([look(folder)]))[-1].strip() == f"loraloom resume {folder} goes on from its newest checkpoint"


@pytest.mark.parametrize(
    ("said", "lock", "state"),
    [
        ("running", "held", "running"),
        ("running", "free", "killed"),
        ("running", None, "killed"),
        ("stopped", "held", "running"),  # resumed, and still loading
        ("stopped", "free", "stopped"),
        ("done", "free", "done"),
        (None, "held", "running"),
        (None, "free", "killed"),
        (None, None, "not started"),
    ],
)
def test_the_state_is_that_of_run_json_and_of_the_lock(tmp_path, said, lock, state):
    folder = write_run(tmp_path / "a", record={"state": said})
    held = FileLock(folder / ".lock")
    if lock:
        held.acquire()
    if lock == "free":
        held.release()
        (folder / ".lock").touch()
    assert look(folder).state == state
    held.release()


def test_asking_takes_no_lock_from_a_run_and_makes_no_file(tmp_path):
    folder = write_run(tmp_path / "a", record={"state": "running"})
    before = sorted(folder.rglob("*"))
    look(folder)
    assert sorted(folder.rglob("*")) == before
    (folder / ".lock").touch()
    look(folder)
    FileLock(folder / ".lock").acquire(timeout=0).lock.release()
    with (folder / ".lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # somebody else asks at the same time
        assert look(folder).state == "killed"


def test_a_lock_that_cannot_be_read_says_nothing(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "a", record={"state": "running"})
    (folder / ".lock").mkdir()
    assert look(folder).state == "running"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("run.json", b'{"state": ', "run.json: is not JSON (Expecting value at line 1 column 11)"),
        ("run.json", b"[]", "run.json: expected a JSON object"),
        ("run.json", b'{"step": "two"}', 'run.json: step cannot be "two"'),
        ("run.json", b'{"versions": 3}', "run.json: versions cannot be 3"),
        ("run.json", b"\xff", "run.json: this is not UTF-8 text (byte 0)"),
        ("config.yaml", b"a: [", "config.yaml: this is not YAML"),
        ("config.yaml", b"- a\n", "config.yaml: expected a mapping"),
        (
            "logs/history.jsonl",
            b'{"step": 1}\n{"st\n',
            "logs/history.jsonl: line 2 is not a JSON object of numbers with a step",
        ),
        ("logs/history.jsonl", b'{"step": 1, "loss": "x"}\n{}', "logs/history.jsonl: line 1 is not a JSON object"),
        ("logs/history.jsonl", b'{"step": 1e999}\n{}', "logs/history.jsonl: line 1 is not a JSON object"),
        ("logs/held_out.jsonl", b"[1]\n", "logs/held_out.jsonl: line 1 is not a JSON object of numbers with a step"),
    ],
)
def test_damage_is_listed_with_its_reason_beside_the_others(tmp_path, capsys, name, content, reason):
    write_run(tmp_path / "sound")
    (write_run(tmp_path / "damaged") / name).write_bytes(content)
    assert run_command(main, [str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    lines = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert err == ""
    assert re.match(rf"{tmp_path}/damaged +damaged +{re.escape(reason)}", lines[f"{tmp_path}/damaged"])
    assert " done " in lines[f"{tmp_path}/sound"]
    assert run_command(main, ["--compare", str(tmp_path / "sound"), str(tmp_path / "damaged")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/damaged/{reason}")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda below: st.lists(below, max_size=2) | st.dictionaries(st.text(max_size=4), below, max_size=2),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from([*RECORD, "model", "adapter", "loop", "optimizer"]), value=JSON)
def test_no_content_of_the_files_is_a_traceback(tmp_path, key, value):
    """Neither in the list nor in the comparison, which says what is damaged."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    (folders[0] / "run.json").write_text(json.dumps(RECORD | {key: value}))
    (folders[0] / "config.yaml").write_text(json.dumps(CONFIG | {key: value}))
    (folders[1] / "config.yaml").write_text(json.dumps(CONFIG))
    assert run_command(main, [str(tmp_path)]) == 0
    assert run_command(main, ["--compare", *map(str, folders), "--out", str(tmp_path / "page.html")]) in (0, 2)


def test_folders_are_searched_three_deep_and_runs_are_listed_once(tmp_path):
    names = ["a", "b/c", "b/d/e", "b/d/f/too-deep", ".hidden", "a/inside"]
    for name in names:
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "run.json").write_text("{}")
    (tmp_path / "config.yaml").write_text("model: {base: pocket}\n")  # of a project, which is not a run, but looks so
    (tmp_path / "z").symlink_to(tmp_path / "b" / "d" / "f")
    (tmp_path / "b" / "around").symlink_to(tmp_path)
    found = find_runs([tmp_path, tmp_path / "a"])
    shown = [os.path.relpath(folder, tmp_path) for folder in found]
    assert sorted(shown) == sorted([".", "a", "b/c", "b/d/e", "z/too-deep"])
    assert find_runs([tmp_path / "a"]) == [tmp_path / "a"]


def test_a_run_that_does_not_say_when_it_started_is_as_old_as_its_file(tmp_path):
    for name, at in (("a", 1e9), ("b", 2e9)):
        folder = write_run(tmp_path / name, record={"started": None})
        for file in folder.iterdir():
            os.utime(file, (at, at))
    write_run(tmp_path / "c")
    assert [Path(listed.run).name for listed in list_runs(find_runs([tmp_path]))] == ["b", "c", "a"]


def test_what_is_wrong_is_said_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    (tmp_path / "empty").mkdir()
    for arguments, said in (
        ([], "runs: there is no such folder; loraloom runs FOLDER lists those in it"),
        (["nowhere"], "nowhere: there is no such folder"),
        (["--compare"], "--compare needs two runs or more"),
        (["--compare", "a"], "--compare needs two runs or more"),
        (["--compare", "a", "./a"], "a: is given twice"),
        (["--compare", "a", "empty"], "empty: is no run folder (holds neither config.yaml nor run.json)"),
        (["--compare", "a", "nowhere"], "nowhere: is no run folder (there is no such folder)"),
        (
            ["--compare", "a", "b", "--out", "no/x.html"],
            "--out no/x.html: cannot be written (No such file or directory)",
        ),
        (["a", "--out", "x.html"], "--out is where --compare writes its page"),
    ):
        assert run_command(main, arguments) == 2
        assert capsys.readouterr().err.startswith(f"error: {said}")
    assert main(["empty"]) == 0
    assert capsys.readouterr().out.startswith("no runs here")


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        cli.run(["runs", "--help"])
    out = capsys.readouterr().out
    assert "loraloom runs --compare runs/rank-4 runs/rank-16 --out ranks.html" in out
    assert max(map(len, out.splitlines())) <= 100


def test_the_list_needs_nothing_heavy_and_is_quick(tmp_path):
    for k in range(5):
        write_run(tmp_path / str(k), [1.0] * 200)
    code = f"import sys; from loraloom.launch.cli import run; run(['runs', {str(tmp_path)!r}]); print(*sys.modules)"
    best = 1e9
    for _ in range(5):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        best = min(best, time.perf_counter() - start)
        if best < 0.5:
            break
    assert not {"torch", "numpy", "pydantic", "PIL"} & set(done.stdout.splitlines()[-1].split())
    assert best < 0.5


# ------------------------------------------------------------------------- the comparison


def test_differences_are_the_keys_that_are_not_the_same_everywhere(tmp_path):
    a = write_run(tmp_path / "a", output__dir="a")
    b = write_run(tmp_path / "b", output__dir="b", adapter__rank=16, optimizer__parts={"unet": {"stop_after": 5}})
    c = write_run(
        tmp_path / "c", output__dir="c", data__sources=[*CONFIG["data"]["sources"], {"prior": "x", "count": 3}]
    )
    found = compare([a, b, c]).differences
    assert found == {
        "adapter.rank": {"a": 4, "b": 16, "c": 4},
        "optimizer.parts.unet": {"b": {"stop_after": 5}},
        "data.sources.1": {"c": {"prior": "x", "count": 3}},
        "output.dir": {"a": "a", "b": "b", "c": "c"},
    }
    assert list(found) == ["data.sources.1", "adapter.rank", "optimizer.parts.unet", "output.dir"]  # as in the config


def test_differences_of_versions_processes_and_images_where_both_are_known(tmp_path):
    versions = {"torch": "2.7.0", "peft": "0.17.0", "diffusers": "0.38"}
    a = write_run(tmp_path / "a")
    b = write_run(tmp_path / "b", record={"versions": versions, "processes": 2})
    c = write_run(tmp_path / "c")
    (c / "run.json").unlink()
    for folder, digest in ((a, "ab"), (b, "cd")):
        write_checkpoint(folder, 10, ("sks", 6, digest), ("prior", 48, "ef"))
    write_checkpoint(b, 20)
    (b / "checkpoints" / "step-000020" / "run_state.json").write_text("{")  # passed over, as resuming does
    assert compare([a, b, c]).differences == {
        "processes": {"a": 1, "b": 2},
        "versions.torch": {"a": "2.6.0", "b": "2.7.0"},
        "images.0.sks": {"a": "6 with captions abababababab", "b": "6 with captions cdcdcdcdcdcd"},
    }


def test_the_command_prints_differences_and_how_each_run_ended(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a = write_run(tmp_path / "a", [1.0] * 20, output__dir="runs/" + "long" * 20)
    write_run(tmp_path / "b", [2.0] * 19 + [0.5], record={"train_seconds": 725}, loop__batch_size=4, model__family="no")
    write_held_out(a, {0: 0.5, 10: 0.125, 20: 0.25})
    assert main(["--compare", "a", "b"]) == 0
    assert (
        rows_of(capsys.readouterr().out)
        == [
            ["differences", "a", "b"],
            ["model.family", "sd1", "'no'"],  # as a config file has it: the word, not the truth value
            ["loop.batch_size", "2", "4"],
            ["output.dir", "runs/longlonglonglonglon…nglonglonglonglonglonglong"[:23] + "…" + "long" * 6, "runs/x"],
            [""],
            ["results", "a", "b"],
            ["State", "done", "done"],
            ["Steps", "20 of 20", "20 of 20"],
            ["Loss", "1 · mean of 2 steps", "1.25 · mean of 2 steps"],
            ["Held-out loss, best", "0.125 at step 10", "-"],
            ["Held-out loss, last", "0.25 at step 20", "-"],
            ["Time", "41.2 s", "12 min 5 s"],
            [""],
            ["wrote compare.html"],
        ]
    )
    assert (tmp_path / "compare.html").is_file()
    assert main(["--compare", "a", "b", "--json", "--out", "x.html"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["differences"]["loop.batch_size"] == {"a": 2, "b": 4}
    assert (found["runs"]["b"]["loss"], found["runs"]["b"]["run"], found["page"]) == (1.25, "b", "x.html")


def test_equal_configs_are_said_to_be_equal(tmp_path, capsys):
    a, b = write_run(tmp_path / "a", [1.0]), write_run(tmp_path / "b", [2.0])
    assert main(["--compare", str(a), str(b), "--out", str(tmp_path / "c.html")]) == 0
    assert capsys.readouterr().out.startswith("no differences found between a, b\n\nresults")
    page = page_of(a, b)
    assert table(page, "Differences") == []
    assert "No differences found" in words(page)


def test_a_run_without_a_config_is_not_taken_for_an_equal_one(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", adapter__rank=16)
    (b / "config.yaml").unlink()
    comparison = compare([a, b])
    assert comparison.differences == {}
    assert comparison.results["Config"] == {"b": "there is none"}


def test_names_are_short_where_they_can_be(tmp_path):
    assert short_names([Path("runs/a"), Path("/x/b/")]) == ["a", "b"]
    assert short_names([Path("runs/a"), Path("old/a")]) == ["runs/a", "old/a"]


def test_tables_and_curves_are_those_of_the_files(tmp_path):
    a = write_run(tmp_path / "a", [1.0, 2.0, 4.0])
    b = write_run(tmp_path / "b", [3.0, 5.0], {"step": 2}, adapter__rank=16, validation__sources=[{"path": "x"}])
    write_held_out(b, {0: 0.5, 2: 0.25})
    page = page_of(a, b)
    assert table(page, "Differences") == [
        ["", "a", "b"],
        ["adapter.rank", "4", "16"],
        ["validation.sources.0", "–", "{path: x}"],
    ]
    assert ["Held-out loss, best", "–", "0.25 at step 2"] in table(page, "Results")
    assert ["Steps", "20 of 20", "2 of 20"] in table(page, "Results")
    found = charts(page)
    titles = ["Loss", "Held-out loss", "Learning rate of unet", "Learning rate of text_encoder", "Gradient norm"]
    assert list(found) == titles
    assert (found["Loss"]["a"]["steps"], found["Loss"]["a"]["values"]) == ([1, 2, 3], [1.0, 2.0, 4.0])
    assert (found["Loss"]["b"]["steps"], found["Loss"]["b"]["values"]) == ([1, 2], [3.0, 5.0])
    assert found["Held-out loss"].keys() == {"b"}
    assert found["Held-out loss"]["b"]["values"] == [0.5, 0.25]
    assert {chart["b"]["key"] for chart in found.values()} == {"colour-1"}  # alone in a chart, and not the first


def test_more_runs_than_colours_are_told_apart_by_their_lines(tmp_path):
    folders = [write_run(tmp_path / f"run-{k}", [1.0, 2.0]) for k in range(14)]
    keys = [curve["key"] for curve in charts(page_of(*folders))["Loss"].values()]
    assert len(set(keys)) == 14
    assert keys[5:8] == ["colour-5", "colour-0 turn-1", "colour-1 turn-1"]


def images(page: ElementTree.Element) -> list[list[list[str]]]:
    """Of each prompt its columns' heads, then cell by cell what the picture is of."""
    grids = [grid for grid in page.iter("div") if grid.get("class") == "grid"]
    return [
        [
            [words(cell) for cell in grid if (cell.get("class") or "").startswith("key")],
            [
                cell.find(".//img").attrib["alt"] if cell.tag == "figure" else words(cell)
                for cell in grid
                if cell.get("class") in ("picture", "soft")
            ],
        ]
        for grid in grids
    ]


def test_images_of_the_last_common_validation_stand_side_by_side(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    for step in (0, 10, 20, 30):
        write_samples(a, step, [(PROMPTS[0], 0), (PROMPTS[0], 1), (PROMPTS[1], 0)])
    for step in (0, 5, 20, 40):
        files = write_samples(b, step, [(PROMPTS[1], 0), (PROMPTS[0], 1), (PROMPTS[0], 1)], "blue")
        if step == 20:
            shown = files
    page = page_of(a, b)
    assert "Of step 20, the last validation that all of them have" in words(page)
    assert images(page) == [
        [
            ["a · step 20", "b · step 20"],
            [
                *(f"a · step 20 · seed 0 · {PROMPTS[0]}", "no image"),
                *(f"{run} · step 20 · seed 1 · {PROMPTS[0]}" for run in "ab"),
                *("no image", f"b · step 20 · seed 1 · {PROMPTS[0]}"),  # the second with this prompt and seed
            ],
        ],
        [["a · step 20", "b · step 20"], [f"{run} · step 20 · seed 0 · {PROMPTS[1]}" for run in "ab"]],
    ]
    found = {image.attrib["alt"]: image.attrib["src"] for image in page.iter("img")}
    assert found[f"b · step 20 · seed 0 · {PROMPTS[1]}"] == data_uri(shown[0])
    names = [button.attrib["id"] for button in page.iter("input")]
    assert len(set(names)) == len(names) == 6 + 1


@pytest.mark.parametrize(
    ("steps", "shown", "said"),
    [
        ([[10, 20], [15, 30]], [20, 30], "No validation step is common to all of them: of each run its last one;"),
        ([[0, 10], [0, 15]], [10, 15], "No validation step is common to all of them: of each run its last one;"),
        (
            [[10, 20], []],
            [20, None],
            "Of step 20, the last validation of a; select an image to enlarge it. No images of b.",
        ),
        ([[10, 20], [20], [10]], [20, 20, 10], "No validation step is common"),
        ([[10, 20], [10], [10, 30]], [10, 10, 10], "Of step 10, the last validation that all of them have;"),
        ([[0], []], [None, None], ""),
    ],
)
def test_which_validation_is_shown(tmp_path, steps, shown, said):
    """Step 0 is the base alone, which is the same everywhere."""
    folders = [write_run(tmp_path / name) for name, _ in zip("abc", steps, strict=False)]
    for folder, found in zip(folders, steps, strict=True):
        for step in found:
            write_samples(folder, step, [("p", 0)])
    runs = compare(folders).runs
    assert shown_steps(runs) == {name: step for name, step in zip(runs, shown, strict=True) if step}
    page = page_of(*folders)
    assert said in words(page)
    assert len(list(page.iter("img"))) == sum(step is not None for step in shown)


def test_what_strangers_wrote_is_text(tmp_path):
    evil = "<script>alert(1)<!--"
    a = write_run(tmp_path / evil / evil, [1.0], model__base=evil, output__name="</td><img src=x onerror=alert(1)>")
    b = write_run(tmp_path / "b", [1.0])
    write_samples(a, 10, [(PROMPTS[1], 0)])
    (b / "run.json").write_text(json.dumps(RECORD | {"versions": {evil: evil}, "state": evil}))
    source = comparison_page(compare([a, b]))
    page = tree(source)
    assert len(list(page.iter("script"))) == source.count("<script") == 1
    assert table(page, "Differences")[1] == ["model.base", evil, "pocket"]
    policy = next(meta for meta in page.iter("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.attrib["content"].startswith("default-src 'none'; img-src data:;")
    assert all(image.attrib["src"].startswith("data:") for image in page.iter("img"))
    assert not any(key.startswith("on") or key in ("href", "srcset") for node in page.iter() for key in node.attrib)


def test_the_same_files_give_the_same_bytes(tmp_path):
    a, b = write_run(tmp_path / "a", [1.0, 3.0]), write_run(tmp_path / "b", [2.0], adapter__rank=16)
    write_samples(a, 10, [("p", 0)])
    first, second = tmp_path / "first.html", tmp_path / "second.html"
    for out, seed in ((first, "1"), (second, "2")):
        command = [sys.executable, "-m", "loraloom.launch.cli", "runs", "--compare", str(a), str(b), "--out", str(out)]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONHASHSEED": seed})
    assert first.read_bytes() == second.read_bytes()


PROBE = """<script>
  const plot = document.querySelector(".plot"), box = plot.getBoundingClientRect();
  plot.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + 5 }));
  const image = document.querySelector(".grid label");
  const found = [getComputedStyle(image).position];
  image.click();
  found.push(getComputedStyle(image).position);
  const keys = [...document.querySelectorAll(".compared table")[0].querySelectorAll("i")];
  const colours = keys.map((key) => getComputedStyle(key).backgroundColor);
  document.title = [plot.querySelector(".tip").textContent, ...found, new Set(colours).size].join("|");
</script><img src="http://control.invalid/a.png">
"""
"""Uses the page as a reader would, and asks for one picture from the network."""


def test_a_browser_shows_the_page_without_asking_for_anything(tmp_path, opened: Callable[[str, str], str]):
    a, b = write_run(tmp_path / "a", [1.0, 2.0, 4.0]), write_run(tmp_path / "b", [3.0, 5.0, 7.0])
    for folder in (a, b):
        write_samples(folder, 10, [("p", 0)])
    title = opened(comparison_page(compare([a, b])), PROBE)
    assert title == "step 2a 2, smoothed 2b 5, smoothed 5|static|fixed|2"


@pytest.mark.slow
def test_two_runs_that_were_really_trained(write_config, tmp_path, photos, capsys):
    from loraloom.train.__main__ import main as train

    validation = {"every": 2, "prompts": ["a moon"], "num_images": 1, "steps": 1, "timesteps": 1}
    validation |= {"sources": [{"path": str(photos), "caption": "a moon"}]}
    for name, rank in (("low", 2), ("high", 4)):
        adapter, output = {"rank": rank, "parts": {"unet": "attention"}}, {"formats": ["diffusers"]}
        sections = {"loop": {"steps": 2}, "adapter": adapter, "validation": validation, "output": output}
        assert train([str(write_config(name, **sections))]) == 0
    capsys.readouterr()
    low, high = tmp_path / "low", tmp_path / "high"
    history = [json.loads(line) for line in (high / "logs/history.jsonl").read_text().splitlines()]
    held_out = [json.loads(line) for line in (high / "logs/held_out.jsonl").read_text().splitlines()]
    best = min(held_out, key=lambda entry: entry["held_out"])
    newest, oldest = list_runs(find_runs([tmp_path]))
    assert (newest.run, oldest.run) == (str(high), str(low))
    assert (newest.state, newest.step, newest.steps, newest.loss) == ("done", 2, 2, history[-1]["loss"])
    assert newest.adapter == ["lora", "rank 4", "alpha 8"]
    assert newest.held_out == Measured(best["step"], best["held_out"])
    assert compare([low, high]).differences == {
        "adapter.rank": {"low": 2, "high": 4},
        "output.dir": {"low": str(low), "high": str(high)},
    }
    page = page_of(low, high)
    assert "Of step 2, the last validation that all of them have" in words(page)
    assert [image.attrib["alt"] for image in page.iter("img")] == [
        f"{name} · step 2 · seed 0 · a moon" for name in ("low", "high")
    ]
    assert list(charts(page)) == ["Loss", "Held-out loss", "Learning rate of unet", "Gradient norm"]


# -------------------------------------------------------------------------------- words


def test_columns_stand_in_line_and_a_short_row_does_not_stretch_them():
    rows = [["a", "number", "b"], ["long", "1", "x"], ["bad", "a reason that is longer than all of them"]]
    assert list(aligned(rows, "<><")) == [
        "a     number  b",
        "long       1  x",
        "bad   a reason that is longer than all of them",
    ]


@given(st.text("abc", max_size=30), st.integers(2, 20))
def test_what_is_shortened_keeps_both_ends(text, width):
    short = shortened(text, width)
    assert len(short) == min(len(text), width)
    start, _, end = short.partition("…")
    assert text.startswith(start)
    assert text.endswith(end)
    assert short == text or 0 <= len(end) - len(start) <= 1
