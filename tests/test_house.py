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


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*/*.yaml")), ids=lambda file: file.name)
def test_every_shipped_config_loads_and_begins_with_its_command(file):
    load_config(file)
    assert file.read_text().splitlines()[0] == f"# loraloom train {file.relative_to(ROOT)}"


def test_every_file_says_its_idea_first():
    assert [str(file) for file in SOURCES if not ast.get_docstring(ast.parse(file.read_text()))] == []
