"""Whether a config fits the family of its base, before anything is loaded."""

from typing import Any

from ..adapters.adapter import Targets
from ..adapters.targets import problems_of, select
from ..configs.choices import did_you_mean, find
from ..configs.errors import UserError
from ..configs.schema import RunConfig
from ..data.buckets import check_rules
from ..data.dataset import bucket_rules
from ..models.family import ModelFamily, Parts


def check_base_fits(config: RunConfig, family: ModelFamily) -> None:
    """Raises UserError if the buckets or the adapter of a config do not fit the family, before anything is loaded."""
    problems: list[str] = []
    for resolution in config.data.resolutions:
        if resolution % family.size_multiple:
            down = resolution - resolution % family.size_multiple
            problems.append(
                f"data.resolution {resolution} is no multiple of {family.size_multiple}, which {family.name} needs: "
                f"use {down} or {down + family.size_multiple}"
            )
    for rules in bucket_rules(config.data, family.size_multiple):
        problems += check_rules(rules, family.size_multiple)
    for part, selection in config.adapter.parts.items():
        if part not in family.targets:
            hint, parts = did_you_mean(part, family.targets), ", ".join(family.targets)
            problems.append(f"adapter.parts: {family.name} has no part {part!r}{hint}; there are: {parts}")
        else:
            problems += [f"adapter.parts.{part}: {p}" for p in problems_of(selection, family.targets[part])]
    if problems:
        raise UserError(list(dict.fromkeys(problems)))


def targets_of(config: RunConfig, family: ModelFamily, parts: Parts) -> Targets:
    """Part -> names of the modules to adapt; UserError for a preset or an expression that matches none."""
    return {
        part: select(part, parts[part], selection, family.targets[part])
        for part, selection in config.adapter.parts.items()
    }


def formats_of(config: RunConfig) -> list[str]:
    """The file formats of the adapter."""
    return config.output.formats or list(find("adapters.methods", config.adapter.method).FORMATS)


def options_of(config: RunConfig) -> Any:
    """The options of the adapter method."""
    return find("adapters.methods", config.adapter.method).Options.model_validate(config.adapter.options)
