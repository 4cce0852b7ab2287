"""The adapter in a checkpoint of a run, as it would have been exported at that step."""

from pathlib import Path

from safetensors.torch import load_file

from ..adapters.adapter import AdapterSet
from ..adapters.artifact import AdapterArtifact
from ..adapters.targets import layer_parts, targets_of
from ..configs.choices import find
from ..configs.errors import UserError
from ..configs.loader import load_config
from .merged import MergedBase


def is_checkpoint(path: Path) -> bool:
    """Whether a path is `RUN/checkpoints/step-N`."""
    return (path / "manifest.json").is_file() and (path.parent.parent / "config.yaml").is_file()


def checkpoints_of(run: Path) -> list[Path]:
    """All checkpoints of a run folder, by their steps."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if is_checkpoint(path))


def read_checkpoint(folder: Path) -> AdapterArtifact:
    """The averaged weights where the run averages them. The parts that carry the adapter are loaded for it.

    UserError for a run that trains the base itself or new words: those are in the files that it exports.
    """
    config = load_config(folder.parent.parent / "config.yaml")
    if config.adapter.method in ("full", "textual_inversion") or config.adapter.tokens:
        raise UserError(f"{folder}: holds more than layers of an adapter; take the file that the run has exported")
    base = MergedBase(config.model)
    selections = layer_parts(config.adapter, base.family.denoiser)
    parts = base.load(list(selections))
    targets = targets_of(parts, selections, base.family.targets)
    method = find("adapters.methods", config.adapter.method)
    adapters: AdapterSet = method.inject(parts, config.adapter, targets, 0)
    for part, named in adapters.named_parameters().items():
        adapters.load(part, load_file(folder / f"adapter_{part}.safetensors"))
        if (averaged := folder / f"ema_{part}.safetensors").is_file():
            averages = load_file(averaged)
            for name, parameter in named.items():
                parameter.data = averages[name]
    artifact = adapters.artifact()
    assert artifact is not None, "methods that change the base were refused"
    return artifact
