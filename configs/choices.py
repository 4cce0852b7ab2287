"""Finding an implementation by the name that users write: file name = name, no registry."""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from types import ModuleType

from .errors import UserError


def names(package: str) -> list[str]:
    """The implementations in a package of ours, such as `adapters.methods`, without importing them."""
    folder = importlib.import_module(f"loraloom.{package}")
    return sorted(module.name for module in pkgutil.iter_modules(folder.__path__) if not module.name.startswith("_"))


def find(package: str, name: str) -> ModuleType:
    """The module `loraloom.<package>.<name>`; UserError with the names that exist if there is none."""
    known = names(package)
    if name not in known:
        raise UserError(f"{name!r} is unknown to {package}{did_you_mean(name, known)}; there are: {', '.join(known)}")
    return importlib.import_module(f"loraloom.{package}.{name}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' (did you mean "x"?)' for the nearest known word, or nothing."""
    nearest = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f' (did you mean "{nearest[0]}"?)' if nearest else ""
