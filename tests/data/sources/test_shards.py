"""Tar files as WebDataset writes them: where everything is, and what is no whole tar file."""

import gzip
import io
import itertools
import json
import os
import pickle
import tarfile
from pathlib import Path
from unicodedata import normalize

import pytest

from loraloom.configs.data_sections import ShardSource
from loraloom.configs.errors import UserError
from loraloom.data import tar_index
from loraloom.data.source import ImageSource, open_source


def pack(file: Path, members: dict[str, bytes | str] | list[tuple[str, bytes | str]], **options) -> Path:
    """A tar file; a list may have one name twice."""
    with tarfile.open(file, "w", **options) as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def opened(pattern: Path | str, cache: Path | None = None, **settings) -> ImageSource:
    return open_source(ShardSource.model_validate({"shards": str(pattern), **settings}), cache)


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_with_one_stem_are_one_sample(tmp_path, encode, layout):
    long = "folder" * 20 + "/größe"
    pack(
        tmp_path / "b.tar",
        {
            "x/0001.png": encode("red"),
            "x/0001.txt": "\ufeffred\nsquare\n",
            "y/0001.JPG": encode("blue"),
            "y/0001.json": json.dumps({"caption": ["blue", "square"], "text": "not this"}),
            "x/0001.mask.png": encode("white"),
            f"{long}.webp": encode("green"),
            f"{long}.json": json.dumps({"text": "green"}),
            f"{long}-masklabel.png": encode("black"),
        },
        format=layout,
    )
    pack(tmp_path / "a.tar", {"./0001.png": encode("black"), "./0001.caption": "black", "./0001.json": "[not read"})
    source = opened(tmp_path / "*.tar", mask="file", caption="x")
    assert [source.location(index) for index in range(len(source))] == [
        f"{tmp_path}/a.tar:./0001.png",
        f"{tmp_path}/b.tar:x/0001.png",
        f"{tmp_path}/b.tar:y/0001.JPG",
        f"{tmp_path}/b.tar:{long}.webp",
    ]
    assert [source.read(index) for index in range(4)] == [encode(name) for name in ("black", "red", "blue", "green")]
    assert [source.captions(index) for index in range(4)] == [
        ["black"],
        ["red", "square"],
        ["blue", "square"],
        ["green"],
    ]
    assert [source.read_mask(index) for index in range(4)] == [None, encode("white"), None, encode("black")]
    assert [source.path(index) for index in (0, 3)] == [tmp_path / "a.tar", tmp_path / "b.tar"]
    assert (source.name, source.declared_sizes) == ("*.tar", None)
    assert [problem.split(": ")[1].split(" (")[0] for problem in source.problems] == ["2 images have no mask"]
    assert source.counts == {
        "captions from .caption": 1,
        "captions from .txt": 1,
        "captions from .json": 2,
        "images with several captions": 2,
        "masks": 2,
        "shards": 2,
    }
    assert opened(tmp_path / "*.tar").read_mask(1) is None


def test_what_is_no_sample_is_left_out_and_counted(tmp_path, encode):
    members = {
        "0001.png": encode(),
        "._0001.png": b"",
        ".hidden/0002.png": encode(),  # WebDataset reads folders of any name
        "0001.depth.png": encode(),
        "0001.cls": "3",
        "0003.txt": "no image",
        "0004-masklabel.png": encode(),
        "README": "",
    }
    source = opened(pack(tmp_path / "a.tar", members), caption="x")
    assert [source.location(index).split(":")[1] for index in range(len(source))] == ["0001.png", ".hidden/0002.png"]
    assert source.problems == []
    assert source.counts == {
        "captions from `caption`": 2,
        "shards": 1,
        "ignored .depth.png members": 1,
        "ignored .cls members": 1,
        "samples without an image": 2,
    }


@pytest.mark.parametrize(
    ("image", "file"),
    [
        ("IMG_0.PNG", "img_0.txt"),
        ("IMG_0.PNG", "img_0.json"),
        ("set/0.png", "set/0.png.txt"),
        ("0.JPG", "0.jpg.caption"),
        ("Photo.v2.png", "photo.V2.TXT"),
        (normalize("NFC", "müsli.png"), normalize("NFD", "müsli.txt")),
        (normalize("NFD", "müsli.JPG"), normalize("NFC", "Müsli.jpg.txt")),
    ],
)
def test_what_belongs_to_an_image_is_found_however_it_is_spelled(tmp_path, encode, image, file):
    text = '{"caption": "own"}' if file.endswith("json") else "own"
    mask = f"{image.rpartition('.')[0].swapcase()}.mask.png"
    source = opened(pack(tmp_path / "a.tar", {image: encode(), file: text, mask: encode("white")}), mask="file")
    assert (source.problems, source.notes, len(source)) == ([], [], 1)
    assert (source.captions(0), source.read_mask(0)) == (["own"], encode("white"))


@pytest.mark.parametrize(
    "members",
    [
        {"Aa.png": "", "aA.png": "", "aa.txt": "of either"},
        {"a.png": "", "a.txt": "the fallback", "A.txt": "other"},
        {"a.png": "", "a.txt": "the fallback", "a.png.txt": "other"},
    ],
)
def test_what_fits_two_images_or_is_there_already_is_left_and_told(tmp_path, encode, members):
    source = opened(
        pack(tmp_path / "a.tar", {name: text or encode() for name, text in members.items()}), caption="the fallback"
    )
    assert {*itertools.chain(*(source.captions(index) for index in range(len(source))))} == {"the fallback"}
    assert len(source.notes) == 1


def test_every_problem_in_a_tar_file_is_told_with_its_member(tmp_path, encode):
    image = encode()
    bad = {
        "a.txt": "größe".encode("cp1252"),
        "b.json": '{"caption": 5}',
        "c.json": "{",
        "d.json": '{"url": "x"}',
        "e.txt": " ",
        "f.json": '{"caption": "\\ud800"}',
        "g.json": b'{"caption": "\xff"}',
        "h.txt": "one",
        "h.caption": "two",
        "i.png": image,
        "i.v2.png": image,  # its stem ends at the first dot, and depth.png and the like are other things
        "j.jpg": image,
        "i.jpg": image,
    }
    members = {f"{name}.png": image for name in "abcdefgh"} | bad
    shard = pack(tmp_path / "a.tar", members)
    source = opened(shard)
    assert source.problems == [
        f"{shard}:a.txt: byte 0xf6 at offset 2 is not UTF-8 text; save it as UTF-8",
        f"{shard}:b.json: its 'caption' is 5; write text, or a list of texts",
        f"{shard}:c.json: is not JSON (Expecting property name enclosed in double quotes at line 1); correct it",
        f"{shard}:f.json: its 'caption' holds half of a character; write it as UTF-8",
        f"{shard}:g.json: byte 0xff at offset 13 is not UTF-8 text; save it as UTF-8",
        f"{shard}:h.txt and {shard}:h.caption: give different captions to one image; keep one of them",
        f"{shard}: i.png and i.jpg are images of one sample, as its name ends at the first dot; rename one",
        f"{shard}: 2 images have no caption ({shard}:d.png, {shard}:j.jpg); "
        'give `caption`, such as "a sks dog", or put .txt files with their stems into the tar file',
        f"{shard}:e.png: its caption is empty; write one, or allow it with `empty_captions: keep`",
    ]


def test_a_member_that_was_added_again_is_told(tmp_path, encode):
    shard = pack(tmp_path / "a.tar", [("a.png", encode("red")), ("a.png", encode("blue"))])
    assert "a.png and a.png are images of one sample" in opened(shard, caption="x").problems[0]


def test_links_within_a_tar_file_are_told(tmp_path, encode):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("a.png", tarfile.LNKTYPE), ("b.png", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo(os.fsdecode(b"\xff.png"))
        tar.addfile(info)
    source = opened(tmp_path / "a.tar", caption="x")
    assert len(source) == 0
    assert source.problems == [
        f"{tmp_path}/a.tar:a.png: is a link or has holes; pack it again",
        f"{tmp_path}/a.tar:b.png: is a link or has holes; pack it again",
        f"{tmp_path}/a.tar:\\udcff.png: has a name that is not UTF-8; pack it again",
    ]


@pytest.mark.parametrize("keep", ["in a header", "in an image", "between members", "before the end mark"])
def test_a_tar_file_that_was_cut_is_named(tmp_path, encode, keep):
    whole = pack(tmp_path / "whole.tar", {"a.png": encode(), "b.png": encode(size=(99, 99))})
    with tarfile.open(whole) as tar:
        first, second = tar.getmembers()
    end = second.offset_data + (second.size + 511) // 512 * 512
    cuts = {"in a header": second.offset + 100, "in an image": second.offset_data + 5}
    cuts |= {"between members": second.offset, "before the end mark": end}
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[: cuts[keep]])
    assert opened(whole, caption="x").problems == []
    source = opened(tmp_path / "*.tar", caption="x")
    assert len(source) == 2  # those of the whole one
    (problem,) = source.problems
    assert problem.startswith(f"{tmp_path}/cut.tar: is no whole tar file (")
    assert problem.endswith("); make it or fetch it again")
    assert first.offset == 0


def test_broken_joined_and_other_files_are_named(tmp_path, encode):
    whole = pack(tmp_path / "whole.tar", {"a.png": encode(), "b.png": encode()}).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        header = tar.getmembers()[1].offset
    (tmp_path / "broken.tar").write_bytes(whole[:header] + b"x" + whole[header + 1 :])
    (tmp_path / "joined.tar").write_bytes(whole * 2)
    (tmp_path / "image.tar").write_bytes(encode())
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "packed.tar").write_bytes(gzip.compress(whole))
    for name, words in (
        ("broken", f"(broken at byte {header:,})"),
        ("joined", "it goes on after its end mark"),
        ("image", "is no whole tar file ("),
        ("empty", "(empty file)"),
        ("packed", "is compressed with gzip, so it cannot be read at random; unpack it to a plain .tar"),
    ):
        (problem,) = opened(tmp_path / f"{name}.tar", caption="x").problems
        assert problem.startswith(f"{tmp_path}/{name}.tar: ")
        assert words in problem


def test_a_pattern_without_tar_files_is_refused(tmp_path, encode):
    pack(tmp_path / "a.tar", {"a.txt": "x"})
    for pattern, words in (
        ("b.tar", "b.tar: there is no such tar file"),
        ("{a..b}.tar", "is written with * and ?, not with {…}"),
        ("", "is a folder; write"),
        ("a.tar", "the shards hold no images"),
    ):
        with pytest.raises(UserError) as error:
            opened(tmp_path / pattern)
        assert words in str(error.value)
    pack(tmp_path / "[1].tar", {"a.png": encode()})
    assert len(opened(tmp_path / "[1].tar", caption="x")) == 1


def test_the_index_is_kept_until_a_shard_changes(tmp_path, encode, monkeypatch):
    def forbidden(shard: str) -> None:
        raise AssertionError(f"{shard} is gone through again")

    red, white = encode("red"), encode("white")
    pack(tmp_path / "a.tar", {"a.png": red, "a.txt": "red\nsquare", "a.mask.png": white, "b.png": b""})
    cache = tmp_path / "cache" / "scans"
    first = opened(tmp_path / "*.tar", cache, caption="x", mask="file")
    (index,) = cache.rglob("*.parquet")
    with monkeypatch.context() as patch:
        patch.setattr(tar_index, "_read_members", forbidden)
        again = opened(tmp_path / "*.tar", cache, caption="x", mask="file")
    for source in (first, again, pickle.loads(pickle.dumps(again))):
        assert (source.read(0), source.read(1), source.read_mask(0)) == (red, b"", white)
        assert (source.captions(0), source.captions(1)) == (["red", "square"], ["x"])
        assert (source.counts, source.problems) == (first.counts, first.problems)

    index.write_bytes(index.read_bytes()[:-20])  # a cache that cannot be read is made again
    assert opened(tmp_path / "*.tar", cache, caption="x").read(0) == red

    pack(tmp_path / "a.tar", {"a.png": encode("blue"), "a.txt": "blue"})
    changed = opened(tmp_path / "*.tar", cache)
    assert (changed.read(0), changed.captions(0)) == (encode("blue"), ["blue"])
    pack(tmp_path / "b.tar", {"a.png": encode("green"), "a.txt": "green"})
    assert len(opened(tmp_path / "*.tar", cache)) == 2
    assert not [file for file in cache.rglob("*.*") if file.suffix != ".parquet"]


def test_an_index_with_problems_is_not_kept(tmp_path, encode):
    pack(tmp_path / "a.tar", {"a.png": encode(), "a.txt": b"\xff"})
    for _ in range(2):
        (problem,) = opened(tmp_path / "a.tar", tmp_path / "cache").problems
        assert problem.startswith(f"{tmp_path}/a.tar:a.txt: byte 0xff")


def test_a_cache_that_cannot_be_written_is_told(tmp_path, encode):
    pack(tmp_path / "a.tar", {"a.png": encode()})
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="indexes: the index of the shards cannot be kept there"):
        opened(tmp_path / "a.tar", tmp_path / "cache", caption="x")


def test_a_tar_file_that_shrank_is_told_when_it_is_read(tmp_path, encode):
    shard = pack(tmp_path / "a.tar", {"a.png": encode()})
    source = opened(shard, caption="x")
    os.truncate(shard, 520)
    with pytest.raises(OSError, match="the tar file is shorter than it was"):
        source.read(0)


def test_names_with_several_dots_are_images_where_their_sample_has_no_other(tmp_path, encode):
    members = {
        "set/1.1.png": encode("red"),
        "set/1.1.txt": "one",
        "set/1.2.PNG": encode("blue"),
        "set/1.2.txt": "two",
        "photo.v2.png": encode("green"),
        "photo.v2.mask.png": encode("white"),
        "plain.png": encode(),
        "plain.depth.png": encode(),
        "__MACOSX/plain.png": encode(),
        "set/@eaDir/1.png": encode(),
    }
    source = opened(pack(tmp_path / "a.tar", members), caption="x", mask="file")
    found = {source.location(index).split(":")[1]: index for index in range(len(source))}
    assert list(found) == ["set/1.1.png", "set/1.2.PNG", "photo.v2.png", "plain.png"]
    assert [source.captions(index) for index in found.values()] == [["one"], ["two"], ["x"], ["x"]]
    assert source.read_mask(found["photo.v2.png"]) == encode("white")
    assert source.read(found["set/1.1.png"]) == encode("red")
    (note,) = source.notes
    assert "1 .depth.png member left out" in note


@pytest.mark.parametrize("folder", ["photos [2024]", "[a]", "*?", "a[!b]/c"])
def test_a_folder_may_be_called_as_patterns_are_written(tmp_path, encode, folder):
    (tmp_path / folder).mkdir(parents=True)
    pack(tmp_path / folder / "a.tar", {"0.png": encode()})
    assert len(opened(tmp_path / folder / "*.tar", caption="x")) == 1
    (tmp_path / "a1").mkdir()
    pack(tmp_path / "a1" / "a.tar", {"0.png": encode(), "1.png": encode()})
    assert len(opened(tmp_path / "[ab][12]" / "*.tar", caption="x")) == 2  # which is a pattern still
    with pytest.raises(UserError, match=r"no such tar file; \[ is part of a pattern"):
        opened(tmp_path / "[c]" / "*.tar", caption="x")
