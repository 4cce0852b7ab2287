"""Where the class of a custom pipeline comes from, and whose code runs for it: all checks come before any of it.

Code that is neither ours nor an installed package runs only when that is asked for, and code from the hub only at a
commit: what was read is what runs. diffusers' own loader checks nothing for its community pipelines, and imports every
pipeline.py under one name, where a second one meets the classes of the first; hence this one.
"""

import hashlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from ..configs.choices import did_you_mean, find, find_class, names
from ..configs.errors import UserError
from ..configs.paths import expanded

SHIPPED, FILE = "inference.pipelines", "pipeline.py"
MIRROR = "diffusers/community-pipelines-mirror"
"""The data set that diffusers itself takes community pipelines from: a folder for each of its versions."""
COMMUNITY, SWITCH = "community:", "DIFFUSERS_DISABLE_REMOTE_CODE"


@dataclass(frozen=True, slots=True)
class Source:
    """A way to get at a class."""

    runs: str  # whose code runs then, in words
    load: Callable[[], type[DiffusionPipeline]]
    foreign: bool = False  # neither ours nor an installed package
    remote: bool = False  # from the hub


def pipeline_class(
    custom: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> type[DiffusionPipeline]:
    """The class that `custom` names, in one of the ways of `source_of`.

    UserError, with nothing executed, where foreign code is not allowed or not pinned, and where
    DIFFUSERS_DISABLE_REMOTE_CODE is set.
    """
    source = source_of(custom, revision)
    _check(custom, source, trust_remote_code, revision)
    return source.load()


def source_of(custom: str, revision: str | None = None) -> Source:
    """Of a name of ours, a folder with pipeline.py, `community:name`, `package.module:Class` or the hub's `owner/name`.

    Nothing is executed, and nothing downloaded.
    """
    custom = expanded(custom)
    if custom in names(SHIPPED):
        return Source(f"loraloom's {custom}", partial(_shipped, custom))
    if custom.startswith(COMMUNITY):
        name = _identifier(custom.removeprefix(COMMUNITY))
        runs = f"{name}.py of diffusers' community, whose authors are many"
        return Source(runs, partial(_community, name, revision or ""), foreign=True, remote=True)
    if Path(custom).exists() or custom.startswith((".", "/")):
        folder = _folder(custom)
        return Source(str(folder / FILE), partial(_class_in, folder, FILE), foreign=True)
    if ":" in custom:
        return Source(f"the installed {custom}", partial(_installed, *custom.split(":", 1)))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", custom):
        runs = f"{FILE} of the hub's repository {custom}"
        return Source(runs, partial(_repository, custom, revision or ""), foreign=True, remote=True)
    known = names(SHIPPED)
    raise UserError(
        f"pipeline {custom!r} is unknown{did_you_mean(custom, known)}; there are: {', '.join(known)}; "
        f"or give a folder with {FILE}, package.module:Class, owner/name of the hub, or {COMMUNITY}name"
    )


def _check(custom: str, source: Source, trust_remote_code: bool, revision: str | None) -> None:
    if revision is not None and not source.remote:
        raise UserError(f"pipeline {custom!r} is not from the hub and has no revision; leave out {revision!r}")
    if not source.foreign:
        return
    if os.environ.get(SWITCH, "").upper() in ("1", "ON", "YES", "TRUE"):
        raise UserError(f"pipeline {custom!r} would run {source.runs}, which {SWITCH} forbids; unset it to allow that")
    wanted = [] if trust_remote_code else ["trust_remote_code=True"]
    if source.remote and not re.fullmatch("[0-9a-f]{40}", revision or ""):
        found = "a branch or tag can change" if revision else "the newest can change"
        wanted.append(f"revision=<the 40 digits of the commit that you have read> ({found})")
    if wanted:
        raise UserError(
            f"pipeline {custom!r} would run {source.runs}, which may do here all that you may do; "
            f"read it, then give {' and '.join(wanted)}"
        )


def _folder(custom: str) -> Path:
    folder = Path(expanded(custom)).resolve()
    if not (folder / FILE).is_file():
        raise UserError(f"pipeline {custom!r}: there is no {FILE} in it; give the folder that holds one")
    return folder


def _identifier(name: str) -> str:
    if not name.isidentifier():  # it becomes part of a path
        raise UserError(
            f"{COMMUNITY}{name}: a community pipeline is named as its file, such as {COMMUNITY}lpw_stable_diffusion"
        )
    return name


def _shipped(name: str) -> type[DiffusionPipeline]:
    return _only_pipeline(find(SHIPPED, name))


def _installed(module: str, name: str) -> type[DiffusionPipeline]:
    if not all(word.isidentifier() for word in module.split(".")):
        raise UserError(f"pipeline {module}:{name}: should be package.module:Class")
    return find_class(f"{module}:{name}", DiffusionPipeline, "pipeline")


def _community(name: str, revision: str) -> type[DiffusionPipeline]:
    file = f"v{diffusers.__version__.split('.dev')[0]}/{name}.py"
    folder = _snapshot(MIRROR, revision, file, repo_type="dataset")
    return _class_in((folder / file).parent, f"{name}.py")


def _repository(repository: str, revision: str) -> type[DiffusionPipeline]:
    return _class_in(_snapshot(repository, revision, "*.py"), FILE)


def _snapshot(repository: str, revision: str, pattern: str, **options: Any) -> Path:
    """The files of one commit, downloaded once."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=pattern, **options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"the hub did not give {repository} at {revision}: {reason}") from error
    if folder.name != revision:
        raise UserError(f"{repository}: {revision} is the name of something else there, the commit {folder.name}")
    return folder


def _class_in(folder: Path, file: str) -> type[DiffusionPipeline]:
    """From a file, which may import its neighbours (`from .blocks import ...`), all read anew each time."""
    if not (folder / file).is_file():
        raise UserError(f"{folder}: there is no {file}")
    package = f"loraloom_custom_{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}"
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]
    sys.modules[package] = ModuleType(package)
    sys.modules[package].__path__ = [str(folder)]
    with _sources_alone():
        return _only_pipeline(importlib.import_module(f"{package}.{file.removesuffix('.py')}"))


@contextmanager
def _sources_alone() -> Iterator[None]:
    """Imports pass over `__pycache__`: compiled code beside a file need not be what the file says."""
    before = sys.pycache_prefix
    with TemporaryDirectory() as folder:
        sys.pycache_prefix = folder
        importlib.invalidate_caches()
        try:
            yield
        finally:
            sys.pycache_prefix = before


def _only_pipeline(module: ModuleType) -> type[DiffusionPipeline]:
    """The one pipeline that the module itself defines."""
    own = [each for each in vars(module).values() if isinstance(each, type) and each.__module__ == module.__name__]
    found = [each for each in own if issubclass(each, DiffusionPipeline)]
    if len(found) != 1:
        listed = ", ".join(each.__name__ for each in found) or "none"
        raise UserError(f"{module.__file__}: there must be one class that is a DiffusionPipeline, found: {listed}")
    return found[0]
