"""What the verbs on adapters read: a file or folder of any format, or a checkpoint of a run."""

from pathlib import Path
from typing import Any

from ..adapters import stored
from ..adapters.artifact import AdapterArtifact
from ..adapters.format import FormatNames, read, recognised
from ..adapters.titles import title_of
from ..configs.bounded import parse_json
from ..configs.errors import UserError
from ..configs.loader import load_config
from ..configs.plain import plain
from ..models.base import check_base, find_base
from .checkpoint import config_of, is_checkpoint, read_checkpoint, usual_format
from .layers import Layers, names_for
from .words import named_words


def opened(path: Path, layers: Layers | None = None, *, as_stored: bool = False) -> tuple[AdapterArtifact, FormatNames]:
    """The adapter, and what formats have to know of its base: of `layers`, or as far as the file or the run tells.

    A word without a name has that of its file: in another file it would have another.
    """
    if is_checkpoint(path):
        model = config_of(path).model
        return read_checkpoint(path), (layers or Layers(model.base, model.revision)).names
    names = names_for(path, layers)
    return named_words(read(path, names, as_stored=as_stored), title_of(path)), names


def base_of(path: Path) -> tuple[str, str | None]:
    """The base and its revision that the run beside a file, or the record in its header, tells, if it is here.

    UserError where nothing tells it, or it is not on this machine: the header of a stranger's file downloads nothing.
    """
    needed = "--base is needed: pocket, a pipeline folder, a .safetensors checkpoint or a hub id"
    model = _model_of(path)
    base, revision = model.get("base"), model.get("revision")
    if not isinstance(base, str) or not isinstance(revision, str | None) or model.get("adapters") or check_base(base):
        raise UserError(f"{path}: does not tell its base; {needed}")
    if find_base(base, revision) is None:
        raise UserError(f"{path}: was trained on {plain(base)}, which is not on this machine; {needed}")
    return base, revision


def _model_of(path: Path) -> dict[str, Any]:
    """The section `model` of the run that made a file; {} where nothing tells it."""
    run = path.parent
    if (run / "run.json").is_file() and (run / "config.yaml").is_file():
        return load_config(run / "config.yaml").model.model_dump()
    try:
        config = parse_json(stored.look(path)[1].get("loraloom.config", "{}"), str(path))
    except UserError as error:
        raise UserError([f"{path}: {problem.removeprefix(f'{path}: ')}" for problem in error.problems]) from None
    model = config.get("model") if isinstance(config, dict) else None
    return model if isinstance(model, dict) else {}


def format_of(path: Path) -> str:
    """Of a file or folder; of a checkpoint the first that its run would write."""
    return usual_format(path) if is_checkpoint(path) else recognised(path)
