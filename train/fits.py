"""Whether a config fits the family of its base, before anything is loaded."""

from collections.abc import Iterator
from typing import Any

from ..adapters.targets import layer_parts, problems_of
from ..configs.choices import did_you_mean, find, names
from ..configs.errors import UserError
from ..configs.schema import AdapterSection, RunConfig
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
    problems += _problems_of_types(config)
    problems += _problems_of_method(config, family)
    problems += _problems_of_selection(config, family)
    problems += _problems_of_formats(config)
    if problems:
        raise UserError(list(dict.fromkeys(problems)))


def trained_parts(config: RunConfig, family: ModelFamily) -> list[str]:
    """The parts whose weights, or words, change."""
    layers, words = layer_parts(config.adapter, family.denoiser), family.tokenizers if config.adapter.tokens else ()
    return list(dict.fromkeys([*layers, *words]))


def changes_base(config: RunConfig) -> bool:
    """Whether the run trains the base's own weights, so that a pipeline folder is written."""
    return _method(config).CHANGES_BASE


def words_of_method(config: RunConfig) -> list[str]:
    """The method, with rank and alpha where it has them."""
    adapter, method = config.adapter, _method(config)
    has_rank = method.SELECTION is not None and not method.CHANGES_BASE
    return [adapter.method, *([f"rank {adapter.rank}", f"alpha {adapter.alpha:g}"] if has_rank else [])]


def _method(config: RunConfig) -> Any:
    return find("adapters.methods", config.adapter.method)


def _problems_of_selection(config: RunConfig, family: ModelFamily) -> Iterator[str]:
    for part, selection in layer_parts(config.adapter, family.denoiser).items():
        if part not in family.targets:
            hint, parts = did_you_mean(part, family.targets), ", ".join(family.targets)
            yield f"adapter.parts: {family.name} has no part {part!r}{hint}; there are: {parts}"
        else:
            problems = problems_of(selection, family.targets[part], whole=changes_base(config))
            yield from (f"adapter.parts.{part}: {problem}" for problem in problems)
    known = [*trained_parts(config, family), *(["tokens"] if config.adapter.tokens else ())]
    for part in config.optimizer.parts:
        if part not in known:
            yield f"optimizer.parts: {part} is not trained{did_you_mean(part, known)}; there are: {', '.join(known)}"


def _problems_of_types(config: RunConfig) -> Iterator[str]:
    """Types in which gradients would vanish, and those that torch does not bring together."""
    model, precision = config.model.dtype, config.loop.precision
    if model == "fp16" and precision != "fp16":
        yield (
            f"model.dtype fp16 with loop.precision {precision}: gradients of fp16 vanish without the scaling that "
            "loop.precision fp16 brings; take that, or model.dtype bf16 or fp32"
        )
    if model == "bf16" and precision == "fp16":
        yield "model.dtype bf16 with loop.precision fp16: torch does not compute with both; take bf16 for both, or none"


def _problems_of_method(config: RunConfig, family: ModelFamily) -> Iterator[str]:
    """Words where there can be none, none where there must be, and settings that a method has no use for."""
    adapter = config.adapter
    if _method(config).SELECTION is None:
        if not adapter.tokens:
            yield f"adapter.tokens: {adapter.method} learns new words; give them, such as [{{token: <sks>}}]"
        if adapter.parts is not None:
            yield f"adapter.parts: {adapter.method} adapts no layers; take method lora to train both"
    if adapter.tokens and not family.tokenizers:
        yield f"adapter.tokens: {family.name} has no text encoder that can learn new words"
    if adapter.method == "lora" and adapter.options.get("init") == "pissa":
        if config.model.dtype != "fp32":
            yield (
                f"adapter.options.init: pissa takes the base's weights apart, and in {config.model.dtype} the rest of "
                "them would be rounded: take model.dtype fp32 (loop.precision may be lower), or another init"
            )
        if adapter.start_from is not None:
            yield "adapter.start_from: `init: pissa` begins with the base's singular values; give one of the two"
    if changes_base(config):
        plain = AdapterSection()
        for name in ("rank", "alpha", "rank_pattern", "alpha_pattern"):
            if getattr(adapter, name) != getattr(plain, name):
                yield f"adapter.{name}: {adapter.method} trains the weights themselves, which have none"
        if adapter.tokens and set(layer_parts(config.adapter, family.denoiser)) & set(family.tokenizers):
            yield f"adapter.tokens: {adapter.method} trains the words of a text encoder too; take either"
        if adapter.start_from is not None:
            yield f"adapter.start_from: {adapter.method} begins with the base: give the trained one as model.base"


def _problems_of_formats(config: RunConfig) -> Iterator[str]:
    """Formats that cannot hold what is trained."""
    needs = _needs(config)
    if config.output.formats and not needs:
        yield f"output.formats: {config.adapter.method} is written as a pipeline folder; leave them out"
        return
    for name in formats_of(config):
        if lacking := needs - set(find("adapters.formats", name).HOLDS):
            able = [each for each in names("adapters.formats") if needs <= set(find("adapters.formats", each).HOLDS)]
            yield f"output.formats: {name} cannot hold {' and '.join(sorted(lacking))}; take {' or '.join(able)}"
    if "embedding" in formats_of(config) and len(config.adapter.tokens) > 1:
        yield "output.formats: embedding holds one word; take loraloom for several"


_IN_TEXT = "dora in a text encoder"  # as `adapters.artifact` has it, which imports torch


def _needs(config: RunConfig) -> set[str]:
    """What an adapter file has to hold."""
    adapter, needs = config.adapter, {"tokens"} if config.adapter.tokens else set()
    if _method(config).SELECTION is not None and not changes_base(config):
        needs.add(kind_of(config))
        if adapter.options.get("dora") and any(part.startswith("text_encoder") for part in adapter.parts or ()):
            needs.add(_IN_TEXT)
    return needs


def kind_of(config: RunConfig) -> str:
    """The method, or `dora`: what a reader of the files has to know."""
    return "dora" if config.adapter.options.get("dora") else getattr(_method(config), "KIND", config.adapter.method)


def formats_of(config: RunConfig) -> list[str]:
    """The formats of the adapter file: those asked for, or those that suit it; none where there is no such file."""
    needs = _needs(config)
    if config.output.formats or not needs:
        return config.output.formats
    if len(config.adapter.tokens) > (1 if needs == {"tokens"} else 0):
        return ["loraloom"]
    usual = [name for name in _method(config).FORMATS if needs <= set(find("adapters.formats", name).HOLDS)]
    return usual or ["loraloom"]
