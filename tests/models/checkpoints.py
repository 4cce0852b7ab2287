"""Checkpoints in one file, written by tables of their own, from how the original models number their blocks."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from loraloom.configs.schema import ModelSection
from loraloom.models import single_file
from loraloom.models.load import Base

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(name: str, attends: set[str]) -> str:
    """Blocks are numbered through: on each floor, three (two and a resampling) going down, three going up."""
    if found := re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", name):
        way, floor, kind, number, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        blocks, index = ("input", 3 * floor + number + 1) if way == "down" else ("output", 3 * floor + number)
        if kind == "downsamplers":
            return f"input_blocks.{3 * floor + 3}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            return f"output_blocks.{3 * floor + 2}.{2 if f'up_blocks.{floor}' in attends else 1}.{rest}"
        place, rest = (0, resnet(rest)) if kind == "resnets" else (1, rest)
        return f"{blocks}_blocks.{index}.{place}.{rest}"
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        return (
            f"middle_block.{2 * int(found[2])}.{resnet(found[3])}"
            if found[1] == "resnets"
            else f"middle_block.1.{found[3]}"
        )
    return renamed(name, UNET)


def resnet(rest: str) -> str:
    return renamed(rest, RESNET)


def renamed(name: str, table: dict[str, str]) -> str:
    stem, _, leaf = name.rpartition(".")
    return f"{table[stem]}.{leaf}"


def vae_name(name: str) -> str:
    name = re.sub(r"decoder\.up_blocks\.(\d)", lambda m: f"decoder.up.{3 - int(m[1])}", name)
    name = re.sub(r"encoder\.down_blocks\.(\d)", r"encoder.down.\1", name)
    name = name.replace(".resnets.", ".block.").replace("samplers.0.conv", "sample.conv")
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.block\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if found := re.match(r"(.*)mid_block\.attentions\.0\.(.*)", name):
        return f"{found[1]}mid.attn_1.{renamed(found[2], ATTENTION)}"
    return name


def open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """q, k and v in one; the projection the other way round."""
    result = {}
    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    names = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
    names |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for name, tensor in state.items():
        if found := re.match(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", name):
            block = f"transformer.resblocks.{found[1]}"
            if found[2] == "self_attn.q_proj":
                parts = [state[name.replace("q_proj", f"{each}_proj")] for each in "qkv"]
                result[f"{block}.attn.in_proj_{found[3]}"] = torch.cat(parts)
            elif found[2] in names:
                result[f"{block}.{names[found[2]]}.{found[3]}"] = tensor
    result["token_embedding.weight"] = state["embeddings.token_embedding.weight"]
    result["positional_embedding"] = state["embeddings.position_embedding.weight"]
    result |= {f"ln_final.{leaf}": state[f"final_layer_norm.{leaf}"] for leaf in ("weight", "bias")}
    width = result["positional_embedding"].shape[1]
    projection = state.get("text_projection.weight")
    result["text_projection"] = torch.eye(width) if projection is None else projection.T
    return result


@pytest.fixture
def checkpoint(base_of, tmp_path, monkeypatch):
    """A tiny base of a family, with text encoders that know all of CLIP's words, as one file; and its parts."""

    def checkpoint(kind: str, metadata=None, extra=None):
        parts = Base(ModelSection(base=str(base_of(kind)))).load()
        for name in [name for name in parts if name.startswith("text_encoder")]:
            config = CLIPTextConfig(**{**parts[name].config.to_dict(), "vocab_size": 49408, "eos_token_id": 2})
            torch.manual_seed(1)
            parts[name] = (CLIPTextModel if name == "text_encoder" else CLIPTextModelWithProjection)(config)
        monkeypatch.setattr(single_file, "SHIPPED", shipped(kind, parts, base_of(kind), tmp_path / "shipped"))
        file = tmp_path / f"{kind}.safetensors"
        save_file(
            {name: t.contiguous().clone() for name, t in (in_one(kind, parts) | (extra or {})).items()}, file, metadata
        )
        return file, parts

    return checkpoint


def shipped(kind, parts, base, folder):
    """The configs of the tiny base in the place of the real ones."""
    folder.mkdir(exist_ok=True)
    contents = json.loads((single_file.SHIPPED / f"{kind}.json").read_text())
    for name in list(contents):
        if name.startswith("text_encoder"):
            contents[name] = parts[name.partition("/")[0]].config.to_dict()
        elif name.startswith(("unet", "vae")):
            contents[name] = json.loads((base / name).read_text())
    (folder / f"{kind}.json").write_text(json.dumps(contents, default=str))
    shutil.copy(single_file.SHIPPED / "clip_merges.txt.xz", folder)
    return folder


def in_one(kind, parts):
    unet = parts["unet"].state_dict()
    attends = {name.partition(".attentions")[0] for name in unet if ".attentions." in name}
    tensors = {f"model.diffusion_model.{unet_name(name, attends)}": tensor for name, tensor in unet.items()}
    assert len(tensors) == len(unet)
    for name, tensor in parts["vae"].state_dict().items():
        attention = "mid_block.attentions" in name and tensor.ndim == 2
        tensors[f"first_stage_model.{vae_name(name)}"] = tensor[:, :, None, None] if attention else tensor
    first = {f"text_model.{n.removeprefix('text_model.')}": t for n, t in parts["text_encoder"].state_dict().items()}
    if kind == "sd1":
        return tensors | {f"cond_stage_model.transformer.{name}": tensor for name, tensor in first.items()}
    if kind == "sd2":
        return tensors | {f"cond_stage_model.model.{name}": tensor for name, tensor in open_clip(first).items()}
    second = open_clip(parts["text_encoder_2"].state_dict())
    tensors |= {f"conditioner.embedders.0.transformer.{name}": tensor for name, tensor in first.items()}
    return tensors | {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in second.items()}
