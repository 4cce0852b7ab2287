"""Folders as people have them: what belongs to an image is found however it is spelled, what does not is told."""

import io
import json
import re
from pathlib import Path
from unicodedata import normalize

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from loraloom.configs.data_sections import DataSection, FolderSource
from loraloom.configs.errors import UserError
from loraloom.data.source import LONGEST_CAPTION, ImageSource, looks_like_one_text, open_source
from loraloom.images.endings import HAS_HEIF, SUFFIXES
from loraloom.train.gather import gather


def png(colour: object = "red") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(content, "PNG")
    return content.getvalue()


def opened(root: Path, lines: str | None = None, **settings) -> ImageSource:
    return open_source(FolderSource.model_validate({"path": str(root), **settings}), None, lines)


STEMS = st.text(st.sampled_from(["a", "B", ".", " ", "ü", "é", "한", "犬", "1", "_"]), min_size=1, max_size=6)
CASES = st.sampled_from([str.lower, str.upper, str.title])
FORMS = st.sampled_from(["NFC", "NFD"])


def sound(stem: str) -> bool:
    return stem.strip(". ") == stem and not stem.startswith(".")


@given(
    st.dictionaries(
        STEMS.filter(sound).map(lambda stem: normalize("NFC", stem)),
        st.tuples(
            *(CASES, CASES, FORMS, FORMS, st.booleans(), st.sampled_from([".txt", ".caption"]), st.booleans()),
            st.sampled_from([str, str.swapcase]),
        ),
        min_size=1,
        max_size=4,
    ).filter(lambda files: len({stem.casefold() for stem in files}) == len(files))
)
@settings(deadline=None, max_examples=60)
def test_captions_and_masks_are_found_however_they_are_spelled(tmp_path_factory, files):
    """The same stem in both ways that Unicode has, stems and endings in any case, `a.txt` and `a.jpg.txt`."""
    root = tmp_path_factory.mktemp("set")
    told = {}
    for number, (stem, (image_case, case, image_form, form, doubled, ending, masked, other)) in enumerate(
        files.items()
    ):
        image = normalize(image_form, stem) + image_case(".png")
        start = other(normalize(form, stem) + (image_case(".png") if doubled else ""))
        (root / image).write_bytes(png())
        (root / (start + case(ending))).write_text(f"caption {number}")
        if masked:
            (root / (other(normalize(form, stem)) + case(".mask.png"))).write_bytes(png((number, 255, 255)))
        told[image] = ([f"caption {number}"], png((number, 255, 255)) if masked else None)
    source = opened(root, caption="the fallback", mask="file")
    found = {source.path(index).name: (source.captions(index), source.read_mask(index)) for index in range(len(source))}
    assert found == told
    assert source.notes == []
    assert [problem for problem in source.problems if "mask" not in problem] == []


@pytest.mark.parametrize(
    ("images", "files", "wanted"),
    [
        (["Aa.png", "aA.png"], ["aa.txt"], {}),  # of either
        (["Aa.png", "aA.png"], ["Aa.txt", "AA.txt"], {"Aa.png": "Aa.txt"}),
        (["a.png"], ["a.txt", "A.txt"], {"a.png": "a.txt"}),
        (["a.png", "a.jpg"], ["A.txt"], {"a.png": "A.txt", "a.jpg": "A.txt"}),
        (["a.jpg", "b.jpg"], ["A.JPG.txt"], {"a.jpg": "A.JPG.txt"}),
    ],
)
def test_a_file_that_differs_in_case_is_taken_where_it_can_only_be_meant_for_one(tmp_path, images, files, wanted):
    for image in images:
        (tmp_path / image).write_bytes(png())
    for file in files:
        (tmp_path / file).write_text(file)
    source = opened(tmp_path, caption="the fallback")
    found = {source.path(index).name: source.captions(index)[0] for index in range(len(source))}
    assert found == dict.fromkeys(images, "the fallback") | wanted
    assert source.problems == []
    assert len(source.notes) == bool({*files} - {*wanted.values()})


@pytest.mark.parametrize(
    ("listed", "there", "words"),
    [
        ("0.png", ["images/0.png"], "does not exist (images/0.png does); correct"),
        ("img_0.png", ["IMG_0.PNG"], "does not exist (IMG_0.PNG does); correct"),
        ("0.png", ["a/0.png", "b/0.png"], "does not exist; correct"),
    ],
)
def test_a_path_of_a_list_that_is_not_there_names_the_image_that_is(tmp_path, listed, there, words):
    for path in there:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(png())
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": listed, "text": "x"}))
    assert any(words in problem for problem in opened(tmp_path).problems)


def test_two_files_that_say_different_things_are_refused(tmp_path):
    (tmp_path / "a.jpg").write_bytes(png())
    for name, text in {"a.txt": "one", "a.jpg.TXT": "two"}.items():
        (tmp_path / name).write_text(text)
    (problem,) = opened(tmp_path).problems
    assert "a.txt and " in problem
    assert "give different captions to one image" in problem


@pytest.mark.parametrize("name", ["metadata.CSV", "Metadata.csv", "METADATA.JSONL", "train/Metadata.Parquet"])
@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_metadata_is_found_however_it_is_spelled(tmp_path, name, forms):
    folder = (tmp_path / name).parent
    folder.mkdir(exist_ok=True)
    (folder / (normalize(forms[0], "müsli") + ".png")).write_bytes(png())
    row = {"file_name": normalize(forms[1], "müsli") + ".png", "text": "own words"}
    match name.lower().rpartition(".")[2]:
        case "csv":
            (tmp_path / name).write_text("\n".join([",".join(row), ",".join(row.values())]))
        case "jsonl":
            (tmp_path / name).write_text(json.dumps(row))
        case _:
            pq.write_table(pa.table({key: [value] for key, value in row.items()}), tmp_path / name)
    source = opened(tmp_path, caption="the fallback")
    assert (source.problems, source.captions(0)) == ([], ["own words"])
    assert source.read(0) == png()


@pytest.mark.parametrize("ending", sorted(SUFFIXES))
def test_every_ending_is_an_image_in_any_case(tmp_path, ending):
    (tmp_path / f"a{ending.upper()}").write_bytes(png())
    assert len(opened(tmp_path, caption="x")) == 1
    assert {".jfif", ".jpe", ".jfi"} < SUFFIXES


LEFT = {
    "IMG_1.heic": "files? in HEIC left out" if not HAS_HEIF else "",
    "a.psd": "left out .*; images end with",
    "b.json": "left out .*; captions for all images are read of a file named metadata.jsonl or",
    "noending": "left out .*; images end with",
    "x.txt": "caption files? without an image",
    "x.mask.png": "masks? without an image",
    "metadata.json": "left out .*; captions for all images are read of a file named metadata.jsonl or",
    "sub/metadata.csv": "is not read",
    "10_sks cat/c.png": "not read as repeats",
    "README.md": "",
    "ok.npz": "",
    "Thumbs.db": "",
    "@eaDir/0.png/SYNOPHOTO_THUMB_M.png": "",
    "$RECYCLE.BIN/$R1.png": "",
    "sub/__MACOSX/a.png": "",
    "lost+found/a.png": "",
    "System Volume Information/a.png": "",
    "#recycle/a.png": "",
}


@given(st.lists(st.sampled_from(sorted(LEFT)), unique=True))
@settings(deadline=None, max_examples=40)
def test_what_is_left_over_is_told_by_a_line_for_each_kind(tmp_path_factory, names):
    root = tmp_path_factory.mktemp("set")
    (root / "0.png").write_bytes(png())
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png() if name.endswith("png") else b"x")
    source = opened(root, caption="x")
    assert {source.path(index).name for index in range(len(source))} == {
        "0.png",
        *(["c.png"] * ("10_sks cat/c.png" in names)),
    }
    wanted = {LEFT[name] for name in names} - {""}
    assert len(source.notes) == len(wanted)
    assert all(any(re.search(words, note) for note in source.notes) for words in wanted)
    system = {
        name for name in names if name.split("/")[0].startswith(("@", "$", "#", "lost", "System")) or "__" in name
    }
    assert source.counts.get("folders of the system, left out", 0) == len(system)


def test_a_folder_without_images_says_what_it_holds_instead(tmp_path):
    for name in ("1.heic", "2.HEIC", "3.mov"):
        (tmp_path / name).write_bytes(b"x")
    if HAS_HEIF:
        return
    with pytest.raises(UserError, match=r"there are 2 \.heic files, 1 \.mov file; pip install 'loraloom\[heif\]'"):
        opened(tmp_path)


# --- lines of a caption file

MODEL_TEXT = "**Subject:**\nA red body on a white ground, seen from the side.\n\nIt stands.\n- red body\n"


@pytest.mark.parametrize(
    ("lines", "captions"),
    [
        (None, ["a dog", "a dog on grass"]),
        ("one_of", ["a dog", "a dog on grass"]),
        ("whole", ["a dog a dog on grass"]),
        ("first", ["a dog"]),
    ],
)
def test_what_lines_are_can_be_said(tmp_path, lines, captions):
    (tmp_path / "0.png").write_bytes(png())
    (tmp_path / "0.txt").write_text("a dog\r\n\na dog on grass\n".replace("\n\n", "\n"))
    source = opened(tmp_path, lines)
    assert (source.captions(0), source.notes) == (captions, [])


@pytest.mark.parametrize("text", [MODEL_TEXT, "# Title\nwords", "one\n\ntwo", "1. a\n2. b", "red\n" + "long " * 30])
def test_lines_that_look_like_one_text_are_told(tmp_path, text):
    assert looks_like_one_text(text.encode())
    (tmp_path / "0.png").write_bytes(png())
    (tmp_path / "0.txt").write_text(text)
    (note,) = opened(tmp_path).notes
    assert "1 caption file with lines that look like one text (0.txt)" in note
    assert all(opened(tmp_path, lines).notes == [] for lines in ("one_of", "whole", "first"))


@pytest.mark.parametrize("text", ["a dog", "a dog\na dog on grass", "a dog\na dog, sitting", "", "a dog\n\n"])
def test_other_lines_are_captions(text):
    assert not looks_like_one_text(text.encode())


def test_a_config_says_what_lines_are(tmp_path):
    (tmp_path / "0.png").write_bytes(png())
    (tmp_path / "0.txt").write_text(MODEL_TEXT)
    for rules, count in (({"lines": "whole"}, 1), ({"lines": "first"}, 1), ({"lines": "one_of"}, 4), ({}, 4)):
        said: list[str] = []
        section = {"resolution": 32, "sources": [{"path": str(tmp_path)}], "captions": rules}
        section["cache"] = {"dir": str(tmp_path.parent / "cache")}
        (images,) = gather(DataSection.model_validate(section), progress=False, say=said.append)
        assert len(images.captions(0)) == count
        assert len(said) == (0 if rules else 1)


# --- copies


def test_copies_are_told_once_wherever_they_lie(tmp_path):
    for name, colour in {"a/0.png": "red", "a/1.png": "blue", "a/again.png": "red", "b/x.png": "blue"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(colour))
    said: list[str] = []
    sources = [{"path": str(tmp_path / name), "caption": "x"} for name in ("a", "b", "b")]
    section = {"resolution": 32, "sources": sources, "cache": {"dir": str(tmp_path.parent / "cache")}}
    gather(DataSection.model_validate(section), progress=False, say=said.append)
    (told,) = said
    assert told.startswith("2 copies among the images")  # b is there twice: its file is no copy of itself
    assert f"{tmp_path}/a/again.png of {tmp_path}/a/0.png" in told
    assert f"{tmp_path}/b/x.png of {tmp_path}/a/1.png" in told


# --- captions that no model can read

FORMATS = ["jsonl", "csv", "parquet"]

BAD_TEXTS = {
    "NUL": "a\0b",
    "half of a character": "a\ud800b",
    f"{LONGEST_CAPTION:,} bytes": "a" * (LONGEST_CAPTION + 1),
}


@given(
    st.sampled_from(sorted(BAD_TEXTS)), st.integers(0, 4), st.booleans(), st.sampled_from(["jsonl", "csv", "parquet"])
)
@settings(deadline=None, max_examples=60)
def test_a_caption_that_cannot_be_read_is_told_with_file_and_line(tmp_path_factory, kind, bad, odd, ending):
    """By each reader: arrow's, and ours of lines, which a row of another form (`odd`) brings in."""
    root = tmp_path_factory.mktemp("set")
    rows = [{"file_name": f"{number}.png", "text": BAD_TEXTS[kind] if number == bad else "fine"} for number in range(5)]
    for row in rows:
        (root / row["file_name"]).write_bytes(png())
    if kind.startswith("half") and ending != "jsonl":
        return  # which no other file can hold
    file = root / f"metadata.{ending}"
    match ending:
        case "jsonl":
            lines = [json.dumps(row | ({"text": [row["text"]]} if odd else {})) for row in rows]
            file.write_text("\n".join(lines))
        case "csv":
            file.write_text("\n".join(["file_name,text", *(f"{row['file_name']},{row['text']}" for row in rows)]))
        case _:
            texts = pa.array([[row["text"]] if odd else row["text"] for row in rows])
            pq.write_table(pa.table({"file_name": [row["file_name"] for row in rows], "text": texts}), file)
    problems = opened(root).problems
    place = f"{file} row {bad + 1}" if ending == "parquet" else f"{file} line {bad + 1 + (ending == 'csv')}"
    assert len(problems) == 1
    assert problems[0].startswith(place)
    assert len(problems[0]) < 400


LARGE = '{"file_name": "0.png", "text": %s, "width": 5, "height": 1' + "0" * 400 + "}"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metadata.csv", 'file_name,text\n0.png,"a red\n1.png,b\n', "line 2: is not CSV"),
        ("metadata.csv", 'file_name,text\n0.png,a\n1.png,"b', "line 3: is not CSV"),
        ("metadata.jsonl", '{"file_name": "0.png/", "text": "x"}', "line 1: '0.png/' is no path"),
        ("metadata.jsonl", '{"file_name": "0.png", "text": "x", "width": 1e999, "height": 4}', "line 1: "),
        (
            "metadata.jsonl",
            '{"file_name": "0.png", "text": ["x"], "width": 5, "height": 1%s}' % ("0" * 400),
            "line 1: ",
        ),
    ],
)
def test_lists_that_are_damaged_are_told_with_the_line(tmp_path, name, content, words):
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(png())
    (tmp_path / name).write_text(content)
    problems = opened(tmp_path).problems
    assert any(f"{tmp_path / name} {words}" in problem for problem in problems), problems
    assert all(len(problem) < 400 and "\n" not in problem for problem in problems)


@pytest.mark.parametrize("size", [LONGEST_CAPTION + 1, 700_000, 3_000_000])
def test_a_caption_file_of_megabytes_is_one_line(tmp_path, size):
    (tmp_path / "0.png").write_bytes(png())
    (tmp_path / "0.txt").write_bytes(b"a" * size)
    (problem,) = opened(tmp_path).problems
    assert problem.startswith(f"{tmp_path}/0.txt: has {size:,} bytes, ")
    (tmp_path / "0.txt").write_bytes(b"a" * LONGEST_CAPTION)
    assert opened(tmp_path).problems == []
