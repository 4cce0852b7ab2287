"""The adapter in a checkpoint of a run, as it would have been exported at that step."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..configs.bounded import read_json
from ..configs.choices import find
from ..configs.errors import UserError
from ..configs.loader import load_config
from ..configs.schema import RunConfig

if TYPE_CHECKING:
    from ..adapters.adapter import AdapterSet
    from ..adapters.artifact import AdapterArtifact, Tensors

STATE = "run_state.json"


def is_checkpoint(path: Path) -> bool:
    """Whether a path is `RUN/checkpoints/step-N`."""
    return (path / "manifest.json").is_file() and (path.parent.parent / "config.yaml").is_file()


def checkpoints_of(run: Path) -> list[Path]:
    """All checkpoints of a run folder, by their steps."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if is_checkpoint(path))


def config_of(checkpoint: Path) -> RunConfig:
    """Of the run that has saved it."""
    return load_config(checkpoint.parent.parent / "config.yaml")


def read_checkpoint(folder: Path) -> "AdapterArtifact":
    """All that was trained at that step, new words too; the averaged weights where the run averages them.

    The parts that carry the adapter are loaded for it. UserError for a run that trains the base itself.
    """
    from ..adapters.combined import Combined
    from ..adapters.targets import layer_parts, targets_of
    from ..adapters.token_embeddings import inject_tokens
    from .merged import MergedBase

    config = config_of(folder)
    method, tokens = find("adapters.methods", config.adapter.method), config.adapter.tokens
    if method.CHANGES_BASE:
        raise UserError(f"{folder}: holds weights of the base itself; take the pipeline that the run has exported")
    base = MergedBase(config.model)
    selections, words = layer_parts(config.adapter, base.family.denoiser), base.family.tokenizers if tokens else {}
    parts = base.load([*dict.fromkeys([*selections, *words, *words.values()])])
    sets: list[AdapterSet] = []
    if selections:
        unread = partial(base.family.unread, parts, clip_skip=config.model.clip_skip)
        left_out = "latents" in read_json(folder / STATE).get("data", ())  # older versions adapted those layers too
        targets = targets_of(parts, selections, base.family.targets, unread if left_out else lambda part: ())
        sets.append(method.inject(parts, config.adapter, targets, 0))
    if tokens:
        sets.append(inject_tokens(parts, words, tokens, 0))
    adapters = Combined(sets)
    for part, named in adapters.named_parameters().items():
        adapters.load(part, _tensors(folder / f"adapter_{part}.safetensors"))
        if (averaged := folder / f"ema_{part}.safetensors").is_file():
            averages = _tensors(averaged)
            if averages.keys() != named.keys() or any(averages[n].shape != p.shape for n, p in named.items()):
                raise UserError(f"{averaged}: its tensors are not those of this run")
            for name, parameter in named.items():
                parameter.data = averages[name]
    artifact = adapters.artifact()
    assert artifact is not None, "methods that change the base were refused"
    return replace(artifact, metadata={"modelspec.title": config.output.name})


def title_of_checkpoint(folder: Path) -> str:
    """`my-dog-000080`."""
    return f"{config_of(folder).output.name}-{folder.name.removeprefix('step-')}"


def usual_format(folder: Path) -> str:
    """The first that its run would write."""
    config = config_of(folder)
    needs_all = bool(config.adapter.tokens) and config.adapter.method != "textual_inversion"
    usual = "loraloom" if needs_all else find("adapters.methods", config.adapter.method).FORMATS[0]
    return config.output.formats[0] if config.output.formats else usual


def _tensors(file: Path) -> "Tensors":
    from ..adapters.stored import load_file

    try:
        return load_file(file)[0]
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
