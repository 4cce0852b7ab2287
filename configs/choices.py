"""Finding an implementation by the name that users write: a file of ours, or what an installed package offers.

A package offers by an entry point in the group `loraloom.<package>`, such as `loraloom.adapters.methods`, which names a
module (or an object) that keeps the contract of the files there.
"""

import difflib
import importlib
import pkgutil
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, TypeVar

from .errors import UserError

Kind = TypeVar("Kind")
GROUPS = (
    "models.families",
    "adapters.methods",
    "adapters.formats",
    "train.optimizers",
    "train.losses",
)
"""Packages of ours to which others may add."""


def names(package: str) -> list[str]:
    """The implementations that there are, such as those of `adapters.methods`, without importing them."""
    return sorted({*ours(package), *offered(package)})


def find(package: str, name: str) -> ModuleType:
    """The module `loraloom.<package>.<name>`, or what another package offers under the name.

    UserError with the names that exist if there is none, for one that two packages offer, and for one that cannot be
    imported.
    """
    own, foreign = name in ours(package), offered(package).get(name, [])
    if own and not foreign:
        return importlib.import_module(f"loraloom.{package}.{name}")
    if not foreign:
        known = names(package)
        raise UserError(f"{name!r} is unknown to {package}{did_you_mean(name, known)}; there are: {', '.join(known)}")
    if own or len(foreign) > 1:
        owners = [*(["loraloom"] if own else []), *map(owner, foreign)]
        raise UserError(f"{name!r} of {package} is offered by {' and by '.join(owners)}: uninstall all but one of them")
    return _loaded(package, foreign[0])


def offered(package: str) -> dict[str, list[EntryPoint]]:
    """What installed packages add to a package of ours, by name; several under one name are a mistake."""
    return _offered(tuple(sys.path)).get(package, {}) if package in GROUPS else {}


def owner(entry: EntryPoint) -> str:
    """The package that offers it, with its version."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else entry.value


@cache
def ours(package: str) -> list[str]:
    """The files in a package of ours."""
    folder = importlib.import_module(f"loraloom.{package}")
    return sorted(module.name for module in pkgutil.iter_modules(folder.__path__) if not module.name.startswith("_"))


@cache
def _offered(path: tuple[str, ...]) -> dict[str, dict[str, list[EntryPoint]]]:
    """Of everything that can be imported from these folders."""
    found: dict[str, dict[str, list[EntryPoint]]] = {}
    installed = entry_points()
    for package in GROUPS:
        for entry in installed.select(group=f"loraloom.{package}"):
            found.setdefault(package, {}).setdefault(entry.name, []).append(entry)
    return found


def find_class(path: str, base: type[Kind], setting: str) -> type[Kind]:
    """The class that `package.module:Class` names, of an installed package. UserError unless it is a kind of `base`."""
    from .faults import foreign

    module, _, name = path.partition(":")
    foreign(module)
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise UserError(f"{setting} {path}: there is no module {error.name!r}; is it installed here?") from error
    except (ImportError, SyntaxError) as error:
        raise UserError(f"{setting} {path}: cannot be imported ({error})") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(f"{setting} {path}: the module has no {base.__name__} of this name")
    return found


def _loaded(package: str, entry: EntryPoint) -> Any:
    from .faults import foreign

    foreign(entry.module)
    try:
        return entry.load()
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UserError(f"{entry.name!r} of {package}, from {owner(entry)}: cannot be imported ({error})") from error


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' (did you mean "x"?)' for the nearest known word, or nothing."""
    nearest = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f' (did you mean "{nearest[0]}"?)' if nearest else ""
