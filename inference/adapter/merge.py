"""loraloom adapter merge: adapters into a base, or several adapters into one."""

import argparse
from pathlib import Path

from ...adapters import algebra
from ...adapters.algebra import Approximated, fixed
from ...adapters.artifact import AdapterArtifact
from ...adapters.format import FormatNames, read
from ...configs.arguments import path_text, positive
from ...configs.errors import UserError
from ...configs.ownership import check_out
from ..adapter_file import AdapterFile
from ..adapter_input import opened
from ..adapter_output import add_output, lost, out_of, save, share, shown
from ..checkpoint import is_checkpoint, read_checkpoint
from ..layers import Layers
from ..merged_files import merge_into_file, merge_into_folder

EXAMPLES = [
    "loraloom adapter merge dog.safetensors:0.8 style.safetensors --base sd15/ --into-base --out merged/",
    "loraloom adapter merge dog.safetensors --base model.safetensors --into-base --out merged.safetensors",
    "loraloom adapter merge dog.safetensors:0.8 style.safetensors:0.5 --out both.safetensors",
    "loraloom adapter merge a.safetensors b.safetensors --how ties --density 0.5 --rank 32 --out mix.safetensors",
]
HOW = {
    "concat": "the weighted sum without loss; the ranks add up",
    "svd": "the nearest to the weighted sum of --rank",
    "ties": "of each change the share --density that is largest, where signs agree (Yadav et al. 2023), at --rank",
    "dare": "a share --density of each change, drawn with --seed and scaled up (Yu et al. 2024), at --rank",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=path_text, nargs="+", metavar="FILE[:WEIGHT]", help="adapter files")
    parser.add_argument("--into-base", action="store_true", help="write the base with the adapters in its weights")
    how = "; ".join(f"{name}: {words}" for name, words in HOW.items())
    parser.add_argument("--how", choices=tuple(HOW), default="concat", help=f"{how} (concat)")
    parser.add_argument("--rank", type=positive, default=32, help="for all but concat (32)")
    parser.add_argument("--density", type=share, default=0.5, help="for ties and dare (0.5)")
    parser.add_argument("--seed", type=int, default=0, help="for dare (0)")
    add_output(parser)


def run(options: argparse.Namespace) -> int:
    files = [AdapterFile.parse(text) for text in options.files]
    if options.out is None:
        raise UserError("--out is needed: where the result is written")
    folder = options.into_base and Path(options.out).suffix != ".safetensors"
    given = [*(file.file for file in files), *([options.base] if options.base else [])]
    check_out(Path(options.out), options.force, *given, whole=folder or Path(options.out).is_dir())
    if not options.into_base:
        out_of(options, files[0].file)
    layers = Layers(options.base) if options.base else None
    first, names = opened(files[0].file, layers)
    others = [read_checkpoint(file.file) if is_checkpoint(file.file) else read(file.file, names) for file in files[1:]]
    mixed = [(artifact, file.weight) for artifact, file in zip([first, *others], files, strict=True)]
    if options.into_base:
        return _into_base(mixed, layers, options)
    return _into_one(mixed, names, layers, files[0].file, options)


def _into_base(mixed: algebra.Weighted, layers: Layers | None, options: argparse.Namespace) -> int:
    if layers is None:
        raise UserError("--into-base needs the base: --base FOLDER, FILE or hub id")
    out, source = Path(options.out), Path(options.base)
    if out.suffix == ".safetensors":
        if source.suffix != ".safetensors":
            raise UserError(f"--out {out}: a single file is only written from a single-file --base; give a folder")
        count = merge_into_file(layers, mixed, source, out)
    else:
        count = merge_into_folder(layers, mixed, out, options.dtype)
    print(f"wrote {out}: {count} weights of {options.base} changed")
    return 0


def _into_one(
    mixed: algebra.Weighted,
    names: FormatNames,
    layers: Layers | None,
    source: Path,
    options: argparse.Namespace,
) -> int:
    found = _mixed(mixed, layers, options)
    if isinstance(found, Approximated):
        print(lost(found))
        found = found.artifact
    save(found, names, options, source, layers)
    return 0


def _mixed(
    mixed: algebra.Weighted, layers: Layers | None, options: argparse.Namespace
) -> Approximated | AdapterArtifact:
    base, rank, progress = layers and layers.weight, fixed(options.rank), shown("mixing")
    if options.how == "svd":
        return algebra.summed(mixed, rank, base, progress)
    if options.how == "ties":
        return algebra.by_ties(mixed, options.density, rank, base, progress)
    if options.how == "dare":
        return algebra.by_dare(mixed, options.density, options.seed, rank, base, progress)
    return algebra.concatenated(mixed)
