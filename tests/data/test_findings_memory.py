"""The memory of scans: a flipped bit is seen, and an image that is not what was found of it is looked at anew."""

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from loraloom.configs.data_sections import DataSection, FolderSource
from loraloom.configs.errors import TrainingError
from loraloom.data.dataset import Dataset, Images
from loraloom.data.scan import scan
from loraloom.data.source import open_source


@pytest.fixture
def photos(tmp_path) -> Path:
    (tmp_path / "photos").mkdir()
    for k in range(4):
        Image.effect_noise((40, 30), 50).convert("RGB").save(tmp_path / "photos" / f"{k}.png")
    return tmp_path / "photos"


def looked_at(photos: Path, cache: Path):
    section = FolderSource(path=str(photos), caption="a")
    source = open_source(section)
    data = DataSection(sources=[section], resolution=16, cache={"dir": str(cache)})
    return data, source, scan(source, data, progress=False, cache=cache)


def test_no_flipped_bit_is_believed(photos, tmp_path):
    first = looked_at(photos, tmp_path / "cache")[2]
    (memory,) = (tmp_path / "cache").rglob("*.parquet")
    sound, draw = memory.read_bytes(), np.random.default_rng(0)
    noticed = 0
    for _ in range(60):
        content = bytearray(sound)
        content[draw.integers(len(content))] ^= 1 << int(draw.integers(8))
        memory.write_bytes(bytes(content))
        found = looked_at(photos, tmp_path / "cache")[2]
        assert (found.sizes == first.sizes).all() and (found.digests == first.digests).all() and not found.problems
        noticed += any("made anew" in warning for warning in found.warnings)
    assert noticed > 20  # the others change nothing, such as the version of the writer


@pytest.mark.parametrize("kind", ["fifo", "folder", "another table", "a column less"])
def test_what_is_no_memory_is_made_anew(photos, tmp_path, kind):
    first = looked_at(photos, tmp_path / "cache")[2]
    (memory,) = (tmp_path / "cache").rglob("*.parquet")
    table = pq.read_table(memory)
    memory.unlink()
    if kind == "fifo":
        os.mkfifo(memory)
    elif kind == "folder":
        memory.mkdir()
    else:
        changed = table.select(["stamp"]) if kind == "another table" else table.drop_columns(["reason"])
        pq.write_table(changed.replace_schema_metadata(table.schema.metadata), memory)
    found = looked_at(photos, tmp_path / "cache")[2]
    assert (found.digests == first.digests).all()
    assert sum(str(memory) in warning for warning in found.warnings) == 1


def test_an_image_that_is_another_is_looked_at_anew_by_the_next_start(photos, tmp_path):
    data, source, found = looked_at(photos, tmp_path / "cache")
    stamp = (photos / "0.png").stat()
    digests = found.digests.copy()
    digests[0] = b"0" * 64  # what a disk would have made of it, without a change of times
    images = Images.scanned(data.sources[0], source, found, np.arange(4))
    images = Images(images.section, images.source, images.kept, images.sizes, digests)
    dataset = Dataset(data, [images], 8, 0)
    row = next(row for row in range(4) if images.kept[row] == 0)
    with pytest.raises(TrainingError, match="was changed"):
        dataset.pixels(0, row, dataset.sample(0, 0, 0).geometry)
    assert (photos / "0.png").stat() == stamp
    reads: list[int] = []
    again = open_source(data.sources[0])
    read = again.read
    again.read = lambda index: reads.append(index) or read(index)  # type: ignore[method-assign]
    scan(again, data, progress=False, cache=tmp_path / "cache")
    assert reads == [0]
    shutil.rmtree(tmp_path / "cache")
