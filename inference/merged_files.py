"""Adapters merged into the files of a base: a pipeline folder, or a single-file checkpoint, one weight at a time."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ..adapters import algebra
from ..adapters.artifact import AdapterArtifact, Key, Weights
from ..adapters.stored import Entry, opened, write_stream
from ..configs.errors import UserError
from ..configs.ownership import writing
from ..models.original_names import layer_tensor, standard_name
from .layers import Layers
from .pipeline_folder import write_pipeline

Mixed = Sequence[tuple[AdapterArtifact, float]]


class MergedWeights(Mapping[str, Tensor]):
    """Parameter -> its value with the adapters in it, computed when it is asked for."""

    def __init__(self, layers: Layers, component: str, changes: Mapping[Key, Sequence[tuple[Weights, float]]]):
        self.layers, self.component = layers, component
        self.changes = {f"{path}.weight": several for (part, path), several in changes.items() if part == component}

    def __getitem__(self, name: str) -> Tensor:
        weight = self.layers.weight((self.component, name.removesuffix(".weight")))
        return algebra.merged(weight, self.changes[name], f"{self.component} {name}")

    def __contains__(self, name: object) -> bool:
        return name in self.changes

    def __iter__(self) -> Iterator[str]:
        return iter(self.changes)

    def __len__(self) -> int:
        return len(self.changes)


def changes_of(mixed: Mixed) -> dict[Key, list[tuple[Weights, float]]]:
    """The changes of each module. UserError for words, which no weight can hold."""
    changes: dict[Key, list[tuple[Weights, float]]] = defaultdict(list)
    for artifact, weight in mixed:
        if artifact.embeddings:
            words = sorted({word for own in artifact.embeddings.values() for word in own})
            raise UserError(f"the new words {', '.join(words)} cannot be merged into a base: load them beside it")
        for key, weights in artifact.modules.items():
            if weights.kind == "oft" and weight != 1:
                raise UserError(f"an OFT adapter is a rotation, which has no weight; leave out {weight:g}")
            changes[key].append((weights, weight))
    return changes


def merge_into_folder(layers: Layers, mixed: Mixed, folder: Path, dtype: str) -> int:
    """Writes a pipeline folder; how many weights changed."""
    changes = changes_of(mixed)
    components = sorted({component for component, _ in changes})
    states = {component: MergedWeights(layers, component, changes) for component in components}
    write_pipeline(layers.base, states, folder, dtype, {})
    return len(changes)


def merge_into_file(layers: Layers, mixed: Mixed, source: Path, file: Path) -> int:
    """Writes a single-file checkpoint with the names, types and header of `source`; how many weights changed."""
    changes = changes_of(mixed)
    places: dict[str, list[tuple[Key, int | None]]] = defaultdict(list)
    for key in changes:
        name, third = layer_tensor(layers.base.family.name, key[0], key[1], layers.names.original)
        places[name].append((key, third))
    with opened(source) as content, writing(file) as new:
        entries = {}
        for name in content.keys():  # noqa: SIM118  it is no mapping
            piece = content.get_slice(name)
            entries[name] = Entry(piece.get_dtype(), tuple(piece.get_shape()))
        if missing := sorted(places.keys() - set(map(standard_name, entries))):
            raise UserError(f"{source}: has no tensor {missing[0]}, which the adapter changes")
        write_stream(new, entries, _merged(content.get_tensor, places, changes), content.metadata() or {})
    return len(changes)


def _merged(
    read: Callable[[str], Tensor],
    places: Mapping[str, Sequence[tuple[Key, int | None]]],
    changes: Mapping[Key, Sequence[tuple[Weights, float]]],
) -> Callable[[str], Tensor]:
    def tensor(name: str) -> Tensor:
        weight = read(name)
        for key, third in places.get(standard_name(name), ()):
            if third is None:
                weight = algebra.merged(weight, changes[key], name).reshape(weight.shape)
                continue
            pieces = list(weight.chunk(3))
            pieces[third] = algebra.merged(pieces[third], changes[key], name)
            weight = pieces[0].new_empty(weight.shape)
            for number, piece in enumerate(pieces):
                weight[number * len(piece) : (number + 1) * len(piece)] = piece
        return weight

    return tensor
