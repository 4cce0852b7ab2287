"""loraloom adapter resize: an adapter of another rank, as near as that rank can come."""

import argparse
from pathlib import Path

from ...adapters import algebra
from ..adapter_input import opened
from ..adapter_output import lost, out_of, rank_of, save, shown
from ..layers import Layers


def run(options: argparse.Namespace) -> int:
    file = Path(options.file)
    out_of(options, file)
    layers = Layers(options.base) if options.base else None
    artifact, names = opened(file, layers)
    algebra.check_modules(artifact)
    found = algebra.resized(artifact, rank_of(options), layers and layers.weight, shown("resizing"))
    ranks = sorted(weights.rank for weights in found.artifact.modules.values())
    several = f"ranks {ranks[0]} to {ranks[-1]}, half of them up to {ranks[len(ranks) // 2]}"
    print(several if ranks[0] != ranks[-1] else f"rank {ranks[0]} in all modules")
    print(lost(found))
    save(found.artifact, names, options, file, layers)
    return 0
