"""Profiles: what a viewer shows is what is trained and sampled, and an image of sRGB keeps every bit."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from loraloom.configs.data_sections import DataSection
from loraloom.configs.errors import UserError
from loraloom.data.dataset import Images
from loraloom.data.scan import scan
from loraloom.data.source import open_source
from loraloom.images.colour import CONVERTED, KEPT, UNUSABLE
from loraloom.images.decoding import BadImage, PixelRules, as_shown, decode, decode_mask, header
from loraloom.inference.engine import Request
from loraloom.inference.given_pictures import read_mask, read_picture, shown_mask
from loraloom.train.gather import make_dataset
from loraloom.train.state import _differences

TRAINING = PixelRules(background=(255, 255, 255), animated="error", alpha_mask=False)

# --- profiles made by hand: primaries, a gamma or a table, and nothing else

D50 = (0.9642, 1.0, 0.8249)
SRGB = [(0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)]
P3 = [(0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)]
PROPHOTO = [(0.79767, 0.28804, 0.0), (0.13519, 0.71188, 0.0), (0.03134, 0.00009, 0.82491)]


def srgb_curve() -> bytes:
    """sRGB's own as a table of 1024: what HP's well-known profile has."""
    x = np.linspace(0, 1, 1024)
    y = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    return b"curv" + bytes(4) + struct.pack(">I", 1024) + np.rint(y * 65535).astype(">u2").tobytes()


def gamma(value: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(value * 256)) + bytes(2)


def profile(primaries=P3, curve: bytes | None = None, name: str = "wide", space: bytes = b"RGB ") -> bytes:
    """A display profile of version 2; all three curves are one."""
    curve, text = curve or srgb_curve(), name.encode() + b"\0"
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78), b"wtpt": _xyz(D50)}
    tags[b"cprt"] = b"text" + bytes(4) + b"none\0\0\0\0"
    letters = b"rgb" if space == b"RGB " else b"k"
    tags |= {b"%cTRC" % letter: curve for letter in letters}
    if space == b"RGB ":
        tags |= {b"%cXYZ" % letter: _xyz(point) for letter, point in zip(letters, primaries, strict=True)}
    table, body, place = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        table += tag + struct.pack(">II", place + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s", place + len(body), b"lcms", 0x02400000, b"mntr", space, b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + b"".join(struct.pack(">i", round(value * 65536)) for value in D50)
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + table + body


def _xyz(point) -> bytes:
    return b"XYZ " + bytes(4) + b"".join(struct.pack(">i", round(value * 65536)) for value in point)


PROFILES = {
    "none": (None, KEPT),
    "sRGB": (profile(SRGB, name="sRGB IEC61966-2.1"), KEPT),
    "sRGB by another name": (profile(SRGB), KEPT),
    "a rough sRGB": (profile(SRGB, gamma(2.2), "sRGB"), KEPT),
    "P3": (profile(), CONVERTED),
    "ProPhoto": (profile(PROPHOTO, gamma(1.8)), CONVERTED),
    "grey": (profile(space=b"GRAY"), UNUSABLE),
    "cut": (profile()[:300], UNUSABLE),
    "garbage": (bytes(range(200)), UNUSABLE),
    "P3 of two megabytes": (profile() + bytes(2_000_000), CONVERTED),
}


def by_hand(pixels: np.ndarray, primaries, power: float | None) -> np.ndarray:
    """The textbook: linear light, XYZ of D50, linear sRGB, sRGB's curve; what is outside of sRGB is cut off."""
    values = pixels / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    linear = linear if power is None else values**power
    mixed = linear @ np.array(primaries) @ np.linalg.inv(np.array(SRGB))
    mixed = mixed.clip(0, 1)
    return 255 * np.where(mixed <= 0.0031308, mixed * 12.92, 1.055 * mixed ** (1 / 2.4) - 0.055)


def noise(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    picture = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
    if mode in ("RGBA", "LA", "PA"):
        return picture if mode == "RGBA" else picture.convert("LA").convert(mode)
    if mode.startswith("I;16"):
        return Image.fromarray(np.random.default_rng(seed).integers(0, 65536, (height, width), dtype=np.uint16))
    if mode == "F":
        return Image.fromarray(np.random.default_rng(seed).random((height, width), dtype=np.float32))
    return picture.convert("RGB").convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **{name: value for name, value in options.items() if value is not None})
    return stream.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize(("primaries", "power", "curve"), [(P3, None, None), (PROPHOTO, 1.8, gamma(1.8))])
def test_a_wide_profile_is_converted_as_the_textbook_does_it(primaries, power, curve):
    image = noise(40, 30)
    found = np.asarray(decode(encoded(image, icc_profile=profile(primaries, curve)), TRAINING)[0])
    assert np.abs(found - by_hand(np.asarray(image), primaries, power)).max() <= 2
    assert np.abs(found.astype(int) - np.asarray(image)).max() > 50  # and that is something else


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_what_a_profile_does_is_known_from_the_header(name, kind):
    (icc, use), image = PROFILES[name], noise(24, 20)
    plain, data = encoded(image, kind), encoded(image, kind, icc_profile=icc)
    assert header(data, TRAINING).profile == use
    same = decode(data, TRAINING)[0].tobytes() == decode(plain, TRAINING)[0].tobytes()
    assert same == (use != CONVERTED)


KINDS = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "JPEG": ["L", "RGB", "CMYK"],
    "WEBP": ["RGB", "RGBA"],
    "TIFF": ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "F"],
    "BMP": ["1", "L", "P", "RGB"],
    "GIF": ["L", "P"],
}
FILES = [(kind, mode) for kind, modes in KINDS.items() for mode in modes]


@given(st.sampled_from(FILES), st.integers(1, 8), st.sampled_from(list(PROFILES)), st.booleans(), st.integers(0, 9))
@settings(deadline=None, max_examples=120)
def test_sampling_sees_what_training_sees(tmp_path_factory, file, orientation, name, keyed, seed):
    """Every pixel format x EXIF x transparency x profile: of a file, and of what Pillow has opened."""
    kind, mode = file
    options = {"exif": turned(orientation) if kind not in ("BMP", "GIF") else None}
    options["icc_profile"] = PROFILES[name][0] if kind not in ("BMP", "GIF") else None
    options["transparency"] = 0 if keyed and kind in ("PNG", "GIF") and mode in ("L", "P") else None
    data = encoded(noise(30, 20, seed, mode), kind, **options)
    trained = decode(data, TRAINING)[0]
    assert trained.size == header(data, TRAINING).size
    path = tmp_path_factory.getbasetemp() / "given.picture"
    path.write_bytes(data)
    request = Request(["a"], [0], image=read_picture(str(path)))
    assert (request.image.mode, request.sides) == ("RGB", trained.size)
    assert request.image.tobytes() == trained.tobytes()
    assert request.part([0]).image.tobytes() == trained.tobytes()  # a second look changes nothing
    with Image.open(io.BytesIO(data)) as opened:
        assert Request(["a"], [0], image=opened).image.tobytes() == trained.tobytes()
    assert read_mask(str(path)).tobytes() == decode_mask(data).tobytes()
    with Image.open(io.BytesIO(data)) as opened:
        seen = decode_mask(data)
        if seen.getextrema()[1] < 128:
            return
        assert shown_mask(opened, seen.size).tobytes() == seen.tobytes()


# --- masks


def strokes(under: tuple[int, int, int], on: tuple[int, int, int]) -> Image.Image:
    """Painted on a transparent page of a colour."""
    image = Image.new("RGBA", (32, 24), (*under, 0))
    image.paste((*on, 255), (4, 4, 12, 20))
    return image


def test_where_a_mask_is_transparent_nothing_changes():
    mask = shown_mask(strokes((255, 255, 255), (255, 255, 255)), (32, 24))
    assert mask.getbbox() == (4, 4, 12, 20)
    assert shown_mask(mask, (64, 48)).tobytes() == mask.tobytes()


@pytest.mark.parametrize(
    "mask", [strokes((0, 0, 0), (0, 0, 0)), Image.new("L", (32, 24), 127), Image.new("1", (32, 24))]
)
def test_a_mask_that_would_change_nothing_is_refused(mask):
    with pytest.raises(UserError, match="nothing would change"):
        shown_mask(mask, (32, 24))


@given(st.integers(16, 300), st.integers(16, 300), st.floats(0.1, 3))
@settings(deadline=None)
def test_a_mask_may_have_another_size_but_no_other_proportions(width, height, scale):
    wide, high = round(width * scale), round(height * scale)
    if min(wide, high) < 16:
        return
    shown_mask(Image.new("1", (wide, high), 1), (width, height))
    with pytest.raises(UserError, match="other proportions"):
        shown_mask(Image.new("1", (wide * 2, high)), (width, height))


# --- what is written in a PNG


def chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def packed(megabytes: int) -> bytes:
    squeeze = zlib.compressobj(9)
    return b"".join(squeeze.compress(b" " * 2**20) for _ in range(megabytes)) + squeeze.flush()


TEXTS = {
    "zTXt of 70 MB": chunk(b"zTXt", b"workflow\0\0" + packed(70)),
    "iTXt of 70 MB": chunk(b"iTXt", b"workflow\0\1\0\0\0" + packed(70)),
    "100 texts": chunk(b"zTXt", b"a\0\0" + packed(1)) * 100,
    "XMP of 2 MB": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + packed(2)),
    "XMP of 40 MB": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0de\0de\0" + packed(40)),
    "EXIF of 40 MB": chunk(b"zTXt", b"Raw profile type exif\0\0" + packed(40)),
    "a profile of 40 MB": chunk(b"iCCP", b"wide\0\0" + packed(40)),
    "a text that is cut": chunk(b"zTXt", b"a\0\0" + packed(1)[:-5]),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("behind", [False, True])
def test_a_png_is_read_whatever_is_written_in_it(name, behind):
    image, plain = noise(24, 20), encoded(noise(24, 20))
    place = len(plain) - 12 if behind and b"iCCP" not in TEXTS[name] else 33
    data = plain[:place] + TEXTS[name] + plain[place:]
    assert decode(data, TRAINING)[0].tobytes() == image.tobytes()
    assert header(data, TRAINING).profile == (UNUSABLE if b"iCCP" in TEXTS[name] else KEPT)


def test_orientation_is_found_in_a_long_xmp():
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", f'<x tiff:Orientation="6">{" " * 3_000_000}', zip=True)
    data = encoded(noise(24, 20), pnginfo=text)
    assert header(data, TRAINING).size == decode(data, TRAINING)[0].size == (20, 24)


# --- given files


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "empty"), (b"<html>", "HTML"), (encoded(noise(30, 30))[:90], "cannot be decoded")]
)
def test_a_given_picture_that_is_none_is_one_line(tmp_path, content, words):
    (tmp_path / "a.png").write_bytes(content)
    for read in (read_picture, read_mask):
        with pytest.raises(UserError, match=rf"a\.png: .*{words}") as caught:
            read(str(tmp_path / "a.png"))
        assert len(caught.value.problems) == 1
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="is a folder, not a file"):
        read_picture(str(tmp_path))


def test_what_has_no_look_is_refused_in_python_too():
    with pytest.raises(UserError, match="float pixels"):
        Request(["a"], [0], image=Image.new("F", (20, 20), 7.0))
    with pytest.raises(BadImage):
        as_shown(Image.new("F", (20, 20), 7.0))
    assert as_shown(image := noise(9, 9)) is image


# --- caches and checkpoints

BASE = {"base": {}, "dtype": "fp32", "latents": "fp32"}
"""What else a checkpoint says of its run."""


@pytest.fixture
def dataset_of(tmp_path):
    """A folder of two images, the second with a profile, and its data set."""

    def dataset_of(icc: bytes | None):
        for number, own in enumerate((None, icc)):
            (tmp_path / f"{number}.png").write_bytes(encoded(noise(40, 40, number), icc_profile=own))
        section = DataSection.model_validate(
            {"resolution": 32, "sources": [{"path": str(tmp_path), "caption": "a"}], "cache": {"dir": str(tmp_path)}}
        )
        source = open_source(section.sources[0])
        found = scan(source, section, progress=False)
        images = Images.scanned(section.sources[0], source, found, np.arange(2))
        return make_dataset(section, [images], 8, 0), found

    return dataset_of


def test_the_key_of_latents_changes_with_the_pixels_only(dataset_of):
    dataset, found = dataset_of(profile())
    assert found.converted.tolist() == [False, True]
    keys = [dataset.latent_key(0, row, dataset.geometries(0, row)[0]) for row in (0, 1)]
    plain = make_dataset(dataset.data, [_without_profiles(dataset.images[0])], 8, 0)
    before = [plain.latent_key(0, row, plain.geometries(0, row)[0]) for row in (0, 1)]
    assert keys[0] == before[0]
    assert keys[1] != before[1]


def _without_profiles(images: Images) -> Images:
    """As they were when profiles were not looked at."""
    return Images(images.section, images.source, images.kept, images.sizes, images.digests, images.mask_digests)


def test_a_run_of_before_is_told_why_it_cannot_go_on(dataset_of):
    dataset, _ = dataset_of(profile())
    then = make_dataset(dataset.data, [_without_profiles(dataset.images[0])], 8, 0).fingerprint(1) | BASE
    (told,) = _differences(then, dataset.fingerprint(1) | BASE)
    assert "1 of its images have a colour profile" in told
    assert list(_differences(dataset.fingerprint(1) | BASE, dataset.fingerprint(1) | BASE)) == []
    plain, _ = dataset_of(profile(SRGB))
    then = make_dataset(plain.data, [_without_profiles(plain.images[0])], 8, 0).fingerprint(1) | BASE
    assert list(_differences(then, plain.fingerprint(1) | BASE)) == []


def test_a_profile_that_cannot_be_used_is_told_once(dataset_of):
    _, found = dataset_of(PROFILES["garbage"][0])
    (told,) = found.warnings
    assert "1 image with a colour profile that cannot be used" in told
    assert "1.png" in told
