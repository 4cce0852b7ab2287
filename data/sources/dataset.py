"""A dataset of the `datasets` library: from the hub, from a folder that it saved, or from a folder in its formats."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ...configs.bounded import PICTURE, read_json, regular
from ...configs.choices import did_you_mean
from ...configs.data_sections import DatasetSource, GivenSource
from ...configs.errors import UserError
from ...configs.headers import is_plain_name
from ...configs.paths import looked_in
from ..source import SAVED, Captions, Problems, first_line, lacks_captions, missing_column, read_picture, text_column

if TYPE_CHECKING:
    from datasets import Dataset


class DatasetImages:
    """An `ImageSource` of rows; a row is read when it is asked for, and no image is decoded."""

    declared_sizes: np.ndarray | None = None

    def __init__(
        self, title: str, name: str, rows: "Dataset", captions: Captions, problems: list[str], counts: dict[str, int]
    ):
        """`rows` has one column, which holds images; `title` is what messages call the dataset."""
        self.name, self.problems, self.notes, self.counts = name, problems, [], counts
        self._dataset, self._captions = title, captions
        self._rows = rows.with_format("arrow")  # what is stored: bytes, or {"bytes", "path"}

    def __len__(self) -> int:
        return len(self._rows)

    def location(self, index: int) -> str:
        return f"{self._dataset}[{index}]"

    def path(self, index: int) -> Path | None:
        stored = self._stored(index)
        if isinstance(stored, pa.StructScalar) and not stored["bytes"].is_valid and stored["path"].is_valid:
            return Path(stored["path"].as_py())
        return None

    def read(self, index: int) -> bytes:
        if path := self.path(index):
            return read_picture(path)
        stored = self._stored(index)
        content = stored["bytes"] if isinstance(stored, pa.StructScalar) and stored.is_valid else stored
        if not content.is_valid:
            raise OSError("the row holds no image")
        if (size := content.as_buffer().size) > PICTURE:
            raise OSError(f"the row has {size:,} bytes, more than the {PICTURE:,} of an image")
        return content.as_py()

    def read_mask(self, index: int) -> bytes | None:
        return None

    def captions(self, index: int) -> list[str]:
        return self._captions[index]

    def _stored(self, index: int) -> Any:
        table: Any = self._rows[index : index + 1]
        return table.column(0)[0]


def open_source(section: DatasetSource, cache: Path | None = None, lines: str | None = None) -> DatasetImages:
    """The rows of a dataset; `datasets` has its own cache for what it loads and converts."""
    with _quiet():
        dataset = _open(section)
    if not len(dataset):
        raise UserError(f"{section.dataset}: split {section.split!r} has no rows")
    name = Path(section.dataset).name if Path(section.dataset).is_dir() else section.dataset
    return images_of_rows(section, dataset, section.dataset, name)


def images_of_rows(section: DatasetSource | GivenSource, dataset: "Dataset", title: str, name: str) -> DatasetImages:
    """The images of an open dataset, which messages call `title`, with the captions that the section takes."""
    if section.mask == "file":
        raise UserError(f"{title}: a dataset has no files beside its images; set `mask` to alpha or none")
    _check_image_column(section, dataset, title)
    problems = Problems(title)
    captions = Captions(_caption_column(section, dataset, title), section)

    def location(row: int) -> str:
        return f"{title}[{row}]"

    captions.check(problems, location, lambda row: f"fill its {section.caption_column!r}")
    counts = captions.counts({f"column {section.caption_column!r}": captions.num_own})
    columns = dataset.select_columns([section.image_column])
    return DatasetImages(title, name, columns, captions, problems.lines(), counts)


def _check_image_column(section: DatasetSource | GivenSource, dataset: "Dataset", title: str) -> None:
    from datasets import Image, Value

    name, names = section.image_column, dataset.column_names
    if name not in names:
        raise UserError(missing_column(title, "image_column", name, names))
    feature = dataset.features[name]
    if isinstance(feature, Image) or (isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")):
        return
    images = [other for other, feature in dataset.features.items() if isinstance(feature, Image)]
    hint = f"the images are in {', '.join(map(repr, images))}" if images else "give paths as a folder with metadata.csv"
    raise UserError(f"{title}: column {name!r} holds no images but {feature}; {hint}")


def _caption_column(section: DatasetSource | GivenSource, dataset: "Dataset", title: str) -> pa.ChunkedArray:
    name, names = section.caption_column, dataset.column_names
    if lacks_captions(section, names):
        return pa.chunked_array([pa.nulls(len(dataset), pa.string())])
    if name not in names:
        raise UserError(missing_column(title, "caption_column", name, names))
    table: Any = dataset.select_columns([name]).with_format("arrow")[:]
    try:
        return text_column(table.column(0))
    except ValueError as error:
        raise UserError(f"{title}: column {name!r} {error}") from error


def _open(section: DatasetSource) -> "Dataset":
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    if any((Path(section.dataset) / name).is_file() for name in SAVED):
        return _open_saved(section)
    if Path(section.dataset).is_file():
        raise UserError(f"{section.dataset}: is a file; `dataset` is the folder that it is in, or an id of the hub")
    if not Path(section.dataset).exists() and "/" not in section.dataset:
        where = looked_in(section.dataset)
        raise UserError(f"{section.dataset}: there is no such folder{where}; ids of the hub have the form owner/name")
    try:
        return load_dataset(section.dataset, section.subset, split=section.split, revision=section.revision)
    # what it raises for an unknown id, subset, split or file format, for bad files, and for the network
    except (OSError, ValueError, AssertionError, RuntimeError, DatasetsError, HTTPError) as error:
        raise UserError(f"{section.dataset}: cannot be loaded ({_reason(error)})") from error


def _open_saved(section: DatasetSource) -> "Dataset":
    """A split, or a slice of one, of what `save_to_disk` wrote."""
    from datasets import DatasetDict, ReadInstruction, concatenate_datasets, load_from_disk

    if section.subset or section.revision:
        raise UserError(f"{section.dataset}: a saved dataset has no `subset` and no `revision`; leave them out")
    try:
        _check_saved(Path(section.dataset))
        saved = load_from_disk(section.dataset)
    except _OF_DAMAGE as error:
        raise UserError(f"{section.dataset}: cannot be loaded ({_reason(error)}); save it again") from error
    splits: dict[str, Dataset]
    if isinstance(saved, DatasetDict):
        splits = {str(name): split for name, split in saved.items()}
    elif section.split == type(section).model_fields["split"].default:
        return saved  # its only one, whatever it is called
    else:
        splits = {str(saved.split or "train"): saved}
    sizes = {name: len(split) for name, split in splits.items()}
    try:
        wanted = ReadInstruction.from_spec(section.split)
        pieces = wanted.to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        hint = did_you_mean(section.split, sizes)
        known = ", ".join(splits)
        raise UserError(
            f"{section.dataset}: has no split {section.split!r}{hint}, it has: {known}; set `split`"
        ) from error
    return concatenate_datasets([splits[piece.splitname].select(range(piece.from_, piece.to)) for piece in pieces])


_OF_DAMAGE = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, pa.ArrowException)
"""What `datasets` raises where a file of a saved dataset is not as it wrote it."""


def _check_saved(folder: Path) -> None:
    """UserError for records that `save_to_disk` does not write, and for tables elsewhere than beside them."""
    splits = folder / "dataset_dict.json"
    if splits.exists():
        names = read_json(splits).get("splits")
        if not isinstance(names, list) or not all(isinstance(name, str) and is_plain_name(name) for name in names):
            raise UserError(f"{splits}: `splits` should be a list of folders in it")
        for name in names:
            _check_saved(folder / name)
        return
    state, about = read_json(folder / "state.json"), read_json(folder / "dataset_info.json")
    files = state.get("_data_files")
    listed = [each.get("filename") if isinstance(each, dict) else None for each in files] if files else []
    if not isinstance(files, list) or not all(isinstance(name, str) and is_plain_name(name) for name in listed):
        raise UserError(f"{folder / 'state.json'}: `_data_files` should name the files beside it")
    for name in listed:
        regular(folder / str(name))
    if not isinstance(about.get("features"), dict):
        raise UserError(f"{folder / 'dataset_info.json'}: has no `features`")


def _reason(error: BaseException) -> str:
    """The message with that of what caused it: `datasets` says only that generating failed."""
    lines: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        lines.append(first_line(cause))
        cause = None if isinstance(cause, UserError) else cause.__cause__
    return ": ".join(lines)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of `datasets`."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
