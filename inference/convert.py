"""loraloom convert: a whole model, from a web UI's single file to a diffusers pipeline folder, and the other way."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..configs.arguments import Parser, path_text
from ..configs.command import run_command
from ..configs.dtypes import DTYPES, torch_dtype
from ..configs.errors import UserError
from ..configs.ownership import check_out
from ..configs.words import counted

EPILOG = """\
SOURCE is a single file (.safetensors, the names of CompVis and Stability) or a pipeline folder of diffusers; TARGET is
the other one of the two. Stable Diffusion 1, 2 and XL, and their inpainting models. Every tensor has its place, or it
is named and nothing is written.

examples:
  loraloom convert downloads/model.safetensors --out models/my-model/
  loraloom convert runs/full/dog --out dog.safetensors --dtype fp16       for a web UI
"""
Shapes = Mapping[str, tuple[int, ...]]


def main(arguments: Sequence[str]) -> int:
    """Converts, and says what was written and what was not."""
    options = _parser().parse_args(list(arguments))
    out = Path(options.out)
    check_out(out, options.force, options.source, whole=True)
    if _is_file(options.source) == (out.suffix == ".safetensors"):
        both = "single files" if _is_file(options.source) else "folders"
        raise UserError(f"{options.source} and --out {out} are both {both}: one has to be a folder, one a .safetensors")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    convert = file_to_folder if _is_file(options.source) else folder_to_file
    for line in convert(options.source, out, options.dtype):
        print(line)
    return 0


def file_to_folder(source: str, folder: Path, dtype: str | None = None) -> list[str]:
    """Writes a pipeline folder, whole or not at all; what is to be said of it.

    UserError for a file that is no checkpoint, lacks a tensor, or has one that is not known.
    """
    from ..configs.ownership import writing_folder
    from ..models.base import INDEX, check_base
    from ..models.single_file import kind_of, read_header, unpack

    if problems := check_base(source):
        raise UserError(problems)
    file = Path(source)
    shapes, header = read_header(file)
    kind = kind_of(shapes)
    pipeline, beside = _pipeline_of(file, kind, shapes), _beside(file, kind, shapes)
    with writing_folder(folder) as partial:
        unpack(file, partial, None if dtype is None else torch_dtype(dtype))
        index = json.loads((partial / INDEX).read_text()) | {"_class_name": pipeline}
        (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    lines = [f"  left out: {counted(len(names), 'tensor')}, {what} ({names[0]} …)" for what, names in beside.items()]
    if words := sorted(key for key in header if key != "format"):
        lines.append(
            f"  left out: {counted(len(words), 'entry')} of its header, for which a folder has no place ({words[0]} …)"
        )
    return [f"wrote {folder}", *lines]


def folder_to_file(source: str, file: Path, dtype: str | None = None) -> list[str]:
    """Writes a single file, whole or not at all; what is to be said of it.

    UserError for a model that a single file cannot describe, and for tensors that are missing or have no name there.
    """
    from ..models.base import PipelineFiles, locate_base
    from .single_file import write_single_file
    from .single_file_limits import held

    folder = locate_base(source)
    content = held(PipelineFiles(folder))
    count = write_single_file(folder, content, file, None if dtype is None else torch_dtype(dtype))
    return [f"wrote {file}: {counted(count, 'tensor')}", *(f"  not in a single file: {what}" for what in content.told)]


def _beside(file: Path, kind: str, shapes: Shapes) -> dict[str, list[str]]:
    """Tensors of a file that no pipeline has, by what they are. UserError for those that nobody knows."""
    from ..models.original_names import MARKS, beside_the_model, standard_name
    from ..models.part_tensors import tensors_of
    from ..models.single_file import shipped_configs

    parts = tensors_of(kind, shipped_configs(kind)).values()
    used = {original.name for tensors in parts for original, _ in tensors.values()} | {*MARKS}
    known, strange = beside_the_model(name for name in shapes if standard_name(name) not in used)
    if strange:
        shown = f"{', '.join(sorted(strange)[:3])}{', …' if len(strange) > 3 else ''}"
        raise UserError(f"{file}: has {len(strange)} tensors that belong to no part of a {kind} model: {shown}")
    return known


def _pipeline_of(file: Path, kind: str, shapes: Shapes) -> str:
    """The pipeline class, by the channels of the UNet. UserError for one that is not known."""
    from ..models.single_file import input_channels
    from .single_file_limits import CLASSES

    key = "sdxl" if kind == "sdxl" else "sd", input_channels(shapes) or 0
    if key not in CLASSES:
        raise UserError(f"{file}: its UNet takes {key[1]} channels; text-to-image (4) and inpainting (9) are known")
    return CLASSES[key]


def _is_file(source: str) -> bool:
    from ..models.single_file import is_single_file

    return is_single_file(source)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="loraloom convert",
        description="Turn a web UI's single file into a diffusers pipeline folder, or a folder into a single file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=path_text, metavar="SOURCE", help="single file, pipeline folder or hub id")
    parser.add_argument("--out", type=path_text, required=True, metavar="TARGET", help="folder, or .safetensors file")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the tensors (as they are)")
    parser.add_argument(
        "--force", "--overwrite", action="store_true", help="replace what loraloom wrote and nobody changed"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
