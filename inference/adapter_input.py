"""What the verbs on adapters read: a file or folder of any format, or a checkpoint of a run."""

from pathlib import Path

from ..adapters.artifact import AdapterArtifact
from ..adapters.format import FormatNames, read, recognised
from .checkpoint import config_of, is_checkpoint, read_checkpoint, usual_format
from .layers import Layers, names_for


def opened(path: Path, layers: Layers | None = None, *, as_stored: bool = False) -> tuple[AdapterArtifact, FormatNames]:
    """The adapter, and what formats have to know of its base: of `layers`, or as far as the file or the run tells."""
    if is_checkpoint(path):
        model = config_of(path).model
        return read_checkpoint(path), (layers or Layers(model.base, model.revision)).names
    names = names_for(path, layers)
    return read(path, names, as_stored=as_stored), names


def format_of(path: Path) -> str:
    """Of a file or folder; of a checkpoint the first that its run would write."""
    return usual_format(path) if is_checkpoint(path) else recognised(path)
