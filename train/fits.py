"""Whether a config fits the family of its base, before anything is loaded."""

from collections.abc import Sequence

from ..adapters.adapter import Targets
from ..configs.choices import did_you_mean
from ..configs.errors import UserError
from ..configs.schema import RunConfig
from ..data.buckets import check_rules
from ..data.dataset import bucket_rules
from ..models.family import ModelFamily


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
    if problems:
        raise UserError(list(dict.fromkeys(problems)))
    target_names(config, family)


def target_names(config: RunConfig, family: ModelFamily) -> Targets:
    """Part -> endings of the names of the modules to adapt; UserError for a part or preset that there is not."""
    targets: dict[str, Sequence[str]] = {}
    for part, preset in config.adapter.parts.items():
        presets = family.targets.get(part)
        if presets is None:
            hint, parts = did_you_mean(part, family.targets), ", ".join(family.targets)
            raise UserError(f"adapter.parts: {family.name} has no part {part!r}{hint}; there are: {parts}")
        if preset not in presets:
            hint = did_you_mean(preset, presets)
            raise UserError(f"adapter.parts.{part}: no preset {preset!r}{hint}; there are: {', '.join(presets)}")
        targets[part] = presets[preset]
    return targets
