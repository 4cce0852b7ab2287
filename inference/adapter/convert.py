"""loraloom adapter convert: the same adapter in another format or type, read again and compared."""

import argparse
from pathlib import Path

from ...adapters import algebra
from ...adapters.algebra import fixed
from ...adapters.artifact import AdapterArtifact
from ...configs.errors import UserError
from ..adapter_input import opened
from ..adapter_output import lost, out_of, save, shown
from ..layers import Layers


def run(options: argparse.Namespace) -> int:
    file = Path(options.file)
    out_of(options, file)
    layers = Layers(options.base) if options.base else None
    artifact, names = opened(file, layers, as_stored=True)
    if options.without:
        artifact = algebra.without(artifact, options.without)
    if options.bake_dora:
        artifact = _baked(artifact, options, layers)
    if options.scale is not None:
        artifact = algebra.scaled(artifact, options.scale)
    save(artifact, names, options, file, layers)
    return 0


def _baked(artifact: AdapterArtifact, options: argparse.Namespace, layers: Layers | None) -> AdapterArtifact:
    if layers is None:
        raise UserError("--bake-dora needs the base, whose weights decide what DoRA changes: give --base")
    found = algebra.baked(artifact, layers.weight, fixed(options.rank), shown("baking"))
    if found.lost:
        print(lost(found))
    return found.artifact
