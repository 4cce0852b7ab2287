"""loraloom adapter inspect: what a file holds, in a table or as JSON. No base is needed, and no model is made."""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...adapters import algebra, stored
from ...adapters.artifact import MAGNITUDES, AdapterArtifact, Weights, block_of
from ...adapters.format import recognised
from ...adapters.origin import architecture_of
from ...configs.errors import BAD_INPUT, DONE, UserError
from ...configs.plain import plain
from ..adapter_input import opened
from ..checkpoint import is_checkpoint
from ..layers import Layers

BAR = 24  # characters of the longest
CHECKPOINT = "checkpoint of a run (`adapter convert` makes a file of it)"
LONGEST = 100  # characters of a metadata value


@dataclass(frozen=True, slots=True)
class Block:
    """Part of a component: a block of the UNet, a layer of a text encoder."""

    component: str
    block: str
    modules: int
    norm: float  # root of the sum of |delta|^2, Frobenius; of DoRA and OFT without the base: |s B A|, or not known (0)


@dataclass(frozen=True, slots=True)
class Inspection:
    """All that is shown; None and empty is what could not be read."""

    file: str
    bytes: int
    tensors: int
    dtypes: dict[str, int]
    format: str | None = None
    architecture: str | None = None
    method: str | None = None
    modules: dict[str, int] = field(default_factory=dict)  # component -> how many
    ranks: dict[str, int] = field(default_factory=dict)  # rank -> modules that have it
    scales: dict[str, int] = field(default_factory=dict)  # alpha / rank -> modules
    words: dict[str, int] = field(default_factory=dict)  # new word -> vectors
    blocks: list[Block] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)  # why it cannot be used: NaN, unknown keys, ...


def run(options: argparse.Namespace) -> int:
    """Exit code 2 where a file cannot be used."""
    layers = Layers(options.base) if options.base else None
    found = [inspect(Path(file), layers) for file in options.files]
    if options.json:
        print(json.dumps([asdict(each) for each in found], indent=1))
    else:
        print("\n\n".join("\n".join(map(plain, lines(each))) for each in found))
    return BAD_INPUT if any(each.problems for each in found) else DONE


def inspect(file: Path, layers: Layers | None = None) -> Inspection:
    """What is in a file. UserError only where it is no adapter file at all; other damage is told in `problems`."""
    try:
        if is_checkpoint(file):
            found = [stored.look(each) for each in sorted(file.glob("adapter_*.safetensors"))]
            entries, header = {name: entry for own, _ in found for name, entry in own.items()}, {}
        else:
            entries, header = stored.look(file)
    except UserError as error:
        raise UserError([f"{file}: {problem}" for problem in error.problems]) from None
    size = sum(each.stat().st_size for each in file.rglob("*")) if file.is_dir() else file.stat().st_size
    facts: dict[str, Any] = {
        "file": str(file),
        "bytes": size,
        "tensors": len(entries),
        "dtypes": dict(Counter(entry.dtype for entry in entries.values())),
        "architecture": architecture_of({name: entry.shape for name, entry in entries.items()}, header),
        "metadata": dict(sorted(header.items())),
    }
    try:
        facts["format"] = CHECKPOINT if is_checkpoint(file) else recognised(file)
        artifact, names = opened(file, layers, as_stored=True)
        facts["architecture"] = facts["architecture"] or names.architecture
        facts |= _content(artifact)
    except UserError as error:
        facts["problems"] = [problem.removeprefix(f"{file}: ") for problem in error.problems]
    return Inspection(**facts)


def _content(artifact: AdapterArtifact) -> dict[str, Any]:
    weights = artifact.modules.values()
    blocks: dict[tuple[str, str], list[float]] = defaultdict(list)
    for key, each in artifact.modules.items():
        blocks[key[0], block_of(key)].append(_norm(each))
    words = {word: len(rows) for own in artifact.embeddings.values() for word, rows in own.items()}
    return {
        "method": next((each.kind for each in weights if each.is_dora), artifact.method),
        "modules": dict(Counter(component for component, _ in artifact.modules)),
        "ranks": _counted(str(each.rank) for each in weights if each.method == "lora"),
        "scales": _counted(f"{each.scale:g}" for each in weights),
        "words": words,
        "blocks": [Block(*name, len(norms), sum(n * n for n in norms) ** 0.5) for name, norms in blocks.items()],
    }


def _counted(values: Iterator[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _norm(weights: Weights) -> float:
    if weights.method == "oft":
        return 0.0
    plain = {name: tensor for name, tensor in weights.tensors.items() if name not in MAGNITUDES}
    return algebra.norm(Weights(weights.method, plain, weights.scale))


def lines(found: Inspection) -> Iterator[str]:
    """For a terminal."""
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in found.dtypes.items())
    yield found.file
    yield f"  {_size(found.bytes)}, {found.tensors} tensors ({dtypes})"
    yield from (f"  problem: {problem}" for problem in found.problems)
    yield f"  format        {found.format or 'not known'}"
    yield f"  base          {found.architecture or 'not told'}"
    if found.method:
        yield f"  method        {found.method}"
        if found.modules:
            yield f"  modules       {_pairs(found.modules)}"
        yield "  NaN or Inf    none"
    for title, counts in (("rank", found.ranks), ("alpha / rank", found.scales), ("words", found.words)):
        if counts:
            yield f"  {title:14}{_most(counts) if title != 'words' else _pairs(counts)}"
    yield from _chart(found.blocks)
    if found.metadata:
        yield from ("", "  metadata")
        named = {plain(name): _shortened(value) for name, value in found.metadata.items()}
        width = max(map(len, named))
        yield from (f"    {name:{width}}  {value}" for name, value in named.items())


def _chart(blocks: list[Block]) -> Iterator[str]:
    largest = max((block.norm for block in blocks), default=0.0)
    if not largest:
        return
    width = max(len(plain(f"{block.component} {block.block}")) for block in blocks)
    yield ""
    yield f"  {'block':{width}}  modules  norm of the change"
    for block in blocks:
        bar = "█" * max(1, round(BAR * block.norm / largest)) if block.norm else ""
        yield f"  {plain(block.component + ' ' + block.block):{width}}  {block.modules:7}  {block.norm:8.3g} {bar}"


def _pairs(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.items())


def _most(counts: dict[str, int], most: int = 6) -> str:
    """'4', or '4 (100 modules), 8 (20)'."""
    if len(counts) == 1:
        return next(iter(counts))
    words = [f"{value} ({count})" for value, count in list(counts.items())[:most]]
    return ", ".join(words) + (f" and {len(counts) - most} others" if len(counts) > most else "")


def _shortened(value: str) -> str:
    value = " ".join(value.split())
    return value if len(value) <= LONGEST else f"{value[: LONGEST - 1]}…"


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 1024:.1f} KiB"
