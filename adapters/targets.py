"""Which modules of a part are adapted: presets of the family, and regular expressions over module names."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ..configs.choices import did_you_mean, find
from ..configs.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from ..configs.schema import AdapterSection

T = TypeVar("T")

Presets = Mapping[str, Sequence[str]]
"""Preset -> endings of module names."""
Selection = str | Sequence[str]
"""Presets joined by `+`, or a list of presets and of `re:` with a regular expression for whole module names."""

ALL_LINEAR = "all-linear"
ALL = "all"
PATTERN = "re:"


def words_of(selection: Selection) -> list[str]:
    """The presets and expressions of a selection."""
    return (
        selection.split("+") if isinstance(selection, str) and not selection.startswith(PATTERN) else _listed(selection)
    )


def _listed(selection: Selection) -> list[str]:
    return [selection] if isinstance(selection, str) else list(selection)


def problems_of(selection: Selection, presets: Presets, *, whole: bool = False) -> list[str]:
    """What is wrong with a selection, as far as it can be told without the model; `whole` parts may be selected."""
    problems, known = [], [*presets, ALL_LINEAR, *([ALL] if whole else [])]
    for word in words_of(selection):
        if word.startswith(PATTERN):
            try:
                re.compile(word.removeprefix(PATTERN))
            except re.error as error:
                problems.append(f"{word!r} is no regular expression ({error})")
        elif word not in known:
            problems.append(f"no preset {word!r}{did_you_mean(word, known)}; there are: {', '.join(known)}, and re:…")
    return problems


def select(
    part: str, module: "nn.Module", selection: Selection, presets: Presets, unread: Collection[str] = ()
) -> list[str]:
    """Names of the linear and convolution layers that a selection means, in the order of the model.

    `all` means every module with weights of its own, norms and embeddings too. Modules in `unread`, and what is below
    them, are left out: nothing would train them.

    UserError for a preset or expression that matches nothing: PEFT is silent about one of several.
    """
    from torch import nn

    if ALL in words_of(selection):
        named = (name for name, each in module.named_modules() if any(True for _ in each.parameters(recurse=False)))
        return [name for name in named if not _is_below(name, unread)]
    layers = {name: each for name, each in module.named_modules() if isinstance(each, nn.Linear | nn.Conv2d)}
    chosen: set[str] = set()
    for word in words_of(selection):
        if word.startswith(PATTERN):
            found = {name for name in layers if re.fullmatch(word.removeprefix(PATTERN), name)}
        elif word == ALL_LINEAR:
            found = {name for name, layer in layers.items() if isinstance(layer, nn.Linear)}
        else:
            found = {name for name in layers if name.endswith(tuple(f".{ending}" for ending in presets[word]))}
        if not found:
            raise UserError(f"adapter.parts.{part}: {word!r} matches no layer of {part}")
        read = {name for name in found if not _is_below(name, unread)}
        if not read:
            raise UserError(
                f"adapter.parts.{part}: {word!r} matches only layers that nothing reads ({', '.join(unread)}): this "
                "family, or model.clip_skip, leaves them out, so they cannot be trained"
            )
        chosen |= read
    return [name for name in layers if name in chosen]


def _is_below(name: str, modules: Collection[str]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def layer_parts(section: "AdapterSection", denoiser: str) -> Mapping[str, Selection]:
    """Part -> selection of the layers that are trained: none for a method that trains words alone."""
    selection = find("adapters.methods", section.method).SELECTION
    return {} if selection is None else section.parts or {denoiser: selection}


def targets_of(
    parts: Mapping[str, Any],
    selections: Mapping[str, Selection],
    presets: Mapping[str, Presets],
    unread: Callable[[str], Collection[str]] = lambda part: (),
) -> dict[str, list[str]]:
    """Part -> names of the modules to adapt. UserError for a preset or an expression that matches none.

    `unread` answers with the modules of a part that cannot be trained, as `select` has it.
    """
    return {
        part: select(part, parts[part], selection, presets[part], unread(part))
        for part, selection in selections.items()
    }


def by_pattern(
    setting: str, targets: Mapping[str, Iterable[str]], patterns: Mapping[str, T]
) -> dict[str, dict[str, T]]:
    """Part -> module name -> the value of the first pattern that matches `part.name`; others have no entry.

    A pattern is a regular expression that is looked for anywhere in the name. UserError for one that matches nothing.
    """
    found: dict[str, dict[str, T]] = {part: {} for part in targets}
    unused = dict.fromkeys(patterns)
    for part, names in targets.items():
        for name in names:
            matching = [pattern for pattern in patterns if re.search(pattern, f"{part}.{name}")]
            for pattern in matching:
                unused.pop(pattern, None)
            if matching:
                found[part][name] = patterns[matching[0]]
    if unused:
        raise UserError([f"{setting}: {pattern!r} matches no adapted module" for pattern in unused])
    return found
