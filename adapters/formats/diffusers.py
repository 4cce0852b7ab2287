"""diffusers' format: `<component>.<path>.lora_A.weight` and `.lora_B.weight`, PEFT's own names.

The scale is folded into `lora_B` and no `lora_adapter_metadata` is written: without it diffusers takes the scale as 1,
and an older peft refuses settings that it does not know. CLIP is spelled with `text_model.`, which all versions read.
Files of diffusers' own `save_lora_weights` are read too: it renames some layers and says alpha in the header.
"""

import json
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ...configs.errors import UserError
from ..artifact import AdapterArtifact, Key, Tensors
from ..format import FormatNames, Header, KeyTable, artifact_of, header_of

SUFFIX = ""
FOLDS = True
HOLDS = frozenset({"lora"})

_PARTS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
}


def matches(keys: Iterable[str]) -> bool:
    endings = tuple(f".{ending}" for ending in _PARTS)
    return any(key.endswith(endings) for key in keys)


def to_tensors(artifact: AdapterArtifact, names: FormatNames) -> tuple[Tensors, Header]:
    """Raw PEFT names; see `adapters.formats`."""
    tensors: Tensors = {}
    for (component, path), weights in artifact.modules.items():
        tensors[f"{component}.{path}.lora_A.weight"] = weights.tensors["down"]
        tensors[f"{component}.{path}.lora_B.weight"] = weights.tensors["up"]
    return tensors, header_of(artifact, names)


def from_tensors(tensors: Tensors, header: Header, names: FormatNames) -> AdapterArtifact:
    """See `adapters.formats`. UserError for ranks or alphas by pattern in the header: their rules are PEFT's own."""
    configs = _peft_configs(header)

    def scale_of(key: Key, parts: dict[str, Tensor]) -> float:
        return _scale(configs, key[0], rank=parts["down"].shape[0])

    return artifact_of(tensors, header, _key_table(names), scale_of)


def _key_table(names: FormatNames) -> KeyTable:
    """Every key that a file for this base can have, in every spelling."""
    return {
        f"{component}.{spelling}.{ending}": ((component, path), part)
        for component, paths in names.module_paths.items()
        for path in paths
        for spelling in (path, path.removeprefix("text_model."))
        for ending, part in _PARTS.items()
    }


def _peft_configs(header: Header) -> dict[str, Any]:
    """The PEFT settings in a header, flat: `unet.r`, `unet.lora_alpha`, ...; empty when there are none."""
    try:
        configs = json.loads(header.get("lora_adapter_metadata") or "{}")
    except json.JSONDecodeError as error:
        raise UserError(f"lora_adapter_metadata in the header is no JSON: {error}") from None
    if not isinstance(configs, dict):
        raise UserError("lora_adapter_metadata in the header is no JSON object")
    patterns = [name for name, value in configs.items() if name.endswith(("rank_pattern", "alpha_pattern")) and value]
    if patterns:
        raise UserError(
            f"{' and '.join(patterns)} in lora_adapter_metadata cannot be resolved to single modules; "
            "load the file with diffusers and save it with the scale folded into lora_B"
        )
    return configs


def _scale(configs: dict[str, Any], component: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA; 1 when the header says nothing, as diffusers has it."""
    alpha = configs.get(f"{component}.lora_alpha", configs.get(f"{component}.r"))
    if alpha is None:
        return 1.0
    return float(alpha) / (rank**0.5 if configs.get(f"{component}.use_rslora") else rank)
