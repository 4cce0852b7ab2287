"""loraloom adapter diff: how far two adapters are from each other, block by block, and what their headers say."""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ...adapters import algebra
from ...adapters.artifact import AdapterArtifact, block_of
from ...configs.plain import plain
from ...configs.words import counted
from ..adapter_input import opened
from ..adapter_output import shown
from ..layers import Layers

_LONGEST = 60  # characters of an entry of a header that is shown


@dataclass(frozen=True, slots=True)
class Row:
    """A block in both."""

    component: str
    block: str
    modules: int
    norms: tuple[float, float]
    apart: float  # norm of the difference
    cosine: float  # of all numbers of the block


def run(options: argparse.Namespace) -> int:
    layers = Layers(options.base) if options.base else None
    one, other = (opened(Path(file), layers)[0] for file in (options.one, options.other))
    rows = compare(one, other, layers)
    only = [sorted(a.modules.keys() - b.modules.keys()) for a, b in ((one, other), (other, one))]
    headers = {name: (one.metadata.get(name), other.metadata.get(name)) for name in one.metadata | other.metadata}
    different = {name: pair for name, pair in headers.items() if pair[0] != pair[1]}
    if options.json:
        facts = {"blocks": [asdict(row) for row in rows], "only": [[".".join(k) for k in own] for own in only]}
        print(json.dumps(facts | {"metadata": different}, indent=1))
        return 0
    width = max((len(plain(f"{row.component} {row.block}")) for row in rows), default=5)
    print(f"{'block':{width}}  modules     first    second     apart  cosine")
    for row in rows:
        first, second = row.norms
        name = plain(f"{row.component} {row.block}")
        print(f"{name:{width}}  {row.modules:7}  {first:8.3g}  {second:8.3g}  {row.apart:8.3g}  {row.cosine:6.3f}")
    for title, own in zip(("first", "second"), only, strict=True):
        if own:
            print(f"{counted(len(own), 'module')} only in the {title}, such as {plain(' '.join(own[0]))}")
    for line in _words(one, other):
        print(plain(line))
    for name, (first, second) in different.items():
        short = all(len(text or "") <= _LONGEST for text in (first, second))
        print(plain(f"{name}: {first or '-'}  |  {second or '-'}" if short else f"{name}: differs (--json shows it)"))
    return 0


def _words(one: AdapterArtifact, other: AdapterArtifact) -> Iterator[str]:
    """A line for each word of each text encoder."""
    for part in one.embeddings | other.embeddings:
        first, second = (artifact.embeddings.get(part, {}) for artifact in (one, other))
        for word in first | second:
            if word not in first or word not in second:
                yield f"the word {word!r} of {part} is only in the {'first' if word in first else 'second'}"
            elif first[word].shape != second[word].shape:
                yield f"the word {word!r} of {part} has {len(first[word])} and {len(second[word])} vectors"
            else:
                apart, norm = (first[word] - second[word]).norm().item(), first[word].norm().item()
                yield f"the word {word!r} of {part} differs by {apart:.3g}, and has the norm {norm:.3g}"


def compare(one: AdapterArtifact, other: AdapterArtifact, layers: Layers | None) -> list[Row]:
    """A row for each block that is in both, and one for all of them."""
    found = algebra.distances(one, other, layers and layers.weight, shown("comparing"))
    blocks: dict[tuple[str, str], list[algebra.Distance]] = defaultdict(list)
    for key, distance in found.items():
        blocks[key[0], block_of(key)].append(distance)
    if len(blocks) > 1:
        blocks["all", ""] = list(found.values())
    return [_row(name, several) for name, several in blocks.items()]


def _row(name: tuple[str, str], several: list[algebra.Distance]) -> Row:
    first, second, apart = (
        sum(value * value for value in values) ** 0.5
        for values in zip(*((*each.norms, each.apart) for each in several), strict=True)
    )
    product = sum(each.cosine * each.norms[0] * each.norms[1] for each in several)
    return Row(*name, len(several), (first, second), apart, product / (first * second) if first * second else 0.0)
