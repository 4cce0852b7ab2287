"""The cache: the same bytes whatever interrupts a build, and never an entry that is stale, half or damaged."""

import errno
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from loraloom.configs.errors import UserError
from loraloom.data import cache
from loraloom.data.cache import CacheError, Store, cache_folder, content_key, weights_hash

FORK = multiprocessing.get_context("fork")  # a process of its own without importing torch again
KEYS = [content_key("entry", index) for index in range(123)]  # 18 shards of up to 7


def entry_of(key: str) -> dict[str, torch.Tensor]:
    """What an encoder would make of a key."""
    generator = torch.Generator().manual_seed(int(key[:15], 16))
    return {name: torch.randn(2, 3, generator=generator) for name in ("mean", "logvar")}


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def build(folder: Path, keys=KEYS, **options) -> int:
    return Store(folder, shard_entries=7).fill(keys, entry_of, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted build."""
    folder = tmp_path_factory.mktemp("whole")
    assert build(folder) == len(KEYS)
    return folder


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "copied")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


# what comes back


def test_entries_come_back_with_their_types_and_shapes(tmp_path):
    entries = {
        content_key(1): {"a": torch.randn(2, 3), "b": torch.randn(4).half(), "c": torch.randn(3).bfloat16()},
        content_key(2): {"ids": torch.arange(5), "scalar": torch.tensor(2.5), "none": torch.zeros(0, 4)},
    }
    store = Store(tmp_path)
    assert store.fill(list(entries), entries.__getitem__) == 2
    for reader in (store, Store(tmp_path)):
        assert len(reader) == 2
        assert reader.size_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
        assert all(same(reader.get(key), entry) for key, entry in entries.items())


def test_what_compute_returns_may_be_views_of_a_batch_that_is_written_again(tmp_path):
    batch = torch.zeros(4, 6)

    def compute(key: str) -> dict[str, torch.Tensor]:
        batch.fill_(int(key[:4], 16))
        return {"row": batch[1], "column": batch[:, 2], "spread": batch[0, :1].expand(3)}

    store = Store(tmp_path)
    store.fill(KEYS[:3], compute)
    for key in KEYS[:3]:
        assert [(tensor == int(key[:4], 16)).all().item() for tensor in store.get(key).values()] == [True] * 3


def test_an_entry_is_never_a_view_of_the_file(copied):
    store = Store(copied)
    entry = store.get(KEYS[0])
    for file in copied.iterdir():
        with open(file, "r+b") as stream:  # in place: a mapping would show it
            stream.write(bytes(file.stat().st_size))
    assert same(entry, entry_of(KEYS[0]))
    entry["mean"].zero_()  # nor is it read-only


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        build(tmp_path / "store")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "store").iterdir()} == {0o640}


def test_missing_keys_come_in_order_and_once(copied):
    store = Store(copied)
    strange = [content_key("strange", index) for index in range(2)]
    assert store.missing([strange[1], KEYS[3], strange[0], strange[1]]) == [strange[1], strange[0]]
    assert KEYS[3] in store
    assert strange[0] not in store
    store.require(KEYS)
    with pytest.raises(CacheError, match=r"2 of 124 entries are missing.*loraloom cache"):
        store.require(iter([*strange, *KEYS[1:], strange[0]]))
    with pytest.raises(CacheError, match=f"no entry {strange[0]}"):
        store.get(strange[0])


def test_an_index_of_a_million_keys_takes_less_than_250_megabytes(tmp_path):
    keys = [content_key(index) for index in range(2048)]
    Store(tmp_path).fill(keys, lambda key: {"mean": torch.zeros(1), "logvar": torch.zeros(1)})
    Store(tmp_path)  # what is imported and cached on the way
    tracemalloc.start()
    store = Store(tmp_path)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used / len(store) < 250


def test_the_store_is_used_in_forked_and_in_other_processes(copied):
    def check(answer) -> None:
        answer.put([same(reader.get(key), entry_of(key)) for reader in (store, pickle.loads(sent)) for key in KEYS])

    store = Store(copied)
    assert same(store.get(KEYS[5]), entry_of(KEYS[5]))  # the parent's mapping is open
    sent = pickle.dumps(store)
    assert len(sent) == len(pickle.dumps(Store(copied)))  # the shard that was read from is not sent along
    answer = FORK.SimpleQueue()
    process = FORK.Process(target=check, args=(answer,))
    process.start()
    process.join()
    assert answer.get() == [True] * 2 * len(KEYS)


def test_importing_the_cache_imports_no_torch():
    code = "import sys, loraloom.data.cache; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# the same bytes whatever happens


def test_kills_at_random_moments_change_nothing(whole, tmp_path):
    computed = FORK.Value("i", 0)

    def slowly(key: str) -> dict[str, torch.Tensor]:
        time.sleep(0.001 if computed.value < stop + 8 else 60)  # never so far that nothing is left to do
        computed.value += 1
        return entry_of(key)

    moments = random.Random(0)
    for _ in range(5):
        computed.value, stop = 0, moments.randrange(4, 12)
        process = FORK.Process(target=lambda: Store(tmp_path, shard_entries=7).fill(KEYS, slowly))
        process.start()
        while computed.value < stop:
            time.sleep(0.0005)
        time.sleep(moments.uniform(0, 0.004))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    finished = 0
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, "pt") as content:
            finished += len({name.partition("/")[0] for name in content.keys()})  # noqa: SIM118
    assert 0 < finished < len(KEYS)
    assert build(tmp_path) == len(KEYS) - finished
    assert files_of(tmp_path) == files_of(whole)


@pytest.mark.parametrize(("moment", "lost"), [("write", 7), ("fsync", 7), ("replace", 7), ("folder", 0)])
def test_a_kill_within_the_third_write_loses_that_shard_at_most(moment, lost, whole, tmp_path):
    def killed() -> None:
        calls = {"open": 0, "fsync": 0, "replace": 0}

        def dying(name: str, function, at: int):
            def call(*arguments):
                calls[name] += name != "open" or "wb" in arguments
                if calls[name] == at:
                    if moment == "write":
                        Path(arguments[0]).write_bytes(b"half of a shard")
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments)

            return call

        match moment:
            case "write":
                cache.open = dying("open", open, 3)
            case "replace":
                os.replace = dying("replace", os.replace, 3)
            case _:  # two for each shard: the file, then the folder
                os.fsync = dying("fsync", os.fsync, 5 if moment == "fsync" else 6)
        build(tmp_path)

    process = FORK.Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.glob("*.tmp-*"))) == (lost > 0)
    assert build(tmp_path) == len(KEYS) - 21 + lost
    assert files_of(tmp_path) == files_of(whole)


@given(
    st.lists(st.integers(0, 17), max_size=18),
    st.integers(1, 4).flatmap(lambda world: st.permutations(range(world))),
    st.booleans(),
)
@settings(deadline=None, max_examples=20)
def test_the_bytes_depend_neither_on_what_was_finished_nor_on_the_processes(whole, lacking, ranks, at_once):
    """Any shards missing, any number of processes, in any order, which look before or after the others have written."""
    shards = files_of(whole)
    names = sorted(shards)
    assert len(names) == 18
    lost = {names[index] for index in lacking}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in shards.keys() - lost:
            (folder / name).write_bytes(shards[name])
        absent = len(Store(folder).missing(KEYS))
        stores = [Store(folder, shard_entries=7) for _ in ranks]
        if at_once:
            for store in stores:
                store.refresh = lambda: None
        assert absent == sum(
            store.fill(KEYS, entry_of, rank=rank, world=len(ranks)) for store, rank in zip(stores, ranks, strict=True)
        )
        assert files_of(folder) == shards


def test_two_processes_at_the_same_time_give_the_bytes_of_one(whole, tmp_path):
    processes = [FORK.Process(target=build, args=(tmp_path,), kwargs={"rank": rank, "world": 2}) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert files_of(tmp_path) == files_of(whole)
    store = Store(tmp_path)
    assert all(same(store.get(key), entry_of(key)) for key in KEYS)


def test_a_whole_build_is_dealt_evenly(tmp_path):
    assert [build(tmp_path, rank=rank, world=3) for rank in range(3)] == [42, 42, 39]


def test_large_entries_make_short_shards(tmp_path):
    store = Store(tmp_path, shard_entries=7, shard_bytes=100)
    assert store.fill(KEYS[:10], entry_of, entry_bytes=48) == 10
    assert len(files_of(tmp_path)) == 5
    assert store.fill(KEYS[10:13], entry_of, entry_bytes=1000) == 3
    assert len(files_of(tmp_path)) == 8


def test_a_partial_rebuild_computes_only_what_is_missing(copied):
    asked: list[str] = []
    strange = [content_key("strange", index) for index in range(3)]

    def compute(key: str) -> dict[str, torch.Tensor]:
        asked.append(key)
        return entry_of(key)

    before = files_of(copied)
    store = Store(copied)
    assert store.fill([strange[0], *KEYS[:30], *strange, *KEYS[30:]], compute) == 3
    assert asked == strange
    assert before.items() < files_of(copied).items()
    assert store.fill([*KEYS, *strange], compute) == 0


@pytest.mark.parametrize("error", [RuntimeError("the encoder broke"), KeyboardInterrupt()])
def test_an_error_loses_only_the_shard_under_way(error, whole, tmp_path):
    def compute(key: str) -> dict[str, torch.Tensor]:
        if key == KEYS[17]:
            raise error
        return entry_of(key)

    store = Store(tmp_path, shard_entries=7)
    with pytest.raises(type(error)):
        store.fill(KEYS, compute)
    assert len(store) == 14
    assert store.fill(KEYS, entry_of) == len(KEYS) - 14
    assert files_of(tmp_path) == files_of(whole)


def test_refresh_sees_what_others_wrote_and_deleted(whole, tmp_path):
    folder = tmp_path / "later"
    store = Store(folder)
    assert len(store) == store.size_bytes == 0
    shutil.copytree(whole, folder)
    assert len(store) == 0
    store.refresh()
    assert len(store) == len(KEYS)
    assert same(store.get(KEYS[9]), entry_of(KEYS[9]))
    os.remove(min(folder.iterdir()))
    store.refresh()
    assert 0 < len(store) < len(KEYS)
    assert all(same(store.get(key), entry_of(key)) for key in KEYS if key in store)


# damage


def shard_with(folder: Path, key: str) -> Path:
    return next(file for file in folder.iterdir() if key.encode() in file.read_bytes())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content[:-1], "not the length"),
        (lambda content: content + b"\0", "not the length"),
        (lambda content: content[:20], "not a whole safetensors file"),
        (lambda content: b"", ""),
        (lambda content: b"<html>an error page</html>", "not a whole safetensors file"),
        (lambda content: (2).to_bytes(8, "little") + b"{}", "no shard of this"),
        (lambda content: content.replace(b'\\"format\\":1', b'\\"format\\":2'), "no shard of this"),
        (lambda content: content.replace(b"loraloom.cache", b"somebody.else_"), "no shard of this"),
        (lambda content: content.replace(KEYS[0].encode() + b"/", KEYS[0][::-1].encode() + b"/"), "header lists"),
    ],
    ids=["truncated", "longer", "only a begin", "empty", "no shard", "no entries", "format 2", "foreign", "other key"],
)
def test_a_shard_that_is_not_whole_is_named_and_made_again(damage, words, whole, copied):
    file = shard_with(copied, KEYS[0])
    content = damage(file.read_bytes())
    assert content != file.read_bytes()
    file.write_bytes(content)
    store = Store(copied, shard_entries=7)
    assert len(store.problems) == 1
    assert store.problems[0].startswith(f"{file}: not used")
    assert words in store.problems[0]
    assert "\n" not in store.problems[0]
    assert store.missing(KEYS) == KEYS[:7]
    assert store.fill(KEYS, entry_of) == 7
    assert store.problems == []
    assert files_of(copied) == files_of(whole)


def test_a_flipped_byte_of_an_entry_is_found_when_it_is_read(copied):
    file = shard_with(copied, KEYS[0])
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    store = Store(copied)
    assert store.problems == []
    unreadable = []
    for key in KEYS:
        try:
            assert same(store.get(key), entry_of(key))
        except CacheError as error:
            unreadable.append(str(error))
    assert len(unreadable) == 1
    assert str(file) in unreadable[0]
    assert "delete it and run `loraloom cache` again" in unreadable[0]


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_no_byte_of_a_shard_can_change_what_is_read(whole, data):
    file = shard_with(whole, KEYS[0])
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / file.name).write_bytes(content)
        store = Store(Path(folder))
        for key in KEYS[:7]:
            with suppress(CacheError):
                assert same(store.get(key), entry_of(key))


def test_a_shard_that_is_cut_or_goes_away_is_named(copied):
    store = Store(copied)
    file = shard_with(copied, KEYS[0])
    for change in (lambda: os.truncate(file, 100), file.unlink):
        change()
        with pytest.raises(CacheError, match=f"{file.name}: cannot be read") as raised:
            store.get(KEYS[0])
        assert "\n" not in str(raised.value)


def test_leftovers_are_removed_if_nobody_can_be_writing_them(tmp_path):
    dead = FORK.Process(target=int)
    dead.start()
    dead.join()
    here = cache.socket.gethostname()
    ages = {
        f"a.safetensors.tmp-{here}-{dead.pid}": (0, False),
        f"b.safetensors.tmp-{here}-{os.getpid()}": (0, True),
        f"c.safetensors.tmp-else-where-{dead.pid}": (3600, True),
        f"d.safetensors.tmp-else-where-{dead.pid}": (2 * 86400, False),
        "notes.txt": (2 * 86400, True),
    }
    for name, (age, _) in ages.items():
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    assert len(Store(tmp_path)) == 0
    assert sorted(files_of(tmp_path)) == sorted(name for name, (_, stays) in ages.items() if stays)


def test_a_full_disk_is_a_line_for_the_user_and_costs_no_finished_shard(tmp_path, monkeypatch):
    store = Store(tmp_path, shard_entries=7)
    store.fill(KEYS[:7], entry_of)
    before = files_of(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched, pytest.raises(CacheError, match=r"[0-9,]+ bytes.*No space left") as raised:
        patched.setattr(os, "fsync", full)
        store.fill(KEYS, entry_of)
    assert isinstance(raised.value, UserError)
    assert str(tmp_path) in str(raised.value)
    with monkeypatch.context() as patched, pytest.raises(CacheError, match="No space left"):
        patched.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 99))
        store.fill(KEYS, entry_of)
    assert files_of(tmp_path) == before
    assert store.fill(KEYS, entry_of) == len(KEYS) - 7


def test_a_folder_that_cannot_be_is_a_line_for_the_user(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CacheError, match=r"file: cannot be read .*data\.cache\.dir"):
        Store(tmp_path / "file")
    with pytest.raises(CacheError, match=r"cannot be (read|written)"):
        build(tmp_path / "file" / "below")


# keys


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
    monkeypatch.setattr(cache, "FORMAT", 2)
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
    hashed, original = [], cache._file_hash
    monkeypatch.setattr(cache, "_file_hash", lambda file: (hashed.append(file), original(file))[1])
    return hashed


def test_hashes_of_files_are_remembered_until_they_change(component, tmp_path, reads, monkeypatch):
    monkeypatch.setattr(cache, "_SETTLED", -1.0)
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
    monkeypatch.setattr(cache, "_SETTLED", -1.0)
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
    monkeypatch.setattr(cache, "_SETTLED", -1.0)
    before = weights_hash(component, tmp_path / "cache")
    for file in (tmp_path / "cache/weights").iterdir():
        file.write_bytes(content)
    assert weights_hash(component, tmp_path / "cache") == before
    assert len(reads) == 6


def test_a_memory_that_cannot_be_written_is_done_without(component, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_SETTLED", -1.0)
    (tmp_path / "file").write_bytes(b"")
    assert weights_hash(component, tmp_path / "file") == weights_hash(component)


def test_a_folder_without_weights_is_a_line_for_the_user(tmp_path):
    with pytest.raises(CacheError, match=r"holds no weights.*\.safetensors"):
        weights_hash(tmp_path)
    with pytest.raises(CacheError, match=r"gone: cannot be read"):
        weights_hash(tmp_path / "gone")
