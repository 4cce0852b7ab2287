"""Adapter files for programs: read and written without a base, where the file itself tells which layers it is for."""

from pathlib import Path

from ..adapters import format
from ..adapters.artifact import AdapterArtifact
from ..adapters.format import FormatNames
from ..adapters.origin import architecture_of
from ..configs.errors import UserError
from .adapter_input import opened
from .layers import Layers, likely_names


def read_adapter(file: str | Path, base: str | None = None) -> AdapterArtifact:
    """The adapter in a file of any format, a PEFT folder or a checkpoint of a run, in float32 on the CPU.

    `base` (a folder, a file, a hub id or `pocket`) is needed only for one whose layers are not known here. UserError,
    with the name of the file in each line, for anything that is not a sound adapter.
    """
    return opened(Path(file), None if base is None else Layers(base))[0]


def write_adapter(
    artifact: AdapterArtifact,
    file: str | Path,
    format_name: str = "diffusers",
    *,
    base: str | None = None,
    dtype: str = "fp32",
) -> None:
    """Writes an adapter: the same adapter always gives the same bytes, and a file is replaced whole or not at all.

    `format_name` is a file name of `adapters/formats/`, `dtype` fp32, bf16 or fp16; `base` as for `read_adapter`.
    UserError for what the format cannot hold or the type cannot, for layers that the base does not have, and where
    something lies in the way that loraloom did not write.
    """
    names = _names_for(artifact) if base is None else Layers(base).names
    format.write(artifact, Path(file), format_name, names, dtype)


def _names_for(artifact: AdapterArtifact) -> FormatNames:
    """Those of the known base that has all layers of the adapter, in their sizes."""
    shapes = {
        f"{component}.{path}.lora_A.weight": tuple(weights.tensors["down"].shape)
        for (component, path), weights in artifact.modules.items()
        if "down" in weights.tensors
    }
    architecture = architecture_of(shapes, artifact.metadata)
    for names in likely_names(architecture):
        if all(path in names.module_paths.get(component, ()) for component, path in artifact.modules):
            return names
    raise UserError("the layers of this adapter are not those of a base that is known here; give `base`")
