"""Tensors on disk: safetensors files with a header whose order is fixed, and folders of them with JSON beside."""

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..configs.bounded import read_json
from ..configs.errors import UserError
from ..configs.headers import SafetensorsHeader, safetensors_header
from ..configs.plain import plain
from .artifact import Tensors

Header = dict[str, str]
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_PICKLES = "pickles (.bin, .pt, .ckpt) are not read, they can run code"
_CODES = {dtype: name for name, dtype in _DTYPES.items()}
Folder = dict[str, "tuple[Tensors, Header] | dict[str, Any]"]
"""Contents of a folder: path in it -> tensors with their header, or JSON."""


class Entry(NamedTuple):
    """A tensor as the header of its file has it."""

    dtype: str  # F32, BF16, ...
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Payload:
    """Tensors as a file will have them: in the order of safetensors' own writer, cast when their turn comes."""

    tensors: Tensors
    dtype: torch.dtype = torch.float32  # of all but single numbers, such as alpha, and those that are exact
    exact: Collection[str] = ()  # tensors that stay in float32

    @property
    def entries(self) -> dict[str, Entry]:
        """In the order of the file."""
        found = {name: Entry(_CODES[self._dtype_of(name)], tuple(self.tensors[name].shape)) for name in self.tensors}
        return dict(sorted(found.items(), key=lambda item: (-_DTYPES[item[1].dtype].itemsize, item[0])))

    def tensor(self, name: str) -> Tensor:
        """On the CPU, contiguous."""
        return self.tensors[name].detach().to("cpu", self._dtype_of(name)).contiguous()

    def chunks(self) -> Iterator[memoryview]:
        """The bytes behind the header."""
        return (_bytes(self.tensor(name)) for name in self.entries)

    def _dtype_of(self, name: str) -> torch.dtype:
        if not self.tensors[name].ndim:
            return self.tensors[name].dtype
        return torch.float32 if name in self.exact else self.dtype


def header_bytes(entries: Mapping[str, Entry], header: Mapping[str, str]) -> bytes:
    """What a file begins with. The library itself writes the header's entries in another order each time."""
    assert all(isinstance(value, str) for value in header.values()), "safetensors knows no other header values"
    described: dict[str, Any] = {"__metadata__": dict(sorted(header.items()))} if header else {}
    end = 0
    for name, entry in entries.items():
        begin, end = end, end + math.prod(entry.shape) * _DTYPES[entry.dtype].itemsize
        described[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text


def write_stream(
    file: Path, entries: Mapping[str, Entry], tensor_of: Callable[[str], Tensor], header: Mapping[str, str]
) -> None:
    """A safetensors file whose tensors come one after the other, so that only one is in memory.

    A tensor has to be of the type and shape of its entry. Whoever wants the file whole or not at all gives another
    name and renames it.
    """
    with file.open("wb") as stream:
        stream.write(header_bytes(entries, header))
        for name, entry in entries.items():
            tensor = tensor_of(name).detach().to("cpu").contiguous()
            assert (tensor.dtype, tuple(tensor.shape)) == (_DTYPES[entry.dtype], entry.shape), name
            stream.write(_bytes(tensor))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data


def load_file(file: Path) -> tuple[Tensors, Header]:
    """The tensors and the header of a file; UserError if it is none, or damaged."""
    with opened(file) as content:
        for name in content.keys():  # noqa: SIM118
            if (dtype := content.get_slice(name).get_dtype()) not in _DTYPES:
                raise UserError(f"{name} is of the type {dtype}, which is not read here: write it as F16, BF16 or F32")
        return {name: content.get_tensor(name) for name in content.keys()}, content.metadata() or {}  # noqa: SIM118


def _header(file: Path) -> SafetensorsHeader:
    """Checked; in what it says the name of the file is left out, as all callers name it."""
    try:
        return safetensors_header(file)
    except UserError as error:
        words = str(error).removeprefix(f"{file}: ")
        if not file.is_file():
            raise UserError(words) from error
        raise UserError(f"not a whole safetensors file ({words}); {_PICKLES}") from error


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file whose header is sound, mapped into memory. UserError for one with types that torch lacks."""
    header = _header(file)
    if strange := {entry.dtype for entry in header.tensors.values()} - _DTYPES.keys():
        raise UserError(f"has tensors of the type {', '.join(sorted(strange))}, which cannot be read here")
    try:
        with safe_open(file, framework="pt") as content:
            yield content
    except SafetensorError as error:
        raise UserError(f"not a whole safetensors file ({error}); {_PICKLES}") from None


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
        return read_json(file)
    except UserError as error:
        raise UserError(f"{file.name}: {str(error).removeprefix(f'{file}: ')}") from None


def file_in(path: Path) -> Path:
    """The one adapter file of a folder that somebody has downloaded whole; a file or PEFT's folder itself.

    UserError for a folder with several, and for a pipeline.
    """
    if not path.is_dir() or [*path.glob("adapter_config.json"), *path.glob("*/adapter_config.json")]:
        return path
    if (path / "model_index.json").is_file():
        raise UserError("is the folder of a pipeline, not an adapter; `loraloom adapter extract` makes one of two")
    files = sorted(path.glob("*.safetensors"))
    if len(files) > 1:
        names = ", ".join(plain(file.name) for file in files[:5]) + (", …" if len(files) > 5 else "")
        raise UserError(f"the folder holds {len(files)} .safetensors files: name one ({names})")
    return files[0] if files else path


def look(path: Path) -> tuple[dict[str, Entry], Header]:
    """Each tensor's entry, and the header, of a file or of all in a folder; no tensor is read. UserError as above."""
    path = file_in(path)
    files = sorted([*path.glob("*.safetensors"), *path.glob("*/*.safetensors")]) if path.is_dir() else [path]
    entries: dict[str, Entry] = {}
    header: Header = {}
    for file in files:
        start = "" if file.parent == path or file == path else f"{file.parent.name}."  # the component
        found = _header(file)
        entries |= {f"{start}{name}": Entry(entry.dtype, entry.shape) for name, entry in found.tensors.items()}
        header |= found.metadata
    if not files:
        raise UserError("the folder holds no .safetensors file, nor does one within; pickles (.bin) are not read")
    return entries, header


def entry_type(dtype: torch.dtype) -> str:
    """As headers call it."""
    return _CODES[dtype]
