"""Our own format, which holds every method without loss: `<component>.<path>:<tensor>`, scales in the header.

For methods that no other tool's files can hold, and as a master copy that the other formats can be written from.
"""

import json
from collections.abc import Iterable

from ...configs.bounded import parse_json
from ...configs.choices import names as methods
from ...configs.errors import UserError
from ..artifact import DORA_IN_TEXT, DORA_OVER_INPUTS, AdapterArtifact, Key, Tensors, Weights
from ..format import FormatNames, carried, header_of
from ..parsed import computable
from ..stored import Header

SUFFIX = ".loraloom"
FOLDS = False
HOLDS = frozenset({*methods("adapters.methods"), "dora", DORA_IN_TEXT, DORA_OVER_INPUTS, "tokens"})

_MODULES = "loraloom.modules"
_WORD = "embedding:"


def matches(keys: Iterable[str]) -> bool:
    return any(":" in key for key in keys)


def to_tensors(artifact: AdapterArtifact, names: FormatNames) -> tuple[Tensors, Header]:
    """Tensors as they are; the header has method and scale of each module."""
    tensors = {
        f"{component}.{path}:{name}": tensor
        for (component, path), weights in artifact.modules.items()
        for name, tensor in weights.tensors.items()
    }
    for part, tokens in artifact.embeddings.items():
        tensors |= {f"{part}:{_WORD}{token}": rows for token, rows in tokens.items()}
    modules = {f"{key[0]}.{key[1]}": [weights.method, weights.scale] for key, weights in artifact.modules.items()}
    return tensors, {**header_of(artifact, names), _MODULES: json.dumps(modules, sort_keys=True)}


def from_tensors(tensors: Tensors, header: Header, names: FormatNames) -> AdapterArtifact:
    """See `adapters.formats`. UserError for a module that the base does not have, or one without its entry."""
    try:
        entries = {module: (str(method), float(scale)) for module, (method, scale) in _entries(header).items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{_MODULES} in the header is damaged ({error})") from None
    modules: dict[Key, Tensors] = {}
    embeddings: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        module, _, part = name.partition(":")
        if part.startswith(_WORD):
            if tensor.ndim != 2 or not tensor.numel() or not tensor.is_floating_point():
                raise UserError(f"{name} is {tuple(tensor.shape)}; the vectors of a word are (vectors, width) numbers")
            embeddings.setdefault(module, {})[part.removeprefix(_WORD)] = computable(tensor).float()
            continue
        component, _, path = module.partition(".")
        if path not in names.module_paths.get(component, ()) or module not in entries:
            raise UserError(f"{name} belongs to no module of this base")
        if not tensor.is_floating_point():
            raise UserError(f"{name} is {tensor.dtype}, which is not read here")
        modules.setdefault((component, path), {})[part] = computable(tensor)
    known = sorted(HOLDS - {"dora", DORA_IN_TEXT, DORA_OVER_INPUTS, "tokens"})
    if strange := {method for method, _ in entries.values()} - {*known}:
        raise UserError(f"the method {sorted(strange)[0]!r} is unknown; there are: {', '.join(known)}")
    return AdapterArtifact(
        {(c, p): Weights(entries[f"{c}.{p}"][0], held, entries[f"{c}.{p}"][1]) for (c, p), held in modules.items()},
        carried(header),
        embeddings,
    )


def _entries(header: Header) -> dict:
    return parse_json(header.get(_MODULES, "{}"), "it")
