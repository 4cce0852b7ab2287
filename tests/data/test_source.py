"""Captions as every source reads, counts and checks them."""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loraloom.configs.data_sections import SOURCE_KINDS, FolderSource
from loraloom.data.source import (
    CAPTION_LISTS,
    SHOWN,
    Captions,
    Problems,
    caption_lines,
    decode_text,
    open_source,
    read_sidecars,
    text_column,
)

words = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n\ufeff"), max_size=6)


def column(*rows: list[list[str | None] | None]) -> pa.ChunkedArray:
    """Each argument is a chunk."""
    return pa.chunked_array([pa.array(chunk, CAPTION_LISTS) for chunk in rows], CAPTION_LISTS)


@pytest.mark.parametrize(
    ("content", "captions"),
    [
        (b"a dog", ["a dog"]),
        (b"\xef\xbb\xbfa dog\r\n\r\n a big dog \r\n", ["a dog", "a big dog"]),
        (b"a dog\ranother", ["a dog", "another"]),
        ("größe\u2028x".encode(), ["größe\u2028x"]),
        (b"", [""]),
        (b"\xef\xbb\xbf \n\t\n", [""]),
    ],
)
def test_a_caption_file_has_one_caption_on_each_line(content, captions):
    assert caption_lines(content) == captions


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("ein großer Hund".encode("cp1252"), "byte 0xdf at offset 7 is not UTF-8 text; save it as UTF-8"),
        (b"\xef\xbb\xbfa\xff", "byte 0xff at offset 4"),
        ("a dog".encode("utf-16"), "offset 0 is not UTF-8 text (it looks like UTF-16)"),
        ("a dog".encode("utf-16-be"), "byte 0x00 at offset 0 is not UTF-8 text (it looks like UTF-16)"),
        ("é dog".encode("utf-16-le"), "offset 0 is not UTF-8 text (it looks like UTF-16)"),
        (b"a dog\0", "byte 0x00 at offset 5"),
    ],
)
def test_what_is_not_utf8_is_refused_with_its_offset(content, words):
    with pytest.raises(ValueError, match="save it as UTF-8") as error:
        caption_lines(content)
    assert words in str(error.value)


@given(st.binary(max_size=12), st.integers(0, 100))
@settings(deadline=None, max_examples=200)
def test_the_offset_is_that_of_the_first_wrong_byte(content, start):
    try:
        text, told = decode_text(content, start), ""
    except ValueError as error:
        text, told = "", str(error)
    if not told:
        assert text.encode() == content.removeprefix(b"\xef\xbb\xbf")
        return
    offset = int(told.split("offset ")[1].split()[0]) - start
    content[:offset].decode()  # all before it is sound
    assert f"byte 0x{content[offset]:02x}" in told


def test_two_caption_files_may_say_the_same_only():
    assert read_sidecars({}) is None
    assert read_sidecars({"a.txt": b"x\n", "a.caption": b"\xef\xbb\xbfx"}) == ["x"]
    with pytest.raises(ValueError, match=r"^a\.txt and a\.caption: give different captions to one image; keep one"):
        read_sidecars({"a.txt": b"x", "a.caption": b"y"})
    with pytest.raises(ValueError, match=r"^a\.caption: byte 0xff at offset 0"):
        read_sidecars({"a.txt": b"x", "a.caption": b"\xff"})


caption_rows = st.lists(st.none() | st.lists(st.none() | words | st.sampled_from(["", " "]), max_size=3), max_size=5)


@given(st.lists(caption_rows, max_size=3), st.none() | st.just("a dog"), st.sampled_from(["error", "keep"]))
@example([[None, [None], []], [["a", " b "], [""]]], None, "error")
@settings(deadline=None, max_examples=200)
def test_captions_from_arrow_are_those_of_plain_lists(chunks, caption, empty_captions):
    section = FolderSource(path="x", caption=caption, empty_captions=empty_captions)
    captions, rows = Captions(column(*chunks), section), [row for chunk in chunks for row in chunk]
    given = [[text.strip() for text in row or () if text is not None] for row in rows]
    default = [] if caption is None else [caption]
    assert [captions[row] for row in range(len(rows))] == [texts or default for texts in given]

    problems = Problems("photos")
    captions.check(problems, lambda row: f"row {row}", lambda row: "write one")
    without = [row for row, texts in enumerate(given) if not texts]
    advice = 'give `caption`, such as "a sks dog", or write one'
    first = ", ".join(f"row {row}" for row in without[:3]) + ", …" * (len(without) > 3)
    missing = [f"photos: {len(without)} images have no caption ({first}); {advice}"] if len(without) > 1 else []
    missing += [f"row {without[0]}: has no caption; {advice}"] if len(without) == 1 else []
    empty = [
        f"row {row}: its caption is empty; write one, or allow it with `empty_captions: keep`"
        for row, texts in enumerate(given)
        if "" in texts
    ]
    assert problems.lines() == missing * (caption is None) + empty * (empty_captions == "error")
    counts = captions.counts({"here": captions.num_own})
    assert counts.get("captions from here", 0) == sum(map(bool, given))
    assert counts.get("captions from `caption`", 0) == (caption is not None) * len(without)
    assert counts.get("empty captions", 0) == len(empty)


def test_a_column_of_strings_is_one_caption_each():
    section = FolderSource(path="x")
    captions = Captions(pa.chunked_array([["a"], [" b\n", None, "\u00a0"]]), section, unreadable=[2])
    assert [captions[row] for row in range(4)] == [["a"], ["b"], [], [""]]
    problems = Problems("photos")
    captions.check(problems, str, str)
    assert len(problems.lines()) == 1  # the empty one; row 2 has been told of
    assert problems.lines()[0].startswith("3: its caption is empty")


def test_many_problems_of_a_kind_are_told_shortly():
    problems, asked = Problems("photos"), []

    def say(row: int) -> str:
        asked.append(row)
        return f"image {row}"

    problems.add_rows("images without a caption", np.arange(1_000_000), say)
    problems.add("empty captions", "image x")
    problems.add("images without a caption", "one more")
    lines = problems.lines()
    assert asked == list(range(SHOWN))
    assert lines[:SHOWN] == [f"image {row}" for row in range(SHOWN)]
    assert lines[SHOWN:] == ["photos: and 999,981 more images without a caption", "image x"]


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.dictionary(pa.int8(), pa.string()),
        pa.list_(pa.string()),
        pa.large_list(pa.large_string()),
        pa.list_(pa.string(), 1),
    ],
    ids=str,
)
def test_text_columns_of_every_type_are_read(kind):
    rows = [["a"], None, ["b"]] if pa.types.is_nested(kind) else ["a", None, "b"]
    captions = Captions(text_column(pa.chunked_array([pa.array(rows, kind)])), FolderSource(path="x", caption="c"))
    assert [captions[row] for row in range(3)] == [["a"], ["c"], ["b"]]


def test_a_column_without_any_text_is_no_captions():
    for column in (pa.nulls(2), pa.array([[], []], pa.list_(pa.null()))):
        captions = Captions(text_column(pa.chunked_array([column])), FolderSource(path="x", caption="c"))
        assert captions[1] == ["c"]


@pytest.mark.parametrize("kind", [pa.int64(), pa.binary(), pa.struct({"a": pa.string()}), pa.list_(pa.int8())], ids=str)
def test_other_columns_are_no_text(kind):
    with pytest.raises(ValueError, match="not text"):
        text_column(pa.chunked_array([pa.array([], kind)]))


def test_a_column_that_only_claims_to_be_utf8_is_refused():
    wrong = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xff"))
    with pytest.raises(ValueError, match=r"UTF8.*save it as UTF-8"):
        text_column(pa.chunked_array([wrong]))


def test_every_kind_of_source_has_its_file():
    folder = Path(sys.modules[open_source.__module__].__file__).parent / "sources"
    assert {file.stem for file in folder.glob("*.py")} - {"__init__"} == set(SOURCE_KINDS.values())
