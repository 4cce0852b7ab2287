"""Folders of real files: which are images, what belongs to them, and what is refused."""

import json
import os
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loraloom.configs.data_sections import FolderSource
from loraloom.configs.errors import UserError
from loraloom.data.source import ImageSource, open_source
from loraloom.data.sources.folder import image_files


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def put(root: Path, files: dict[str, bytes | str]) -> None:
    """Files by name, with the folders that they are in."""
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)


def opened(root: Path, **settings) -> ImageSource:
    return open_source(FolderSource.model_validate({"path": str(root), **settings}))


def names(root: Path, source: ImageSource) -> list[str]:
    return [str(source.path(index).relative_to(root)) for index in range(len(source))]


def test_images_are_found_in_all_folders_in_one_order(root, encode):
    put(root, {"b.PNG": encode("red"), "a/c.jpeg": encode("blue"), "a/d/e.webp": encode("green")})
    source = opened(root, caption="x")
    assert names(root, source) == ["a/c.jpeg", "a/d/e.webp", "b.PNG"]
    assert [source.read(index) for index in range(3)] == [encode("blue"), encode("green"), encode("red")]
    assert source.location(2) == str(root / "b.PNG")
    assert (source.name, source.problems, source.declared_sizes) == ("photos", [], None)
    assert source.counts == {"captions from `caption`": 3}
    assert image_files(root) == [source.path(index) for index in range(3)]


def test_what_is_no_image_is_left_out_and_counted_where_it_surprises(root, encode):
    put(root, dict.fromkeys(["a.png", ".hidden.png", ".git/b.png", "._a.png"], encode()))
    put(root, dict.fromkeys(["Thumbs.db", ".DS_Store", "desktop.ini"], ""))
    put(root, dict.fromkeys(["a.json", "b.json", "c.HEIC", "LICENSE", "d.txt", "e.mask.png"], "surprise"))
    os.mkfifo(root / "pipe.png")
    (root / "folder.png").mkdir()
    source = opened(root, caption="x")
    assert names(root, source) == ["a.png"]
    assert source.problems == []
    assert source.counts == {
        "captions from `caption`": 1,
        "ignored .json files": 2,
        "ignored .heic files": 1,
        "ignored files without an ending": 1,
        "caption files without an image": 1,
        "masks without an image": 1,
    }


def test_captions_beside_images_win_over_the_one_of_the_section(root, encode):
    put(root, {f"{name}.png": encode() for name in "abcd"})
    put(root, {"a.txt": "\ufeffa red square\r\nred\r\n", "b.caption": "blue", "c.txt": "same\n", "c.caption": "same"})
    source = opened(root, caption="a square")
    assert [source.captions(index) for index in range(4)] == [["a red square", "red"], ["blue"], ["same"], ["a square"]]
    assert source.problems == []
    assert source.counts == {
        "captions from .txt": 2,
        "captions from .caption": 1,
        "captions from `caption`": 1,
        "images with several captions": 1,
    }


def test_every_problem_with_captions_is_told_with_its_file(root, encode):
    put(root, {f"{name}.png": encode() for name in "abcde"})
    put(root, {"a.txt": "größe".encode("cp1252"), "b.txt": "one", "b.caption": "two", "c.txt": "\n", "d.txt": "fine"})
    source = opened(root)
    assert source.problems == [
        f"{root}/a.txt: byte 0xf6 at offset 2 is not UTF-8 text; save it as UTF-8",
        f"{root}/b.txt and {root}/b.caption: give different captions to one image; keep one of them",
        f'{root}/e.png: has no caption; give `caption`, such as "a sks dog", or put e.txt beside it',
        f"{root}/c.png: its caption is empty; write one, or allow it with `empty_captions: keep`",
    ]
    assert len(source) == 5  # they are looked at all the same: all problems at once
    assert source.captions(3) == ["fine"]
    assert source.counts == {"captions from .txt": 2, "empty captions": 1}
    kept = opened(root, caption="", empty_captions="keep")
    assert [kept.captions(index) for index in (2, 4)] == [[""], [""]]
    assert len(kept.problems) == 2


def test_many_images_without_a_caption_are_told_shortly(root, encode):
    put(root, {f"{number:03}.png": encode() for number in range(30)})
    (problem,) = opened(root).problems
    assert problem == (
        f"{root}: 30 images have no caption ({root}/000.png, {root}/001.png, {root}/002.png, …); "
        'give `caption`, such as "a sks dog", or put 000.txt beside it'
    )


def test_masks_lie_beside_their_images(root, encode):
    white, black = encode("white"), encode("black")
    put(root, dict.fromkeys(["a.png", "b.jpg", "c.png"], encode()))
    put(root, {"a.mask.png": white, "b-masklabel.png": black})
    source = opened(root, caption="x", mask="file")
    assert [source.read_mask(index) for index in range(3)] == [white, black, None]
    assert source.problems == [f"{root}/c.png: has no mask; put <name>.mask.png beside it, or set `mask: none`"]
    assert source.counts["masks"] == 2
    unused = opened(root, caption="x")
    assert [unused.read_mask(index) for index in range(3)] == [None] * 3
    assert (unused.problems, unused.counts["masks that are not used (`mask: file` would)"]) == ([], 2)


def test_links_may_not_lead_out_of_the_folder(root, encode):
    outside = root.parent / "outside"
    put(outside, {"secret.png": encode(), "words.txt": "secret"})
    put(root, {"real.png": encode(), "inner/b.png": encode("blue")})
    for name, target in (
        ("out.png", outside / "secret.png"),
        ("folder", outside),
        ("real.txt", outside / "words.txt"),
        ("gone.png", root / "nothing.png"),
        ("loop.png", root / "loop.png"),
        ("readme.md", outside / "words.txt"),  # nothing to us
        ("in.png", root / "real.png"),
        ("again", root / "inner"),  # its images are found where they are
    ):
        (root / name).symlink_to(target)
    source = opened(root, caption="x")
    assert names(root, source) == ["in.png", "inner/b.png", "real.png"]
    out, gone = "is a link that leads out of the folder, to", "which is no file; delete it or correct it"
    assert source.problems == [
        f"{root}/folder: {out} {outside}; copy what you need into the folder",
        f"{root}/gone.png: is a link to {root}/nothing.png, {gone}",
        f"{root}/loop.png: is a link to {root}/loop.png, {gone}",
        f"{root}/out.png: {out} {outside}/secret.png; copy what you need into the folder",
        f"{root}/real.txt: {out} {outside}/words.txt; copy what you need into the folder",
    ]
    assert source.captions(2) == ["x"]
    (root / "real.png").unlink()
    (root / "real.png").symlink_to(outside / "secret.png")  # after it was opened
    with pytest.raises(OSError, match="leads out of"):
        source.read(2)


def test_a_folder_that_is_a_link_itself_is_read(root, encode):
    put(root, {"a.png": encode()})
    (root.parent / "link").symlink_to(root)
    source = opened(root.parent / "link", caption="x")
    assert (source.problems, source.read(0)) == ([], encode())


def test_a_name_that_is_not_utf8_is_a_problem(root, encode):
    put(root, {"a.png": encode()})
    (root / os.fsdecode(b"gr\xf6\xdfe.png")).write_bytes(encode())
    source = opened(root, caption="x")
    assert names(root, source) == ["a.png"]
    assert source.problems == [f"{root}/gr\\udcf6\\udcdfe.png: its name is not UTF-8; rename it"]


def test_a_folder_without_images_is_refused(root):
    with pytest.raises(UserError, match=r"none: there is no such folder of images"):
        opened(root / "none")
    put(root, {"a.txt": "a caption"})
    with pytest.raises(UserError, match=r"photos: holds no images \(looked for .*, also in the folders in it\)"):
        opened(root)


@pytest.mark.parametrize(
    ("files", "path", "words"),
    [
        (["a.tar"], "a.tar", "is a tar file, not a folder; `shards`"),
        (["a.png"], "a.png", "is a file, not a folder"),
        (["state.json", "x.arrow"], ".", "there are 1 .json file, 1 .arrow file; `dataset` in place of `path`"),
        (["0.tar", "1.tar"], ".", "there are 2 .tar files; `shards: "),
    ],
)
def test_what_another_kind_of_source_reads_is_told_with_its_name(root, files, path, words):
    put(root, dict.fromkeys(files, "x"))
    with pytest.raises(UserError) as refused:
        opened(root / path)
    assert words in str(refused.value)


# ------------------------------------------------------------------------ with metadata


def lines(*rows: dict | str) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def test_metadata_is_the_list_of_images(root, encode):
    put(root, {"a.png": encode("red"), "b/c.png": encode("blue"), "unlisted.png": encode(), "b/c.txt": "not read"})
    put(root, {"a.mask.png": encode("white")})
    rows = [
        {"file_name": "./b//./c.png", "text": ["blue", " square\n"], "width": 20, "height": 16},
        {"file_name": "a.png", "text": None, "width": 7},
        {"file_name": "a.png", "text": "red", "extra": {"x": 1}},
    ]
    put(root, {"metadata.jsonl": lines(*rows)})
    source = opened(root, caption="x", mask="file")
    assert names(root, source) == ["b/c.png", "a.png", "a.png"]
    assert [source.captions(index) for index in range(3)] == [["blue", "square"], ["x"], ["red"]]
    assert source.declared_sizes.tolist() == [[20, 16], [0, 0], [0, 0]]
    assert [source.read_mask(index) for index in range(2)] == [None, encode("white")]
    assert source.problems == [f"{root}/b/c.png: has no mask; put <name>.mask.png beside it, or set `mask: none`"]
    assert source.counts == {
        "captions from metadata.jsonl": 2,
        "captions from `caption`": 1,
        "images with several captions": 1,
        "masks": 2,
        "images that metadata.jsonl does not list": 1,
        "images that metadata.jsonl lists again": 1,
        "caption files ignored beside metadata.jsonl": 1,
    }


def test_paths_of_metadata_stay_in_the_folder_and_exist(root, encode):
    outside = root.parent / "outside"
    put(outside, {"secret.png": encode()})
    good = ["a.png", ".hidden/b.png", "..c.png", "d...png"]
    put(root, dict.fromkeys(good, encode()))
    (root / "out.png").symlink_to(outside / "secret.png")
    (root / "folder").symlink_to(outside)
    outward = f"is a link that leads out of the folder, to {outside}"
    bad = {
        "../outside/secret.png": "leads out of the folder; copy the image into it",
        "b/../../outside/secret.png": "leads out of the folder; copy the image into it",
        "..": "leads out of the folder; copy the image into it",
        "..\\outside\\secret.png": "leads out of the folder; copy the image into it",
        str(outside / "secret.png"): "is an absolute path; write it from the folder of the metadata",
        "C:\\photos\\a.png": "is an absolute path; write it from the folder of the metadata",
        "": "is no path of an image; write one",
        ".": "is no path of an image; write one",
        "a\0.png": "is no path of an image; write one",
        "out.png": f"{outward}/secret.png; copy what you need into the folder",
        "./folder//secret.png": f"is reached through {root}/folder, which {outward}; "
        "copy what you need into the folder",
        "gone.png": "does not exist; correct it or take it out",
        "x" * 300 + ".png": "does not exist; correct it or take it out",
    }
    put(root, {"metadata.jsonl": lines(*({"file_name": name, "text": "x"} for name in [*bad, *good]))})
    source = opened(root)
    assert names(root, source) == good
    told = {int(problem.split(" line ")[1].split(":")[0]): problem for problem in source.problems}
    for line, (name, reason) in enumerate(bad.items(), 1):
        shown = name.replace("./folder//", "folder/")
        assert told[line] == f"{root}/metadata.jsonl line {line}: {shown!r} {reason}"
    assert len(source.problems) == len(bad)


def test_with_declared_sizes_absent_images_are_left_to_the_scan(root, encode, monkeypatch):
    put(root, {"a.png": encode()})
    row = {"text": "x", "width": 20, "height": 16}
    put(root, {"metadata.jsonl": lines({"file_name": "a.png"} | row, {"file_name": "gone.png"} | row)})
    monkeypatch.setattr("loraloom.data.sources.folder.os.path.isfile", lambda file: pytest.fail(f"looked at {file}"))
    source = opened(root)
    assert (len(source), source.problems) == (2, [])
    with pytest.raises(FileNotFoundError):
        source.read(1)


def test_images_outside_of_the_listing_have_masks_too(root, encode):
    put(root, {".hidden/a.png": encode(), ".hidden/a.mask.png": encode("white"), ".hidden/b.png": encode()})
    put(root, {"metadata.csv": "file_name,text\n.hidden/a.png,x\n.hidden/b.png,x\n"})
    source = opened(root, mask="file")
    assert [source.read_mask(index) for index in range(2)] == [encode("white"), None]
    assert source.problems == [f"{root}/.hidden/b.png: has no mask; put <name>.mask.png beside it, or set `mask: none`"]
    assert source.counts["masks"] == 1


def test_two_metadata_files_are_one_too_many(root, encode):
    put(root, {"a.png": encode(), "metadata.csv": "file_name,text\na.png,x\n", "metadata.jsonl": ""})
    with pytest.raises(UserError, match=r"photos: holds metadata\.jsonl and metadata\.csv; keep the one"):
        opened(root)


def test_metadata_in_a_folder_below_is_read_where_all_images_are_there(root, encode):
    put(root, {"sub/a.png": encode(), "sub/metadata.csv": "file_name,text\na.png,own words\n"})
    source = opened(root, caption="x")
    assert (source.captions(0), source.name, source.location(0)) == (["own words"], "photos", f"{root}/sub/a.png")
    put(root, {"b.png": encode()})
    source = opened(root, caption="x")
    assert [source.captions(index) for index in range(2)] == [["x"], ["x"]]
    assert any("sub/metadata.csv is not read" in note for note in source.notes)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_paths_of_parquet_may_be_any_strings(root, encode, kind):
    put(root, {"a.png": encode("red"), "b.png": encode("blue")})
    names = pa.array(["./b.png", "../c.png", None, "a.png"], kind)
    pq.write_table(pa.table({"file_name": names, "text": pa.array(list("wxyz"), kind)}), root / "metadata.parquet")
    source = opened(root)
    assert [source.read(index) for index in range(2)] == [encode("blue"), encode("red")]
    assert [source.captions(index) for index in range(2)] == [["w"], ["z"]]
    assert [problem.split(" row ")[1] for problem in source.problems] == [
        "3: None is no path of an image; write one",
        "2: '../c.png' leads out of the folder; copy the image into it",
    ]


def test_an_open_source_goes_to_other_processes(root, encode):
    put(root, {"a.png": encode(), "metadata.csv": "file_name,text\na.png,x\n"})
    source = pickle.loads(pickle.dumps(opened(root)))
    assert (source.read(0), source.captions(0)) == (encode(), ["x"])
