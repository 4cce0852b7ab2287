"""Files that were written once stay readable, hold the numbers that they were made of, and are written the same today.

The files in `golden/` are from `golden/make.py`; `golden/versions.json` has the libraries that wrote them.
"""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from loraloom.adapters import format
from loraloom.adapters.artifact import AdapterArtifact, Weights
from loraloom.configs.choices import find, names
from loraloom.configs.record import NAME as RECORD

GOLDEN = Path(__file__).parent / "golden"
MAKE: dict[str, Any] = runpy.run_path(str(GOLDEN / "make.py"))
CASES = [(name, kind) for name, kinds in MAKE["HELD"].items() for kind in kinds]
every_file = pytest.mark.parametrize(("name", "kind"), CASES)


def contents(path: Path) -> dict[str, bytes]:
    """Of a file, or of all files in a folder but our record of them."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    files = [file for file in files if file.name != RECORD]
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def golden(name: str, kind: str) -> Path:
    return GOLDEN / format.file_name(kind, name)


def expected(name: str, kind: str) -> AdapterArtifact:
    made: AdapterArtifact = MAKE["artifact"](kind)
    return made.folded() if find("adapters.formats", name).FOLDS else made


def assert_equal(found: Weights, wanted: Weights) -> None:
    """To the bit; magnitudes may lie in another direction."""
    assert (found.method, found.scale) == (wanted.method, wanted.scale)
    assert found.tensors.keys() == wanted.tensors.keys()
    for part, tensor in wanted.tensors.items():
        held = found.tensors[part].flatten() if part == "magnitude" else found.tensors[part]
        assert torch.equal(held, tensor), part


@every_file
def test_a_golden_file_holds_what_it_was_made_of(name: str, kind: str):
    found, wanted = format.read(golden(name, kind), MAKE["NAMES"]), expected(name, kind)
    assert found.modules.keys() == wanted.modules.keys()
    for key, weights in wanted.modules.items():
        assert_equal(found.modules[key], weights)
    assert found.metadata == wanted.metadata


@every_file
def test_the_same_bytes_are_written_today(name: str, kind: str, tmp_path: Path):
    """From the numbers, and from what the file is read as; headers and configs too."""
    for artifact in (MAKE["artifact"](kind), format.read(golden(name, kind), MAKE["NAMES"])):
        format.write(artifact, tmp_path / "x", name, MAKE["NAMES"])
        assert contents(tmp_path / "x") == contents(golden(name, kind))


def test_every_format_has_its_files_and_they_are_small():
    kinds = {"lora", "dora", "loha", "lokr"}
    holds = {name: kinds & set(find("adapters.formats", name).HOLDS) for name in names("adapters.formats")}
    assert {name: held for name, held in holds.items() if held} == {name: set(k) for name, k in MAKE["HELD"].items()}
    sizes = [len(content) for name, kind in CASES for content in contents(golden(name, kind)).values()]
    assert max(sizes) < 3 * 1024 and sum(sizes) < 60 * 1024
    versions = json.loads((GOLDEN / "versions.json").read_text())
    assert versions.keys() == set(MAKE["VERSIONS"])
