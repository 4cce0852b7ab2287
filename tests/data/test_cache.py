"""The cache: the same bytes whatever interrupts a build, and never an entry that is stale, half or damaged."""

import errno
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import socket
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
from loraloom.data.cache import CacheError, Store
from loraloom.data.keys import content_key

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
        calls = {"write": 0, "fsync": 0, "replace": 0}

        def dying(name: str, function, at: int):
            def call(*arguments):
                calls[name] += 1
                if calls[name] == at:
                    if moment == "write":
                        function(arguments[0], b"half of a shard")
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments)

            return call

        match moment:
            case "write":
                Path.write_bytes = dying("write", Path.write_bytes, 3)
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


@pytest.mark.parametrize("most", [2**30, 0])
def test_a_flipped_byte_of_an_entry_is_found_before_a_run_as_far_as_is_looked(copied, whole, most):
    file = shard_with(copied, KEYS[0])
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    store = Store(copied, shard_entries=7)
    store.check([*KEYS, "0" * 32], most)
    assert len(store.problems) == (1 if most else 0)
    assert store.missing(KEYS) == (KEYS[:7] if most else [])
    store.fill(KEYS, entry_of)
    assert (files_of(copied) == files_of(whole)) is bool(most)


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
    assert "it was removed" in unreadable[0]
    assert not file.exists()
    store = Store(copied, shard_entries=7)
    assert store.fill(KEYS, entry_of) == 7  # by itself, and nothing else
    assert all(same(store.get(key), entry_of(key)) for key in KEYS)


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


def test_a_shape_that_is_none_is_found(copied):
    file = shard_with(copied, KEYS[0])
    content = file.read_bytes()
    assert b"[2,3]" in content
    file.write_bytes(content.replace(b"[2,3]", b"[2.3]", 1))
    store = Store(copied, shard_entries=7)
    assert "its header has the shape [2.3]" in store.problems[0]
    assert store.fill(KEYS, entry_of) == 7


def test_a_shard_that_is_cut_or_goes_away_is_named(copied):
    for change in (lambda file: os.truncate(file, 100), Path.unlink):
        store, file = Store(copied, shard_entries=7), shard_with(copied, KEYS[0])
        change(file)
        with pytest.raises(CacheError, match=f"{file.name}: cannot be read") as raised:
            store.get(KEYS[0])
        assert "\n" not in str(raised.value)
        assert not file.exists()
        assert Store(copied, shard_entries=7).fill(KEYS, entry_of) == 7


def test_what_has_no_room_is_said_before_anything_is_computed(tmp_path):
    store = Store(tmp_path / "cache")
    store.check_room(1000)
    with pytest.raises(CacheError, match=r"1,000,000,000,000,000,000 bytes cannot be written \(No space left"):
        store.check_room(10**18)
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_bytes(b"")
    with pytest.raises(CacheError, match=r"1,000 bytes cannot be written \("):
        store.check_room(1000)


def test_leftovers_are_removed_if_nobody_can_be_writing_them(tmp_path):
    dead = FORK.Process(target=int)
    dead.start()
    dead.join()
    here = socket.gethostname()
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
