"""Random bases: the names and shapes of real ones, numbers that neither vanish nor overflow, and whole files only."""

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from loraloom.benchmarks import random_base
from loraloom.benchmarks.random_base import FAMILIES, RandomWeights, random_weight, random_weights, write_base
from loraloom.configs.errors import UserError
from loraloom.configs.schema import ModelSection
from loraloom.models.family import Conditioning
from loraloom.models.load import Base
from loraloom.models.noise.process import Noised
from loraloom.models.part_tensors import meta_model
from loraloom.models.single_file import shipped_configs

HEADS = {"sd1": 4, "sdxl": [1, 2, 4]}


def tiny(family: str) -> dict:
    """The real configs, all of whose layers are there and narrow."""
    contents = copy.deepcopy(shipped_configs(family))
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "projection_dim": 32,
    }
    encoders = [name for name in contents if name.startswith("text_encoder")]
    for name in encoders:
        contents[name] |= text
    unet, vae = contents["unet/config.json"], contents["vae/config.json"]
    widths = [32, 64, 128, 128][: len(unet["block_out_channels"])]
    unet |= {"block_out_channels": widths, "attention_head_dim": HEADS[family]}
    unet["cross_attention_dim"] = 32 * len(encoders)
    if family == "sdxl":
        unet |= {"transformer_layers_per_block": [1, 1, 2], "projection_class_embeddings_input_dim": 32 + 6 * 256}
    vae["block_out_channels"] = [32, 32, 64, 64]
    return contents


@pytest.fixture(scope="module", params=FAMILIES)
def tiny_random(request, tmp_path_factory):
    """Family, and the folder of a narrow base of it."""
    folder = tmp_path_factory.mktemp("random") / request.param
    write_base(request.param, folder, contents=tiny(request.param))
    return request.param, folder


@pytest.mark.parametrize("family", FAMILIES)
def test_headers_have_every_tensor_of_the_real_models_and_no_other(family):
    contents = shipped_configs(family)
    for path, weights in random_weights(family, contents, torch.float32, seed=0).items():
        part = path.partition("/")[0]
        tensors = meta_model(part, contents[f"{part}/config.json"]).state_dict()
        wanted = {name.removeprefix("text_model."): tuple(tensor.shape) for name, tensor in tensors.items()}
        assert {name.removeprefix("text_model."): shape for name, shape in weights.shapes.items()} == wanted
        if part.startswith("text_encoder"):  # as libraries before transformers 5.6 want them
            assert {name.partition(".")[0] for name in weights.shapes} <= {"text_model", "text_projection"}


def test_safetensors_reads_what_was_written_by_hand(tmp_path):
    shapes = {"a.weight": (3, 5), "a.bias": (3,), "norm.weight": (7,)}
    weights = RandomWeights(shapes, torch.bfloat16, seed=3)
    told = []
    weights.write(tmp_path / "x.safetensors", told.append)
    found = load_file(tmp_path / "x.safetensors")
    assert told == [30, 6, 14] and weights.size == 50
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == shapes
    assert all(tensor.dtype == torch.bfloat16 for tensor in found.values())
    assert torch.equal(found["a.weight"], random_weight("a.weight", (3, 5), 3).bfloat16())
    assert found["a.bias"].eq(0).all() and found["norm.weight"].eq(1).all()
    assert weights.is_in(tmp_path / "x.safetensors")
    assert not RandomWeights(shapes, torch.float16, seed=3).is_in(tmp_path / "x.safetensors")
    assert not RandomWeights(shapes, torch.bfloat16, seed=4).is_in(tmp_path / "x.safetensors")


@pytest.mark.parametrize("shape", [(64, 300), (64, 30, 3, 3)])
def test_a_layer_says_as_much_as_it_is_told(shape):
    weight = random_weight("x.weight", shape, 0).flatten(1)
    told = torch.randn(weight.shape[1], 500, generator=torch.Generator().manual_seed(1))
    assert (weight @ told).std().item() == pytest.approx(1, rel=0.05)
    assert not torch.equal(weight, random_weight("y.weight", shape, 0).flatten(1))


@torch.no_grad()
def test_all_parts_load_and_neither_vanish_nor_overflow(tiny_random):
    family, folder = tiny_random
    base = Base(ModelSection(base=str(folder), dtype="fp32"))
    assert base.family.name == family
    parts = base.load()
    row = base.family.encode_prompts(parts, ["a photo of a sks creature"]).row(0)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    noised = Noised(latents, torch.full((1,), 500), latents, torch.ones(1), torch.ones(1))
    predicted = base.family.predict(parts, noised, Conditioning.stack([row]), torch.full((1, 6), 128.0))
    encoded = parts["vae"].encode(torch.rand(1, 3, 64, 64)).latent_dist.mode()
    decoded = parts["vae"].decode(latents).sample
    for each in (row["prompt_embeds"], predicted, encoded, decoded):
        assert 0.1 < each.std() < 10


def test_diffusers_loads_it_and_paints(tmp_path):
    write_base("sd1", tmp_path / "base", contents=tiny("sd1"))
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "base", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline("a creature", height=32, width=32, num_inference_steps=1).images
    assert image.size == (32, 32)


def test_a_folder_that_is_whole_stays_as_it_is(tiny_random, monkeypatch):
    family, folder = tiny_random
    monkeypatch.setattr(random_base, "replace_folder", None)
    write_base(family, folder, contents=tiny(family))
    with pytest.raises(UserError, match="holds something else than this base; remove it"):
        write_base(family, folder, seed=1, contents=tiny(family))


def test_what_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RandomWeights, "write", full)
    with pytest.raises(OSError, match="No space"):
        write_base("sd1", tmp_path / "base", contents=tiny("sd1"))
    assert list(tmp_path.iterdir()) == []
