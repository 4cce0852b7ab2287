"""Tensors of a safetensors file, mapped: nothing is copied but what changes its type.

The system reads what a step needs, and processes on one machine share it. Nobody sees it when mapped weights are
written into, but the file must not change while they are in use.
"""

import json
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I64": torch.int64}


def read_tensors(file: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors by their names; numbers with a fraction in `dtype`.

    ValueError for a file that is cut off, or has a type of its own.
    """
    with file.open("rb") as stream:
        memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    if len(memory) < 8:
        raise ValueError("the file is cut off")
    (length,) = struct.unpack_from("<Q", memory)
    header = json.loads(memory[8 : 8 + length])
    header.pop("__metadata__", None)
    return {name: _tensor(memory, 8 + length, about, dtype) for name, about in header.items()}


def _tensor(memory: mmap.mmap, first: int, about: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    if about["dtype"] not in TYPES:
        raise ValueError(f"a tensor is of the type {about['dtype']}")
    own, count = TYPES[about["dtype"]], math.prod(about["shape"])
    start, end = (first + offset for offset in about["data_offsets"])
    if end > len(memory) or end - start != count * own.itemsize:
        raise ValueError("the file is cut off")
    if not count:
        return torch.empty(about["shape"], dtype=dtype if own.is_floating_point else own)
    mapped = torch.frombuffer(memory, dtype=own, count=count, offset=start).view(about["shape"])
    if own == dtype or not own.is_floating_point:
        return mapped
    cast = mapped.to(dtype)
    _forget(memory, start, end)
    return cast


def _forget(memory: mmap.mmap, start: int, end: int) -> None:
    """Gives back the pages that lie between two bytes, so that what was cast does not count twice."""
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and hasattr(mmap, "MADV_DONTNEED"):
        memory.madvise(mmap.MADV_DONTNEED, first, last - first)


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The files that hold the weights of a part; none where they are in another format or of a variant."""
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        return []
    return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
