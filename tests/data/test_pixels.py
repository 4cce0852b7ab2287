"""Pixels from files as a viewer shows them, and the scan that finds files which give none."""

import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from loraloom.configs.errors import TrainingError
from loraloom.data.scan import image_files, scan_folder, scan_image
from loraloom.data.transforms import load_pixels, read_rgb


def pixels_of(image: Image.Image, tmp_path, **options) -> np.ndarray:
    file = tmp_path / f"image.{options.pop('kind', 'png')}"
    image.save(file, **options)
    return np.asarray(read_rgb(file))


def test_transparent_pixels_show_white_not_the_colour_under_them(tmp_path):
    image = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 10, 20))
    pixels = pixels_of(image, tmp_path)
    assert (pixels[:, :10] == (0, 0, 255)).all()
    assert (pixels[:, 10:] == 255).all()


def test_sixteen_bits_are_scaled(tmp_path):
    gray = np.full((20, 20), 127 * 257, dtype=np.uint16)
    assert abs(pixels_of(Image.fromarray(gray), tmp_path).mean() - 127) <= 1


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA", "RGB"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    image = Image.new("RGB", (20, 20), "white").convert(mode)
    pixels = pixels_of(image, tmp_path, kind="tif" if mode == "CMYK" else "png")
    assert pixels.shape == (20, 20, 3)
    assert pixels.mean() > 250


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, tmp_path):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that a camera would have done
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert (pixels_of(stored, tmp_path, exif=exif) == np.asarray(upright)).all()


def test_pixels_are_cropped_in_the_middle_and_scaled_to_one(tmp_path):
    image = Image.new("RGB", (60, 20), "black")
    image.paste("white", (20, 0, 40, 20))
    image.save(tmp_path / "wide.png")
    pixels = load_pixels(tmp_path / "wide.png", 16)
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == torch.float32
    assert pixels[:, :, 2:-2].min() > 0.99


def test_a_file_that_changed_after_the_scan_is_named(tmp_path):
    (tmp_path / "gone.png").write_bytes(b"not an image any more")
    with pytest.raises(TrainingError, match=r"gone\.png"):
        load_pixels(tmp_path / "gone.png", 16)


def test_hidden_files_and_other_kinds_are_no_images(tmp_path):
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for name in ("a.PNG", "deep/er/b.jpeg", "._a.png", ".hidden/c.png", "a.txt", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"")
    assert [file.name for file in image_files(tmp_path)] == ["a.PNG", "b.jpeg"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda file: Image.new("RGB", (1, 1)).save(file, "PNG"), "too small"),
        (lambda file: Image.new("RGB", (2000, 3)).save(file, "PNG"), "too small"),
        (lambda file: Image.new("F", (30, 30)).save(file, "TIFF"), "float"),
        (lambda file: file.write_bytes(b""), "empty"),
        (lambda file: file.write_text("<html>"), "cannot be decoded"),
        (
            lambda file: Image.new("RGB", (30, 30)).save(
                file, "GIF", save_all=True, append_images=[Image.new("RGB", (30, 30), "red")]
            ),
            "animation",
        ),
    ],
)
def test_the_scan_says_what_is_wrong(make, words, tmp_path):
    file = tmp_path / "x.png"
    make(file)
    problem = scan_image(file)
    assert problem is not None
    assert words in problem
    assert str(file) in problem


@pytest.mark.parametrize("side", [10_001, 30_000])
def test_a_bomb_is_refused_by_its_header(side, tmp_path):
    content = bytearray((lambda f: (Image.new("1", (16, 16)).save(f), f.read_bytes())[1])(tmp_path / "small.png"))
    content[16:24] = side.to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(content)
    problem = scan_image(tmp_path / "bomb.png")
    assert problem is not None
    assert "pixels" in problem


def test_a_photo_with_a_preview_beside_it_is_one_photo(tmp_path):
    photo, preview = Image.new("RGB", (40, 40), "red"), Image.new("RGB", (20, 20), "red")
    photo.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[preview])
    assert scan_image(tmp_path / "phone.jpg") is None
    assert read_rgb(tmp_path / "phone.jpg").size == (40, 40)


def test_a_sound_folder_has_no_problems(photos):
    scanned = scan_folder(photos)
    assert len(scanned.images) == 6
    assert scanned.problems == []
