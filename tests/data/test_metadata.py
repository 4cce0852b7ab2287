"""Metadata files: three formats with one meaning, and the line of everything that is wrong."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.configs.data_sections import FolderSource
from loraloom.configs.errors import UserError
from loraloom.data import metadata as module
from loraloom.data.metadata import Metadata, find_metadata, read_metadata
from loraloom.data.source import Problems

SECTION = FolderSource(path="x")


def read(file: Path, content: bytes | str, **settings) -> tuple[Metadata, list[str]]:
    """Metadata, and problems without the path of the file."""
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    problems = Problems(file.name)
    metadata = read_metadata(file, FolderSource(path="x", **settings), problems)
    return metadata, [line.removeprefix(f"{file} ") for line in problems.lines()]


def write_parquet(file: Path, **columns) -> bytes:
    pq.write_table(pa.table(columns), file)
    return file.read_bytes()


def rows_of(metadata: Metadata) -> list[tuple[str, list[str] | None, list[int] | None]]:
    captions = [None] * len(metadata.images) if metadata.captions is None else metadata.captions.to_pylist()
    captions = [[caption] if isinstance(caption, str) else caption for caption in captions]
    sizes = [None] * len(metadata.images) if metadata.sizes is None else metadata.sizes.tolist()
    return list(zip(metadata.images.to_pylist(), captions, sizes, strict=True))


def test_three_formats_say_the_same(tmp_path):
    content = {
        "jsonl": '{"file_name": "a.png", "text": "a, b", "width": 3, "height": 4}\n'
        '{"file_name": "ä.png", "text": "c", "width": null, "height": 5}\n',
        "csv": 'text,width,file_name,height\n"a, b",3,a.png,4\nc,,ä.png,5\n',
        "parquet": write_parquet(
            tmp_path / "metadata.parquet",
            file_name=["a.png", "ä.png"],
            text=["a, b", "c"],
            width=pa.array([3, None], pa.int16()),
            height=pa.array([4.0, 5.0]),
        ),
    }
    for kind, text in content.items():
        metadata, problems = read(tmp_path / f"metadata.{kind}", text)
        assert rows_of(metadata) == [("a.png", ["a, b"], [3, 4]), ("ä.png", ["c"], [0, 0])]
        assert problems == []
        assert metadata.sizes.dtype == np.int32


BAD_LINES = b"""\xef\xbb\xbf{"file_name": "a.png", "text": "x"}

{"file_name": "b.png", "text": "x"
{"file_name": "c.png", "text": "gr\xf6\xdfe"}
["d.png", "x"]
{"filename": "e.png", "text": "x"}
{"file_name": "f.png", "text": 5}
{"file_name": "g.png", "text": ["x", 5]}
{"file_name": null, "text": "x"}
{"file_name": "h.png", "text": "\\ud800"}
{"file_name": "i.png", "text": "x", "width": "wide", "height": 3}
{"file_name": "j.png", "text": ["x", "y"], "width": "3", "height": 4}
{"file_name": "k.png", "text": "x", "width": 0, "height": 4}
{"file_name": "l.png", "text": "x", "width": 3.5, "height": 4}
{"file_name": "m.png"}"""


def test_every_bad_line_of_jsonl_is_named(tmp_path):
    metadata, problems = read(tmp_path / "metadata.jsonl", BAD_LINES)
    assert problems == [
        "line 3: is not JSON (Expecting ',' delimiter at column 35); write one object on each line",
        f"line 4: byte 0xf6 at offset {BAD_LINES.index(0xF6)} is not UTF-8 text; save it as UTF-8",
        "line 5: is no object; write one {…} on each line",
        "line 6: has no 'file_name' (did you mean \"filename\"?), it has: filename, text; name the image",
        "line 7: its 'text' is 5; write text, or a list of texts",
        "line 8: its 'text' is ['x', 5]; write text, or a list of texts",
        "line 9: its 'file_name' is None; write the path of an image",
        "line 10: its 'text' holds half of a character; write it as UTF-8",
        "line 11: its 'width' is 'wide'; write a number of pixels",
        "line 13: 0 x 4 is no size of an image; correct it",
        "line 14: 3.5 x 4 is no size of an image; correct it",
    ]
    assert rows_of(metadata) == [
        ("a.png", ["x"], [0, 0]),
        ("j.png", ["x", "y"], [3, 4]),
        ("k.png", ["x"], [0, 0]),
        ("l.png", ["x"], [0, 0]),
        ("m.png", None, [0, 0]),
    ]
    assert [metadata.place(row).split(" line ")[1] for row in range(5)] == ["1", "12", "13", "14", "15"]


def test_text_that_arrow_would_take_for_utf8_is_named(tmp_path):
    for name in ("file_name", "text"):
        line = json.dumps({"file_name": "a", "text": "b"} | {name: "gr?"}).encode().replace(b"?", b"\xf6")
        assert read(tmp_path / "metadata.jsonl", line)[1] == [
            f"line 1: byte 0xf6 at offset {line.index(0xF6)} is not UTF-8 text; save it as UTF-8"
        ]


def test_every_bad_line_of_csv_is_named(tmp_path):
    content = (
        b"\xef\xbb\xbffile_name,text\r\na.png,x\r\n\r\nb.png,x,y\r\nc.png\r\n"
        b'd.png,"two\r\nlines"\r\ne.png,\xff\r\nf.png,z\r\n'
    )
    metadata, problems = read(tmp_path / "metadata.csv", content)
    assert problems == [
        'line 4: has 3 fields, the header has 2; put a text with commas in quotes "…"',
        'line 5: has 1 fields, the header has 2; put a text with commas in quotes "…"',
        f"line 8: byte 0xff at offset {content.index(0xFF)} is not UTF-8 text; save it as UTF-8",
    ]
    assert [row[:2] for row in rows_of(metadata)] == [("a.png", ["x"]), ("d.png", ["two\r\nlines"]), ("f.png", ["z"])]
    assert metadata.lines.tolist() == [2, 6, 9]


def test_a_size_that_is_no_number_is_named(tmp_path):
    content = "file_name,text,width,height\na.png,x,,\nb.png,x,NA,3\n"
    assert read(tmp_path / "metadata.csv", content)[1] == ["line 3: its 'width' is 'NA'; write a number of pixels"]


def test_a_quote_that_is_never_closed_is_told_where_it_opens(tmp_path):
    metadata, problems = read(tmp_path / "metadata.csv", 'file_name,text\na.png,x\nb.png,"y\nc.png,z\n')
    assert problems == ["line 3: is not CSV (unexpected end of data); correct it, what follows cannot be read"]
    assert metadata.images.to_pylist() == ["a.png"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(
    ("names", "settings", "words"),
    [
        (("filename", "text"), {}, "no column 'file_name' (did you mean \"filename\"?), it has: filename, text; say"),
        (("file_name", "caption"), {}, "no column 'text', it has: file_name, caption; say which with `caption_column`"),
        (("file_name", "prompt"), {"caption": "x", "caption_column": "promt"}, '(did you mean "prompt"?)'),
        (("file_name", "text"), {"image_column": "image"}, "say which with `image_column`"),
    ],
)
def test_a_missing_column_is_answered_with_those_that_exist(kind, names, settings, words, tmp_path):
    values = dict.fromkeys(names, "a.png")
    content = {"jsonl": json.dumps(values), "csv": ",".join(names) + "\na.png,x\n"}
    content["parquet"] = write_parquet(tmp_path / "x.parquet", **{name: ["a.png"] for name in names})
    with pytest.raises(UserError) as error:
        read(tmp_path / f"metadata.{kind}", content[kind], **settings)
    assert words in str(error.value)
    assert str(error.value).startswith(f"{tmp_path}/metadata.{kind}: ")


def test_without_a_column_of_captions_that_of_the_section_is_used(tmp_path):
    for kind, content in {
        "jsonl": '{"file_name": "a.png", "width": 3, "height": 4}',
        "csv": "file_name\na.png\n",
    }.items():
        metadata, problems = read(tmp_path / f"metadata.{kind}", content, caption="x")
        assert (metadata.images.to_pylist(), metadata.captions, problems) == (["a.png"], None, [])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metadata.jsonl", "", "lists no images"),
        ("metadata.jsonl", "\n\n", "lists no images"),
        ("metadata.csv", "file_name,text\n", "lists no images"),
        ("metadata.csv", "file_name;text\na.png;x\n", "it has: file_name;text"),
        ("metadata.csv", "file_name,text,text\na.png,x,y\n", "has 2 columns 'text'; keep one"),
        ("metadata.jsonl", '{"file_name": "a.png"}'.encode("utf-16"), "looks like UTF-16); save it as UTF-8"),
        ("metadata.parquet", b"", "cannot be read as parquet"),
        ("metadata.parquet", b"PAR1 and no more", "cannot be read as parquet"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(name, content, words, tmp_path):
    with pytest.raises(UserError) as error:
        read(tmp_path / name, content)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"file_name": [1], "text": ["x"]}, "column 'file_name' holds int64, not text"),
        ({"file_name": [["a.png"]], "text": ["x"]}, "column 'file_name' holds list<element: string>, not paths"),
        ({"file_name": ["a.png"], "text": [1.5]}, "column 'text' holds double, not text"),
        (
            {"file_name": ["a.png"], "text": ["x"], "width": ["wide"], "height": ["3"]},
            "column 'width' does not",
        ),
    ],
)
def test_columns_of_parquet_have_the_right_type(columns, words, tmp_path):
    with pytest.raises(UserError) as error:
        read(tmp_path / "metadata.parquet", write_parquet(tmp_path / "x.parquet", **columns))
    assert words in str(error.value)


def test_rows_of_parquet_are_counted_from_one(tmp_path):
    content = write_parquet(tmp_path / "x.parquet", file_name=["a", "b"], text=["x"] * 2, width=[3, -1], height=[3, 3])
    assert read(tmp_path / "metadata.parquet", content)[1] == ["row 2: -1 x 3 is no size of an image; correct it"]


words = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n\ufeff"), max_size=5)
records = st.fixed_dictionaries(
    {"file_name": words}, optional={"text": words, "width": st.integers(1, 99), "height": st.integers(1, 99)}
)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@given(st.lists(records, min_size=1, max_size=4))
@settings(deadline=None, max_examples=60)
def test_reading_fast_is_reading_line_by_line(kind, tmp_path_factory, rows):
    file = tmp_path_factory.getbasetemp() / f"metadata.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, ["file_name", "text", "width", "height"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        file.write_text(text.getvalue())
    section, fast, slow = FolderSource(path="x", caption="x"), Problems("x"), Problems("x")
    found = module._read_text(file, section, fast)
    expected = module._read_lines(file, section, slow)
    sizes = found.sizes if found.sizes is not None else np.zeros((len(rows), 2))
    assert found.images.to_pylist() == expected.images.to_pylist()
    assert [row[1] for row in rows_of(found)] == [row[1] for row in rows_of(expected)]
    assert expected.sizes is None or (sizes == expected.sizes).all()
    assert found.lines.tolist() == expected.lines.tolist()
    assert fast.lines() == slow.lines()


def test_plain_text_files_are_read_by_arrow(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_read_lines", None)
    content = {
        "jsonl": b'\xef\xbb\xbf{"file_name": "a", "text": "x", "extra": [1]}',
        "csv": b"\xef\xbb\xbffile_name,text\na,x",
    }
    for kind, text in content.items():
        metadata, _ = read(tmp_path / f"metadata.{kind}", text)
        assert rows_of(metadata) == [("a", ["x"], None)]
        assert metadata.lines.tolist() == [1 + (kind == "csv")]


def test_one_metadata_file_is_found(tmp_path):
    assert find_metadata(tmp_path) is None
    (tmp_path / "metadata.csv").touch()
    assert find_metadata(tmp_path) == tmp_path / "metadata.csv"


MEASURE = """
import resource, sys, time
import pandas  # which arrow imports by itself
from loraloom.configs.data_sections import FolderSource
from loraloom.data.source import open_source
from loraloom.data.sources import folder
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before, start = peak(), time.perf_counter()
source = open_source(FolderSource(path=sys.argv[1]))
print(time.perf_counter() - start, (peak() - before) / 1000)
assert source.captions(999_999) == ["a photo of thing 999999 on a table"] and source.location(7).endswith("/7.jpg")
assert len(source) == 1_000_000 == (source.declared_sizes == (640, 480)).all(axis=1).sum() and not source.problems
"""


@pytest.mark.slow
def test_a_million_rows_are_opened_in_seconds_and_little_memory(tmp_path):
    numbers = pa.array(np.arange(1_000_000)).cast(pa.string())
    write_parquet(
        tmp_path / "metadata.parquet",
        file_name=pc.binary_join_element_wise(numbers, ".jpg", ""),
        text=pc.binary_join_element_wise("a photo of thing ", numbers, " on a table", ""),
        width=np.full(1_000_000, 640),
        height=np.full(1_000_000, 480),
    )
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    seconds, megabytes = map(float, done.stdout.split())
    assert seconds < 10  # 1 on a machine that does nothing else
    assert megabytes < 250
