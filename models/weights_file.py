"""Tensors of a safetensors file, mapped: nothing is copied but what changes its type.

The system reads what a step needs, and processes on one machine share it. Nobody sees it when mapped weights are
written into, but the file must not change while they are in use.
"""

import math
import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

from ..configs.bounded import open_regular, regular
from ..configs.headers import TensorEntry, header_of_stream, weight_index

TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I64": torch.int64}


def read_tensors(file: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors by their names; numbers with a fraction in `dtype`.

    UserError for a file that is damaged, or is no file; ValueError for one with a type that is not in TYPES.
    """
    with open_regular(file) as stream:
        header = header_of_stream(stream, str(file), os.fstat(stream.fileno()).st_size)
        memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    return {name: _tensor(memory, entry, dtype) for name, entry in header.tensors.items()}


def _tensor(memory: mmap.mmap, entry: TensorEntry, dtype: torch.dtype) -> Tensor:
    if entry.dtype not in TYPES:
        raise ValueError(f"a tensor is of the type {entry.dtype}")
    own, count = TYPES[entry.dtype], math.prod(entry.shape)
    if not count:
        return torch.empty(entry.shape, dtype=dtype if own.is_floating_point else own)
    mapped = torch.frombuffer(memory, dtype=own, count=count, offset=entry.start).view(entry.shape)
    if own == dtype or not own.is_floating_point:
        return mapped
    cast = mapped.to(dtype)
    _forget(memory, entry.start, entry.end)
    return cast


def _forget(memory: mmap.mmap, start: int, end: int) -> None:
    """Gives back the pages that lie between two bytes, so that what was cast does not count twice."""
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and hasattr(mmap, "MADV_DONTNEED"):
        memory.madvise(mmap.MADV_DONTNEED, first, last - first)


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The files that hold the weights of a part; none where they are in another format or of a variant.

    UserError for what is no file, and for an index that names anything but files of this folder.
    """
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if whole.exists():
        regular(whole)
        return [whole]
    return weight_index(index) if index.exists() else []
