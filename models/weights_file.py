"""Tensors of a safetensors file straight into memory of torch's own.

A mapped file would be counted twice as soon as its weights are copied or cast: once as the file's pages, once as the
copy. It would also lie where its header ends, and CPU kernels round by where their operands begin.
"""

import json
import os
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I64": torch.int64}
READERS = 4  # threads: most of the time the system finds pages for what is read


def read_tensors(file: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors by their names; numbers with a fraction in `dtype`.

    ValueError for a file that is cut off, or has a type of its own.
    """
    with file.open("rb") as stream, ThreadPoolExecutor(READERS) as readers:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        read = partial(_read, stream.fileno(), 8 + length, dtype)
        return dict(zip(header, readers.map(read, header.values()), strict=True))


def _read(descriptor: int, start: int, dtype: torch.dtype, about: Mapping[str, Any]) -> Tensor:
    if about["dtype"] not in TYPES:
        raise ValueError(f"a tensor is of the type {about['dtype']}")
    tensor = torch.empty(about["shape"], dtype=TYPES[about["dtype"]])
    place, end = (start + offset for offset in about["data_offsets"])
    left = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    while left:
        count = os.preadv(descriptor, [left], place)
        if not count or place + count > end:
            raise ValueError("the file is cut off")
        left, place = left[count:], place + count
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The files that hold the weights of a part; none where they are in another format or of a variant."""
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        return []
    return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
