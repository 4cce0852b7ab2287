"""A pipeline folder written as one file with the names of CompVis and Stability, one tensor at a time."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adapters.stored import Entry, entry_type, look, opened, write_stream
from ..configs.errors import UserError
from ..configs.ownership import writing
from ..configs.progress import Bar
from ..models.original_names import Original, Shape, current_name
from ..models.part_tensors import cast, same_numbers, tensors_of
from .pipeline_folder import VARIANT
from .single_file_limits import Held

Places = Mapping[str, tuple[Original, Shape]]


class Source(NamedTuple):
    """Where a folder has a tensor."""

    file: Path
    name: str
    entry: Entry


def write_single_file(folder: Path, held: Held, file: Path, dtype: torch.dtype | None) -> int:
    """How many tensors were written, in `dtype` or in the folder's own. UserError for missing and strange ones."""
    wanted: dict[str, list[tuple[Source, Original, Shape]]] = defaultdict(list)
    for part, tensors in tensors_of(held.kind, held.configs).items():
        sources = _sources(folder / part, part)
        if problems := _problems(sources, tensors):
            raise UserError([f"{folder / part}: {problem}" for problem in problems])
        for name, (original, shape) in tensors.items():
            wanted[original.name].append((sources[name], original, shape))
    entries = {name: _entry(pieces, dtype) for name, pieces in wanted.items()}
    entries |= {name: Entry("F32", (0,)) for name in held.marks}
    shown = Bar(total=len(entries), desc=f"writing {file.name}", unit="tensor", leave=False, disable=None)
    with ExitStack() as stack, writing(file) as new, shown:
        contents = {
            source.file: stack.enter_context(opened(source.file))
            for pieces in wanted.values()
            for source, _, _ in pieces
        }

        def tensor(name: str) -> Tensor:
            shown.update()
            return cast(name, _joined(wanted[name], contents), dtype) if name in wanted else torch.empty(0)

        write_stream(new, entries, tensor, held.header)
    return len(entries)


def _sources(folder: Path, part: str) -> dict[str, Source]:
    """Of each tensor of a part, by the name that today's diffusers gives it."""
    found: dict[str, Source] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if not VARIANT.search(file.name):
            for name, entry in look(file)[0].items():
                if not name.endswith("position_ids"):
                    found[current_name(part, name)] = Source(file, name, entry)
    if not found:
        raise UserError(f"{folder}: holds no .safetensors file; pickles (.bin) are not read, they can run code")
    return found


def _problems(sources: Mapping[str, Source], tensors: Places) -> list[str]:
    """Tensors that are missing, that a single file has no name for, or that are of another shape."""
    problems = []
    if missing := sorted(tensors.keys() - sources.keys()):
        problems.append(f"lacks {len(missing)} of {len(tensors)} tensors, first {missing[0]}")
    if strange := sorted(sources.keys() - tensors.keys()):
        problems.append(f"has {len(strange)} tensors that a single file has no name for, first {strange[0]}")
    for name in sorted(sources.keys() & tensors.keys()):
        found, wanted = sources[name].entry.shape, tensors[name][1]
        if not same_numbers(found, wanted):
            problems.append(f"{name} is {found}, not {wanted}")
    return problems


def _entry(pieces: Sequence[tuple[Source, Original, Shape]], dtype: torch.dtype | None) -> Entry:
    source, original, shape = pieces[0]
    fraction = source.entry.dtype.startswith(("F", "BF"))
    return Entry(entry_type(dtype) if dtype and fraction else source.entry.dtype, original.shape(shape))


def _joined(pieces: Sequence[tuple[Source, Original, Shape]], contents: Mapping[Path, Any]) -> Tensor:
    """A tensor as the single file has it: q, k and v one below the other, or turned, or one of the folder's."""
    in_order = sorted(pieces, key=lambda piece: piece[1].third or 0)
    original, shape = in_order[0][1:]
    tensors = [contents[source.file].get_tensor(source.name).reshape(shape) for source, _, _ in in_order]
    tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    return (tensor.T if original.transposed else tensor).reshape(original.shape(shape))
