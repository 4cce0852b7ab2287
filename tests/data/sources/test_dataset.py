"""Datasets that `datasets` itself has saved or loads: rows, splits, columns, and every refusal in one line."""

import pickle
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from datasets.utils import are_progress_bars_disabled, enable_progress_bars

from loraloom.configs.data_sections import DatasetSource
from loraloom.configs.errors import UserError
from loraloom.data.source import ImageSource, open_source

COLOURS = ("red", "blue", "green", "white")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What `load_dataset` converts goes nowhere else."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    enable_progress_bars()


@pytest.fixture
def rows(encode) -> Dataset:
    """Four images, with one, two, no and an empty caption."""
    features = Features({"image": Image(), "text": List(Value("string")), "kind": Value("int8")})
    captions = [["red"], ["blue", "square"], None, [""]]
    images = [{"bytes": encode(colour), "path": f"{colour}.png"} for colour in COLOURS]
    return Dataset.from_dict({"image": images, "text": captions, "kind": [0] * 4}, features)


def opened(dataset: Path | str, **settings) -> ImageSource:
    return open_source(DatasetSource.model_validate({"dataset": str(dataset), **settings}))


def problem(dataset: Path | str, **settings) -> str:
    with pytest.raises(UserError) as error:
        opened(dataset, **settings)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{dataset}: ")
    return str(error.value).removeprefix(f"{dataset}: ")


def test_a_saved_dataset_gives_bytes_and_captions(tmp_path, rows, encode):
    rows.save_to_disk(tmp_path / "saved")
    source = opened(tmp_path / "saved", caption="a square", empty_captions="keep")
    assert [source.read(index) for index in range(len(source))] == [encode(colour) for colour in COLOURS]
    assert [source.captions(index) for index in range(4)] == [["red"], ["blue", "square"], ["a square"], [""]]
    assert source.location(3) == f"{tmp_path}/saved[3]"
    assert (source.path(3), source.read_mask(3), source.declared_sizes) == (None, None, None)
    assert (source.name, source.problems) == ("saved", [])
    assert source.counts == {
        "captions from column 'text'": 3,
        "captions from `caption`": 1,
        "empty captions": 1,
        "images with several captions": 1,
    }
    again = pickle.loads(pickle.dumps(source))
    assert (again.read(1), again.captions(1)) == (encode("blue"), ["blue", "square"])


def test_rows_without_captions_are_named(tmp_path, rows):
    rows.save_to_disk(tmp_path / "saved")
    assert opened(tmp_path / "saved").problems == [
        f"{tmp_path}/saved[2]: has no caption; give `caption`, such as \"a sks dog\", or fill its 'text'",
        f"{tmp_path}/saved[3]: its caption is empty; write one, or allow it with `empty_captions: keep`",
    ]


def test_splits_and_slices_of_a_saved_dataset(tmp_path, rows):
    DatasetDict({"train": rows.select(range(3)), "test": rows.select([3])}).save_to_disk(tmp_path / "saved")
    rows.select([1, 0]).save_to_disk(tmp_path / "one")

    def captions(name: str, split: str) -> list[list[str]]:
        source = opened(tmp_path / name, split=split, caption="x", empty_captions="keep")
        return [source.captions(index) for index in range(len(source))]

    assert captions("saved", "train") == [["red"], ["blue", "square"], ["x"]]
    assert captions("saved", "train[1:]") == [["blue", "square"], ["x"]]
    assert captions("saved", "test+train[:1]") == [[""], ["red"]]
    assert captions("one", "train") == [["blue", "square"], ["red"]]
    assert captions("one", "train[:50%]") == [["blue", "square"]]
    for split in ("tests", "train[:half]", "train[:500%]"):
        assert f"has no split {split!r}" in problem(tmp_path / "saved", split=split)
    assert problem(tmp_path / "saved", split="tests") == (
        "has no split 'tests' (did you mean \"test\"?), it has: train, test; set `split`"
    )
    assert problem(tmp_path / "saved", split="train[:0]") == "split 'train[:0]' has no rows"
    assert "leave them out" in problem(tmp_path / "saved", subset="en")


def test_an_image_folder_is_read_from_its_files(tmp_path, encode, capfd):
    folder = tmp_path / "photos"
    folder.mkdir()
    for colour in ("red", "blue"):
        (folder / f"{colour}.png").write_bytes(encode(colour))
    (folder / "metadata.csv").write_text("file_name,text\nblue.png,a blue square\nred.png,a red square\n")
    source = opened(folder)
    assert capfd.readouterr() == ("", "")  # no progress bars, which others still have
    assert not are_progress_bars_disabled()
    found = {source.captions(index)[0]: source.read(index) for index in range(2)}
    assert found == {"a blue square": encode("blue"), "a red square": encode("red")}
    assert {source.path(index) for index in range(2)} == {folder / "red.png", folder / "blue.png"}
    assert source.problems == []
    (folder / "red.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"red\.png"):
        [source.read(index) for index in range(2)]
    assert 'Unknown split "validation"' in problem(folder, split="validation")


def test_plain_bytes_are_images_too(tmp_path, encode):
    columns = {"picture": [encode(), None], "caption": ["x", "y"]}
    features = Features({"picture": Value("binary"), "caption": Value("string")})
    Dataset.from_dict(columns, features).save_to_disk(tmp_path / "saved")
    source = opened(tmp_path / "saved", image_column="picture", caption_column="caption")
    assert (source.read(0), source.path(0)) == (encode(), None)
    with pytest.raises(OSError, match="the row holds no image"):
        source.read(1)


def test_a_row_without_an_image_is_told_when_it_is_read(tmp_path, encode):
    features = Features({"image": Image(), "text": Value("string")})
    Dataset.from_dict({"image": [None], "text": ["x"]}, features).save_to_disk(tmp_path / "saved")
    source = opened(tmp_path / "saved")
    assert source.path(0) is None
    with pytest.raises(OSError, match="the row holds no image"):
        source.read(0)


def test_columns_that_do_not_fit_are_answered_with_those_that_do(tmp_path, rows):
    rows.save_to_disk(tmp_path / "saved")
    assert problem(tmp_path / "saved", image_column="imag") == (
        "has no column 'imag' (did you mean \"image\"?), it has: image, text, kind; say which with `image_column`"
    )
    assert problem(tmp_path / "saved", image_column="kind") == (
        "column 'kind' holds no images but Value('int8'); the images are in 'image'"
    )
    assert "say which with `caption_column`" in problem(tmp_path / "saved", caption_column="texts", caption="x")
    assert problem(tmp_path / "saved", caption_column="kind") == "column 'kind' holds int8, not text"
    rows.remove_columns(["text", "image"]).save_to_disk(tmp_path / "other")
    assert "give paths as a folder with metadata.csv" in problem(tmp_path / "other", image_column="kind")
    rows.remove_columns("text").save_to_disk(tmp_path / "images")
    assert "has no column 'text'" in problem(tmp_path / "images")
    assert opened(tmp_path / "images", caption="x").captions(0) == ["x"]


def test_masks_beside_rows_do_not_exist(tmp_path, rows):
    rows.save_to_disk(tmp_path / "saved")
    assert problem(tmp_path / "saved", mask="file") == (
        "a dataset has no files beside its images; set `mask` to alpha or none"
    )


def test_what_cannot_be_loaded_is_told_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert problem(tmp_path / "empty").startswith("cannot be loaded (")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "state.json").write_text("{")
    assert problem(broken).startswith("cannot be loaded (")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.csv").write_bytes(b"image,text\n\xff,x\n")
    assert problem(tmp_path / "text").startswith("cannot be loaded (")

    def unreachable(*arguments, **settings):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert problem("owner/name") == "cannot be loaded (Couldn't reach 'owner/name' on the Hub)"


def test_no_source_imports_torch_or_datasets():
    names = (
        "source",
        "metadata",
        "listing",
        "tar_index",
        *(f"sources.{kind}" for kind in ("folder", "shards", "dataset")),
    )
    program = f"import sys, {', '.join(f'loraloom.data.{name}' for name in names)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "datasets", "pandas"} & set(done.stdout.split())
