"""Which base an adapter file was made for, as its header or its tensors tell: for errors that name both sides."""

import re
from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]

_VERSIONS = {"sdxl": "stable-diffusion-xl-v1-base", "sd_v2": "stable-diffusion-v2", "sd_v1": "stable-diffusion-v1"}
"""Beginnings of kohya's `ss_base_model_version`."""
_STABLE_3 = ("joint_blocks", "_x_block_")
"""Parts of names that only adapters of Stable Diffusion 3 have."""
_TRANSFORMERS = re.compile(
    r"double_blocks|single_blocks|single_transformer_blocks|joint_blocks|attn[._]add_[qkv]_proj|^lora_te3_"
    r"|^(transformer|diffusion_model|lora_transformer|lycoris|lora_unet|base_model\.model)[._]"
    r"(transformer_blocks|blocks|layers)[._]\d|^(transformer_blocks|blocks)\.\d"
)
TRANSFORMER = "a diffusion transformer, as FLUX, Stable Diffusion 3, Wan and others are"
"""Which of them is not certain: their layers have the same names."""
_UNET = re.compile(r"(down|up|mid|input|output|middle)_blocks?[._]")
_SDXL = re.compile(r"lora_te2_|text_encoder_2\.|(^|\.)clip_g\.|_blocks?[._].*transformer_blocks[._]9[._]")
"""Names that of all UNets only that of SDXL has; and its second text encoder."""
_WIDTHS = {768: "stable-diffusion-v1", 1024: "stable-diffusion-v2", 2048: "stable-diffusion-xl-v1-base"}
"""Numbers in a token's embedding, which the keys of cross-attention read."""
_READING = ("lora_down.weight", "lora_A.weight", "lora.down.weight", "to_k_lora.down.weight", "hada_w1_b")


def architecture_of(shapes: Shapes, header: Mapping[str, str]) -> str | None:
    """ModelSpec's name of the architecture, without its last details; None where nothing tells."""
    said = _said(header)
    if any(mark in name for name in shapes for mark in _STABLE_3):
        return "stable-diffusion-3"
    if any(_TRANSFORMERS.search(name) for name in shapes):
        return said if said and not said.startswith(tuple(_WIDTHS.values())) else TRANSFORMER
    if any(_SDXL.search(name) for name in shapes):
        return "stable-diffusion-xl-v1-base"
    for name, shape in shapes.items():
        if _UNET.search(name) and "attn2" in name and "to_k" in name and name.endswith(_READING) and len(shape) == 2:
            if shape[1] in _WIDTHS:
                return _WIDTHS[shape[1]]
            break
    return said


def _said(header: Mapping[str, str]) -> str | None:
    """By the header alone."""
    version = header.get("ss_base_model_version", "")
    known = (architecture for start, architecture in _VERSIONS.items() if version.startswith(start))
    return next(known, None) or header.get("modelspec.architecture", "").partition("/")[0] or None


def is_of(architecture: str, base: str) -> bool:
    """Whether an adapter of this architecture is for this base, of which more details may be known."""
    return base.startswith(architecture) or architecture.startswith(base)
