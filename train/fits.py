"""Whether a config fits the family of its base, before anything is loaded."""

from ..adapters.adapter import Targets
from ..adapters.targets import problems_of, select
from ..configs.choices import did_you_mean, find, names
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
    problems += _problems_of_method(config, family)
    for part, selection in layer_parts(config).items():
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
        for part, selection in layer_parts(config).items()
    }


def layer_parts(config: RunConfig) -> dict[str, str | list[str]]:
    """Part -> selection of the layers that are adapted: none for a method that trains words alone."""
    return config.adapter.parts if find("adapters.methods", config.adapter.method).ADAPTS_LAYERS else {}


def trained_parts(config: RunConfig, family: ModelFamily) -> list[str]:
    """The parts whose weights, or words, change."""
    return list(dict.fromkeys([*layer_parts(config), *(family.tokenizers if config.adapter.tokens else ())]))


def _problems_of_method(config: RunConfig, family: ModelFamily) -> list[str]:
    """Words where there can be none, none where there must be, and formats that cannot hold what is trained."""
    adapter, problems = config.adapter, []
    if not find("adapters.methods", adapter.method).ADAPTS_LAYERS:
        if not adapter.tokens:
            problems.append(f"adapter.tokens: {adapter.method} learns new words; give them, such as [{{token: <sks>}}]")
        if "parts" in adapter.model_fields_set:
            problems.append(f"adapter.parts: {adapter.method} adapts no layers; take method lora to train both")
    if adapter.tokens and not family.tokenizers:
        problems.append(f"adapter.tokens: {family.name} has no text encoder that can learn new words")
    needs = _needs(config)
    for name in formats_of(config):
        if lacking := needs - set(find("adapters.formats", name).HOLDS):
            able = [each for each in names("adapters.formats") if needs <= set(find("adapters.formats", each).HOLDS)]
            what = " and ".join(sorted(lacking))
            problems.append(f"output.formats: {name} cannot hold {what}; take {' or '.join(able)}")
    if "embedding" in formats_of(config) and len(adapter.tokens) > 1:
        problems.append("output.formats: embedding holds one word; take loraloom for several")
    return problems


def _needs(config: RunConfig) -> set[str]:
    """What a file has to hold."""
    adapter = config.adapter
    layers = {"dora" if adapter.options.get("dora") else adapter.method} if layer_parts(config) else set()
    return layers | ({"tokens"} if adapter.tokens else set())


def formats_of(config: RunConfig) -> list[str]:
    """The file formats of the adapter: those asked for, or those that suit it."""
    if config.output.formats:
        return config.output.formats
    usual = list(find("adapters.methods", config.adapter.method).FORMATS)
    if len(config.adapter.tokens) > (0 if layer_parts(config) else 1):
        return ["loraloom"]
    needs = _needs(config)
    return [name for name in usual if needs <= set(find("adapters.formats", name).HOLDS)] or ["loraloom"]
