"""The scan finds everything that is wrong at once, decodes nothing twice, and keeps what it found."""

import hashlib
import io
import itertools
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loraloom.configs.data_sections import DataSection
from loraloom.data import findings
from loraloom.data import scan as scan_module
from loraloom.data.scan import Scan, apply_policy, scan
from loraloom.images.decoding import PixelRules


class Pictures:
    """The files of one folder, in the order of their names; notes what is read, and fails where it is told to."""

    problems: list[str] = []
    counts: dict[str, int] = {}
    declared_sizes = None

    def __init__(self, folder: Path, masks: Path | None = None):
        self.name, self.masks, self.reads = folder.name, masks, []
        self.files = sorted(folder.iterdir())
        self.failing: dict[int, BaseException] = {}

    def __len__(self) -> int:
        return len(self.files)

    def location(self, index: int) -> str:
        return str(self.files[index])

    def path(self, index: int) -> Path | None:
        return self.files[index]

    def read(self, index: int) -> bytes:
        if index in self.failing:
            raise self.failing[index]
        self.reads.append(index)
        return self.files[index].read_bytes()

    def read_mask(self, index: int) -> bytes | None:
        file = self.masks and self.masks / self.files[index].name
        return file.read_bytes() if file and file.exists() else None

    def captions(self, index: int) -> list[str]:
        return [""]


class Archive(Pictures):
    """The same images as members of one file."""

    def path(self, index: int) -> Path | None:
        return self.files[0]


class Rows(Pictures):
    """The same images without files of their own, as rows of a table are."""

    def path(self, index: int) -> Path | None:
        return None


def section(**options) -> DataSection:
    return DataSection.model_validate({"sources": [{"path": "photos"}], **options})


def look(source, cache: Path | None = None, **options) -> Scan:
    return scan(source, section(**options), progress=False, cache=cache)


def noise(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten sound images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(10):
        noise(seed=index).save(folder / f"{index}.png")
    return folder


def bad_images() -> dict[str, tuple[bytes, str]]:
    """File name to content and the words that say what is wrong."""
    png = encoded(noise(64, 64))
    animation = encoded(noise(), "GIF", save_all=True, append_images=[noise(seed=1)])
    return {
        "animation.gif": (animation, "animation"),
        "bitten.jpg": (encoded(noise(64, 64), "JPEG")[:-2000], "cannot be decoded"),
        "cut.png": (png[: len(png) // 2], "cannot be decoded"),
        "empty.png": (b"", "empty"),
        "float.tif": (encoded(Image.new("F", (30, 30), 7.5), "TIFF"), "float"),
        "long.png": (encoded(Image.new("RGB", (2000, 3))), "2000 x 3 pixels is longer than 4 to 1"),
        "longer.png": (encoded(Image.new("RGB", (20, 81))), "20 x 81 pixels is longer than 4 to 1"),
        "page.jpg": (b"<!doctype html><title>Not found</title>", "HTML"),
        "small.png": (encoded(Image.new("RGB", (1, 1))), "too small"),
        "words.jpg": (b"just words", "is text"),
    }


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_a_sound_folder_has_columns_and_no_problems(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise().save(folder / "a.jpg", exif=exif)
    noise().convert("L").save(folder / "b.png")
    found = look(Pictures(folder))
    assert found.problems == {}
    assert found.warnings == []
    assert found.sizes.tolist() == [[40, 30]] * 10 + [[30, 40], [40, 30]]
    assert found.sizes.dtype == np.int32
    assert found.modes.tolist() == ["RGB"] * 11 + ["L"]
    assert found.orientations.tolist() == [1] * 10 + [6, 1]
    contents = [file.read_bytes() for file in sorted(folder.iterdir())]
    assert found.digests.tolist() == [hashlib.sha256(content).hexdigest().encode() for content in contents]
    assert found.digests.dtype == found.mask_digests.dtype == np.dtype("S64")
    assert not found.mask_digests.any()


def test_an_empty_source_is_no_problem_of_the_scan(tmp_path):
    found = look(Pictures(tmp_path), tmp_path / "cache")
    assert (found.sizes.shape, found.problems) == ((0, 2), {})
    assert apply_policy(found, section())[1] == []


def test_all_problems_are_found_at_once_each_with_its_file(folder):
    for name, (content, _) in bad_images().items():
        (folder / name).write_bytes(content)
    (folder / "vanished.png").symlink_to("nowhere")
    source = Pictures(folder)
    found = look(source)
    expected = {name: words for name, (_, words) in bad_images().items()} | {"vanished.png": "cannot be read"}
    assert sorted(Path(source.location(index)).name for index in found.problems) == sorted(expected)
    for index, problem in found.problems.items():
        assert problem.startswith(f"{source.location(index)}: ")
        assert expected[source.files[index].name] in problem
        assert "\n" not in problem
        assert found.sizes[index].tolist() == [0, 0]
    assert (found.sizes[:10] == (40, 30)).all()
    assert sorted(source.reads) == list(range(len(source)))


def test_the_longest_aspect_is_the_configured_one(folder):
    (folder / "long.png").write_bytes(encoded(Image.new("RGB", (20, 80))))
    assert look(Pictures(folder)).problems == {}
    assert "longer than 3.9 to 1" in look(Pictures(folder), buckets={"max_aspect": 3.9}).problems[10]


def test_the_first_frame_is_taken_if_it_is_wanted(folder):
    (folder / "moving.gif").write_bytes(bad_images()["animation.gif"][0])
    assert look(Pictures(folder), animated="first").problems == {}


def test_masks_have_the_size_of_their_image(folder, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    Image.new("L", (40, 30), 1).save(masks / "0.png")
    Image.new("L", (30, 40), 1).save(masks / "1.png")
    (masks / "2.png").write_bytes(b"")
    Image.new("L", (40, 30)).save(masks / "4.png")
    found = look(Pictures(folder, masks))
    assert list(found.problems) == [1, 2, 4]
    assert "its mask is black everywhere" in found.problems[4]
    assert "its mask has 30 x 40 pixels, the image 40 x 30" in found.problems[1]
    assert "its mask cannot be used: the file is empty" in found.problems[2]
    assert found.mask_digests[0] == hashlib.sha256((masks / "0.png").read_bytes()).hexdigest().encode()
    assert found.mask_digests[3] == b""


def test_an_image_without_anything_to_see_is_a_problem(folder):
    Image.new("RGBA", (40, 30), (255, 0, 0, 0)).save(folder / "0.png")
    Image.new("RGBA", (40, 30), (255, 0, 0, 1)).save(folder / "1.png")
    found = look(Pictures(folder))
    assert list(found.problems) == [0]
    assert "is transparent everywhere" in found.problems[0]


def test_cmyk_and_very_large_images_are_told_once(folder, monkeypatch):
    for index in range(5):
        noise().convert("CMYK").save(folder / f"c{index}.tif")
    noise(50, 50).save(folder / "large.png")
    noise(200, 20).convert("CMYK").save(folder / "unusable.tif")
    monkeypatch.setattr(scan_module, "VERY_LARGE", 50 * 50 - 1)
    cmyk, large = look(Pictures(folder)).warnings
    assert "photos: 5 images in CMYK" in cmyk
    assert cmyk.count(".tif") == 3
    assert cmyk.endswith("…)")
    assert "1 image of more than" in large
    assert "large.png" in large


def test_what_pillow_warns_of_does_not_reach_the_user(folder):
    (folder / "odd.jpg").write_bytes(encoded(noise(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\xff garbage"))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert look(Pictures(folder)).problems == {}
    assert told == []


# --- what is kept


def equal(one: Scan, other: Scan, *, warnings: bool = True) -> bool:
    columns = ("sizes", "digests", "modes", "orientations", "mask_digests")
    same = all((getattr(one, name) == getattr(other, name)).all() for name in columns)
    return same and one.problems == other.problems and (not warnings or one.warnings == other.warnings)


def test_nothing_is_read_twice(folder, tmp_path):
    for name, (content, _) in bad_images().items():
        (folder / name).write_bytes(content)
    noise().convert("CMYK").save(folder / "x.tif")
    first = look(Pictures(folder), tmp_path / "cache")
    again = Pictures(folder)
    assert equal(look(again, tmp_path / "cache"), first)
    assert again.reads == []
    assert equal(look(Pictures(folder)), first)


def test_only_what_is_new_or_changed_is_read(folder, tmp_path):
    look(Pictures(folder), tmp_path / "cache")
    (folder / "1.png").unlink()
    noise(30, 40).save(folder / "10.png")  # after 0.png
    for name, content, later in [("5.png", encoded(noise(40, 31)), 0), ("6.png", (folder / "6.png").read_bytes(), 1)]:
        status = (folder / name).stat()
        (folder / name).write_bytes(content)  # of another size at the same time, and of the same size later
        os.utime(folder / name, ns=(status.st_atime_ns, status.st_mtime_ns + later))
    source = Pictures(folder)
    found = look(source, tmp_path / "cache")
    assert sorted(source.files[index].name for index in source.reads) == ["10.png", "5.png", "6.png"]
    assert equal(found, look(Pictures(folder)))
    assert found.sizes[1].tolist() == [30, 40]


def test_images_in_one_file_are_told_apart(folder, tmp_path):
    noise(20, 50).save(folder / "9.png")
    first = look(Archive(folder), tmp_path / "cache")
    source = Archive(folder)
    assert equal(look(source, tmp_path / "cache"), first)
    assert source.reads == []
    assert first.sizes[9].tolist() == [20, 50]
    noise().save(folder / "0.png", compress_level=1)
    look(source, tmp_path / "cache")
    assert len(source.reads) == 10


def test_other_rules_ask_again_and_another_aspect_does_not(folder, tmp_path):
    (folder / "moving.gif").write_bytes(bad_images()["animation.gif"][0])
    assert len(look(Pictures(folder), tmp_path, animated="first").problems) == 0
    assert len(look(Pictures(folder), tmp_path).problems) == 1
    source = Pictures(folder)
    found = look(source, tmp_path, buckets={"max_aspect": 1.2}, background=(0, 0, 0))
    assert source.reads == []
    assert len(found.problems) == 11


def test_another_version_asks_again(folder, tmp_path, monkeypatch):
    look(Pictures(folder), tmp_path)
    monkeypatch.setattr(findings, "VERSION", findings.VERSION + 1)
    source = Pictures(folder)
    look(source, tmp_path)
    assert len(source.reads) == 10


def test_a_mended_mask_is_looked_at_again(folder, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for size, problems in [((30, 40), 1), ((40, 30), 0), ((41, 30), 1)]:
        Image.new("L", size, 255).save(masks / "3.png")
        source = Pictures(folder, masks)
        assert len(look(source, tmp_path / "cache").problems) == problems
        assert 3 in source.reads
    assert source.reads == [3]
    (masks / "3.png").unlink()
    assert look(Pictures(folder, masks), tmp_path / "cache").problems == {}


def test_what_could_not_be_read_is_tried_again(folder, tmp_path):
    source = Pictures(folder)
    source.failing = {4: PermissionError(13, "Permission denied"), 6: ValueError("no such member")}
    problems = look(source, tmp_path).problems
    assert [problem.split(": ")[1] for problem in problems.values()] == [
        "cannot be read (Permission denied); restore it, or take it out",
        "cannot be read (no such member); restore it, or take it out",
    ]
    again = Pictures(folder)
    assert look(again, tmp_path).problems == {}
    assert sorted(again.reads) == [4, 6]


def test_rows_of_a_table_are_not_kept(folder, tmp_path):
    look(Rows(folder), tmp_path / "cache")
    source = Rows(folder)
    assert equal(look(source, tmp_path / "cache"), look(Pictures(folder)))
    assert len(source.reads) == 10
    assert not (tmp_path / "cache").exists()


def test_an_interrupt_keeps_what_was_found(folder, tmp_path):
    source = Pictures(folder)
    source.failing = {7: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        look(source, tmp_path)
    again = Pictures(folder)
    assert look(again, tmp_path).problems == {}
    assert sorted(again.reads) == [7, 8, 9]


@pytest.mark.parametrize("damage", [b"", b"PAR1 no Parquet at all PAR1", b"other"])
def test_a_damaged_memory_is_made_anew(damage, folder, tmp_path):
    first = look(Pictures(folder), tmp_path / "cache")
    (memory,) = (tmp_path / "cache").rglob("*.parquet")
    memory.write_bytes(damage)
    again = look(Pictures(folder), tmp_path / "cache")
    assert equal(again, first, warnings=False)
    assert next(warning for warning in again.warnings if "made anew" in warning).startswith(f"{memory}: ")
    source = Pictures(folder)
    look(source, tmp_path / "cache")
    assert source.reads == []


def test_a_failed_write_leaves_the_old_memory_and_a_note(folder, tmp_path, monkeypatch):
    look(Pictures(folder), tmp_path / "cache")
    (memory,) = (tmp_path / "cache").rglob("*.parquet")
    content = memory.read_bytes()
    noise().save(folder / "new.png")

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", disk_full)
    found = look(Pictures(folder), tmp_path / "cache")
    assert "cannot be written (No space left on device)" in found.warnings[0]
    assert found.problems == {}
    assert memory.read_bytes() == content


def test_a_cache_that_cannot_be_written_is_told_and_done_without(folder, tmp_path):
    (tmp_path / "file").write_text("")
    found = look(Pictures(folder), tmp_path / "file")
    assert "cannot be written" in found.warnings[0]
    assert (found.sizes == (40, 30)).all()


def test_processes_that_start_together_read_once(folder, tmp_path):
    sources = [Pictures(folder) for _ in range(3)]
    together = threading.Barrier(3)

    def start(source: Pictures) -> Scan:
        together.wait()
        return look(source, tmp_path)

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(start, sources))
    assert sorted(len(source.reads) for source in sources) == [0, 0, 10]
    assert equal(results[0], results[1])
    assert equal(results[1], results[2])


def test_two_folders_of_one_name_do_not_disturb_each_other(folder, tmp_path):
    other = tmp_path / "other" / "photos"
    other.mkdir(parents=True)
    for index in range(2):
        noise(20, 20).save(other / f"{index}.png")
    for _ in range(2):
        here, there = Pictures(folder), Pictures(other)
        assert look(here, tmp_path / "cache").sizes.shape == (10, 2)
        assert look(there, tmp_path / "cache").sizes.tolist() == [[20, 20]] * 2
    assert here.reads == there.reads == []


def test_a_million_images_do_not_pile_up(folder):
    """The indices are taken as the images are done, so there may be no end of them."""
    taken: list[int] = []
    endless = (taken.append(number) or number % 10 for number in itertools.count())
    rules = PixelRules(background=(0, 0, 0), animated="error", alpha_mask=False)
    results = scan_module._in_turn(Pictures(folder), rules, endless)
    assert [index for index, _ in itertools.islice(results, 25)] == [number % 10 for number in range(25)]
    results.close()
    assert len(taken) <= 25 + 16 * scan_module.cores()


# --- what is done about problems


def found_with(problems: dict[int, str], count: int = 10) -> Scan:
    sizes = np.full((count, 2), 64, np.int32)
    texts = np.zeros(count, "S64")
    return Scan(sizes, texts, texts.astype("U8"), np.ones(count, np.uint8), problems, [], texts, np.zeros(count, bool))


BAD = {7: "g.png: is text", 2: "b.png: the file is empty"}


def test_bad_images_are_refused_unless_told_otherwise():
    kept, problems, notes = apply_policy(found_with(BAD), section())
    assert kept.tolist() == [0, 1, 3, 4, 5, 6, 8, 9]
    assert problems == [BAD[2], BAD[7]]
    assert notes == []
    kept, problems, notes = apply_policy(found_with({}), section())
    assert (kept.tolist(), problems, notes) == (list(range(10)), [], [])


def test_skipped_images_are_counted_and_named():
    kept, problems, notes = apply_policy(found_with(BAD), section(on_bad_image="skip", max_skipped=0.2))
    assert kept.tolist() == [0, 1, 3, 4, 5, 6, 8, 9]
    assert problems == []
    assert notes == ["2 of 10 images cannot be used and are left out:", BAD[2], BAD[7]]


def test_too_many_skipped_images_are_one_problem():
    many = {index: f"{index}.png: is text" for index in range(5)}
    _, (problem,), notes = apply_policy(found_with(many), section(on_bad_image="skip", max_skipped=0.49))
    assert "5 of 10 images cannot be used" in problem
    assert "`data.max_skipped: 0.49`" in problem
    assert "0.png" in problem and "2.png" in problem and "3.png" not in problem
    assert notes == []


def test_no_image_left_is_a_problem_whatever_may_be_skipped():
    every = {index: f"{index}.png: is text" for index in range(3)}
    kept, problems, _ = apply_policy(found_with(every, 3), section(on_bad_image="skip", max_skipped=1.0))
    assert len(kept) == 0
    assert len(problems) == 1
