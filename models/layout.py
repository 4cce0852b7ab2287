"""What the layers of Stable Diffusion's models are called, from their configs alone: no model is made, no torch needed.

Only layers that an adapter can change: linear ones and convolutions. The original code of CompVis and Stability has
other names for those of the UNet, which kohya's files for SDXL and single-file checkpoints are written in.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

_ATTENTION = [f"attn{number}.to_{name}" for number in (1, 2) for name in ("q", "k", "v", "out.0")]
_TRANSFORMER = [*_ATTENTION, "ff.net.0.proj", "ff.net.2"]
_RESNET = ["conv1", "time_emb_proj", "conv2"]
_CLIP = [*(f"self_attn.{name}_proj" for name in ("k", "v", "q", "out")), "mlp.fc1", "mlp.fc2"]

_ORIGINAL_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_ORIGINAL = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_THIRDS = [f"self_attn.{name}_proj" for name in "qkv"]
_OPEN_CLIP = {
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
}
_PLACE = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def unet_layers(config: Mapping[str, Any]) -> list[str]:
    """Of a `UNet2DConditionModel` with this config."""
    return [*_unet(config)]


def clip_layers(config: Mapping[str, Any]) -> list[str]:
    """Of a CLIP text encoder with this config, under `text_model.`."""
    layers = [f"text_model.encoder.layers.{n}.{name}" for n in range(config["num_hidden_layers"]) for name in _CLIP]
    return layers + ["text_projection"] * (config["architectures"] == ["CLIPTextModelWithProjection"])


def _unet(config: Mapping[str, Any]) -> Iterator[str]:
    widths, each = config["block_out_channels"], config["layers_per_block"]
    depths, last = _per_block(config.get("transformer_layers_per_block", 1), len(widths)), len(widths) - 1
    yield from ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
    if config.get("addition_embed_type"):
        yield from ("add_embedding.linear_1", "add_embedding.linear_2")
    for block, kind in enumerate(config["down_block_types"]):
        changes = block > 0 and widths[block] != widths[block - 1]
        shortcuts = [changes and layer == 0 for layer in range(each)]
        yield from _block(f"down_blocks.{block}", shortcuts, depths[block] if "Attn" in kind else 0)
        if block < last:
            yield f"down_blocks.{block}.downsamplers.0.conv"
    yield from _block("mid_block", [False, False], depths[-1], attentions=1)
    for block, kind in enumerate(config["up_block_types"]):
        depth = depths[last - block] if "Attn" in kind else 0
        yield from _block(f"up_blocks.{block}", [True] * (each + 1), depth)
        if block < last:
            yield f"up_blocks.{block}.upsamplers.0.conv"


def _per_block(value: int | Sequence[int], count: int) -> Sequence[int]:
    return [value] * count if isinstance(value, int) else value


def _block(name: str, shortcuts: Sequence[bool], depth: int, attentions: int | None = None) -> Iterator[str]:
    """Its resnets, of which some change the number of channels; `depth` transformer layers in each attention."""
    for number, shortcut in enumerate(shortcuts):
        yield from (f"{name}.resnets.{number}.{layer}" for layer in [*_RESNET, *["conv_shortcut"] * shortcut])
    for number in range((len(shortcuts) if attentions is None else attentions) if depth else 0):
        attention = f"{name}.attentions.{number}"
        yield from (f"{attention}.proj_in", f"{attention}.proj_out")
        yield from (f"{attention}.transformer_blocks.{n}.{layer}" for n in range(depth) for layer in _TRANSFORMER)


def original_clip_name(path: str) -> tuple[str, int | None]:
    """A text encoder's layer in OpenCLIP's code, and which third of the weight it is where three are one."""
    found = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)", path)
    if found is None:
        return path, None
    block = f"transformer.resblocks.{found[1]}"
    if found[2] in _THIRDS:
        return f"{block}.attn.in_proj", _THIRDS.index(found[2])
    return f"{block}.{_OPEN_CLIP[found[2]]}", None


def original_names(paths: Collection[str]) -> dict[str, str]:
    """diffusers' path of each layer of a UNet -> its path in the original code (`input_blocks.4.1.proj_in`).

    `paths` are all layers of one UNet, as those of one block tell how the others are counted; {} where they are of
    some other model.
    """
    per_block = sum(re.fullmatch(r"down_blocks\.0\.resnets\.\d+\.conv1", path) is not None for path in paths)
    if not per_block:
        return {}
    named = {path: _original_name(path, per_block, paths) for path in paths}
    return {path: name for path, name in named.items() if name is not None}


def _original_name(path: str, per_block: int, paths: Collection[str]) -> str | None:
    if path in _ORIGINAL:
        return _ORIGINAL[path]
    found = _PLACE.fullmatch(path)
    if found is None:
        return None
    side, block, kind, number, layer = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    inner = _ORIGINAL_RESNET.get(layer, layer)
    if side is None:
        return f"middle_block.{2 * number if kind == 'resnets' else 1}.{inner}"
    first = block * (per_block + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + per_block + 1}.0.op"
    if kind == "upsamplers":
        behind = 2 if f"up_blocks.{block}.attentions.0.proj_in" in paths else 1
        return f"output_blocks.{first + per_block}.{behind}.conv"
    place = f"input_blocks.{first + number + 1}" if side == "down" else f"output_blocks.{first + number}"
    return f"{place}.{0 if kind == 'resnets' else 1}.{inner}"
