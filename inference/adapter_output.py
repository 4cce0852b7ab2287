"""What verbs have in common that write an adapter: their options, and the file, which is read again and compared."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from ..adapters.algebra import Approximated, Progress, Rank, by_energy, by_norm, fixed
from ..adapters.artifact import AdapterArtifact, Key
from ..adapters.format import FormatNames, file_name, is_folder, read, write
from ..adapters.readers import note
from ..adapters.titles import title_of
from ..configs.errors import AfterTrainingError, UserError
from ..configs.ownership import check_out
from ..configs.plain import plain
from ..configs.words import counted
from .adapter_input import format_of
from .checkpoint import is_checkpoint, title_of_checkpoint
from .layers import Layers
from .verify import TOLERANCE, furthest


def rank_of(options: argparse.Namespace) -> Rank:
    """By the one that was given."""
    if options.rank:
        return fixed(options.rank)
    return by_energy(options.energy) if options.energy else by_norm(options.norm)


def out_of(options: argparse.Namespace, source: Path) -> tuple[Path, str]:
    """Where the result goes, and its format. UserError where something is in the way: before anything is computed."""
    try:
        form = options.to or format_of(source)
    except UserError as error:
        raise UserError([f"{source}: {problem}" for problem in error.problems]) from None
    out = Path(options.out) if options.out else _beside(source, form)
    if not out.absolute().parent.is_dir():
        raise UserError(f"cannot write {out}: there is no folder {out.parent}")
    check_out(out, options.force, *([options.base] if options.base else []), whole=is_folder(form))
    if not is_folder(form) and out.suffix != ".safetensors":
        raise UserError(f"--out {plain(out)}: the format {form} is a file of safetensors: give a name ending in that")
    return out, form


def save(
    artifact: AdapterArtifact, names: FormatNames, options: argparse.Namespace, source: Path, layers: Layers | None
) -> Path:
    """Writes it, reads it again, and says how far the two are apart. UserError where that is too far."""
    out, form = out_of(options, source)
    write(artifact, out, form, names, options.dtype)
    kinds = {weights.kind for weights in artifact.modules.values()}
    for advice in dict.fromkeys(note(form, kind) for kind in sorted(kinds)):
        if advice is not None:
            print(f"{out}: {advice}")
    base = layers.weight if layers else None
    if base is None and any(weights.depends_on_base for weights in artifact.modules.values()):
        print(f"wrote {out} ({form}); the change of DoRA and OFT depends on the base: give --base to compare it")
        return out
    apart, worst = furthest(artifact, read(out, names, as_stored=True), base)
    if not apart <= TOLERANCE[options.dtype]:
        raise AfterTrainingError(f"{out}: {worst} differs by {apart:.3g} of its norm from what was to be written")
    print(f"wrote {out} ({form}); read again, the largest error of a change is {apart:.1e} of its norm")
    return out


def _beside(source: Path, form: str) -> Path:
    """Where a file is written that has no other place: beside its source, and that of a checkpoint in the run."""
    if is_checkpoint(source):
        return source.parent.parent / file_name(title_of_checkpoint(source), form)
    return source.with_name(file_name(title_of(source), form))


def lost(found: Approximated) -> str:
    """What an approximation cost."""
    worst, key = found.worst
    mean = sum(found.lost.values()) / len(found.lost)
    words = f"{mean:.1%} of the norm of the change is lost on average, {worst:.1%} in {plain(' '.join(key))}"
    return f"{counted(len(found.lost), 'module')}: {words}"


def shown(title: str) -> Progress:
    """A progress bar over modules."""

    def progress(keys: Iterable[Key]) -> Iterable[Key]:
        from ..configs.progress import Bar

        return Bar(keys, desc=title, unit="module", leave=False, disable=None)

    return progress
