"""Tensors on disk: safetensors files with a header whose order is fixed, and folders of them with JSON beside."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open

from ..configs.errors import UserError
from .artifact import Tensors

Header = dict[str, str]
Folder = dict[str, "tuple[Tensors, Header] | dict[str, Any]"]
"""Contents of a folder: path in it -> tensors with their header, or JSON."""


def serialised(tensors: Tensors, header: Mapping[str, str]) -> bytes:
    """A safetensors file. The library itself writes the header's entries in another order each time."""
    assert all(isinstance(value, str) for value in header.values()), "safetensors knows no other header values"
    plain = safetensors.torch.save(tensors)
    size = int.from_bytes(plain[:8], "little")
    entries = {"__metadata__": dict(sorted(header.items())), **json.loads(plain[8 : 8 + size])}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text + plain[8 + size :]


def load_file(file: Path) -> tuple[Tensors, Header]:
    if not file.is_file():
        raise UserError("there is no such file")
    try:
        with safe_open(file, framework="pt") as content:
            return {name: content.get_tensor(name) for name in content.keys()}, content.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(
            f"not a whole safetensors file ({error}); pickles (.bin, .pt, .ckpt) are not read, they can run code"
        ) from None


def load_folder(folder: Path) -> Folder:
    """Weights and configs in a folder, or in the folders within; nothing else is opened."""
    contents: Folder = {}
    for file in sorted([*folder.glob("*.*"), *folder.glob("*/*.*")]):
        path = file.relative_to(folder).as_posix()
        if file.suffix == ".safetensors":
            contents[path] = load_file(file)
        elif file.name.endswith("config.json"):
            contents[path] = _json(file)
    if not any(isinstance(content, tuple) for content in contents.values()):
        raise UserError("the folder holds no .safetensors file, nor does one within; pickles (.bin) are not read")
    return contents


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file.name} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file.name} is no JSON object")
    return content


def to_bytes(content: tuple[Tensors, Header] | dict[str, Any]) -> bytes:
    if isinstance(content, dict):
        return (json.dumps(content, indent=2) + "\n").encode()
    return serialised(*content)
