"""loraloom adapter extract: what one checkpoint has learnt beside another, as a LoRA."""

import argparse
import math
from pathlib import Path

from ...adapters import algebra, stored
from ...configs.errors import UserError
from ...configs.ownership import check_out
from ...configs.words import counted
from ..adapter_output import lost, out_of, rank_of, save, shown
from ..layers import Layers


def run(options: argparse.Namespace) -> int:
    if options.out is None:
        raise UserError("--out is needed: the file of the adapter")
    options.to = options.to or "diffusers"
    check_out(Path(options.out), options.force, options.tuned, options.original)
    out_of(options, Path(options.out))
    tuned, original = Layers(options.tuned), Layers(options.original)
    sizes = [layers.names.module_paths for layers in (tuned, original)]
    if sizes[0] != sizes[1]:
        names = [f"{layers.title} ({layers.names.architecture})" for layers in (tuned, original)]
        raise UserError(f"{names[0]} has other layers than {names[1]}: one was not trained from the other")
    for line in left_out(tuned, original):
        print(line)
    found = algebra.extracted(
        tuned.weight, original.weight, original.keys, rank_of(options), shown("extracting"), options.min_change
    )
    print(lost(found))
    save(found.artifact, original.names, options, Path(options.out), original)
    return 0


def left_out(tuned: Layers, original: Layers) -> list[str]:
    """What differs too, and no LoRA can hold: one line for each part."""
    lines = []
    for part in (*original.names.module_paths, "vae"):
        ours, theirs = original.others(part), tuned.others(part)
        apart = {name: _apart(name, ours[name], theirs[name]) for name in ours.keys() & theirs.keys()}
        if different := {name: most for name, most in apart.items() if most}:
            worst = max(sorted(different), key=lambda name: different[name])
            lines.append(
                f"not in the adapter: {counted(len(different), 'tensor')} of {part} that differ, and that no LoRA "
                f"holds, such as {worst} (by up to {different[worst]:.2g})"
            )
    return lines


def _apart(name: str, one: Path, other: Path) -> float:
    """The largest difference; of tensors of two sizes, infinity."""
    with stored.opened(one) as first, stored.opened(other) as second:
        a, b = (content.get_tensor(name) for content in (first, second))
    if a.shape != b.shape:
        return math.inf
    return (a.double() - b.double()).abs().max().item() if a.numel() and a.is_floating_point() else 0.0
