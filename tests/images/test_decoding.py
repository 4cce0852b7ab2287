"""Pixels as a viewer shows them, bad files refused with a reason, and cuts that land where Geometry says."""

import io
import struct
import subprocess
import sys
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from loraloom.data.transforms import crop, place
from loraloom.images.decoding import (
    MAX_PIXELS,
    MIN_SIDE,
    BadImage,
    PixelRules,
    decode,
    decode_mask,
    header,
)
from loraloom.images.endings import HAS_HEIF

RULES = PixelRules(background=(255, 255, 255), animated="error", alpha_mask=True)
FIRST = PixelRules(background=(255, 255, 255), animated="first", alpha_mask=False)


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


def pixels(data: bytes, rules: PixelRules = RULES) -> np.ndarray:
    return np.asarray(decode(data, rules)[0])


def png_of_size(width: int, height: int) -> bytes:
    """A sound header of another size than the pixels have."""
    content = bytearray(encoded(Image.new("1", (16, 16))))
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# --- what a file looks like


MODES = {
    "PNG": ["RGB", "L", "P", "1"],
    "JPEG": ["RGB", "L", "CMYK"],
    "WEBP": ["RGB"],
    "BMP": ["RGB", "L", "P", "1"],
    "TIFF": ["RGB", "L", "P", "1", "CMYK", "YCbCr"],
    "GIF": ["P", "L"],
}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes])
def test_plain_pixels_are_those_of_pillow(kind, mode):
    data = encoded(noise(40, 30).convert(mode), kind)
    with Image.open(io.BytesIO(data)) as opened:
        expected = opened.convert("RGB")
    picture, mask = decode(data, RULES)
    assert (picture.mode, picture.size, mask) == ("RGB", (40, 30), None)
    assert picture.tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, kind):
    data = encoded(noise(30, 20), kind, exif=with_orientation(orientation))
    with Image.open(io.BytesIO(data)) as opened:
        expected = ImageOps.exif_transpose(opened).convert("RGB")
    found = header(data, RULES)
    assert (found.orientation, found.format, found.mode) == (orientation, kind, "RGB")
    assert found.size == expected.size == ((30, 20) if orientation < 5 else (20, 30))
    assert (pixels(data) == np.asarray(expected)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_camera_gives_an_upright_picture(orientation):
    upright = noise(30, 20)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that a camera would have done
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    assert (pixels(encoded(stored, exif=with_orientation(orientation))) == np.asarray(upright)).all()


@pytest.mark.parametrize("orientation", [0, 9, 99])
def test_an_orientation_that_does_not_exist_is_ignored(orientation):
    data = encoded(noise(30, 20), exif=with_orientation(orientation))
    assert header(data, RULES).orientation == 1
    assert (pixels(data) == np.asarray(noise(30, 20))).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_photo_with_damaged_exif_is_shown():
    data = encoded(noise(30, 20), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\xff garbage")
    assert header(data, RULES).orientation == 1
    assert decode(data, RULES)[0].size == (30, 20)


def test_exif_may_stand_behind_the_pixels_of_a_png():
    data = encoded(noise(30, 20))
    content = with_orientation(6).tobytes()[len(b"Exif\0\0") :]
    chunk = b"eXIf" + content
    data = data[:-12] + len(content).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + data[-12:]
    assert header(data, RULES).size == (20, 30)
    assert decode(data, RULES)[0].size == (20, 30)


def test_the_header_is_read_without_decoding(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"):
        assert header(encoded(Image.new("L", (40, 30)), kind), RULES).size == (40, 30)
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6">')
    assert header(encoded(Image.new("L", (40, 30)), pnginfo=text), RULES).size == (30, 40)


def test_transparent_pixels_show_the_background_and_hide_their_colour():
    image = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 10, 20))
    image.paste((0, 0, 0, 51), (0, 0, 10, 10))
    rules = PixelRules(background=(0, 255, 100), animated="error", alpha_mask=True)
    picture, mask = decode(encoded(image), rules)
    assert mask is not None
    assert (np.asarray(picture)[:, 10:] == (0, 255, 100)).all()
    assert (np.asarray(picture)[10:, :10] == (0, 0, 255)).all()
    assert (np.asarray(picture)[:10, :10] == (0, 204, 80)).all()  # a fifth of black
    assert (np.asarray(mask)[:, 10:] == 0).all()
    assert (np.asarray(mask)[10:, :10] == 255).all()
    assert (np.asarray(mask)[:10, :10] == 51).all()


def test_hidden_colours_do_not_bleed_when_scaled():
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    image.paste((255, 255, 255, 255), (0, 0, 31, 64))
    picture = decode(encoded(image), RULES)[0]
    assert np.asarray(crop(picture, place((64, 64), (16, 16)))).min() == 255


@pytest.mark.parametrize("mode", ["LA", "PA", "P", "L", "RGB", "1", "I;16"])
def test_every_way_to_be_transparent(mode):
    """The right half is transparent, the left one black."""
    options: dict = {}
    if mode in ("LA", "PA"):
        image = Image.new("LA", (20, 20), (0, 255))
        image.paste((60, 0), (10, 0, 20, 20))
        image = image if mode == "LA" else image.convert("RGBA").convert("PA")
    elif mode == "I;16":
        values = np.zeros((20, 20), np.uint16)
        values[:, 10:] = 700
        image, options = Image.fromarray(values), {"transparency": 700}
    else:
        image = Image.new("RGB", (20, 20))
        image.paste("white", (10, 0, 20, 20))
        image = image.convert(mode)
        options["transparency"] = image.getpixel((15, 5)) if mode != "1" else 1
    data = encoded(image, "TIFF" if mode == "PA" else "PNG", **options)
    rules = PixelRules(background=(10, 20, 30), animated="error", alpha_mask=True)
    picture, mask = decode(data, rules)
    assert mask is not None
    assert (np.asarray(picture)[:, :10] == 0).all()
    assert (np.asarray(picture)[:, 10:] == (10, 20, 30)).all()
    assert (np.asarray(mask) == [255] * 10 + [0] * 10).all()


def test_opacity_is_a_mask_only_if_asked_for_and_there():
    assert decode(encoded(noise(20, 20)), RULES)[1] is None
    transparent = encoded(noise(20, 20).convert("RGBA"))
    assert decode(transparent, FIRST)[1] is None
    turned = encoded(Image.new("RGBA", (30, 20), (0, 0, 0, 9)), exif=with_orientation(6))
    picture, mask = decode(turned, RULES)
    assert mask is not None
    assert mask.size == picture.size == (20, 30)
    assert mask.mode == "L"


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(kind):
    gray = np.full((20, 20), 127 * 257, dtype=np.uint16)
    gray[0, :4] = (0, 65535, 128, 129)
    found = pixels(encoded(Image.fromarray(gray), kind))
    assert abs(found.mean() - 127) <= 1
    assert found[0, :4, 0].tolist() == [0, 255, 0, 1]  # 128 / 257 < 0.5 < 129 / 257
    assert (found[1:] == 127).all()


def test_twelve_bits_are_scaled():
    """As scanners write them: two pixels in three bytes, which Pillow unpacks and leaves below 4,096."""
    values = np.full((20, 20), 2048)
    values[0, :3] = (0, 4095, 1)
    bits = "".join(f"{value:012b}" for value in values.ravel())
    packed = int(bits, 2).to_bytes(len(bits) // 8, "big")
    tags = [(256, 3, 20), (257, 3, 20), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 0), (277, 3, 1), (278, 3, 20)]
    tags.append((279, 4, len(packed)))
    start = 8 + 2 + 12 * len(tags) + 4
    entries = [struct.pack("<HHII", tag, kind, 1, start if tag == 273 else value) for tag, kind, value in tags]
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries) + bytes(4) + packed
    found = pixels(data)[..., 0]
    assert found[0, :3].tolist() == [0, 255, 0]
    assert (found[1:] == 128).all()  # 2048 / 4095 * 255 = 127.5


def test_thirty_two_bits_are_sixteen_or_refused():
    values = np.full((20, 20), 127 * 257, dtype=np.int32)
    assert (pixels(encoded(Image.fromarray(values), "TIFF")) == 127).all()
    for beyond in (65_536, -1):
        values[0, 0] = beyond
        with pytest.raises(BadImage, match=rf"32-bit pixels from .*{beyond}|from {beyond}"):
            decode(encoded(Image.fromarray(values), "TIFF"), RULES)


def test_floats_in_zero_to_one_are_scaled():
    values = np.full((20, 20), 0.5, dtype=np.float32)
    values[0, :2] = (0, 1)
    found = pixels(encoded(Image.fromarray(values), "TIFF"))
    assert found[0, :3, 0].tolist() == [0, 255, 128]


@pytest.mark.parametrize("value", [-0.001, 1.001, 255.0, float("nan"), float("inf"), float("-inf")])
def test_other_floats_are_refused(value):
    values = np.full((20, 20), 0.5, dtype=np.float32)
    values[3, 3] = value
    with pytest.raises(BadImage, match=r"^has float pixels"):
        decode(encoded(Image.fromarray(values), "TIFF"), RULES)


def test_inverted_cmyk_keeps_its_colours():
    data = encoded(Image.new("RGB", (32, 32), (200, 30, 60)).convert("CMYK"), "JPEG", quality=95)
    assert header(data, RULES).mode == "CMYK"
    assert np.abs(pixels(data).astype(int) - (200, 30, 60)).max() < 12


def test_a_photo_with_a_preview_beside_it_is_one_photo():
    data = encoded(noise(40, 40), "MPO", save_all=True, append_images=[noise(20, 20)])
    assert header(data, RULES).format == "MPO"
    assert decode(data, RULES)[0].size == (40, 40)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_are_refused_or_their_first_frame_taken(kind):
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    frames = [Image.new("RGB", (32, 32), colour) for colour in colours]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    for look in (header, decode):
        with pytest.raises(BadImage, match="pages" if kind == "TIFF" else "animation"):
            look(data, RULES)
    assert (pixels(data, FIRST) == colours[0]).all()
    still = encoded(frames[1], kind, **options)
    assert (pixels(still) == colours[1]).all()


def test_a_mask_is_white_where_to_look():
    image = Image.new("RGBA", (20, 16), (255, 255, 255, 0))
    image.paste((255, 255, 255, 255), (0, 0, 10, 16))
    mask = decode_mask(encoded(image))
    assert (mask.mode, mask.size) == ("L", (20, 16))
    assert (np.asarray(mask) == [255] * 10 + [0] * 10).all()
    gray = Image.linear_gradient("L").resize((64, 64))
    assert decode_mask(encoded(gray)).tobytes() == gray.tobytes()


# --- what is refused


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
        (b"\xef\xbb\xbf\n <HTML lang=en>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", 'text.*"version https://git-lfs'),
        (b"\xef\xbb\xbfwords", 'text.*"words"'),
        (b"x" + "ü".encode() * 600, "text"),
        (bytes(range(256)), "not an image"),
        (b"\xff\xd8\xff\xe0 but no JPEG", "cannot be decoded"),
        pytest.param(
            b"\0\0\0\x18ftypheic" + bytes(99), "a photo in HEIC", marks=pytest.mark.skipif(HAS_HEIF, reason="")
        ),
        (b"BM is how a bitmap begins", "cannot be decoded"),
        (encoded(Image.new("RGB", (1, 1))), "1 x 1 pixels is too small"),
        (encoded(Image.new("RGB", (MIN_SIDE - 1, 500))), "too small"),
        (encoded(Image.new("RGB", (32, 32)).convert("LAB"), "TIFF"), "LAB"),
        (encoded(Image.new("RGB", (32, 32)), "PPM"), "not an image that can be read"),
    ],
)
def test_what_is_no_picture_is_told_in_one_line(data, words):
    for look in (header, decode):
        with pytest.raises(BadImage, match=words) as caught:
            look(data, RULES)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_refused(kind, part):
    data = encoded(noise(64, 64), kind)
    decode(data, RULES)
    with pytest.raises(BadImage):
        decode(data[: int(len(data) * part)], RULES)


@given(st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"]), st.data())
@settings(deadline=None, max_examples=150)
def test_damage_is_a_bad_image_or_other_pixels_but_no_crash(kind, data):
    content = bytearray(DAMAGED[kind])
    for place_ in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place_] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow's plugins
        with suppress(BadImage):
            assert decode(bytes(content), RULES)[0].mode == "RGB"


DAMAGED = {kind: encoded(smooth(24, 20), kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")}


def test_too_little_memory_is_not_the_fault_of_the_image(monkeypatch):
    def fail(self):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(MemoryError):
        decode(encoded(noise(20, 20)), RULES)


@pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (MAX_PIXELS // 16 + 1, 16), (20_000, 20_000)])
def test_a_bomb_is_refused_by_its_header(width, height):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for look in (header, decode):
            with pytest.raises(BadImage, match=f"{width} x {height} pixels are too many") as caught:
                look(png_of_size(width, height), RULES)
    assert caught.value.size == (width, height)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="ru_maxrss is that of the parent at first")
def test_a_bomb_takes_no_memory():
    """A real one: 900 million pixels in some 110 kB."""
    program = """
import io, re, zlib
from loraloom.images.decoding import BadImage, PixelRules, decode
def chunk(kind, content):
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")
side, squeeze = 30000, zlib.compressobj()
rows = b"".join(squeeze.compress(bytes(1 + side // 8)) for _ in range(side)) + squeeze.flush()
size = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
bomb = b"\\x89PNG\\r\\n\\x1a\\n" + chunk(b"IHDR", size) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
try:
    decode(bomb, PixelRules((255, 255, 255), "error", False))
except BadImage as error:
    print(error)
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    reason, megabytes = done.stdout.splitlines()
    assert "30000 x 30000 pixels are too many" in reason
    assert int(megabytes) < 200
    assert done.stderr == ""


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_a_large_photo_is_no_bomb_and_pillow_says_nothing(kind):
    data = encoded(Image.new("1", (12_000, 12_000), 1), kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert header(data, RULES).size == (12_000, 12_000)
        picture, _ = decode(data, RULES)
    assert picture.size == (12_000, 12_000)
    assert picture.getpixel((11_999, 11_999)) == (255, 255, 255)


def test_no_torch_for_a_look_at_files():
    program = "import sys, loraloom.data.scan, loraloom.data.transforms; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
