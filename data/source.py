"""Where images and their captions come from: the contract of every source, and how all of them read captions."""

import errno
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute

from ..configs.bounded import PICTURE, Missing, read_bytes
from ..configs.choices import did_you_mean, find
from ..configs.data_sections import (
    DatasetSource,
    FolderSource,
    GivenSource,
    ImageSection,
    PriorSource,
    source_kind,
)
from ..configs.errors import UserError
from ..configs.words import agreeing

pc: Any = pyarrow.compute  # its functions are made when it is imported: a type checker sees none


MASKS = (".mask.png", "-masklabel.png")
"""What stands after the stem of an image in the name of its mask; the second is how other trainers write it."""
CAPTION_LISTS = pa.list_(pa.string())
"""Captions of an image, where a source makes the column itself."""
SAVED = ("state.json", "dataset_dict.json")
"""What `save_to_disk` of `datasets` leaves of a dataset, and of several splits."""
SHOWN = 20  # problems of one kind that are written out
NAMED = 3  # things that one line names
LONGEST_CAPTION = 1 << 16  # bytes; tokenizers take seconds for a million of them, and gigabytes for a hundred


Given = Mapping[str, Any]
"""Name -> images that a program hands over: a list, as `sources.given` takes it, or a `datasets.Dataset`."""


class ImageSource(Protocol):
    """Encoded images with their captions, by index."""

    name: str
    """Short, for logs: the name of the folder, the id of the dataset."""
    problems: list[str]
    """One line for each thing that is wrong with what was found: "where: what; what to do"."""
    notes: list[str]
    """One line for each kind of thing that was found and is not trained, though somebody may have meant it to be."""
    counts: dict[str, int]
    """For people: {"captions from .txt": 6, "captions from `caption`": 2, "ignored .heic files": 1}."""
    declared_sizes: np.ndarray | None
    """(N, 2) int32 of width and height as shown, where a list of the images has them; 0, 0 for a row without."""

    def __len__(self) -> int: ...

    def location(self, index: int) -> str:
        """What messages name: `photos/1.png`, `photos/a.tar:0001.png`, `owner/name[12]`."""
        ...

    def path(self, index: int) -> Path | None:
        """The file that holds the image, which can be looked at for changes; None where there is none of its own."""
        ...

    def read(self, index: int) -> bytes:
        """The encoded image, also from several threads. OSError with the reason if it cannot be read."""
        ...

    def read_mask(self, index: int) -> bytes | None:
        """The encoded mask file of the image; None where there is none, or the section uses no mask files."""
        ...

    def captions(self, index: int) -> list[str]:
        """Captions of the image itself, or the section's `caption`, before any rule; none if that is a problem."""
        ...


def open_source(
    section: ImageSection, cache: Path | None = None, lines: str | None = None, given: Given | None = None
) -> ImageSource:
    """The images of a section; class images are made by the run and come from `sources.prior.PriorImages`.

    `cache` is a folder for what takes long to find out, such as the index of shards. `lines` is what the lines of a
    caption file are, as `captions.lines` says; None: nobody has said it. `given` are the images that a program hands
    over, by name. UserError where nothing can be opened (no such folder, column, split, ...); what is wrong with single
    images is in `problems`.
    """
    assert not isinstance(section, PriorSource)
    module = find("data.sources", source_kind(section))
    if isinstance(section, GivenSource):
        return module.open_given(section, given or {})
    return module.open_source(section, cache, lines)


class Problems:
    """What is wrong with single images: the first of each kind in full, and how many more there are."""

    def __init__(self, place: str = ""):
        self.place = place
        self._lines: defaultdict[str, list[str]] = defaultdict(list)
        self._more: Counter[str] = Counter()

    def add(self, kind: str, problem: str) -> None:
        """One more problem of a kind, such as "empty captions"."""
        if len(self._lines[kind]) < SHOWN:
            self._lines[kind].append(problem)
        else:
            self._more[kind] += 1

    def add_rows(self, kind: str, rows: Sequence[int] | np.ndarray, say: Callable[[int], str]) -> None:
        """The same problem of many rows; `say` is asked for the first ones only."""
        for row in rows[:SHOWN]:
            self.add(kind, say(int(row)))
        self._more[kind] += len(rows[SHOWN:])

    def add_at_once(
        self, one: str, many: str, rows: Sequence[int] | np.ndarray, location: Callable[[int], str], advice: str
    ) -> None:
        """The same problem of many rows in one line, which names the first."""
        if len(rows) == 1:
            self.add(many, f"{location(int(rows[0]))}: {one}; {advice}")
        elif len(rows):
            first = named([location(int(row)) for row in rows[: NAMED + 1]], len(rows))
            self.add(many, f"{self.place}{self.place and ': '}{len(rows):,} images {many} ({first}); {advice}")

    def lines(self) -> list[str]:
        """One line each, kind by kind."""
        found: list[str] = []
        for kind, lines in self._lines.items():
            found += lines
            if more := self._more[kind]:
                found.append(f"{self.place}{self.place and ': '}and {more:,} more {kind}")
        return found


class Captions:
    """The captions of all images of a source, checked and kept as one arrow column: no Python object for each.

    `column` holds strings or lists of strings; null and [] are images without a caption. `unreadable` are rows whose
    captions are a problem that is told already.
    """

    def __init__(self, column: pa.ChunkedArray, section: ImageSection, unreadable: Sequence[int] = ()):
        self._section = section
        self._values, self._offsets = _flat(column)
        self._missing = np.setdiff1d(np.flatnonzero(~_any_of_row(pc.is_valid(self._values), self._offsets)), unreadable)
        self._empty = np.flatnonzero(_any_of_row(_is_blank(self._values), self._offsets))
        self._num_rows = len(column)

    def __getitem__(self, index: int) -> list[str]:
        first, end = (index, index + 1) if self._offsets is None else self._offsets[index : index + 2].tolist()
        texts = [self._values[place].as_py() for place in range(first, end)]
        own = [text.strip() for text in texts if text is not None]
        return own or ([] if self._section.caption is None else [self._section.caption])

    def check(
        self,
        problems: Problems,
        location: Callable[[int], str],
        remedy: Callable[[int], str],
        place: Callable[[int], str] | None = None,
    ) -> None:
        """Tells of captions that cannot be used, and of missing and empty ones as the section wants them treated.

        `place` names where the caption of a row stands, if that is not at the image itself.
        """
        place = place or location
        for unusable, why in (
            (pc.match_substring(self._values, "\0"), "its caption holds a NUL character; take it out"),
            (
                pc.greater(pc.binary_length(self._values), LONGEST_CAPTION),
                f"its caption has more than {LONGEST_CAPTION:,} bytes, of which no model sees a hundredth; shorten it",
            ),
        ):
            rows = np.flatnonzero(_any_of_row(pc.fill_null(unusable, False), self._offsets))
            problems.add_rows("captions that cannot be used", rows, lambda row, why=why: f"{place(row)}: {why}")
        if self._section.caption is None and len(self._missing):
            advice = f'give `caption`, such as "a sks dog", or {remedy(int(self._missing[0]))}'
            problems.add_at_once("has no caption", "have no caption", self._missing, location, advice)
        if self._section.empty_captions == "error":
            text = "{}: its caption is empty; write one, or allow it with `empty_captions: keep`"
            problems.add_rows("images with an empty caption", self._empty, lambda row: text.format(location(row)))

    def counts(self, own: Mapping[str, int]) -> dict[str, int]:
        """How many images have captions from where; `own` says it of those that are not from `caption`."""
        from_section = 0 if self._section.caption is None else len(self._missing)
        several = 0 if self._offsets is None else int((np.diff(self._offsets) > 1).sum())
        return {f"captions from {origin}": count for origin, count in own.items() if count} | {
            what: count
            for what, count in {
                "captions from `caption`": from_section,
                "empty captions": len(self._empty),
                "images with several captions": several,
            }.items()
            if count
        }

    @property
    def num_own(self) -> int:
        """Images with captions of their own."""
        return self._num_rows - len(self._missing)


def _flat(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, np.ndarray | None]:
    """All strings in a row and (N + 1,) offsets: row i has those from offsets[i] to offsets[i + 1]; None: one each."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column, None
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    return pc.list_flatten(column), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _is_blank(values: pa.ChunkedArray) -> pa.ChunkedArray:
    blank = pc.or_(pc.equal(pc.binary_length(values), 0), pc.utf8_is_space(values))
    return pc.fill_null(blank, False)


def _any_of_row(flags: pa.ChunkedArray, offsets: np.ndarray | None) -> np.ndarray:
    """(N,) bool: whether the flag of any string of a row is set."""
    if offsets is None:
        return flags.to_numpy()
    total = np.concatenate([[0], np.cumsum(flags.to_numpy(), dtype=np.int64)])
    return total[offsets[1:]] > total[offsets[:-1]]


def text_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of strings or lists of strings in one of the types that `Captions` takes; ValueError for another."""
    kind = column.type
    listed = any(test(kind) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))
    inner = kind.value_type if listed or pa.types.is_dictionary(kind) else kind
    if not any(test(inner) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)):
        raise ValueError(f"holds {kind}, not text")
    if pa.types.is_null(inner) or pa.types.is_dictionary(kind):
        column = column.cast(CAPTION_LISTS if listed else pa.string())
    try:
        column.validate(full=True)  # files may claim UTF-8 and hold something else
    except pa.ArrowInvalid as error:
        raise ValueError(f"{first_line(error)}; save it as UTF-8") from error
    return column


def missing_column(place: str, setting: str, wanted: str, names: Sequence[str]) -> str:
    """The problem of a column that there is not."""
    hint = did_you_mean(wanted, names)
    return f"{place}: has no column {wanted!r}{hint}, it has: {', '.join(names)}; say which with `{setting}`"


def lacks_captions(section: FolderSource | DatasetSource | GivenSource, names: Sequence[str]) -> bool:
    """Whether the images are meant to have no captions but the section's: it gives one, and names no other column."""
    usual = type(section).model_fields["caption_column"].default
    return section.caption_column not in names and section.caption is not None and section.caption_column == usual


def check_masks(
    section: ImageSection, has_mask: np.ndarray, problems: Problems, location: Callable[[int], str]
) -> dict[str, int]:
    """Tells of images (N,) without the mask file that the section wants; how many there are, for `counts`."""
    if section.mask == "file":
        advice = f"put <name>{MASKS[0]} beside it, or set `mask: none`"
        problems.add_at_once("has no mask", "have no mask", np.flatnonzero(~has_mask), location, advice)
    label = "masks" if section.mask == "file" else "masks that are not used (`mask: file` would)"
    return {label: count} if (count := int(has_mask.sum())) else {}


def named(first: Sequence[str], count: int) -> str:
    """The first of so many things, for a message."""
    return ", ".join([*first[:NAMED], *(["…"] if count > NAMED else [])])


def read_sidecars(files: Mapping[str, bytes], lines: str | None = None) -> list[str] | None:
    """Captions from the caption files of one image, by what messages call them; None where there are no files.

    `lines` is what each of their lines is, as `captions.lines` says.

    ValueError "where: what; what to do" for one that cannot be decoded, and for two that differ.
    """
    found: dict[str, list[str]] = {}
    for place, content in files.items():
        try:
            found[place] = _as_captions(caption_lines(content), lines)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    if len({tuple(captions) for captions in found.values()}) > 1:
        raise ValueError(f"{' and '.join(found)}: give different captions to one image; keep one of them")
    return next(iter(found.values()), None)


def _as_captions(found: list[str], lines: str | None) -> list[str]:
    if lines == "whole":
        return [" ".join(found)]
    return found[:1] if lines == "first" else found


_MARKDOWN = re.compile(r"(#{1,6} |[-*+•] |\d+[.)] |>|\*\*|__|```).*|.*(:|\*\*|__)")
_LONG, _SHORT = 80, 0.25  # letters of a line, and what part of them another has in one text


def looks_like_one_text(content: bytes) -> bool:
    """Whether the lines of a caption file (UTF-8) belong together, as in what a model wrote of an image."""
    lines = [line.strip() for line in re.split(r"\r\n?|\n", content.decode("utf-8", "replace").strip())]
    texts = [line for line in lines if line]
    if len(texts) < 2:
        return False
    lengths = [len(text) for text in texts]
    uneven = max(lengths) >= _LONG and min(lengths) <= _SHORT * max(lengths)
    return uneven or "" in lines or any(_MARKDOWN.fullmatch(text) for text in texts)


def one_text_note(where: str, count: int, first: Sequence[str] = ()) -> str:
    """What to say of caption files whose lines look like one text."""
    which = f" ({named(first, count)})" if first else ""
    return (
        f"{where}: {agreeing(count, 'caption files')} with lines that look like one text{which}, but each line is a "
        "caption of its own; `captions: {lines: whole}` takes a file as one, `lines: one_of` says that it is meant"
    )


def caption_lines(content: bytes) -> list[str]:
    """Captions of a caption file, one on each line; [""] for an empty file.

    ValueError where it is not UTF-8, or too long.
    """
    if len(content) > LONGEST_CAPTION:
        raise ValueError(f"has {len(content):,} bytes, a caption file at most {LONGEST_CAPTION:,}; shorten it")
    lines = [line.strip() for line in re.split(r"\r\n?|\n", decode_text(content))]
    return [line for line in lines if line] or [""]


def caption_list(value: Any) -> list[str] | None:
    """Captions in a field of JSON: text, or a list of texts; None for none. ValueError "is …; what to do"."""
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(texts, list) or not all(text is None or isinstance(text, str) for text in texts):
        raise ValueError(f"is {value!r:.60}; write text, or a list of texts")
    captions = [text for text in texts if text is not None]
    if not all(map(is_utf8, captions)):
        raise ValueError("holds half of a character; write it as UTF-8")
    if any("\0" in caption for caption in captions):
        raise ValueError("holds a NUL character; take it out")
    return captions or None


def read_picture(file: str | Path) -> bytes:
    """An encoded image or mask. OSError with the reason for what is no regular file, or too large."""
    try:
        return read_bytes(file, PICTURE)
    except Missing as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file)) from error
    except UserError as error:
        raise OSError(str(error).removeprefix(f"{file}: ")) from error


def is_utf8(text: str) -> bool:
    """Whether it can be written: names of files and JSON may hold single surrogates, which are halves of characters."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def shown(name: str) -> str:
    """The name of a file that is not UTF-8, in characters that can be printed."""
    return name.encode("utf-8", "backslashreplace").decode()


def decode_text(content: bytes, start: int = 0) -> str:
    """UTF-8 without its byte order mark; ValueError with the offset of the wrong byte, which counts from `start`."""
    try:
        text = content.decode("utf-8")
        wrong = content.find(b"\0")
    except UnicodeDecodeError as error:
        text, wrong = "", error.start
    if wrong < 0:
        return text.removeprefix("\ufeff")
    wide = b"\0" in content or content.startswith((b"\xff\xfe", b"\xfe\xff"))
    hint = " (it looks like UTF-16)" if wide else ""
    raise ValueError(f"byte 0x{content[wrong]:02x} at offset {start + wrong} is not UTF-8 text{hint}; save it as UTF-8")


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
