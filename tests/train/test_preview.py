"""The preview: true cuts, pixels and words on a page that asks for nothing, and nothing written anywhere else."""

import base64
import io
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from loraloom.configs.command import run_command
from loraloom.configs.loader import load_config
from loraloom.data.dataset import Dataset
from loraloom.data.transforms import crop, place
from loraloom.models.load import Base
from loraloom.train.choice import choose, evenly, fair_shares
from loraloom.train.outlook import dataset_ahead
from loraloom.train.pages.contact_sheet import GAP, MARGIN, TITLE, Tile, contact_sheet
from loraloom.train.preflight import preflight
from loraloom.train.preview import main
from loraloom.train.prior import class_image_paths
from loraloom.train.view import ORIGINAL_SIDE, box_of, find_uses, look, unseen, whole

EVIL = "<script>document.title = 'evil'</script><img src=x onerror=alert(1)>"


def smooth(width: int, height: int, seed: int) -> Image.Image:
    """A picture in which every place looks different."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two wide ones, two tall ones (one turned by EXIF), and a square one with an evil name and caption; masks."""
    folder = tmp_path_factory.mktemp("people")
    turned = Image.Exif()
    turned[0x0112] = 6
    smooth(96, 60, 1).save(folder / "wide.png")
    smooth(48, 30, 2).save(folder / "small.png")
    smooth(60, 96, 3).save(folder / "tall.png")
    smooth(96, 60, 4).save(folder / "turned.jpg", exif=turned)
    smooth(64, 64, 5).save(folder / "a&<b>.png")
    for file in list(folder.iterdir()):
        file.with_suffix(".txt").write_text("sks, red, green, blue, gold")
        size = (60, 96) if file.stem in ("tall", "turned") else Image.open(file).size
        mask = Image.new("L", size, 0)
        mask.paste(255, (0, 0, size[0] // 2, size[1]))  # the left half is looked at
        mask.save(file.with_suffix(".mask.png"))
    (folder / "a&<b>.txt").write_text(EVIL)
    return folder


@pytest.fixture
def preview(write_config, people, tmp_path) -> Callable[..., tuple[ElementTree.Element, Path, Dataset]]:
    """Runs the command: the page as a tree, its folder, and the dataset of the config."""

    def run(*words: str, sources: list[dict] | None = None, **data) -> tuple[ElementTree.Element, Path, Dataset]:
        own = {"path": str(people), "mask": "file"}
        file = write_config(data={"sources": sources or [own], **data}, output={"dir": str(tmp_path / "run")})
        assert main([str(file), *words]) == 0
        folder = tmp_path / "run-preview"
        config = load_config(file, [word for word in words if "=" in word])
        return tree(folder / "preview.html"), folder, dataset_ahead(config, preflight(config))[0]

    return run


def tree(page: Path) -> ElementTree.Element:
    """The page as XML: elements without an end are closed, attributes without a value get one."""
    text = re.sub(r"<((?:meta|img|input)\b[^>]*)>", r"<\1/>", page.read_text("utf-8")).replace(
        " checked", ' checked=""'
    )
    return ElementTree.fromstring(text.removeprefix("<!doctype html>"))


def cards(page: ElementTree.Element) -> dict[str, ElementTree.Element]:
    """By file name."""
    found = {card.find(".//h3"): card for card in page.iter("article")}
    return {title.attrib["title"].rpartition("/")[2]: card for title, card in found.items() if title is not None}


def boxes(card: ElementTree.Element) -> list[list[float]]:
    """Left, top, width, height of each cut, the shown one last."""
    found = [rect.attrib for rect in card.iter("rect") if rect.get("class") == "cut"]
    return [[float(rect[key]) for key in ("x", "y", "width", "height")] for rect in found]


def pictures(card: ElementTree.Element) -> list[Image.Image]:
    """As it is, as the model gets it, and what it does not look at."""
    uris = [image.attrib["src"] for image in card.iter("img")]
    assert all(uri.startswith("data:image/png;base64,") for uri in uris)
    return [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in uris]


def captions(card: ElementTree.Element) -> list[str]:
    return ["".join(line.itertext()) for line in card.iter("li")]


def words(card: ElementTree.Element) -> str:
    return " | ".join("".join(line.itertext()) for line in card.iter("p"))


def items(dataset: Dataset) -> dict[str, tuple[int, int]]:
    return {
        dataset.location(source, int(row)).rpartition("/")[2]: (source, item)
        for source, rows in enumerate(dataset.item_images)
        for item, row in enumerate(rows)
    }


def test_each_image_stands_beside_exactly_what_the_model_gets(preview):
    page, folder, dataset = preview()
    shown = cards(page)
    assert set(shown) == {"wide.png", "small.png", "tall.png", "turned.jpg", "a&<b>.png"}
    for name, (source, item) in items(dataset).items():
        (cut,), row = dataset.geometries(source, item), int(dataset.item_images[source][item])
        original, pixels, red = pictures(shown[name])
        expected, mask = dataset.pixels(source, row, cut)
        assert pixels.tobytes() == expected.tobytes()
        assert pixels.size == cut.target in dataset.buckets
        assert original.size == cut.original
        assert red.getchannel("A").tobytes() == unseen(mask).getchannel("A").tobytes()
        assert boxes(shown[name]) == [pytest.approx(box_of(cut), rel=1e-5)]
    # scaled to 25 x 40; the left 24 pixels are cut, of which the left 12.5 are looked at
    assert "60 × 96 to 24 × 40 · scaled by 0.42 · 4% cut away · 48% not looked at (red)" in words(shown["turned.jpg"])
    assert "enlarged" not in words(shown["small.png"])
    headings = {"".join(title.itertext()) for title in page.iter("h2")}
    assert headings == {"Sources", "24 × 40", "32 × 32", "40 × 24"}
    assert {file.name for file in folder.iterdir()} == {
        ".loraloom.jsonl",
        "preview.html",
        *(f"sheet-{wide}x{high}.png" for wide, high in dataset.buckets),
    }


def test_the_thumbnail_shows_an_image_turned_as_exif_says(preview, people):
    page, _, _ = preview()
    expected = Image.open(people / "turned.jpg").transpose(Image.Transpose.ROTATE_270)
    difference = np.abs(np.asarray(pictures(cards(page)["turned.jpg"])[0], int) - np.asarray(expected, int))
    assert difference.max() == 0


def test_a_box_is_the_part_of_the_original_that_is_cut():
    """On paper: 1200 x 800 for 512 x 512 is scaled to 768 x 512; of the 256 too many a quarter is left of the cut."""
    cut = place((1200, 800), (512, 512), at=(0.25, 0.5))
    assert cut.scaled == (768, 512)
    assert box_of(cut) == (100, 0, 800, 800)
    assert whole((1200, 800)).target == (ORIGINAL_SIDE, 427)


@given(st.tuples(*[st.integers(16, 3000)] * 2), st.tuples(*[st.integers(1, 16)] * 2), st.tuples(*[st.floats(0, 1)] * 2))
@settings(deadline=None, max_examples=100)
def test_a_box_lies_in_the_image_and_has_the_shape_of_the_bucket(size, bucket, at):
    cut = place(size, (bucket[0] * 8, bucket[1] * 8), at)
    left, top, width, height = box_of(cut)
    assert left >= 0 and top >= 0
    assert left + width <= size[0] + 1e-6 and top + height <= size[1] + 1e-6
    per_pixel = [side / scaled for side, scaled in zip(cut.original, cut.scaled, strict=True)]
    assert (width, height) == pytest.approx((cut.target[0] * per_pixel[0], cut.target[1] * per_pixel[1]))


def test_what_is_inside_the_box_is_what_the_model_gets():
    image = smooth(96, 60, 0)
    cut = place(image.size, (40, 24), at=(0.3, 0.8))
    left, top, width, height = box_of(cut)
    inside = image.resize(cut.target, Image.Resampling.LANCZOS, (left, top, left + width, top + height))
    assert inside.tobytes() == crop(image, cut).tobytes()


def test_all_variants_of_a_crop_are_drawn_and_those_of_captions_written(preview):
    rules = {"shuffle": True, "keep_tokens": 1, "dropout": 0.1}
    page, _, dataset = preview("data.buckets.enabled=false", crop="random", variants=8, flip=0.5, captions=rules)
    card, (source, item) = cards(page)["wide.png"], items(dataset)["wide.png"]
    row, cuts = int(dataset.item_images[source][item]), dataset.geometries(source, item)
    expected = list(dict.fromkeys(map(box_of, cuts)))
    assert len(expected) > 2
    assert boxes(card) == [pytest.approx(box, abs=1e-3) for box in reversed(expected)]
    assert f"cut in one of {len(expected)} places · mirrored 50% of the time, not here" in words(card)
    empty, *spoken = dataset.caption_variants(source, row)
    assert empty == ""
    assert captions(card) == spoken[:6]
    assert words(card).endswith(f"and {len(spoken) - 6} more · 10% of the time: empty")


def test_without_variants_the_first_samples_are_shown_as_examples(preview):
    rules = {"shuffle": True, "dropout": 0.5}
    page, _, dataset = preview("data.buckets.enabled=false", "loop.steps=200", crop="random", flip=0.5, captions=rules)
    card, place = cards(page)["wide.png"], items(dataset)["wide.png"]
    order = dataset.order(200, 2, 2)
    positions = [position for position in range(400) if order[position] == place][:8]
    samples = [dataset.sample(position, *place) for position in positions]
    expected = list(dict.fromkeys(box_of(sample.geometry) for sample in samples[:3]))
    assert boxes(card) == [pytest.approx(box, abs=1e-3) for box in reversed(expected)]
    assert pictures(card)[1].tobytes() == dataset.pixels(0, samples[0].image, samples[0].geometry)[0].tobytes()
    steps = ", ".join(str(step) for step in sorted({position // 2 + 1 for position in positions[:3]}))
    assert f"cut anew each time, here as in steps {steps}" in words(card)
    assert captions(card) == list(dict.fromkeys(sample.caption for sample in samples if sample.caption))[:3]
    assert "made anew each time" in words(card)
    assert words(card).endswith("50% of the time: empty")


def test_images_that_are_not_met_soon_have_draws_of_their_own(write_config, people):
    source = {"path": str(people), "mask": "file"}
    config = load_config(write_config(data={"sources": [source], "crop": "random"}, loop={"steps": 1, "batch_size": 1}))
    dataset, _ = dataset_ahead(config, preflight(config))
    uses = find_uses(config, dataset, [(0, item) for item in range(5)])
    assert [0] in uses.values()
    assert len({position for positions in uses.values() for position in positions}) == 1 + 4 * 8
    assert all(look(config, dataset, place, found).steps == [1] * (found == [0]) for place, found in uses.items())


def test_flips_of_always_and_never(preview):
    always, never = preview(flip=1.0)[0], preview(flip=0.0)[0]
    pixels = [np.asarray(pictures(cards(page)["wide.png"])[1]) for page in (always, never)]
    assert np.abs(pixels[0].astype(int) - pixels[1][:, ::-1]).max() <= 1
    assert "· mirrored ·" in words(cards(always)["wide.png"])
    assert "mirrored" not in words(cards(never)["wide.png"])


def test_what_strangers_wrote_is_text(preview, people):
    page, _, _ = preview()
    assert captions(cards(page)["a&<b>.png"]) == [EVIL]
    assert len(list(page.iter("script"))) == 1
    assert "evil" not in (page.find(".//script").text or "")
    assert all(image.attrib["src"].startswith("data:") for image in page.iter("img"))
    assert not any(key.startswith("on") or key in ("href", "srcset") for node in page.iter() for key in node.attrib)


def test_nothing_is_written_elsewhere_and_nothing_of_the_base_is_loaded(preview, people, tmp_path, monkeypatch):
    loaded: list[str] = []
    load = Base.load

    def recording(self, only=None):
        assert only is not None
        loaded.extend(only)
        return load(self, only)

    monkeypatch.setattr(Base, "load", recording)
    before = {file: file.stat() for file in people.iterdir()}
    preview(sources=[{"path": str(people), "share": 0.5}, {"prior": "a person", "count": 4, "share": 0.5}])
    assert {file: file.stat() for file in people.iterdir()} == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run-preview", "run.yaml"]
    assert loaded == []  # no caption is long enough to be counted in tokens


def test_class_images_are_shown_once_they_are_made(preview, tmp_path):
    sources = [{"prior": "a <person>", "count": 3, "share": 0.5}, {"prior": "a cat", "count": 2, "share": 0.5}]
    page, folder, _ = preview(sources=sources)
    assert cards(page) == {}
    tiles = ["".join(card.itertext()) for card in page.iter("article")]
    assert tiles == [
        "3 class images, made with the base before it is traineda <person>",
        "2 class images, made with the base before it is traineda cat",
    ]
    assert (folder / "sheet-32x32.png").is_file()

    config = load_config(tmp_path / "run.yaml")
    for section, count in zip(config.data.sources, (2, 2), strict=True):
        for file in class_image_paths(section, config)[:count]:
            file.parent.mkdir(parents=True, exist_ok=True)
            smooth(32, 32, int(file.stem)).save(file)
    page, _, _ = preview(sources=sources)
    made, planned = [["a <person>"]] * 2 + [["a cat"]] * 2, [["a <person>"]]
    assert [captions(card) for card in page.iter("article")] == made + planned
    assert "1 class image, made" in "".join(page.itertext())
    assert pictures(next(page.iter("article")))[1].tobytes() == smooth(32, 32, 0).tobytes()


def test_how_many_of_how_many(preview):
    page, _, dataset = preview("--num-images", "3", "data.resolution=[16,32]")
    total = sum(map(len, dataset.item_images))
    assert f"3 of {total} images shown." in "".join(page.itertext())
    assert len(list(page.iter("article"))) == 3
    headings = [section for section in page.iter("section") if section.get("class") == "bucket"]
    assert len(headings) == len(dataset.buckets)
    assert any("none shown" in "".join(section.itertext()) for section in headings)


def test_notes_are_on_the_page(preview, people, tmp_path, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number in range(4):
        smooth(40, 40, number).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    source = {"path": str(folder), "caption": "word " * 90}
    page, _, _ = preview(sources=[source], on_bad_image="skip", max_skipped=0.5)
    notes = [line.text or "" for line in page.iter("p") if "notes" in line.get("class", "")]
    assert len(notes) == 1
    assert "broken.png: cannot be decoded" in notes[0]
    assert "only the first 75 are seen" in notes[0]
    assert "warning: 1 of 5 images cannot be used" in capsys.readouterr().err


def test_a_base_that_is_not_here_is_no_reason_to_wait(preview, capsys):
    page, _, dataset = preview("model.base=some/where")
    assert dataset.buckets == [(24, 40), (32, 32), (40, 24)]
    assert "the base is on the hub" in "".join(page.itertext())


def test_an_older_preview_makes_room_and_other_files_stay(preview, tmp_path):
    folder = tmp_path / "run-preview"
    folder.mkdir()
    (folder / "sheet-8x8.png").write_bytes(b"mine")
    preview()
    assert not (folder / "preview.html.tmp").exists()
    assert (folder / "sheet-8x8.png").read_bytes() == b"mine"
    (folder / "sheet-notes.png").write_bytes(b"mine")
    preview("data.buckets.enabled=false")
    assert sorted(file.name for file in folder.glob("[!.]*")) == [
        "preview.html",
        "sheet-32x32.png",
        "sheet-8x8.png",
        "sheet-notes.png",
    ]
    assert (folder / "sheet-8x8.png").read_bytes() == b"mine"


def test_all_problems_at_once_and_nothing_is_written(write_config, people, tmp_path, capsys):
    config = write_config(data={"sources": [{"path": str(people)}], "captions": {"template": "a [tigger]"}})
    out = people / "preview"
    assert run_command(main, [str(config), "model.base=./nowhere", "--out", str(out)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    assert errors[0] == f"error: --out {out} lies inside the images of {people}: its pictures would be trained on"
    assert not out.exists()
    assert [file.name for file in tmp_path.iterdir()] == ["run.yaml"]


@given(st.lists(st.integers(0, 30), max_size=12), st.integers(1, 100))
@settings(deadline=None, max_examples=200)
def test_shares_are_fair_and_complete(sizes, total):
    taken = fair_shares(sizes, total)
    assert sum(taken) == min(total, sum(sizes))
    assert all(0 <= count <= size for count, size in zip(taken, sizes, strict=True))
    cut_short = [count for count, size in zip(taken, sizes, strict=True) if count < size]
    assert not cut_short or max(taken) - min(cut_short) <= 1


@given(st.integers(1, 200), st.data())
@settings(deadline=None, max_examples=100)
def test_evenly_means_equal_distances(size, data):
    count = data.draw(st.integers(1, size))
    found = evenly(range(size), count)
    gaps = [later - earlier for earlier, later in pairwise(found)]
    assert len(set(found)) == count
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert evenly(range(size), size) == list(range(size))
    assert fair_shares([7] * 5, 2) == [0, 1, 0, 1, 0]  # where not every group can be shown


def test_a_choice_takes_of_every_source_and_bucket(write_config, people, photos):
    sources = [{"path": str(people)}, {"path": str(photos), "caption": "noise"}]
    config = load_config(write_config(data={"sources": sources}))
    dataset, _ = dataset_ahead(config, preflight(config))
    choices = choose(dataset, 4)
    groups = {
        (source, bucket) for source, found in enumerate(dataset.item_buckets) for bucket in map(int, np.unique(found))
    }
    assert len(groups) == 4
    taken = {(s, int(dataset.item_buckets[s][i])) for choice in choices for s, i in choice.page}
    assert taken == groups
    assert sum(len(choice.sheet) for choice in choices) == sum(choice.images for choice in choices) == 11


def test_a_contact_sheet_shows_every_tile_and_its_words():
    tiles = [Tile(Image.new("RGB", (80, 40), colour), ["x" * 500]) for colour in ("#f00", "#0f0", "#00f")]
    tiles.append(Tile(None, ["not made"]))
    sheet = contact_sheet("title", tiles, (80, 40))
    below, right = MARGIN + TITLE, MARGIN + 240
    assert len(np.unique(np.asarray(sheet)[below:, right : right + GAP].reshape(-1, 3), axis=0)) == 1  # no long word
    colours = dict(map(reversed, sheet.getcolors(1 << 16)))
    assert colours[255, 0, 0] == colours[0, 255, 0] == colours[0, 0, 255] == 240 * 120


PROBE = """<script>
  addEventListener("load", () => {
    const images = [...document.images];
    const shown = images.filter((image) => image.naturalWidth > 0 && image.getBoundingClientRect().width > 20);
    const card = document.querySelector('h3[title$="wide.png"]').closest("article");
    const [all, cut] = [card.querySelector("img"), card.querySelector(".cut")].map((e) => e.getBoundingClientRect());
    const box = [(cut.left - all.left) / all.width, (cut.top - all.top) / all.height,
      cut.width / all.width, cut.height / all.height];
    const right = card.querySelectorAll("img")[1].getBoundingClientRect();
    document.title = JSON.stringify([shown.length, box, right.width / cut.width, right.height / cut.height]);
  });
</script><img src="http://control.invalid/a.png">
"""
"""Measures what is seen, and asks for one picture from the network."""


def test_a_browser_shows_the_pictures_and_boxes_without_asking_for_anything(preview, opened):
    """Opened twice: with its policy, and without it, where only the page itself can keep it from asking."""
    _, folder, dataset = preview("data.buckets.enabled=false")
    cut = dataset.geometries(*items(dataset)["wide.png"])[0]
    shown, box, wide, high = json.loads(opened((folder / "preview.html").read_text("utf-8"), PROBE))
    assert shown == 5 * 3  # as it is, as the model gets it, and the layer over that
    left, top, width, height = box_of(cut)
    assert box == pytest.approx([left / 96, top / 60, width / 96, height / 60], abs=0.01)
    assert (wide, high) == pytest.approx((1, 1), abs=0.02)  # both at one scale
