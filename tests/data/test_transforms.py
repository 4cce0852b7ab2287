"""Cuts that land where Geometry says, and their tensors."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from loraloom.data.transforms import Geometry, crop, mask_to_tensor, place, to_tensor
from loraloom.images.decoding import PixelRules, decode, header

RULES = PixelRules(background=(255, 255, 255), animated="error", alpha_mask=True)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(width: int, height: int) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(columns / width * 9) + 1, np.cos(rows / height * 7) + 1, np.sin((rows + columns) / height * 5) + 1]
    return Image.fromarray((np.stack(waves, axis=2) * 100 + 25).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# --- cuts

sizes = st.tuples(st.integers(16, 3000), st.integers(16, 3000))
buckets = st.tuples(st.integers(1, 40), st.integers(1, 40)).map(lambda size: (8 * size[0], 8 * size[1]))
parts = st.tuples(st.floats(0, 1), st.floats(0, 1))


@given(sizes, buckets, parts, st.booleans())
@settings(deadline=None, max_examples=200)
def test_scaled_covers_the_bucket_and_keeps_the_aspect(size, bucket, at, flip):
    found = place(size, bucket, at, flip)
    assert (found.original, found.target, found.flip) == (size, bucket, flip)
    assert any(scaled == side for scaled, side in zip(found.scaled, bucket, strict=True))
    factor = max(bucket[0] / size[0], bucket[1] / size[1])
    for side in (0, 1):
        assert found.scaled[side] >= bucket[side]
        assert abs(found.scaled[side] - size[side] * factor) <= 0.5 + 1e-6
        slack = found.scaled[side] - bucket[side]
        assert abs(found.corner[side] - at[side] * slack) <= 0.5
        assert 0 <= found.corner[side] <= slack


def test_places_on_paper():
    assert place((300, 100), (64, 64)) == Geometry((300, 100), (192, 64), (64, 0), (64, 64), False)
    assert place((300, 100), (64, 64), at=(0, 1), flip=True).corner == (0, 0)
    assert place((300, 100), (64, 64), at=(1, 0)).corner == (128, 0)
    assert place((100, 301), (64, 64), at=(0.5, 0.25)) == Geometry((100, 301), (64, 193), (0, 32), (64, 64), False)


@given(st.tuples(st.integers(16, 90), st.integers(16, 90)), st.tuples(st.integers(8, 90), st.integers(8, 90)), parts)
@settings(deadline=None, max_examples=60)
def test_a_cut_is_that_of_the_whole_image_scaled(size, bucket, at):
    image, found = noise(*size).convert("F"), place(size, bucket, at)  # floats, as 8 bits are rounded between passes
    cut = crop(image, found)
    (left, top), (wide, high) = found.corner, found.target
    whole = image.resize(found.scaled, Image.Resampling.LANCZOS, reducing_gap=3.0)
    expected = whole.crop((left, top, left + wide, top + high))
    assert cut.size == bucket
    assert np.asarray(cut) == pytest.approx(np.asarray(expected), abs=0.01)
    mirrored = place(size, bucket, at, flip=True)
    flipped = crop(image, mirrored)
    left, top = mirrored.corner_as_seen
    assert (left + mirrored.corner[0], top) == (mirrored.scaled[0] - bucket[0], mirrored.corner[1])
    assert place(size, bucket, at).corner_as_seen == place(size, bucket, at).corner
    assert flipped.tobytes() == ImageOps.mirror(cut).tobytes()


def test_a_cut_without_scaling_is_exact():
    image = noise(50, 40)
    cut = crop(image, place((50, 40), (30, 40), at=(0.3, 0)))
    assert cut.tobytes() == image.crop((6, 0, 36, 40)).tobytes()


@pytest.mark.parametrize(("orientation", "part"), [(1, 2), (6, 4)])
def test_a_jpeg_is_decoded_no_larger_than_needed_and_cut_at_the_same_place(orientation, part):
    stored = smooth(811, 607)
    data = encoded(stored, "JPEG", quality=98, exif=with_orientation(orientation))
    size = header(data, RULES).size
    found = place(size, (64, 96), at=(0.9, 0.1))
    small, whole = decode(data, RULES, found.scaled)[0], decode(data, RULES)[0]
    assert whole.size == size
    assert small.size == (-(-size[0] // part), -(-size[1] // part))
    assert all(side >= 2 * scaled for side, scaled in zip(small.size, found.scaled, strict=True))
    difference = np.abs(np.asarray(crop(small, found), dtype=int) - np.asarray(crop(whole, found)))
    assert difference.mean() < 1
    assert difference.max() < 8
    assert decode(data, RULES, size)[0].size == size


def test_cheap_scaling_of_large_images_is_close_to_the_dear_one():
    image = smooth(1200, 900)
    cut = crop(image, place(image.size, (64, 48)))
    exact = image.resize((64, 48), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(cut, dtype=int) - np.asarray(exact)).max() <= 2


def test_tensors():
    image = Image.new("RGB", (4, 3), (0, 255, 51))
    found = to_tensor(image)
    assert (found.shape, found.dtype, found.is_contiguous()) == ((3, 3, 4), torch.float32, True)
    assert [float(channel.unique()) for channel in found] == pytest.approx([-1, 1, -0.6])
    mask = Image.new("L", (4, 3), 51)
    mask.putpixel((0, 0), 255)
    found = mask_to_tensor(mask)
    assert (found.shape, found.dtype) == ((1, 3, 4), torch.float32)
    assert found[0, 0, 0] == 1
    assert found[0, 1, 1] == pytest.approx(0.2)
