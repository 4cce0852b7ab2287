"""The list of images that lies in a folder: `metadata.jsonl`, `.csv` or `.parquet` as arrow columns.

Files of a million rows are read in chunks: the values of a row are Python objects only while its chunk is made.
"""

import csv
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from ..configs.bounded import DEPTH, lines_of, open_regular, parse_json, regular
from ..configs.choices import did_you_mean
from ..configs.data_sections import FolderSource
from ..configs.errors import UserError
from .source import (
    CAPTION_LISTS,
    Problems,
    caption_list,
    decode_text,
    first_line,
    is_utf8,
    lacks_captions,
    missing_column,
    text_column,
)

pc: Any = pyarrow.compute  # its functions are made when it is imported: a type checker sees none

NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SIDES = ("width", "height")  # columns that are read where the file has both
CHUNK = 1 << 16  # rows
LARGEST_SIDE = 2**31 - 1  # what int32 holds


@dataclass(frozen=True, slots=True)
class Metadata:
    """The columns of one metadata file, without the lines that cannot be read."""

    file: Path
    images: pa.ChunkedArray  # (N,) strings: paths from the folder, as they are written
    captions: pa.ChunkedArray | None  # (N,) strings or lists of strings; None: there is no such column
    sizes: np.ndarray | None  # (N, 2) int32 of width and height as shown; 0, 0 where a row gives none
    lines: np.ndarray | None  # (N,) where the rows of a text file stand, counted from 1

    def place(self, row: int) -> str:
        """What messages call a row."""
        return f"{self.file} row {row + 1}" if self.lines is None else f"{self.file} line {self.lines[row]}"

    def filter(self, wanted: np.ndarray) -> "Metadata":
        """The rows where `wanted` (N,) is true."""
        mask = pa.array(wanted)
        return Metadata(
            self.file,
            self.images.filter(mask),
            None if self.captions is None else self.captions.filter(mask),
            None if self.sizes is None else self.sizes[wanted],
            None if self.lines is None else self.lines[wanted],
        )


class Row(NamedTuple):
    """One line of a text file."""

    image: str
    captions: list[str] | None
    width: float  # nan where there is none
    height: float


def find_metadata(folder: Path) -> Path | None:
    """The metadata file of a folder, if it has one; UserError if it has several."""
    with os.scandir(folder) as entries:
        there = [entry.name for entry in entries if entry.name.lower() in NAMES and entry.is_file()]
    found = sorted(there, key=lambda name: (NAMES.index(name.lower()), name))
    if len(found) > 1:
        raise UserError(f"{folder}: holds {' and '.join(found)}; keep the one that is the list of its images")
    return folder / found[0] if found else None


def _kind(file: Path) -> str:
    return file.suffix.lower()


def read_metadata(file: Path, section: FolderSource, problems: Problems) -> Metadata:
    """The columns that the section names. Bad lines go to `problems`; UserError where the whole file cannot be used."""
    read = _read_parquet if _kind(file) == ".parquet" else _read_text
    try:
        metadata = read(file, section, problems)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or first_line(error)})") from error
    if not len(metadata.images) and not problems.lines():
        raise UserError(f"{file}: lists no images; write a line for each, or delete it")
    return metadata


def _read_parquet(file: Path, section: FolderSource, problems: Problems) -> Metadata:
    try:
        regular(file)
        parquet = pq.ParquetFile(file)
        columns = _columns(file, section, parquet.schema_arrow.names)
        table = _in_chunks(parquet, columns)
    except (pa.ArrowException, MemoryError, UnicodeDecodeError) as error:  # the last of names of columns
        raise UserError(f"{file}: cannot be read as parquet ({first_line(error)})") from error
    images = _text(file, section.image_column, table)
    if not pa.types.is_string(images.type) and not pa.types.is_large_string(images.type):
        raise UserError(f"{file}: column {section.image_column!r} holds {images.type}, not paths")
    captions = _text(file, section.caption_column, table) if section.caption_column in columns else None
    return _with_sizes(Metadata(file, images, captions, None, None), table, problems)


def _text(file: Path, name: str, table: pa.Table) -> pa.ChunkedArray:
    try:
        return text_column(table[name])
    except ValueError as error:
        raise UserError(f"{file}: column {name!r} {error}") from error


def _in_chunks(parquet: pq.ParquetFile, columns: list[str]) -> pa.Table:
    """The columns; the reader's own buffers, which are as large again, are given back on the way."""

    def batches() -> Iterator[pa.RecordBatch]:
        for batch in parquet.iter_batches(CHUNK, columns=columns):
            yield batch.select(columns)
            pa.default_memory_pool().release_unused()

    return pa.Table.from_batches(batches(), pa.schema([parquet.schema_arrow.field(name) for name in columns]))


def _columns(file: Path, section: FolderSource, names: list[str]) -> list[str]:
    """Those to read; UserError if one is missing or ambiguous."""
    if section.image_column not in names:
        raise UserError(missing_column(str(file), "image_column", section.image_column, names))
    wanted = [section.image_column]
    if not lacks_captions(section, names):
        if section.caption_column not in names:
            raise UserError(missing_column(str(file), "caption_column", section.caption_column, names))
        wanted.append(section.caption_column)
    wanted += SIDES if set(SIDES) <= set(names) else ()
    if twice := [name for name in wanted if names.count(name) > 1]:
        raise UserError(f"{file}: has {names.count(twice[0])} columns {twice[0]!r}; keep one of them")
    return wanted


def _with_sizes(metadata: Metadata, table: pa.Table, problems: Problems) -> Metadata:
    """With the columns of width and height, if the table has them."""
    if SIDES[0] not in table.column_names:
        return metadata
    parts = (table[start : start + CHUNK] for start in range(0, len(table), CHUNK))
    sides = (np.stack([_numbers(metadata.file, name, part[name]) for name in SIDES], axis=1) for part in parts)
    return replace(metadata, sizes=_checked_sizes(sides, metadata.place, problems))


def _numbers(file: Path, name: str, column: pa.ChunkedArray) -> np.ndarray:
    try:
        return column.cast(pa.float64()).fill_null(math.nan).to_numpy()
    except pa.ArrowException as error:
        raise UserError(f"{file}: column {name!r} does not hold numbers ({first_line(error)})") from error


def _checked_sizes(sides: Iterable[np.ndarray], place: Callable[[int], str], problems: Problems) -> np.ndarray:
    """(N, 2) int32 from chunks (n, 2) of width and height, which are nan where a row has none."""
    chunks, row = [np.empty((0, 2), np.int32)], 0
    for sizes in sides:
        given = ~np.isnan(sizes).any(axis=1)
        sound = given & ((sizes >= 1) & (sizes <= LARGEST_SIDE) & (sizes == np.floor(sizes))).all(axis=1)
        for bad in np.flatnonzero(given & ~sound):
            width, height = sizes[bad]
            problem = f"{place(row + int(bad))}: {width:g} x {height:g} is no size of an image; correct it"
            problems.add("rows with a size that no image has", problem)
        chunks.append(np.where(sound[:, None], sizes, 0).astype(np.int32))
        row += len(sizes)
    return np.concatenate(chunks)


def _read_text(file: Path, section: FolderSource, problems: Problems) -> Metadata:
    table = _read_simple(file, section)
    if table is None:
        return _read_lines(file, section, problems)
    header = int(_kind(file) == ".csv")
    lines = np.arange(1 + header, 1 + header + len(table))
    metadata = Metadata(file, table[section.image_column], table[section.caption_column], None, lines)
    return _with_sizes(metadata, table, problems)


def _read_simple(file: Path, section: FolderSource) -> pa.Table | None:
    """What arrow's own readers make of a text file, at ten times the speed of going through its lines.

    None where they stumble, or where it would take more than they tell to say in which line something is wrong.
    """
    paths = {section.image_column: pa.string(), section.caption_column: pa.string()}
    types = paths | dict.fromkeys(SIDES, pa.float64())
    try:
        if _kind(file) == ".csv":
            parsing = pyarrow.csv.ParseOptions(newlines_in_values=True)
            names = pyarrow.csv.open_csv(file, parse_options=parsing).schema.names
            if len(set(names)) < len(names):
                return None
            converting = pyarrow.csv.ConvertOptions(
                column_types=types, null_values=[""], include_columns=list(types), include_missing_columns=True
            )
            table = pyarrow.csv.read_csv(file, parse_options=parsing, convert_options=converting)
        else:
            options = pyarrow.json.ParseOptions(pa.schema(types), unexpected_field_behavior="ignore")
            table = pyarrow.json.read_json(file, parse_options=options)
        table.validate(full=True)  # of JSON it takes any bytes for UTF-8
    except (pa.ArrowException, MemoryError, UnicodeDecodeError):  # the last of names of columns
        return None
    if _kind(file) == ".csv" and _count(file, b'"') % 2:  # one that is never closed takes all that follows
        return None
    empty = [name for name in types if table[name].null_count == len(table)]
    has_rows = not table[section.image_column].null_count and section.caption_column not in empty
    if not has_rows or _num_plain_lines(file) != len(table) + (_kind(file) == ".csv"):
        return None
    return table.drop_columns(SIDES) if set(SIDES) & set(empty) else table


def _num_plain_lines(file: Path) -> int | None:
    """How many lines; None where one may be nested deeply."""
    count = 0
    for number, line in lines_of(file):
        if line.count(b"[") + line.count(b"{") > DEPTH:
            return None
        count = number
    return count


def _count(file: Path, byte: bytes) -> int:
    with open_regular(file) as stream:
        return sum(chunk.count(byte) for chunk in iter(lambda: stream.read(1 << 20), b""))


def _read_lines(file: Path, section: FolderSource, problems: Problems) -> Metadata:
    found = (_jsonl_rows if _kind(file) == ".jsonl" else _csv_rows)(file, section, problems)
    names: dict[str, None] = {}  # of all columns, in the order in which they come
    images, captions, sides, lines = [], [], [], [np.empty(0, np.int64)]
    while chunk := list(islice(found, CHUNK)):
        rows: list[Row] = []
        numbers: list[int] = []
        for number, values in chunk:
            if not names.keys() >= values.keys():
                names |= dict.fromkeys(values)
            try:
                rows.append(_row(values, section))
                numbers.append(number)
            except ValueError as error:
                problems.add("bad lines", f"{file} line {number}: {error}")
        images.append(pa.array([row.image for row in rows], pa.string()))
        captions.append(pa.array([row.captions for row in rows], CAPTION_LISTS))
        sides.append(np.array([(row.width, row.height) for row in rows]).reshape(-1, 2))
        lines.append(np.array(numbers, np.int64))
    columns = _columns(file, section, list(names)) if names else [section.caption_column]
    has_captions = section.caption_column in columns
    metadata = Metadata(
        file,
        pa.chunked_array(images, pa.string()),
        pa.chunked_array(captions, CAPTION_LISTS) if has_captions else None,
        None,
        np.concatenate(lines),
    )
    if SIDES[0] not in columns:
        return metadata
    return replace(metadata, sizes=_checked_sizes(sides, metadata.place, problems))


def _row(values: dict[str, Any], section: FolderSource) -> Row:
    """ValueError "what; what to do" for values of other types than the columns have."""
    if section.image_column not in values:
        hint = did_you_mean(section.image_column, values)
        raise ValueError(f"has no {section.image_column!r}{hint}, it has: {', '.join(values)}; name the image")
    image, captions = values[section.image_column], values.get(section.caption_column)
    if not isinstance(image, str):
        raise ValueError(f"its {section.image_column!r} is {image!r}; write the path of an image")
    if not is_utf8(image):
        raise ValueError(f"its {section.image_column!r} holds half of a character; write it as UTF-8")
    try:
        captions = caption_list(captions)
    except ValueError as error:
        raise ValueError(f"its {section.caption_column!r} {error}") from error
    return Row(image, captions, *(_side(name, values.get(name)) for name in SIDES))


def _side(name: str, value: Any) -> float:
    try:
        return math.nan if value is None or value == "" else float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"its {name!r} is {value!r:.60}; write a number of pixels") from error


def _jsonl_rows(file: Path, _: FolderSource, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of each line that has one."""
    for number, line in _decoded_lines(file, problems):
        if not line.strip():
            continue
        try:
            values = parse_json(line.rstrip("\r\n"), "it")
        except UserError as error:
            cause, reason = error.__cause__, str(error).removeprefix("it: ")
            if isinstance(cause, json.JSONDecodeError):
                reason = f"is not JSON ({cause.msg} at column {cause.colno})"
            problems.add("bad lines", f"{file} line {number}: {reason}; write one object on each line")
            continue
        if isinstance(values, dict):
            yield number, values
        else:
            problems.add("bad lines", f"{file} line {number}: is no object; write one {{…}} on each line")


def _csv_rows(file: Path, section: FolderSource, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number of the first line, and fields by the names of the header, of each row."""
    reader = csv.reader((line for _, line in _decoded_lines(file, problems)), strict=True)
    header: list[str] = []
    number = 1
    try:
        for fields in reader:
            if fields and not header:
                header = fields
                _columns(file, section, header)  # before a million rows are read
            elif fields and len(fields) != len(header):
                problems.add(
                    "bad lines",
                    f"{file} line {number}: has {len(fields)} fields, the header has {len(header)}; "
                    'put a text with commas in quotes "…"',
                )
            elif fields:
                yield number, dict(zip(header, fields, strict=True))
            number = reader.line_num + 1
    except csv.Error as error:
        problems.add(
            "bad lines", f"{file} line {number}: is not CSV ({error}); correct it, what follows cannot be read"
        )


def _decoded_lines(file: Path, problems: Problems) -> Iterator[tuple[int, str]]:
    """Number, counted from 1, and text of all lines; empty for one that cannot be decoded."""
    offset = 0
    with closing(lines_of(file)) as lines:
        for number, line in lines:
            text = ""
            try:
                text = decode_text(line, offset)
            except ValueError as error:
                if line.startswith((b"\xff\xfe", b"\xfe\xff")) and number == 1:
                    raise UserError(f"{file}: {error}") from error
                problems.add("bad lines", f"{file} line {number}: {error}")
            yield number, text
            offset += len(line)
