"""One table of names, read both ways, beside diffusers' own tables, which go one way."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers.loaders import single_file_utils as tables
from safetensors.torch import load_file, save_file

from loraloom.configs.errors import UserError
from loraloom.inference.engine import Engine
from loraloom.models.base import check_base
from loraloom.models.original_names import beside_the_model, current_name, standard_name
from loraloom.models.part_tensors import tensors_of
from loraloom.models.single_file import shipped_configs

KINDS = ["sd1", "sd2", "sdxl"]


def configs_of(kind, base):
    return {name: json.loads((base / name).read_text()) for name in shipped_configs(kind) if name.endswith(".json")}


def by_diffusers(part, original, config):
    if part == "unet":
        return tables.convert_ldm_unet_checkpoint(original, config)
    if part == "vae":
        return tables.convert_ldm_vae_checkpoint(original, config)
    prefix = next(name for name in original if "resblocks" in name).partition("transformer.")[0]
    width = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
    return tables.convert_open_clip_checkpoint(width, original, prefix)


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_where_diffusers_reads_it(kind, base_of):
    configs = configs_of(kind, base_of(kind))
    for part, tensors in tensors_of(kind, configs).items():
        generator = torch.Generator().manual_seed(0)
        original = {
            place.name: torch.randn(place.shape(shape), generator=generator) for place, shape in tensors.values()
        }
        ours = {name: place.part_of(original[place.name], shape) for name, (place, shape) in tensors.items()}
        if any("resblocks" in name for name in original) or not part.startswith("text"):
            theirs = by_diffusers(part, original, configs[f"{part}/config.json"])
        else:
            theirs = {name.partition("transformer.")[2]: tensor for name, tensor in original.items()}
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()), part


def newer_vae(name):
    for old, new in {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"}.items():
        name = name.replace(f"mid.attn_1.{old}.", f"mid.attn_1.{new}.")
    return name


def flat_clip(name):
    return name.replace("transformer.text_model.", "transformer.")


@pytest.fixture
def picture(tmp_path):
    def picture(tensors):
        file = tmp_path / "other.safetensors"
        save_file(tensors, file)
        pipeline, generator = Engine.load(str(file)).pipeline, torch.Generator().manual_seed(0)
        return pipeline("a red star", num_inference_steps=1, generator=generator, output_type="np").images[0]

    return picture


def test_other_spellings_make_the_same_picture(checkpoint, picture):
    file, _ = checkpoint("sd1")
    usual = load_file(file)
    expected = picture(usual)
    spelled = {newer_vae(flat_clip(name)): tensor for name, tensor in usual.items()}
    assert len([name for name in spelled.keys() - usual.keys() if "attn_1" in name]) == 20
    assert len([name for name in spelled.keys() - usual.keys() if "attn_1" not in name]) == 36
    linear = {name: tensor[:, :, 0, 0].clone() if "attn_1" in name and tensor.ndim == 4 else tensor
              for name, tensor in spelled.items()}  # fmt: skip
    assert (picture(linear) == expected).all()
    name = "first_stage_model.decoder.mid.attn_1.to_v.weight"
    assert (picture(linear | {name: linear[name] * 30}) != expected).any()


def test_two_spellings_of_one_tensor_are_refused(checkpoint):
    file, _ = checkpoint("sd1")
    name = "first_stage_model.decoder.mid.attn_1.q.weight"
    tensors = load_file(file)
    save_file(tensors | {newer_vae(name): tensors[name].clone()}, file)
    assert "two names of one tensor" in check_base(str(file))[0]
    with pytest.raises(UserError, match="two names of one tensor"):
        Engine.load(str(file))


def test_spellings_are_names_of_one_tensor():
    assert standard_name("cond_stage_model.transformer.encoder.layers.0.mlp.fc1.bias") == (
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.bias"
    )
    usual = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.bias"
    assert standard_name(usual) == usual
    assert current_name("vae", "decoder.mid_block.attentions.0.proj_attn.bias") == (
        "decoder.mid_block.attentions.0.to_out.0.bias"
    )
    assert current_name("vae", "decoder.mid_block.attentions.0.to_q.bias").endswith("0.to_q.bias")
    assert current_name("text_encoder", "encoder.layers.0.mlp.fc1.bias") == "text_model.encoder.layers.0.mlp.fc1.bias"


def test_what_lies_beside_the_model_is_told_from_what_is_strange():
    names = [
        "model_ema.diffusion_modelinput_blocks00weight",
        "betas",
        "sqrt_one_minus_alphas_cumprod",
        "cond_stage_model.model.transformer.resblocks.23.ln_1.bias",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "edm_mean",
        "model.diffusion_model.motion.weight",
    ]
    known, strange = beside_the_model(names)
    assert sum(map(len, known.values())) == 5
    assert strange == ["edm_mean", "model.diffusion_model.motion.weight"]
