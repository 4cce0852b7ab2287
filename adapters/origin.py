"""Which base an adapter file was made for, as its header or its tensors tell: for errors that name both sides."""

from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]

_VERSIONS = {"sdxl": "stable-diffusion-xl-v1-base", "sd_v2": "stable-diffusion-v2", "sd_v1": "stable-diffusion-v1"}
"""Beginnings of kohya's `ss_base_model_version`."""
_MARKS = {
    "flux-1": ("double_blocks", "single_transformer_blocks", "single_blocks"),
    "stable-diffusion-3": ("joint_blocks", "_x_block_", ".attn.add_q_proj", "_attn_add_q_proj"),
    "stable-diffusion-xl-v1-base": ("lora_te2_", "text_encoder_2.", "transformer_blocks_9_", "transformer_blocks.9."),
}
"""Parts of names that only adapters of this architecture have."""
_WIDTHS = {768: "stable-diffusion-v1", 1024: "stable-diffusion-v2", 2048: "stable-diffusion-xl-v1-base"}
"""Numbers in a token's embedding, which the keys of cross-attention read."""
_READING = ("lora_down.weight", "lora_A.weight", "lora.down.weight", "to_k_lora.down.weight", "hada_w1_b")


def architecture_of(shapes: Shapes, header: Mapping[str, str]) -> str | None:
    """ModelSpec's name of the architecture, without its last details; None where nothing tells."""
    for architecture, marks in _MARKS.items():
        if any(mark in name for name in shapes for mark in marks):
            return architecture
    for name, shape in shapes.items():
        if "attn2" in name and "to_k" in name and name.endswith(_READING) and len(shape) == 2:
            if shape[1] in _WIDTHS:
                return _WIDTHS[shape[1]]
            break
    said = header.get("ss_base_model_version", "")
    known = (architecture for start, architecture in _VERSIONS.items() if said.startswith(start))
    return next(known, None) or header.get("modelspec.architecture", "").partition("/")[0] or None


def is_of(architecture: str, base: str) -> bool:
    """Whether an adapter of this architecture is for this base, of which more details may be known."""
    return base.startswith(architecture) or architecture.startswith(base)
