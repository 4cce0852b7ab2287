"""kohya's format (sd-scripts, LyCORIS, web UIs): `lora_unet_down_blocks_0_....lora_down.weight`, `.alpha`, ...

The UNet of SDXL has the names of its original code there (`lora_unet_input_blocks_4_1_...`), others diffusers' own.

For LoRA the scale is folded into `lora_up`, all modules are padded with zeros to the largest rank, and alpha is that
rank: readers that take one alpha for the whole file, or none, then agree with those that take one for each module.
sd-scripts passes over modules outside of its own blocks (`conv_in`, `conv_out`, `time_embedding`); web UIs read them.
LoHa, LoKr and DoRA have the names of LyCORIS (https://github.com/KohakuBlueleaf/LyCORIS); web UIs read the first two.
Of DoRA ComfyUI, Forge and A1111 make something else (docs/adapters.md): for them it is to be baked into a LoRA.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable

import torch
from torch import Tensor

from ...configs.errors import UserError
from ..artifact import DORA_IN_TEXT, DORA_OVER_INPUTS, MAGNITUDES, AdapterArtifact, Key, Tensors, Weights
from ..format import FormatNames, header_of
from ..parsed import artifact_of, file_rank
from ..spellings import ENDINGS, UNDERSCORED, underscored
from ..stored import Header, Payload, header_bytes

SUFFIX = ".kohya"
FOLDS = True
HOLDS = frozenset({"lora", "dora", DORA_IN_TEXT, DORA_OVER_INPUTS, "loha", "lokr"})

_LORA = {"down": "lora_down.weight", "up": "lora_up.weight", **dict.fromkeys(MAGNITUDES, "dora_scale")}


def matches(keys: Iterable[str]) -> bool:
    return any(key.startswith(UNDERSCORED) and key.endswith((*ENDINGS,)) for key in keys)


def to_tensors(artifact: AdapterArtifact, names: FormatNames) -> tuple[Tensors, Header]:
    """One rank, alpha = rank; see `adapters.formats`."""
    rank = max(weights.rank if weights.method == "lora" else 1 for weights in artifact.modules.values())
    tensors: Tensors = {}
    for key, weights in artifact.modules.items():
        name = _kohya_name(key, names)
        held = weights.padded(rank) if weights.method == "lora" else weights
        for kind, tensor in held.tensors.items():
            tensors[f"{name}.{_LORA.get(kind, kind)}"] = (
                _magnitude(tensor, kind, held) if kind in MAGNITUDES else tensor
            )
        tensors[f"{name}.alpha"] = torch.tensor(float(file_rank(held.tensors)))
    header = {**header_of(artifact, names), **_training_entries(artifact, rank, names)}
    return tensors, header


def from_tensors(tensors: Tensors, header: Header, names: FormatNames) -> AdapterArtifact:
    """See `adapters.formats`. scale = alpha / r, where a missing alpha is r as in sd-scripts."""
    return artifact_of(tensors, header, names, lambda key, rank: 1.0)


def _magnitude(tensor: Tensor, kind: str, weights: Weights) -> Tensor:
    """(out, 1[, 1, 1]) or (1, in[, 1, 1]), as LyCORIS has `dora_scale`."""
    sides = (-1, 1) if kind == "magnitude" else (1, -1)
    return tensor.reshape(*sides, *[1] * (weights.tensors["down"].ndim - 2))


def _kohya_name(key: Key, names: FormatNames) -> str:
    component, path = key
    if component not in names.kohya_prefixes:
        raise UserError(f"kohya files have no name for {component}; there are: {', '.join(names.kohya_prefixes)}")
    spelled = names.original[path] if names.kohya_original and component == names.denoiser else path
    return f"{names.kohya_prefixes[component]}_{underscored(spelled)}"


def _training_entries(artifact: AdapterArtifact, rank: int, names: FormatNames) -> Header:
    """The `ss_` entries that sd-scripts writes even with --no_metadata."""
    downs = [weights.tensors["down"] for weights in artifact.modules.values() if weights.method == "lora"]
    arguments = {"conv_dim": str(rank), "conv_alpha": str(float(rank))} if any(d.ndim > 2 for d in downs) else {}
    if artifact.method != "lora":
        arguments["algo"] = artifact.method
    return {
        "ss_v2": str(names.kohya_version.startswith("sd_v2")),
        "ss_base_model_version": names.kohya_version,
        "ss_network_module": "networks.lora" if artifact.method == "lora" else "lycoris.kohya",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_network_args": json.dumps(arguments),
    }


def seal(header: Header, payload: Payload) -> Header:
    """With sd-scripts' identity of a file: of its tensors alone, and of 64 KiB behind the first MiB (train_util.py).

    The second is of a file that has only the `ss_` entries in its header.
    """
    whole, window = hashlib.sha256(), bytearray()
    begin = header_bytes(payload.entries, {name: value for name, value in header.items() if name.startswith("ss_")})
    position = 0
    for chunk in itertools.chain([memoryview(begin)], payload.chunks()):
        if position:
            whole.update(chunk)
        window += chunk[max(0x100000 - position, 0) : max(0x110000 - position, 0)]
        position += len(chunk)
    return {
        **header,
        "sshs_model_hash": whole.hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(window).hexdigest()[:8],
    }
