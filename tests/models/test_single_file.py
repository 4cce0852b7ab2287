"""Checkpoints in one file: every tensor arrives in its place, and what the file does not say is asked for.

The files are written here by tables of their own, from how the original models number their blocks.
"""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from loraloom.adapters.artifact import AdapterArtifact, Weights
from loraloom.adapters.format import write
from loraloom.configs.errors import UserError, run_command
from loraloom.configs.schema import ModelSection
from loraloom.inference.adapter.__main__ import main as adapter_verb
from loraloom.inference.layers import Layers
from loraloom.inference.merged import MergedBase
from loraloom.models import single_file
from loraloom.models.base import check_base, locate_base
from loraloom.models.load import Base
from loraloom.train.__main__ import main

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


@pytest.mark.parametrize(
    "kind", ["sd1", pytest.param("sd2", marks=pytest.mark.slow), pytest.param("sdxl", marks=pytest.mark.slow)]
)
def test_every_tensor_arrives_where_it_belongs(kind, checkpoint):
    file, parts = checkpoint(kind, {"modelspec.prediction_type": "v"} if kind == "sd2" else None)
    assert check_base(str(file)) == []
    base = Base(ModelSection(base=str(file)))
    assert base.family.name == kind
    loaded = base.load()
    for name in ("unet", "vae", *base.family.text_encoders):
        wanted, found = parts[name].state_dict(), loaded[name].state_dict()
        assert wanted.keys() == found.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items()), name
    assert loaded["scheduler"].config.prediction_type == ("v_prediction" if kind == "sd2" else "epsilon")
    assert locate_base(str(file)) == base.folder


@pytest.mark.slow
def test_the_file_trains_and_the_adapter_verifies(checkpoint, write_config):
    file, _ = checkpoint("sd1")
    config = write_config(model={"base": str(file)}, loop={"steps": 2})
    assert main([str(config)]) == 0
    record = json.loads((config.parent / "run/run.json").read_text())
    assert record["state"] == "done"
    assert record["verify"]["diffusers"]["delta_difference"] < 1e-5
    names = load_file(config.parent / "run/tiny.safetensors")
    assert any(name.startswith("text_encoder.text_model.encoder") for name in names)


def test_clips_words_are_those_of_clip(tmp_path):
    single_file._write_tokenizer(tmp_path / "tokenizer", "!")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    padded = tokenizer("A Photo", padding="max_length", max_length=5).input_ids
    assert padded == [49406, 320, 1125, 49407, 0]


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_what_is_shipped_are_the_shapes_of_the_real_models(kind):
    contents = json.loads((single_file.SHIPPED / f"{kind}.json").read_text())
    sizes = {
        part: sum(
            torch.Size(shape).numel() for shape in single_file._expected(part, contents[f"{part}/config.json"]).values()
        )
        for part in ("unet", "vae", *single_file._CLIP[kind])
    }
    assert (
        sizes
        == {
            "sd1": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
            "sd2": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
            "sdxl": {
                "unet": 2_567_463_684,
                "vae": 83_653_863,
                "text_encoder": 123_060_480,
                "text_encoder_2": 694_659_840,
            },
        }[kind]
    )


@pytest.mark.slow
def test_a_file_that_does_not_say_what_it_predicts_is_asked(checkpoint, tmp_path):
    file, _ = checkpoint("sd2")
    (problem,) = check_base(str(file))
    assert "does not say whether it predicts the noise or v" in problem
    beside = tmp_path / "sd2.yaml"
    for said, wanted in (("v", "v_prediction"), ("eps", None)):
        beside.write_text(f"model: {{params: {{parameterization: '{said}'}}}}")
        assert check_base(str(file)) == []
        assert single_file.prediction_of(file, "sd2", {}, {}).get("prediction_type") == wanted
    beside.write_text("model: 3")
    assert "cannot be read as a model's config" in check_base(str(file))[0]


def test_marks_of_v_and_zero_snr_are_seen():
    from pathlib import Path

    shapes = {"v_pred": (0,), "ztsnr": (0,)}
    assert single_file.prediction_of(Path("x"), "sdxl", shapes, {}) == {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }


@pytest.mark.slow
def test_an_inpainting_model_and_a_missing_tensor_are_refused(checkpoint):
    file, _ = checkpoint("sd1")
    tensors = load_file(file)
    lacking = {name: tensor for name, tensor in tensors.items() if "input_blocks.4.1.proj_in.weight" not in name}
    save_file(lacking, file)
    with pytest.raises(UserError, match=r"its unet lacks 1 of \d+ tensors, first down_blocks.1.attentions.0.proj_in"):
        Base(ModelSection(base=str(file)))
    first = "model.diffusion_model.input_blocks.0.0.weight"
    save_file(tensors | {first: torch.zeros(tensors[first].shape[0], 9, 3, 3)}, file)
    with pytest.raises(UserError, match="takes 9 channels, which is an inpainting"):
        Base(ModelSection(base=str(file)))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.ckpt", b"", "a pickle can run code when it is opened"),
        ("none.safetensors", None, "there is no such file"),
        ("text.safetensors", b"<html>", "is no safetensors file"),
        ("short.safetensors", (1 << 60).to_bytes(8, "little"), "is no safetensors file"),
    ],
)
def test_other_files_are_refused_in_a_line(name, content, words, tmp_path, write_config, capsys):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    assert run_command(main, [str(write_config(model={"base": str(file)}))]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert "Traceback" not in told


def test_an_adapter_given_as_a_base_is_called_one(tmp_path):
    save_file({"lora_unet_x.lora_down.weight": torch.ones(1)}, tmp_path / "a.safetensors")
    assert "but an adapter: it is no checkpoint" in check_base(str(tmp_path / "a.safetensors"))[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_an_adapter_is_merged_into_the_file_itself(checkpoint, tmp_path, kind):
    """To the bit what the same adapter makes of the base in memory; all else in the file stays as it was."""
    file, _ = checkpoint(kind, metadata={"modelspec.prediction_type": "v" if kind == "sd2" else "epsilon"})
    layers = Layers(str(file))
    modules = {}
    for number, key in enumerate(key for key in layers.keys if key[1] != "text_projection"):
        if number % 3 == 0 or key[0] != "unet":
            shape, generator = layers.names.module_paths[key[0]][key[1]], torch.Generator().manual_seed(number)
            down = torch.randn(2, *shape[1:], generator=generator)
            up = torch.randn(shape[0], 2, *[1] * (len(shape) - 2), generator=generator)
            modules[key] = Weights("lora", {"down": down, "up": up}, 0.25)
    write(AdapterArtifact(modules), tmp_path / "x.safetensors", "loraloom", layers.names)
    out = tmp_path / "merged.safetensors"
    adapter = f"{tmp_path / 'x.safetensors'}:0.5"
    assert adapter_verb(["merge", adapter, "--base", str(file), "--into-base", "--out", str(out)]) == 0
    expected = MergedBase(ModelSection(base=str(file), adapters=[adapter])).load()
    found = Base(ModelSection(base=str(out))).load()
    for part in ("unet", "vae", *(part for part in found if part.startswith("text_encoder"))):
        wanted = expected[part].state_dict()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in found[part].state_dict().items()), part
    before, after = load_file(file), load_file(out)
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    assert not [name for name in changed if name.startswith("first_stage_model")]
