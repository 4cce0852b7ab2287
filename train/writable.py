"""Whether what will be trained can be written: asked of every format before the first step, not after the last."""

from ..adapters.adapter import AdapterSet
from ..adapters.format import check_writable
from ..configs.errors import UserError
from ..configs.schema import RunConfig
from ..inference.adapter_file import format_names
from ..models.family import ModelFamily, Parts
from .fits import formats_of


def check_formats(config: RunConfig, family: ModelFamily, parts: Parts, adapters: AdapterSet) -> None:
    """UserError with a line for each format that refuses the adapter as it begins; `parts` are at least the trained
    ones and the scheduler."""
    artifact = adapters.artifact()
    if artifact is None:
        return
    problems = []
    for kind in formats_of(config):
        try:
            check_writable(artifact, kind, format_names(family, parts), config.output.dtype)
        except UserError as error:
            problems += [f"output.formats: {kind}: {problem}" for problem in error.problems]
    if problems:
        raise UserError(problems)
