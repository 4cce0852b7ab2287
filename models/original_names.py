"""Which tensor of a single-file checkpoint is which of a pipeline folder: one table, read in both directions.

For every part of a family, from the names and shapes that the part has in diffusers. What else lies in such files is
known here too: other spellings of the same names, and tensors that no pipeline needs. Needs no torch.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from ..configs.errors import UserError
from .layout import original_clip_name, original_names

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT_ENCODERS = {  # family -> text encoder -> where it is in the file
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
MARKS = ("v_pred", "ztsnr")
"""Tensors without numbers, whose names alone say that the model predicts v, and that its noise ends without signal."""

_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_VAE_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OPEN_CLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
_NEWER_VAE = re.compile(r"(first_stage_model\.\w+\.mid\.attn_1\.)(to_q|to_k|to_v|to_out\.0|group_norm)(\.\w+)")
_FLAT_CLIP = re.compile(
    r"(cond_stage_model|conditioner\.embedders\.0)(\.transformer\.)((?:embeddings|encoder|final_layer_norm)\..*)"
)
_UNNEEDED = {
    "moving averages of the training": r"(?:first_stage_model\.)?model_ema\..*",
    "numbers of the noise schedule": (
        r"betas|alphas_cumprod(?:_prev)?|(?:sqrt|log|posterior)_\w+|lvlb_weights|logvar|scale_factor|"
        r"denoiser\.(?:sigmas|log_sigmas)|model_sampling\..*"
    ),
    "positions of tokens, which are 0, 1, 2, …": r".*\.position_ids",
    "CLIP's temperature": r".*\blogit_scale",
    "OpenCLIP's last layer and projection, which Stable Diffusion 2 does not use": (
        r"cond_stage_model\.model\.(?:text_projection|attn_mask|transformer\.resblocks\..*)"
    ),
    "a projection that the first text encoder does not use": (
        r"(?:cond_stage_model|conditioner\.embedders\.0)\.transformer\.text_projection(?:\.weight)?"
    ),
    "the VAE's training": r"first_stage_model\.(?:loss|discriminator)\..*",
}
"""What a checkpoint may hold beside the model -> names of its tensors."""


class Original(NamedTuple):
    """Where a file has a tensor of a part, and how it is turned there."""

    name: str
    third: int | None = None  # 0, 1, 2: q, k or v of a tensor that holds all three
    transposed: bool = False
    convolution: bool = False  # with a kernel of 1 x 1, where diffusers has a linear layer

    def shape(self, shape: Shape) -> Shape:
        """In the file, of a tensor that has this shape in the folder."""
        if self.third is not None:
            return (3 * shape[0], *shape[1:])
        return shape[::-1] if self.transposed else (*shape, 1, 1) if self.convolution else shape

    def part_of(self, tensor: "Tensor", shape: Shape) -> "Tensor":
        """A tensor of the file as the folder has it."""
        if self.third is not None:
            tensor = tensor.chunk(3)[self.third]
        return (tensor.T if self.transposed else tensor).reshape(shape)


def original_tensors(kind: str, part: str, names: Collection[str]) -> dict[str, Original]:
    """Of each tensor of a part, as diffusers names it, with `text_model.` in those of a text encoder."""
    if part == "unet":
        layers = original_names({name.rpartition(".")[0] for name in names})
        return {name: Original(f"{UNET}{layers[path]}.{leaf}") for name, path, leaf in _split(names)}
    if part == "vae":
        last = max(int(found[1]) for found in map(re.compile(r"decoder\.up_blocks\.(\d+)\.").match, names) if found)
        return {name: _in_vae(path, leaf, last) for name, path, leaf in _split(names)}
    prefix = TEXT_ENCODERS[kind][part]
    if not prefix.endswith("model."):
        return {name: Original(f"{prefix}{name}") for name in names}
    return {name: _in_open_clip(prefix, name) for name in names}


def _split(names: Iterable[str]) -> Iterable[tuple[str, str, str]]:
    for name in names:
        path, _, leaf = name.rpartition(".")
        yield name, path, leaf


def _in_vae(path: str, leaf: str, last: int) -> Original:
    """Floors of the decoder are counted from the other side, `last` is their highest number."""
    if found := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)", path):
        layer = _VAE_ATTENTION[found[2]]
        return Original(f"{VAE}{found[1]}.mid.attn_1.{layer}.{leaf}", convolution=leaf == "weight" and layer != "norm")
    path = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}", path)
    path = re.sub(r"mid_block\.resnets\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}", path)
    for ours, original in (
        ("down_blocks.", "down."),
        (".resnets.", ".block."),
        ("samplers.0.conv", "sample.conv"),
        ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"),
    ):
        path = path.replace(ours, original)
    return Original(f"{VAE}{path}.{leaf}")


def _in_open_clip(prefix: str, name: str) -> Original:
    if name in _OPEN_CLIP:
        return Original(f"{prefix}{_OPEN_CLIP[name]}", transposed=name.startswith("text_projection"))
    path, _, leaf = name.rpartition(".")
    layer, third = original_clip_name(path)
    return Original(f"{prefix}{layer}{'.' if third is None else '_'}{leaf}", third)


def layer_tensor(kind: str, component: str, path: str, original: Mapping[str, str]) -> tuple[str, int | None]:
    """The tensor of a checkpoint that has a layer's weight, and which third of it where three layers are in one.

    `original` are the names of the UNet's layers in the original code.
    """
    if component == "unet":
        return f"{UNET}{original[path]}.weight", None
    if path == "text_projection":
        raise UserError(
            "a changed text_projection cannot be written into a single file, which has it the other way round"
        )
    found = original_tensors(kind, component, [f"{path}.weight"])[f"{path}.weight"]
    return found.name, found.third


def standard_name(name: str) -> str:
    """A tensor of a checkpoint as most files spell it: CLIP with `text_model.`, the VAE's attention q, k, v."""
    if found := _NEWER_VAE.fullmatch(name):
        return f"{found[1]}{_VAE_ATTENTION[found[2]]}{found[3]}"
    if found := _FLAT_CLIP.fullmatch(name):
        return f"{found[1]}{found[2]}text_model.{found[3]}"
    return name


def by_standard_name(names: Iterable[str]) -> dict[str, str]:
    """Standard name -> the file's own. UserError where two of the file's names mean the same tensor."""
    found: dict[str, str] = {}
    for name in names:
        standard = standard_name(name)
        if standard in found:
            raise UserError(f"has {found[standard]} and {name}, which are two names of one tensor: remove one")
        found[standard] = name
    return found


def current_name(part: str, name: str) -> str:
    """A tensor of a pipeline folder as today's diffusers names it, with `text_model.`, whatever wrote the folder."""
    if part == "vae" and (found := re.fullmatch(r"(.*mid_block\.attentions\.0\.)(\w+)(\.\w+)", name)):
        return f"{found[1]}{_VAE_OLD[found[2]]}{found[3]}" if found[2] in _VAE_OLD else name
    if part.startswith("text") and not name.startswith(("text_model.", "text_projection.")):
        return f"text_model.{name}"
    return name


def beside_the_model(names: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Tensors that no part of a pipeline has: those that are known, by what they are, and the strange ones."""
    known: dict[str, list[str]] = defaultdict(list)
    strange = []
    for name in names:
        what = next((what for what, pattern in _UNNEEDED.items() if re.fullmatch(pattern, name)), None)
        (strange if what is None else known[what]).append(name)
    return dict(known), strange
