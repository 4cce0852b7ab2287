"""Checkpoints in one file: every tensor arrives in its place, and what the file does not say is asked for."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from loraloom.adapters.artifact import AdapterArtifact, Weights
from loraloom.adapters.format import write
from loraloom.configs.command import run_command
from loraloom.configs.errors import UserError
from loraloom.configs.schema import ModelSection
from loraloom.inference.adapter.__main__ import main as adapter_verb
from loraloom.inference.layers import Layers
from loraloom.inference.merged import MergedBase
from loraloom.models import single_file
from loraloom.models.base import check_base, locate_base
from loraloom.models.load import Base
from loraloom.models.part_tensors import tensors_of
from loraloom.train.__main__ import main


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
    single_file.write_config("!", tmp_path / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    padded = tokenizer("A Photo", padding="max_length", max_length=5).input_ids
    assert padded == [49406, 320, 1125, 49407, 0]
    legacy = {
        name: str(tmp_path / "tokenizer" / file) for name, file in (("vocab", "vocab.json"), ("merges", "merges.txt"))
    }
    assert CLIPTokenizer(**legacy)("a photo of a cat").input_ids == tokenizer("a photo of a cat").input_ids


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_what_is_shipped_are_the_shapes_of_the_real_models(kind):
    contents = json.loads((single_file.SHIPPED / f"{kind}.json").read_text())
    sizes = {
        part: sum(torch.Size(shape).numel() for _, shape in tensors.values())
        for part, tensors in tensors_of(kind, contents).items()
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


MARKS = {
    "edm_vpred.sigma_max": "EDM's noise levels",
    "edm_vpred.sigma_min": "EDM's noise levels",
    "edm_mean": "EDM's latents",
    "edm_std": "EDM's latents",
    "scaled_fp8": "8 bits",
    "model.diffusion_model.scaled_fp8": "8 bits",
    "model.diffusion_model.out.2.scale_weight": "8 bits",
    "model.diffusion_model.out.2.weight_scale": "8 bits",
}


@pytest.mark.parametrize("mark", MARKS)
def test_a_mark_that_is_not_understood_is_refused_for_every_use(mark, tmp_path):
    """Not only by `convert`, which names every tensor that it leaves out."""
    names = ["model.diffusion_model.out.2.weight", single_file._KINDS["sd1"]]
    save_file({name: torch.ones(1) for name in (*names, mark)}, tmp_path / "x.safetensors")
    (problem,) = check_base(str(tmp_path / "x.safetensors"))
    assert MARKS[mark] in problem and mark in problem
    with pytest.raises(UserError, match="not understood here"):
        single_file.unpack(tmp_path / "x.safetensors", tmp_path / "folder")


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
