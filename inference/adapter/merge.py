"""loraloom adapter merge: adapters into a base, or several adapters into one."""

import argparse
from pathlib import Path

from ...adapters import algebra
from ...adapters.algebra import Approximated, fixed
from ...adapters.artifact import AdapterArtifact
from ...adapters.format import FormatNames, read
from ...adapters.titles import title_of
from ...configs.errors import UserError
from ...configs.ownership import check_out
from ..adapter_input import opened
from ..adapter_output import lost, out_of, save, shown
from ..checkpoint import is_checkpoint, read_checkpoint
from ..layers import Layers
from ..merged_files import merge_into_file, merge_into_folder
from ..weighted_file import AdapterFile
from ..words import named_words


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
    others = [
        read_checkpoint(path) if is_checkpoint(path) else named_words(read(path, names), title_of(path))
        for path in (file.file for file in files[1:])
    ]
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
