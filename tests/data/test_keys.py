"""Keys: other content, another key; and hashes of weights that are remembered no longer than they are true."""

import json
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.configs.errors import UserError
from loraloom.configs.machine import cache_folder
from loraloom.data import keys
from loraloom.data.keys import content_key, weights_hash

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=4)
parts = st.lists(st.recursive(scalars, lambda inner: st.lists(inner, max_size=3).map(tuple)), max_size=4).map(tuple)


def exact(part) -> object:
    """Equal only for parts that are alike in value, type and grouping: 1, 1.0 and True are equal in Python."""
    if isinstance(part, tuple):
        return ("tuple", *map(exact, part))
    return (type(part).__name__, struct.pack(">d", part) if isinstance(part, float) else part)


@given(parts, parts)
@settings(deadline=None, max_examples=100)
def test_keys_are_equal_only_for_equal_parts(one, other):
    assert (content_key(*one) == content_key(*other)) == (exact(one) == exact(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("ab", "c"), ("a", "bc")),
        (("ab",), ("a", "b")),
        (("a", ""), ("a",)),
        ((("a", "b"), "c"), ("a", ("b", "c"))),
        ((("a",),), ("a",)),
        (((),), ()),
        (("1",), (1,)),
        ((1,), (1.0,)),
        ((1,), (True,)),
        ((0.0,), (-0.0,)),
        (("a",), (b"a",)),
        ((None,), ("",)),
        ((64, 512), (6, 4512)),
    ],
)
def test_parts_that_look_alike_have_keys_of_their_own(one, other):
    assert content_key(*one) != content_key(*other)


def test_a_key_is_the_same_everywhere_and_of_nothing_else_than_values(monkeypatch):
    assert content_key("caption", 512, (0.5, b"x"), None) == "4cf57557f3067c88c29379f50cc0bc8e"
    assert content_key("\udcff") != content_key("?")  # a file name that is no UTF-8
    with pytest.raises(TypeError, match="list"):
        content_key([1])  # pyright: ignore[reportArgumentType]
    before = content_key("a")
    monkeypatch.setattr(keys, "FORMAT", 2)
    assert content_key("a") != before


def test_where_the_cache_is(monkeypatch):
    for name in ("LORALOOM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder(None) == Path("/home/someone/.cache/loraloom")
    monkeypatch.setenv("XDG_CACHE_HOME", "/large")
    assert cache_folder(None) == Path("/large/loraloom")
    monkeypatch.setenv("LORALOOM_CACHE", "/larger/loras")
    assert cache_folder(None) == Path("/larger/loras")
    assert cache_folder("~/mine") == Path("/home/someone/mine")


# weights


@pytest.fixture
def component(tmp_path) -> Path:
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(1000))
    (folder / "config.json").write_text("{}")
    (folder / "merges.txt").write_text("a b")
    return folder


def change_byte(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(999) + b"\1")


@pytest.mark.parametrize(
    "change",
    [
        change_byte,
        lambda folder: (folder / "config.json").rename(folder / "configs.json"),
        lambda folder: (folder / "merges.txt").write_text("a c"),
        lambda folder: (folder / "spiece.model").write_bytes(b""),
        lambda folder: (folder / "config.json").unlink(),
    ],
    ids=["byte", "name", "tokenizer", "file more", "file less"],
)
def test_the_hash_of_weights_sees_every_change(change, component):
    before = weights_hash(component)
    assert weights_hash(component) == before
    (component / "README.md").write_text("is no part of the encoder")
    assert weights_hash(component) == before
    change(component)
    assert weights_hash(component) != before


@pytest.fixture
def reads(monkeypatch) -> list[Path]:
    """The files that are hashed, as they are."""
    hashed, original = [], keys._file_hash
    monkeypatch.setattr(keys, "_file_hash", lambda file: (hashed.append(file), original(file))[1])
    return hashed


def test_hashes_of_files_are_remembered_until_they_change(component, tmp_path, reads, monkeypatch):
    monkeypatch.setattr(keys, "_SETTLED", -1.0)
    first = weights_hash(component, tmp_path / "cache")
    assert first == weights_hash(component)
    assert len(reads) == 6
    assert weights_hash(component, tmp_path / "cache") == first
    assert len(reads) == 6
    model = component / "model.safetensors"
    times = model.stat()
    change_byte(component)
    os.utime(model, ns=(times.st_atime_ns, times.st_mtime_ns))  # the same size and time, as `cp -p` may leave them
    changed = weights_hash(component, tmp_path / "cache")
    assert changed != first
    assert reads[6:] == [model]
    os.utime(model, ns=(0, 0))
    assert weights_hash(component, tmp_path / "cache") == changed
    assert reads[6:] == [model, model]
    with open(model, "ab") as stream:
        stream.write(b"more")
    assert weights_hash(component, tmp_path / "cache") not in (first, changed)
    assert reads[6:] == [model, model, model]


def test_a_hash_is_remembered_for_the_file_behind_a_link(component, tmp_path, reads, monkeypatch):
    monkeypatch.setattr(keys, "_SETTLED", -1.0)
    before = weights_hash(component, tmp_path / "cache")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in component.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert weights_hash(snapshot, tmp_path / "cache") == before
    assert len(reads) == 3


def test_a_file_written_just_now_is_not_remembered(component, tmp_path, reads):
    for _ in range(2):
        weights_hash(component, tmp_path / "cache")
    assert len(reads) == 6


@pytest.mark.parametrize("content", [b"", b"{", b"3", b"[]", b"\xff", json.dumps(["path", 1, 2, 3, "hash"]).encode()])
def test_a_damaged_memory_is_not_believed(content, component, tmp_path, reads, monkeypatch):
    monkeypatch.setattr(keys, "_SETTLED", -1.0)
    before = weights_hash(component, tmp_path / "cache")
    for file in (tmp_path / "cache/weights").iterdir():
        file.write_bytes(content)
    assert weights_hash(component, tmp_path / "cache") == before
    assert len(reads) == 6


def test_a_memory_that_cannot_be_written_is_done_without(component, tmp_path, monkeypatch):
    monkeypatch.setattr(keys, "_SETTLED", -1.0)
    (tmp_path / "file").write_bytes(b"")
    assert weights_hash(component, tmp_path / "file") == weights_hash(component)


def test_a_folder_without_weights_is_a_line_for_the_user(tmp_path):
    with pytest.raises(UserError, match=r"holds no weights.*\.safetensors"):
        weights_hash(tmp_path)
    with pytest.raises(UserError, match=r"gone: cannot be read"):
        weights_hash(tmp_path / "gone")
