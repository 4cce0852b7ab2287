"""Nothing that was there and was not ours is ever removed or replaced, whatever lies in a folder and in its record."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.configs import ownership
from loraloom.configs.errors import UserError
from loraloom.configs.record import HEAD, NAME, record_of

pytestmark = pytest.mark.slow

FLOORS = ("configs", "data", "models", "adapters", "inference", "train", "launch")
ROOT = Path(__file__).parents[2]

names = st.sampled_from(
    ["a.txt", "b.png", "run.json", "x/a.txt", "x/y/b", "x/.DS_Store", "step-000001/w.bin", ".hidden"]
)
states = st.sampled_from(["ours", "ours", "changed", "foreign", "log", "link", "folder", "absent", "gone", "other"])
damage = st.lists(
    st.sampled_from(
        [
            b'{"path": "../outside.txt", "sha256": null, "by": "run"}\n',
            b'{"path": "/etc/hostname", "sha256": null, "by": "run"}\n',
            b'{"path": "through/outside.txt", "sha256": null, "by": "run"}\n',
            b'{"path": "x", "sha256": null, "by": "run"}\n',
            b'{"path": 5}\n',
            b'{"path": "a.txt", "sha256": []}\n',
            b"[" * 5000 + b"\n",
            b"\xff\xfe\n",
            b"null\n",
        ]
    ),
    max_size=4,
)
endings = st.sampled_from([b"", b"", b'{"path": "a.txt", "sha', b'{"path": "b.png", "sha256": null'])


class Layout:
    """A folder with files of ours and of others, beside files that links lead to."""

    def __init__(self, base: Path, files: dict[str, str], damage: list[bytes], ending: bytes):
        self.base, self.root, self.ours = base, base / "root", set()
        (base / "outside").mkdir()
        for each in (base / "outside.txt", base / "outside/outside.txt"):
            each.write_text("precious")
        self.root.mkdir()
        (self.root / "through").symlink_to(base / "outside")
        record = record_of(self.root)
        for path, state in files.items():
            file = self.root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            self.lay(record, path, file, state)
        with (self.root / NAME).open("ab") if (self.root / NAME).exists() else (self.root / NAME).open("wb") as stream:
            stream.write(b"".join(damage) + ending)

    def lay(self, record, path: str, file: Path, state: str) -> None:
        content = f"of {path}"
        if state in ("ours", "changed", "log", "link", "folder", "absent", "other"):
            sha256 = None if state == "log" else hashlib.sha256(content.encode()).hexdigest()
            record.add({path: sha256}, "other" if state == "other" else "run")
        if state == "gone":  # it was ours, was removed, and a stranger's has its name
            record.add({path: None}, "run")
            record.drop([path])
        if state == "link":
            file.symlink_to(self.base / "outside.txt")
        elif state == "folder":
            file.mkdir()
            (file / "inner").write_text("precious")
        elif state != "absent":
            file.write_text(content if state in ("ours", "log", "other") else f"changed, {path}")
        if state in ("ours", "log"):
            self.ours.add(path)

    def content(self) -> dict[str, bytes | str]:
        """Each file and link below the base, but the record."""
        return {
            path.relative_to(self.base).as_posix(): os.readlink(path) if path.is_symlink() else path.read_bytes()
            for path in self.base.rglob("*")
            if (path.is_symlink() or path.is_file()) and path.name != NAME
        }


@st.composite
def layouts(draw):
    files = draw(st.dictionaries(names, states, max_size=7))
    for path in ("x/a.txt", "x/y/b"):  # a file cannot lie below another one
        if any(other != path and path.startswith(f"{other}/") for other in files):
            files.pop(path, None)
    return files, draw(damage), draw(endings)


@pytest.fixture(autouse=True, scope="module")
def nobody_waits_for_the_disk():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda descriptor: None)
        yield


@settings(max_examples=200, deadline=None)
@given(layouts())
def test_exactly_what_is_ours_goes(layout):
    with tempfile.TemporaryDirectory() as base:
        laid = Layout(Path(base), *layout)
        before = laid.content()
        removed = ownership.remove_recorded(laid.root, lambda path, by: by == "run")
        after = laid.content()
        assert before.keys() - after.keys() == {f"root/{path}" for path in laid.ours}
        assert all(before[path] == content for path, content in after.items())
        assert {*removed.gone} >= laid.ours
        assert not {*removed.left} & laid.ours
        for path in laid.ours:  # what a stranger puts there now is a stranger's
            (laid.root / path).parent.mkdir(parents=True, exist_ok=True)
            (laid.root / path).write_text("a stranger's")
        again = laid.content()
        ownership.remove_recorded(laid.root, lambda path, by: by == "run")
        assert laid.content() == again


@settings(max_examples=100, deadline=None)
@given(layouts(), names)
def test_a_file_takes_the_place_of_ours_alone(layout, name):
    with tempfile.TemporaryDirectory() as base:
        laid = Layout(Path(base), *layout)
        before, target = laid.content(), laid.root / name
        free = f"root/{name}" not in before and not os.path.lexists(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            ownership.write_file(target, "new", owner=laid.root)
        except UserError:
            assert laid.content() == before
            assert name not in laid.ours
        else:
            assert free or name in laid.ours or layout[0].get(name) == "other"
            assert laid.content() == {**before, f"root/{name}": b"new"}
            ownership.write_file(target, "newer", owner=laid.root)  # it is ours now
            assert target.read_text() == "newer"


@settings(max_examples=100, deadline=None)
@given(layouts(), st.booleans())
def test_a_folder_is_replaced_whole_or_not_at_all(layout, stranger):
    with tempfile.TemporaryDirectory() as base:
        laid = Layout(Path(base), {}, [], b"")
        shutil.rmtree(laid.root)
        ownership.write_folder(
            laid.root, {"a": lambda file: file.write_text("1"), "b/c": lambda file: file.write_text("2")}
        )
        (laid.root / ".DS_Store").write_bytes(b"litter")
        if stranger:
            for path, state in layout[0].items():
                (laid.root / path).parent.mkdir(parents=True, exist_ok=True)
                laid.lay(record_of(laid.root), path, laid.root / path, state)
        before = laid.content()
        known = {"ours", "log", "other", "absent"}
        strange = stranger and any(
            state in ("link", "folder") or (state not in known and Path(path).name != ".DS_Store")
            for path, state in layout[0].items()
        )
        try:
            ownership.write_folder(laid.root, {"a": lambda file: file.write_text("new")})
        except UserError:
            assert strange
            assert laid.content() == before
        else:
            assert not strange
            assert {path for path in laid.content() if path.startswith("root/")} == {"root/a"}
        assert not [path for path in laid.base.iterdir() if ".tmp-" in path.name]


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(["w.bin", "s.json", "n.txt", "d/x"]), st.sampled_from(
    ["sealed", "sealed", "resized", "changed", "foreign", "missing", "link"]), min_size=1), st.booleans())  # fmt: skip
def test_of_a_checkpoint_what_its_manifest_says_goes(files, damaged):
    with tempfile.TemporaryDirectory() as base:
        folder, outside = Path(base) / "step-000001", Path(base) / "outside"
        folder.mkdir()
        outside.write_text("precious")
        listed = {}
        for path, state in files.items():
            file, content = folder / path, f"of {path}"
            file.parent.mkdir(exist_ok=True)
            file.write_text(content)
            if state != "foreign":
                listed[path] = {"size": len(content), "sha256": hashlib.sha256(content.encode()).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps({"schema": 3, "files": listed})[: 20 if damaged else None])
        later = (folder / "manifest.json").stat().st_mtime_ns + 1_000_000
        for path, state in files.items():
            file = folder / path
            if state in ("resized", "changed"):
                file.write_text("much longer than it was" if state == "resized" else file.read_text().upper())
                os.utime(file, ns=(later, later))
            elif state in ("missing", "link"):
                file.unlink()
                if state == "link":
                    file.symlink_to(outside)
        kept = {path for path, state in files.items() if state not in ("sealed", "missing")}
        left = ownership.remove_checkpoint(folder)
        assert outside.read_text() == "precious"
        there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or p.is_file()}
        if damaged:
            assert there == {path for path, state in files.items() if state != "missing"} | {"manifest.json"}
        else:
            assert there == (kept | {"manifest.json"} if kept else set())
        assert bool(left) == bool(there)


def test_a_file_that_came_while_ours_was_made_stays(tmp_path):
    with pytest.raises(UserError, match="was not written by loraloom"), ownership.writing(tmp_path / "a") as new:
        new.write_text("ours")
        (tmp_path / "a").write_text("theirs")
    assert (tmp_path / "a").read_text() == "theirs"
    assert sorted(os.listdir(tmp_path)) == ["a"]


def test_a_folder_that_came_while_ours_was_made_stays(tmp_path):
    with (
        pytest.raises(UserError, match="holds what loraloom did not write"),
        ownership.writing_folder(tmp_path / "a") as new,
    ):
        (new / "x").write_text("ours")
        (tmp_path / "a").mkdir()
        (tmp_path / "a/photo").write_text("theirs")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["a", "a/photo"]


def test_a_stranger_under_the_name_of_an_unfinished_file_is_not_written_through(tmp_path):
    from loraloom.configs.files import temporary_name

    (tmp_path / "precious").write_text("precious")
    (tmp_path / temporary_name("a")).symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError):
        ownership.write_file(tmp_path / "a", "ours")
    assert (tmp_path / "precious").read_text() == "precious"


def test_many_processes_write_one_record(tmp_path):
    """Lines are added whole, also behind half a line that a killed process left."""
    from multiprocessing import get_context

    (tmp_path / NAME).write_bytes(json.dumps(HEAD).encode() + b'\n{"path": "half')
    workers = [get_context("fork").Process(target=_write_twenty, args=(tmp_path, k)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    record = record_of(tmp_path)
    assert all(record.owns(tmp_path / f"{k}-{n}") for k in range(4) for n in range(20))
    assert len(ownership.remove_recorded(tmp_path).gone) == 80
    assert os.listdir(tmp_path) == [NAME]


def _write_twenty(folder: Path, worker: int) -> None:
    for number in range(20):
        ownership.write_file(folder / f"{worker}-{number}", "x")


def test_a_strangers_file_of_the_records_name_is_left_alone(tmp_path):
    (tmp_path / NAME).write_text("my notes\n")
    with pytest.raises(UserError, match=r"is no record of loraloom's"):
        ownership.write_file(tmp_path / "a", "ours")
    assert (tmp_path / NAME).read_text() == "my notes\n"
    assert sorted(os.listdir(tmp_path)) == [NAME]


@pytest.mark.parametrize("way", ["same", "inside", "link", "other"])
def test_places_are_compared_as_the_file_system_sees_them(tmp_path, way):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    path = {"same": "a", "inside": "a/b/c", "link": "link/b", "other": "ab"}[way]
    assert ownership.lies_in(tmp_path / path, tmp_path / "a") == (way != "other")


def test_nobody_else_removes_or_replaces():
    """House rule: files go, and get their names, in one module; without a record only where we are alone."""
    import ast

    words = {"rmtree", "unlink", "rename", "renames", "truncate", "rmdir", "remove", "removedirs", "move", "copyfile"}
    alone = {
        *("data/cache.py", "data/findings.py", "data/tar_index.py", "data/keys.py"),  # names made of hashes, in a cache
        *("train/state.py", "inference/pipeline_folder.py"),  # within a folder that is being built
    }
    found, plain = set(), set()
    for file in (file for floor in FLOORS for file in (ROOT / floor).rglob("*.py")):
        name = file.relative_to(ROOT).as_posix()
        if name.startswith(("configs/ownership", "configs/record", "configs/files", "models/pocket/")):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                module = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
                of_system = module in ("os", "shutil") and node.func.attr in {*words, "replace"}
                if of_system or node.func.attr in words - {"remove", "move", "copyfile"}:
                    found.add((name, node.func.attr))
            if isinstance(node, ast.ImportFrom) and node.module and node.module.endswith("configs.files"):
                plain |= {name for each in node.names if each.name in ("replace_file", "replacing")}
    assert found == {("inference/pipeline_folder.py", "copyfile")}
    assert plain == alone


def test_a_folder_that_cannot_be_begun_leaves_nothing_beside_it(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space") as found, ownership.writing_folder(tmp_path / "new"):
        pytest.fail("it was begun")
    assert found.value.filename == str(tmp_path / "new")
    assert not list(tmp_path.iterdir())
