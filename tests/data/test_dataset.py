"""A sample is a function of its position alone, and what can be computed ahead is all that a sample can be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from loraloom.configs.data_sections import DataSection
from loraloom.configs.errors import TrainingError
from loraloom.data.dataset import Dataset, Images
from loraloom.data.scan import scan
from loraloom.data.source import open_source

SIZES = ((64, 64), (96, 64), (64, 96), (128, 64), (70, 64), (200, 180))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six pictures of five shapes, each with its tags."""
    folder = tmp_path_factory.mktemp("shapes")
    for index, (width, height) in enumerate(SIZES):
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"sks, tag {index}, small, round, soft\n")
    return folder


def dataset(folder, seed=0, **options):
    """With 8-pixel steps at a resolution of 64."""
    source_options = options.pop("source", {})
    data = DataSection.model_validate({"resolution": 64, "sources": [{"path": str(folder)} | source_options]} | options)
    source = open_source(data.sources[0])
    found = scan(source, data, progress=False)
    return Dataset(data, [Images.scanned(data.sources[0], source, found, np.arange(len(source)))], 8, seed)


RANDOM = {"crop": "random", "flip": 0.5, "captions": {"shuffle": True, "keep_tokens": 1, "dropout": 0.2}}


def samples(data, positions, group=1):
    order = data.order(10_000, group, group)
    return [data.sample(position, *order[position]) for position in positions]


@given(st.integers(0, 5000))
@settings(deadline=None, max_examples=30)
def test_a_position_replayed_alone_is_the_same_sample(folder, position):
    (first,) = samples(dataset(folder, **RANDOM), [position])
    (again,) = samples(dataset(folder, **RANDOM), [position])
    assert first == again
    assert first.position == position


def test_every_image_is_used_and_keeps_its_shape(folder):
    data = dataset(folder)
    assert {sample.image for sample in samples(data, range(60))} == set(range(6))
    for sample in samples(data, range(12)):
        width, height = SIZES[sample.image]
        assert sample.geometry.target[0] % 8 == sample.geometry.target[1] % 8 == 0
        assert sample.geometry.target[0] * sample.geometry.target[1] <= 64 * 64
        assert abs(np.log(sample.geometry.target[0] / sample.geometry.target[1]) - np.log(width / height)) < 0.2


def test_a_group_is_of_one_bucket(folder):
    found = samples(dataset(folder), range(120), group=4)
    for start in range(0, 120, 4):
        assert len({sample.geometry.target for sample in found[start : start + 4]}) == 1
    assert len({sample.geometry.target for sample in found}) >= 4


def test_without_buckets_all_are_squares(folder):
    data = dataset(folder, buckets={"enabled": False})
    assert data.buckets == [(64, 64)]


def test_several_resolutions_train_each_image_at_each(folder):
    data = dataset(folder, resolution=[64, 32])
    assert len(data.item_images[0]) == 12
    assert sorted(data.item_images[0].tolist()) == sorted([*range(6), *range(6)])
    assert min(width * height for width, height in data.buckets) <= 32 * 32
    twins = dataset(folder, resolution=[64, 64])
    assert len(twins.item_images[0]) == 6, "one bucket from two resolutions is one item"


@given(st.integers(0, 100_000))
@settings(deadline=None, max_examples=60)
def test_what_is_computed_ahead_holds_every_sample(folder, position):
    data = dataset(folder, variants=3, **RANDOM)
    (sample,) = samples(data, [position])
    item = next(i for i, row in enumerate(data.item_images[0]) if row == sample.image)
    assert sample.geometry in data.geometries(0, item)
    assert sample.caption in data.caption_variants(0, sample.image)


def test_variants_are_as_many_as_were_asked_for(folder):
    data = dataset(folder, variants=3, **RANDOM)
    assert "" in data.caption_variants(0, 0)
    assert 2 <= len(data.caption_variants(0, 0)) <= 4
    wide = next(i for i, row in enumerate(data.item_images[0]) if row == 4)  # 70 x 64: six pixels to choose from
    assert 2 < len(data.geometries(0, wide)) <= data.cuts_of_an_item == 6
    other = dataset(folder, seed=7, variants=3, **RANDOM)
    assert other.geometries(0, wide) == data.geometries(0, wide), "variants belong to the image, not to the run"


def test_without_variants_there_is_no_end_of_random_ones(folder):
    data = dataset(folder, **RANDOM)
    assert len({sample.geometry.corner for sample in samples(data, range(200)) if sample.image == 4}) > 4
    with pytest.raises(TypeError):
        data.geometries(0, 0)
    with pytest.raises(TypeError):
        data.caption_variants(0, 0)


def test_flips_and_dropped_captions_come_as_often_as_asked(folder):
    found = samples(dataset(folder, **RANDOM), range(2000))
    assert abs(np.mean([sample.geometry.flip for sample in found]) - 0.5) < 0.05
    assert abs(np.mean([sample.caption == "" for sample in found]) - 0.2) < 0.04
    assert all(sample.caption.startswith("sks, ") for sample in found if sample.caption)


def test_keys_tell_apart_all_that_decides_the_pixels(folder):
    data = dataset(folder, variants=3, **RANDOM)
    cuts = [(int(row), cut) for item, row in enumerate(data.item_images[0]) for cut in data.geometries(0, item)]
    keys = [data.latent_key(0, row, cut) for row, cut in cuts]
    assert len(set(keys)) == len(cuts) > 18
    black = dataset(folder, variants=3, background=(0, 0, 0), **RANDOM)
    assert set(keys).isdisjoint(black.latent_key(0, row, cut) for row, cut in cuts)
    alpha = dataset(folder, variants=3, source={"mask": "alpha"}, **RANDOM)
    assert set(keys).isdisjoint(alpha.latent_key(0, row, cut) for row, cut in cuts)


def test_pixels_are_cut_and_mirrored_as_the_geometry_says(folder):
    data = dataset(folder, flip=1.0)
    item = int(np.flatnonzero(data.item_images[0] == 1)[0])
    (geometry,) = data.geometries(0, item)
    picture, mask = data.pixels(0, 1, geometry)
    assert (picture.size, mask, geometry.flip) == (geometry.target, None, True)
    upright = dataset(folder)
    unmirrored, _ = upright.pixels(0, 1, upright.geometries(0, item)[0])
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(unmirrored)[:, ::-1])


def test_a_file_that_was_changed_since_the_scan_is_named(folder, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    data = dataset(tmp_path, source={"caption": "x"})
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "a.png")
    with pytest.raises(TrainingError, match=r"a\.png.*changed"):
        data.pixels(0, 0, data.geometries(0, 0)[0])


def test_too_small_an_image_is_a_problem_with_its_limit(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "small.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "good.png")
    data = dataset(tmp_path, source={"caption": "x"}, buckets={"step": 24, "max_upscale": 1.2})
    (problem,) = data.problems(0)
    assert "small.png" in problem
    assert "1.2" in problem
    assert data.item_images[0].tolist() == [0]


def test_sources_stop_and_start(folder):
    sources = [{"path": str(folder), "end_step": 3}, {"path": str(folder), "start_step": 3, "share": None}]
    data = DataSection.model_validate({"resolution": 64, "sources": sources})
    source = open_source(data.sources[0])
    found = scan(source, data, progress=False)
    images = [Images.scanned(section, source, found, np.arange(6)) for section in data.sources]
    order = Dataset(data, images, 8, 0).order(10, 4, 2)
    assert {order[position][0] for position in range(12)} == {0}
    assert {order[position][0] for position in range(12, 40)} == {1}


def test_variants_go_through_all_captions_of_an_image(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    data = dataset(tmp_path, variants=3)
    assert sorted(data.caption_variants(0, 0)) == ["one", "three", "two"]


def test_a_mask_that_was_changed_since_the_scan_is_named(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "a.mask.png")
    data = dataset(tmp_path, source={"caption": "x", "mask": "file"})
    before = data.fingerprint(1)
    Image.new("L", (64, 64), 9).save(tmp_path / "a.mask.png")
    with pytest.raises(TrainingError, match="mask was changed"):
        data.pixels(0, 0, data.geometries(0, 0)[0])
    assert dataset(tmp_path, source={"caption": "x", "mask": "file"}).fingerprint(1) != before
