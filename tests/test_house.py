"""The house: every folder is a package that the wheel ships, and nobody imports upwards."""

import ast
import tomllib
from pathlib import Path

import pytest

from loraloom.configs.loader import load_config

ROOT = Path(__file__).parent.parent
FLOORS = ("configs", "images", "data", "models", "adapters", "inference", "train", "launch")
MAY_IMPORT = {
    "configs": (),
    "images": ("configs",),
    "data": ("images", "configs"),
    "models": ("configs",),
    "adapters": ("configs",),
    "inference": ("adapters", "models", "images", "configs"),
    "train": ("inference", "adapters", "models", "data", "images", "configs"),
    "launch": ("configs", "data", "images"),
}
SOURCES = [file for floor in FLOORS for file in sorted((ROOT / floor).rglob("*.py"))]


def test_the_list_of_packages_is_the_list_of_folders():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {file.parent.relative_to(ROOT) for file in SOURCES}
    assert sorted(listed) == sorted(["loraloom", *(f"loraloom.{'.'.join(folder.parts)}" for folder in folders)])
    assert sorted(file.name for file in ROOT.glob("*.py")) == ["__init__.py", "__main__.py"]


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nobody_imports_upwards(file):
    floor, *below = file.relative_to(ROOT).parts
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            origin = (floor, *below[:-1])[: len(below) + 1 - node.level]
            path = ".".join((*origin, *(node.module or "").split(".")))
            target = next((part for part in path.split(".") if part), "")
            if target and target != floor:
                assert target in MAY_IMPORT[floor], f"{floor} may not import {target}"
        elif isinstance(node, ast.ImportFrom | ast.Import):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(module.split(".")[0] == "loraloom" for module in modules), (
                "imports between folders are relative"
            )


def imports_of(root: Path, files: list[Path]) -> dict[str, set[str]]:
    """File -> the files of ours that it imports, in functions and for types too."""
    known = {str(file.relative_to(root).with_suffix("")).removesuffix("/__init__"): file for file in files}
    found: dict[str, set[str]] = {}
    for name, file in known.items():
        package = file.relative_to(root).parts[:-1]
        found[name] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                way = "/".join([*package[: len(package) + 1 - node.level], *(node.module or "").split(".")]).strip("/")
                below = {f"{way}/{alias.name}" for alias in node.names} & known.keys()
                found[name] |= below or ({way} & known.keys())
    return found


def circle_in(imports: dict[str, set[str]]) -> list[str]:
    """Files that import each other in a ring; none where all can be put in an order."""
    left = {name: below - {name} for name, below in imports.items()}
    while free := [name for name, below in left.items() if not below & left.keys()]:
        for name in free:
            del left[name]
    way = [next(iter(sorted(left)))] if left else []
    while way and way[-1] not in way[:-1]:
        way.append(min(left[way[-1]] & left.keys()))
    return way[way.index(way[-1]) :] if way else []


def test_no_files_import_each_other_in_a_circle(tmp_path):
    assert circle_in(imports_of(ROOT, SOURCES)) == []
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.py").write_text("def f():\n    from .y import g\n")
    (tmp_path / "a" / "y.py").write_text("if TYPE_CHECKING:\n    from . import x\n")
    circle = circle_in(imports_of(tmp_path, sorted(tmp_path.rglob("*.py"))))
    assert circle == ["a/x", "a/y", "a/x"]


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*/*.yaml")), ids=lambda file: file.name)
def test_every_shipped_config_loads_and_begins_with_its_command(file):
    load_config(file)
    assert file.read_text().splitlines()[0] == f"# loraloom train {file.relative_to(ROOT)}"


def test_every_file_says_its_idea_first():
    assert [str(file) for file in SOURCES if not ast.get_docstring(ast.parse(file.read_text()))] == []
