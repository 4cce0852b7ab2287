"""diffusers' format: `<component>.<path>.lora_A.weight` and `.lora_B.weight`, PEFT's own names.

The scale is folded into `lora_B` and no `lora_adapter_metadata` is written: without it diffusers takes the scale as 1,
and an older peft refuses settings that it does not know. All modules of a component are padded with zeros to its
largest rank: before 0.40 diffusers takes alpha for the whole component from its first module, which scales modules of
other ranks (huggingface/diffusers#14409). CLIP is spelled with `text_model.`, which all versions read.
DoRA of the denoiser has `.lora_magnitude_vector`; of a text encoder transformers looks for it under another name.
Files of diffusers' own `save_lora_weights` are read too: it renames some layers and says alpha in the header.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ...configs.bounded import parse_json
from ...configs.errors import UserError
from ..artifact import AdapterArtifact, Key, Tensors, listed
from ..format import FormatNames, header_of
from ..parsed import artifact_of
from ..spellings import ENDINGS, UNDERSCORED
from ..stored import Header

SUFFIX = ""
FOLDS = True
HOLDS = frozenset({"lora", "dora"})


_LONGEST_PATTERN, _MOST_REPEATS = 1000, 3
"""Of a PEFT config: names of modules, and expressions as people write them, have no more."""


def matches(keys: Iterable[str]) -> bool:
    return any(key.endswith((*ENDINGS,)) and not key.startswith(UNDERSCORED) for key in keys)


def to_tensors(artifact: AdapterArtifact, names: FormatNames) -> tuple[Tensors, Header]:
    """Raw PEFT names; see `adapters.formats`."""
    _check_magnitudes(artifact, names)
    tensors: Tensors = {}
    ranks = largest_ranks(artifact)
    for (component, path), own in artifact.modules.items():
        weights = own.padded(ranks[component])
        tensors[f"{component}.{path}.lora_A.weight"] = weights.tensors["down"]
        tensors[f"{component}.{path}.lora_B.weight"] = weights.tensors["up"]
        if "magnitude" in weights.tensors:
            shape = (-1,) if weights.tensors["down"].ndim == 2 else (1, -1, 1, 1)
            tensors[f"{component}.{path}.lora_magnitude_vector"] = weights.tensors["magnitude"].reshape(shape)
    return tensors, header_of(artifact, names)


def largest_ranks(artifact: AdapterArtifact) -> dict[str, int]:
    """Component -> the largest rank of its LoRAs."""
    ranks: dict[str, int] = {}
    for (component, _), weights in artifact.modules.items():
        ranks[component] = max(ranks.get(component, 0), weights.rank)
    return ranks


def _check_magnitudes(artifact: AdapterArtifact, names: FormatNames) -> None:
    """UserError for what diffusers would load as something else."""
    kinds = {kind: [k for k, w in artifact.modules.items() if w.kind == kind] for kind in ("lora", "dora")}
    if texts := [key for key in kinds["dora"] if key[0] != names.denoiser]:
        raise UserError(
            f"DoRA of a text encoder ({listed(texts, 2)}) is lost when diffusers loads it; write kohya or loraloom, "
            "or bake it: loraloom adapter convert --bake-dora"
        )
    if kinds["dora"] and (plain := [key for key in kinds["lora"] if key[0] == names.denoiser]):
        raise UserError(
            f"{len(kinds['dora'])} modules have DoRA and {len(plain)} have none ({listed(plain, 2)}): "
            "diffusers takes all of a model for the same; write kohya or loraloom"
        )


def from_tensors(tensors: Tensors, header: Header, names: FormatNames) -> AdapterArtifact:
    """See `adapters.formats`. Where there is no alpha the header may say one, for patterns of modules too."""
    configs = _peft_configs(header)
    return artifact_of(tensors, header, names, lambda key, rank: _scale(configs, key, rank))


def _peft_configs(header: Header) -> dict[str, Any]:
    """The PEFT settings in a header, flat: `unet.r`, `unet.lora_alpha`, ...; empty when there are none."""
    try:
        configs = parse_json(header.get("lora_adapter_metadata") or "{}", "it")
    except UserError as error:
        raise UserError(f"lora_adapter_metadata in the header is no JSON: {error}") from None
    if not isinstance(configs, dict):
        raise UserError("lora_adapter_metadata in the header is no JSON object")
    return configs


def _scale(configs: Mapping[str, Any], key: Key, rank: int | None) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA; 1 when the header says nothing, as diffusers has it."""
    component, path = key
    own = {name.removeprefix(f"{component}."): v for name, v in configs.items() if name.startswith(f"{component}.")}
    return peft_scale(own, path, rank)


def peft_scale(config: Mapping[str, Any], path: str, rank: int | None) -> float:
    """The scale that PEFT gives a module by its config; 1 where that is empty.

    The rank is that of the config where the tensors do not tell it.
    """
    try:
        alpha = _by_pattern(config.get("alpha_pattern"), path)
        if alpha is None:
            alpha = config.get("lora_alpha", config.get("alpha", config.get("r")))
        if alpha is None:
            return 1.0
        if rank is None:
            own = _by_pattern(config.get("rank_pattern"), path)
            rank = int(config.get("r", 8) if own is None else own)  # 8 is PEFT's own
        return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, re.error) as error:
        raise UserError(f"the PEFT config of the adapter is damaged ({error})") from None


def _by_pattern(patterns: Mapping[str, Any] | None, path: str) -> Any:
    """The value of the first pattern that matches, or None.

    A pattern is a regular expression for the end of a module's name (`peft.tuners.tuners_utils.get_pattern_key`).
    """
    for pattern, value in (patterns or {}).items():
        if not _is_quick(pattern):
            raise UserError(f"the pattern {pattern!r} in the PEFT config repeats what repeats, and is not tried")
        if any(re.match(rf"(.*\.)?({pattern})$", each) for each in (path, path.removeprefix("text_model."))):
            return value
    return None


def _is_quick(pattern: str) -> bool:
    """Whether a stranger's regular expression surely ends soon: no group is repeated, and little else is."""
    repeats = len(re.findall(r"(?<!\\)[*+{]", pattern))
    return len(pattern) <= _LONGEST_PATTERN and repeats <= _MOST_REPEATS and not re.search(r"\)[*+{]", pattern)
