"""kohya's format (sd-scripts, web UIs): `lora_unet_down_blocks_0_....lora_down.weight`, `.lora_up.weight`, `.alpha`.

The scale is folded into `lora_up`, all modules are padded with zeros to the largest rank, and alpha is that rank:
readers that take one alpha for the whole file, or none, then agree with those that take one for each module.
sd-scripts passes over modules outside of its own blocks (`conv_in`, `conv_out`, `time_embedding`); web UIs read them.
"""

import hashlib
import json
from collections.abc import Iterable

import torch
from torch import Tensor

from ...configs.errors import UserError
from ..artifact import AdapterArtifact, Key, LoraWeights
from ..format import FormatNames, Header, KeyTable, Tensors, artifact_of, header_of, serialised

SUFFIX = ".kohya"

_PARTS = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha"}


def matches(keys: Iterable[str]) -> bool:
    return any(key.endswith((".lora_down.weight", ".lora_up.weight")) for key in keys)


def to_tensors(artifact: AdapterArtifact, names: FormatNames) -> tuple[Tensors, Header]:
    """One rank, alpha = rank; see `adapters.formats`."""
    rank = max(weights.rank for weights in artifact.modules.values())
    tensors: Tensors = {}
    for key, weights in artifact.folded().modules.items():
        name = _kohya_name(key, names)
        padded = _padded(weights, rank)
        tensors[f"{name}.lora_down.weight"] = padded.down
        tensors[f"{name}.lora_up.weight"] = padded.up
        tensors[f"{name}.alpha"] = torch.tensor(float(rank))
    header = {**header_of(artifact, names), **_training_entries(artifact, rank, names)}
    return tensors, {**header, **_hashes(tensors, header)}


def from_tensors(tensors: Tensors, header: Header, names: FormatNames) -> AdapterArtifact:
    """See `adapters.formats`. scale = alpha / r, where a missing alpha is r as in sd-scripts."""
    return artifact_of(tensors, header, _key_table(names), _scale)


def _scale(key: Key, parts: dict[str, Tensor]) -> float:
    rank = parts["down"].shape[0]
    alpha = parts.get("alpha", torch.tensor(float(rank)))
    if alpha.numel() != 1:
        raise UserError(f"alpha of {' '.join(key)} has {alpha.numel()} values instead of one")
    return float(alpha) / rank


def _kohya_name(key: Key, names: FormatNames) -> str:
    component, path = key
    if component not in names.kohya_prefixes:
        raise UserError(f"kohya files have no name for {component}; there are: {', '.join(names.kohya_prefixes)}")
    return f"{names.kohya_prefixes[component]}_{path.replace('.', '_')}"


def _key_table(names: FormatNames) -> KeyTable:
    """Every key that a file for this base can have: underscores alone do not say where a path had its dots."""
    modules = [
        (component, path) for component in names.kohya_prefixes for path in names.module_paths.get(component, ())
    ]
    table = {f"{_kohya_name(key, names)}.{ending}": (key, part) for key in modules for ending, part in _PARTS.items()}
    assert len(table) == len(modules) * len(_PARTS), "two modules of the base have one kohya name"
    return table


def _padded(weights: LoraWeights, rank: int) -> LoraWeights:
    """The same change of the weight at a larger rank: zero rows in `down`, zero columns in `up`."""
    missing = rank - weights.rank
    down = weights.down.new_zeros(missing, *weights.down.shape[1:])
    up = weights.up.new_zeros(weights.up.shape[0], missing, *weights.up.shape[2:])
    return LoraWeights(torch.cat([weights.down, down], 0), torch.cat([weights.up, up], 1), weights.scale)


def _training_entries(artifact: AdapterArtifact, rank: int, names: FormatNames) -> Header:
    """The `ss_` entries that sd-scripts writes even with --no_metadata."""
    has_conv = any(weights.down.shape[2:].numel() > 1 for weights in artifact.modules.values())
    return {
        "ss_v2": str(names.kohya_version.startswith("sd_v2")),
        "ss_base_model_version": names.kohya_version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_network_args": json.dumps({"conv_dim": str(rank), "conv_alpha": str(float(rank))} if has_conv else {}),
    }


def _hashes(tensors: Tensors, header: Header) -> Header:
    """sd-scripts' identity of a file: of its tensors alone, and of 64 KiB behind the first MiB (train_util.py)."""
    content = serialised(tensors, {name: value for name, value in header.items() if name.startswith("ss_")})
    payload = content[8 + int.from_bytes(content[:8], "little") :]
    return {
        "sshs_model_hash": hashlib.sha256(payload).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
    }
