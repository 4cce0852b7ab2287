"""The report of a run: what is on the page, what must not be, and that a browser asks for nothing to show it."""

import base64
import io
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from loraloom.configs.errors import UserError
from loraloom.configs.plain import plain_lines
from loraloom.models.pocket.scenes import draw, random_scene
from loraloom.train.pages import chart
from loraloom.train.pages.chart import Axis, Series
from loraloom.train.pages.page import data_uri
from loraloom.train.pages.report import MAX_VALIDATIONS, spread, write_report
from loraloom.train.pages.words import duration
from loraloom.train.run_folder import read_history

PROMPTS = ["a sks creature on a blue background", 'two <script>alert("x")</script> & stars', "a creature, green"]
CONFIG = {
    "model": {"base": "pocket", "family": "sd1", "revision": None, "dtype": "fp32"},
    "data": {
        "sources": [{"path": "examples/sks", "caption": "</code><script>bad()</script>"}, {"prior": "a creature"}]
    },
    "adapter": {"method": "lora", "rank": 8, "alpha": 8.0, "parts": {"unet": "attention"}},
    "optimizer": {"learning_rate": 0.001, "parts": {"text_encoder": {"learning_rate": 5e-05}}, "schedule": "cosine"},
    "loop": {"steps": 300, "batch_size": 8, "micro_batch": 4},
    "output": {"dir": "runs/demo", "name": "sks"},
}
RECORD = {
    "state": "done",
    "exit_code": 0,
    "step": 300,
    "steps": 300,
    "train_seconds": 41.2,
    "started": "2025-01-02T03:04:05+00:00",
    "versions": {"torch": "2.6.0", "diffusers": "0.38.0", "peft": "0.17.0"},
    "trainable_parameters": 1234567,
    "modules": {"unet": 64, "text_encoder": 12},
    "verify": {
        "diffusers": {"largest_delta_difference": 0.0, "same_prediction": True},
        "kohya": {"largest_delta_difference": 2.4e-07, "same_prediction": True},
    },
    "files": ["sks.safetensors", "sks.kohya.safetensors"],
}


def history(steps: int = 300) -> list[dict[str, float]]:
    """What a DreamBooth run with two sources and two trained parts writes."""
    rng = np.random.default_rng(0)
    entries = []
    for step in range(1, steps + 1):
        subject = (0.05 + 0.2 * math.exp(-step / 60)) * rng.lognormal(0, 0.35)
        prior = (0.06 + 0.03 * math.exp(-step / 100)) * rng.lognormal(0, 0.3)
        fall = (1 + math.cos(math.pi * step / steps)) / 2 * min(1, step / 20)
        entries.append(
            {"step": step, "loss": (subject + prior) / 2, "loss/examples_sks": subject, "loss/prior": prior}
            | {"learning_rate/unet": 1e-3 * fall, "learning_rate/text_encoder": 5e-5 * fall}
            | {"grad_norm": 0.4 * rng.lognormal(0, 0.4) + math.exp(-step / 15), "seconds": 0.137}
        )
    return entries


def write_history(run: Path, entries: list[dict[str, float]], tail: str = "") -> Path:
    file = run / "logs" / "history.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + tail)
    return file


def write_samples(run: Path, step: int, num_images: int = 2) -> None:
    folder = run / "samples" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    entries = []
    for place, prompt in enumerate(PROMPTS):
        for k in range(num_images):
            rng = np.random.default_rng([step, place, k])
            file = f"{re.sub('[^a-z]+', '-', prompt)}-{k}.png"
            draw(random_scene(rng)).save(folder / file)
            entries.append({"file": file, "prompt": prompt, "seed": k})
    (folder / "samples.json").write_text(json.dumps(entries))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run folder: 300 steps, 4 validations of 3 prompts with 2 images each."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    (folder / "run.json").write_text(json.dumps(RECORD))
    (folder / "sks.safetensors").write_bytes(bytes(1_250_000))
    write_history(folder, history())
    for step in (75, 150, 225, 300):
        write_samples(folder, step)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, for one test to change."""
    return shutil.copytree(finished, tmp_path / "demo")


class Page(HTMLParser):
    """What a browser would make of a page: its elements with their attributes, and the text of each."""

    def __init__(self, source: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self) -> str:
        return " ".join(text for tag, texts in self.texts.items() if tag not in ("style", "script") for text in texts)


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text("utf-8"))


def plots(page: Page) -> list[dict]:
    """What the charts know about their curves."""
    found = [attributes["data-chart"] for attributes in page.all("div") if "data-chart" in attributes]
    return [json.loads(data) for data in found if data]


def test_the_page_tells_the_run(run: Path) -> None:
    report = write_report(run)
    page = Page(report.read_text("utf-8"))
    assert report == run / "report.html"
    assert page.texts["title"] == ["sks: done"]
    for fact in (
        *("pocket · sd1", "lora · rank 8 · alpha 8 · unet: 64 modules · text_encoder: 12 modules", "1,234,567"),
        *("300 of 300", "8 · 4 at a time", "0.001 · text_encoder: 5e-5 · cosine", "41.2 s · 0.14 s per step"),
    ):
        assert fact in page.texts["dd"]
    assert "sks.kohya.safetensors" in page.texts["code"]
    assert " 1.25 MB" in page.texts["span"]
    assert [text for text in page.texts["td"] if text] == ["0", "yes", "2.4e-7", "yes"]
    assert {"torch", "2.6.0"} <= {*page.texts["dt"], *page.texts["dd"]}
    assert yaml.safe_load("".join(text for text in page.texts["code"] if "learning_rate" in text)) == CONFIG


def test_curves_are_the_history(run: Path) -> None:
    loss, rate, norm = plots(page_of(run))
    entries = history()
    assert [curve["name"] for curve in loss["series"]] == ["examples_sks", "prior"]
    assert [curve["name"] for curve in rate["series"]] == ["unet", "text_encoder"]
    assert [curve["name"] for curve in norm["series"]] == ["grad norm"]
    prior = loss["series"][1]
    assert prior["steps"] == list(range(1, 301))
    assert prior["values"] == pytest.approx([entry["loss/prior"] for entry in entries], rel=1e-3)


def test_every_validation_image_is_inside_the_page(run: Path) -> None:
    page = page_of(run)
    images = page.all("img")
    assert len(images) == 4 * 3 * 2
    assert images[0]["alt"] == f"step 300 · seed 0 · {PROMPTS[0]}"
    assert images[-1]["alt"] == f"step 75 · seed 1 · {PROMPTS[2]}"
    folder = run / "samples" / "step-000300"
    assert images[0]["src"] == data_uri(folder / json.loads((folder / "samples.json").read_text())[0]["file"])
    assert page.texts["figcaption"] == ["seed 0", "seed 1"] * 12
    names = [button["id"] for button in page.all("input")]
    assert len(set(names)) == len(names) == 24 + 1
    assert [label["for"] for label in page.all("label")] == names


def test_nothing_on_the_page_comes_from_elsewhere_or_runs_by_itself(run: Path) -> None:
    """Prompt and config of this run hold script elements: they are text here."""
    page = page_of(run)
    policy = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]
    assert len(page.all("script")) == 1
    assert PROMPTS[1] in page.texts["h3"]
    assert "<script>bad()</script>" in page.text()
    for _, attributes in page.elements:
        assert (attributes.get("src") or "data:").startswith("data:")
        assert not {name for name in attributes if name.startswith("on")} | {"href", "srcset", "action"} & {*attributes}


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=40))
def test_any_text_goes_through_a_tag_with_what_steers_as_an_escape(text: str) -> None:
    page = Page(chart.tag("p", "<", text, title=text))
    assert page.elements == [("p", {"title": plain_lines(text)})]
    assert "".join(page.texts["p"]) == "<" + plain_lines(text)


def test_a_lone_surrogate_in_a_prompt_is_no_crash(run: Path) -> None:
    folder = run / "samples" / "step-000300"
    entries = json.loads((folder / "samples.json").read_text())
    (folder / "samples.json").write_text(json.dumps([entries[0] | {"prompt": "half \ud83d of an emoji"}]))
    assert r"half \ud83d of an emoji" in page_of(run).texts["h3"]


def test_a_cut_off_last_line_is_ignored_and_only_the_last(tmp_path: Path) -> None:
    entries = history(3)
    assert read_history(write_history(tmp_path, entries, tail='{"step": 4, "lo')) == entries
    assert read_history(write_history(tmp_path, entries, tail=json.dumps({"step": 4})))[-1] == {"step": 4}
    for damage in ('{"step": 4, "lo\n', '{"step": 4, "lo\n{"step": 5}\n', '{"loss": 4}\n', "[4]\n"):
        with pytest.raises(UserError, match="line 4 is not a JSON object of numbers with a step"):
            read_history(write_history(tmp_path, entries, tail=damage))


def test_the_last_entry_of_a_repeated_step_wins(run: Path) -> None:
    again = [entry | {"loss/prior": 0.5} for entry in history()[99:150]]
    write_history(run, history()[:130] + again)
    prior = plots(page_of(run))[0]["series"][1]
    assert prior["steps"] == list(range(1, 151))
    assert prior["values"][98] < 0.5
    assert prior["values"][99:] == [0.5] * 51


@pytest.mark.parametrize(
    ("missing", "gone", "still"),
    [
        ("config.yaml", ["Base", "Batch"], ["Steps", "Loss", "Validation images", "Verification"]),
        ("run.json", ["Files", "Verification", "Versions"], ["300 of 300", "Base", "Validation images"]),
        ("logs", ["Loss", "Gradient norm"], ["41.2 s", "Base", "Validation images"]),
        ("samples", ["Validation images"], ["Base", "Loss", "Verification"]),
    ],
)
def test_what_is_missing_leaves_its_part_out(run: Path, missing: str, gone: list[str], still: list[str]) -> None:
    whole = page_of(run).text()
    path = run / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = page_of(run)
    headings = [text for tag in ("dt", "h2", "h3", "summary") for text in page.texts.get(tag, [])]
    assert not set(gone) & set(headings)
    assert all(words in whole and words in page.text() for words in still)


def test_an_empty_run_folder_gives_a_page(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert page.texts["title"] == [f"{tmp_path.name}: state unknown"]
    assert page.all("section") == []


def test_a_stopped_run_says_how_far_it_came(run: Path) -> None:
    record = {"state": "stopped", "step": 120, "steps": 300, "message": "stopped by <TERM>"}
    (run / "run.json").write_text(json.dumps(record))
    page = page_of(run)
    assert page.texts["title"] == ["sks: stopped"]
    assert [(bar["value"], bar["max"]) for bar in page.all("progress")] == [("120", "300")]
    assert "stopped by <TERM>" in page.texts["p"]


def test_damage_is_an_error_and_leaves_the_page_as_it_was(run: Path, tmp_path: Path) -> None:
    before = write_report(run).read_bytes()
    for name, content in (("run.json", '{"state": '), ("run.json", "[]"), ("config.yaml", "a: [")):
        sound = (run / name).read_text()
        (run / name).write_text(content)
        with pytest.raises(UserError, match=re.escape(name)):
            write_report(run)
        (run / name).write_text(sound)
    with pytest.raises(UserError, match="no such run folder"):
        write_report(tmp_path / "nothing")
    assert (run / "report.html").read_bytes() == before
    assert [file.name for file in run.iterdir() if "tmp" in file.name] == []


def test_the_same_files_give_the_same_bytes(run: Path) -> None:
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_long_runs_stay_small_and_keep_their_spikes(run: Path) -> None:
    shutil.rmtree(run / "samples")
    entries = history(6_000)
    entries[4_344]["grad_norm"] = 1.75
    write_history(run, entries)
    report = write_report(run)
    assert report.stat().st_size < 400_000
    norm = plots(Page(report.read_text("utf-8")))[2]["series"][0]
    assert len(norm["steps"]) <= chart.MAX_POINTS
    assert (4_345, 1.75) in zip(norm["steps"], norm["values"], strict=True)


def test_values_that_are_not_finite_are_noted(run: Path) -> None:
    entries = history(20)
    entries[14] |= {"loss/prior": math.nan, "grad_norm": math.inf}
    entries[15] |= {"loss/prior": math.nan}
    write_history(run, entries)
    page = page_of(run)
    assert "prior: 2 values are not finite, first at step 15." in page.texts["p"]
    assert "grad norm: 1 value is not finite, first at step 15." in page.texts["p"]
    assert not re.search("nan|inf", " ".join(path["d"] or "" for path in page.all("path")))


def test_only_finished_validations_and_only_their_own_files_are_shown(run: Path) -> None:
    Image.new("RGB", (8, 8)).save(run / "secret.png")
    shutil.copytree(run / "samples" / "step-000300", run / "samples" / "step-000400")
    (run / "samples" / "step-000400" / "samples.json").unlink()
    entries = [{"file": "../../secret.png", "prompt": "p", "seed": 0}, {"file": "lost.png", "prompt": "p", "seed": 1}]
    (run / "samples" / "step-000300" / "samples.json").write_text(json.dumps(entries))
    assert len(page_of(run).all("img")) == 3 * 3 * 2


def test_many_validations_are_spread(run: Path) -> None:
    for step in range(1000, 1030):
        write_samples(run, step, num_images=1)
    page = page_of(run)
    rows = list(dict.fromkeys(text for text in page.texts["span"] if text.startswith("step ") and "·" not in text))
    assert len(rows) == MAX_VALIDATIONS
    assert (rows[0], rows[-1]) == ("step 1,029", "step 75")
    assert "12 of 34 validations" in page.text()
    assert spread([1, 2, 3, 4, 5], 3) == [1, 3, 5]
    assert spread([1, 2], 3) == [1, 2]


def test_a_large_picture_is_reduced(tmp_path: Path) -> None:
    file = tmp_path / "large.png"
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((1024, 512), Image.Resampling.BICUBIC).save(file)
    uri = data_uri(file)
    assert uri.startswith("data:image/jpeg;base64,")
    with Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as reduced:
        assert reduced.size == (768, 384)
    assert len(uri) < file.stat().st_size / 2


def test_report_does_not_import_torch() -> None:
    code = "import sys, loraloom.train.pages.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("seconds", "words"), [(41.23, "41.2 s"), (725, "12 min 5 s"), (12_000, "3 h 20 min")])
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.03124, "0.0312"),
        (5e-5, "5e-5"),
        (0.001, "0.001"),
        (2.5e-4, "2.5e-4"),
        (1200, "1,200"),
        (1234.5, "1,234"),
        (2.5e20, "2.5e20"),
        (0, "0"),
        (-1e-10, "-1e-10"),
        (math.nan, "nan"),
    ],
)
def test_number(value: float, words: str) -> None:
    assert chart.number(value) == words


def test_ticks_are_round() -> None:
    assert Axis(0, 0.41).ticks() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert Axis(1, 300).ticks() == [50, 100, 150, 200, 250, 300]
    assert Axis(1, 12_345).ticks() == [2000, 4000, 6000, 8000, 10_000, 12_000]
    assert Axis(-3, 3).ticks() == [-3, -2, -1, 0, 1, 2, 3]
    assert Axis(3e-5, 2e-3, log=True).ticks() == pytest.approx([5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3])
    assert Axis(1e-6, 1, log=True).ticks() == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1])


def test_positions_on_an_axis() -> None:
    assert Axis(2, 4).position(3) == 0.5
    assert Axis(1e-4, 1, log=True).position(1e-2) == pytest.approx(0.5)
    assert Axis(1e-4, 1, log=True).position(0) == 0


def test_the_value_axis_fits_its_curves() -> None:
    def axis(*curves: list[float]) -> Axis:
        return chart.value_axis([Series("x", range(len(values)), values) for values in curves])

    assert axis([0.1, 1.0]) == Axis(0, 1.06)
    assert axis([0.0, 0.0]) == Axis(0, 1)
    assert axis([2.0]) == Axis(0, 2.12)
    assert axis([8.0, 10.0]).low == pytest.approx(7.8)
    assert axis([1e-3, 1e-3], [5e-4, 0.0]).log is False
    assert axis([1e-3, 1e-3], [5e-5, 0.0]) == Axis(5e-5 / 1.5, 1.5e-3, log=True)
    assert axis([1.0] * 999 + [500.0]).high < 2.5


def test_smoothing_keeps_constants_slopes_and_length() -> None:
    assert chart.smoothed([3.0]) == [3.0]
    assert chart.smoothed([2.0] * 200) == pytest.approx([2.0] * 200)
    assert chart.smoothed(range(200))[50:150] == pytest.approx(list(range(50, 150)))
    noise = np.random.default_rng(0).normal(size=1000)
    assert np.std(chart.smoothed(noise.tolist())) < 0.2


PROBE = """<script>
  const plot = document.querySelector(".plot"), box = plot.getBoundingClientRect();
  plot.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + 5 }));
  const first = document.querySelector(".at label");
  const found = [getComputedStyle(first).position];
  first.click();
  found.push(getComputedStyle(first).position);
  document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
  found.push(getComputedStyle(first).position);
  document.title = [plot.querySelector(".tip").textContent, ...found].join("|");
</script><img src="http://control.invalid/a.png">
"""
"""Uses the page as a reader would, and asks for one picture from the network."""


def test_a_browser_shows_the_page_without_asking_for_anything(run: Path, opened: Callable[[str, str], str]) -> None:
    title = opened(write_report(run).read_text("utf-8"), PROBE)
    assert re.fullmatch(r"step 15[01]examples_sks 0\.\d+, smoothed 0\.\d+prior .*\|static\|fixed\|static", title)
