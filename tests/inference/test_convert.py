"""Whole models: a single file and a pipeline folder are turned into each other without loss, or a line says why not."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from loraloom.configs.command import run_command
from loraloom.configs.errors import UserError
from loraloom.inference.convert import file_to_folder, folder_to_file, main
from loraloom.inference.engine import Engine
from loraloom.inference.single_file_limits import held
from loraloom.launch import cli
from loraloom.models.base import PipelineFiles

pytestmark = pytest.mark.slow

V_ZERO_SNR = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
SLOW = pytest.mark.slow


def same_bytes(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        assert torch.equal(tensor, other[name]), name


def configs(folder):
    return {path.relative_to(folder).as_posix(): json.loads(path.read_text()) for path in folder.rglob("*.json")}


@pytest.mark.parametrize(
    ("kind", "metadata", "extra"),
    [
        ("sd1", {}, {}),
        pytest.param("sd2", {"modelspec.prediction_type": "v"}, {}, marks=SLOW),
        pytest.param("sdxl", {}, V_ZERO_SNR, marks=SLOW),
    ],
)
def test_there_and_back_is_the_same(checkpoint, tmp_path, kind, metadata, extra):
    """File -> folder -> file -> folder: the same tensors, and all that the configs say of the model."""
    source, _ = checkpoint(kind, metadata | {"modelspec.resolution": "32x32"}, extra)
    if kind == "sd2":  # what is in such files and in no pipeline
        tensors = load_file(source)
        tensors.pop("cond_stage_model.model.text_projection")
        save_file(tensors, source, metadata)
    folder, file, again = tmp_path / "folder", tmp_path / "back.safetensors", tmp_path / "again"
    assert cli.run(["convert", str(source), "--out", str(folder)]) == 0
    assert cli.run(["convert", str(folder), "--out", str(file)]) == 0
    same_bytes(load_file(source), load_file(file))
    assert file_to_folder(str(file), again)[0] == f"wrote {again}"
    assert configs(folder) == configs(again)
    for path in folder.rglob("*.safetensors"):
        assert path.read_bytes() == (again / path.relative_to(folder)).read_bytes()
    scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == ("epsilon" if kind == "sd1" else "v_prediction")
    assert bool(scheduler.get("rescale_betas_zero_snr")) == (kind == "sdxl")


@pytest.fixture
def unpacked(checkpoint, tmp_path):
    """A folder of Stable Diffusion 1."""
    source, _ = checkpoint("sd1")
    file_to_folder(str(source), tmp_path / "unpacked")
    return tmp_path / "unpacked"


def picture(base):
    generator = torch.Generator().manual_seed(0)
    pipeline = Engine.load(str(base)).pipeline
    return pipeline("a red star", num_inference_steps=1, generator=generator, output_type="np").images[0]


def test_what_diffusers_saves_and_its_file_make_the_same_picture(unpacked, tmp_path):
    folder, file = tmp_path / "saved", tmp_path / "model.safetensors"
    StableDiffusionPipeline.from_pretrained(unpacked).save_pretrained(folder)
    said = folder_to_file(str(folder), file)
    assert said == [f"wrote {file}: {len(load_file(file))} tensors"]
    image = picture(folder)
    assert image.std() > 0
    assert (image == picture(file)).all()


@SLOW
def test_old_names_of_the_vae_and_flat_text_encoders_are_known(unpacked, tmp_path):
    """As the folder of Stable Diffusion 1.5 has them, and as new transformers write them."""
    usual, file = tmp_path / "usual.safetensors", tmp_path / "model.safetensors"
    folder_to_file(str(unpacked), usual)
    vae, text = unpacked / "vae/diffusion_pytorch_model.safetensors", unpacked / "text_encoder/model.safetensors"
    tensors = load_file(vae)
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        tensors = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): t for name, t in tensors.items()}
    assert len([name for name in tensors if "proj_attn" in name]) == 4
    save_file(tensors, vae)
    flat = {name.removeprefix("text_model."): tensor for name, tensor in load_file(text).items()}
    save_file(flat | {"embeddings.position_ids": torch.arange(77)[None]}, text)
    folder_to_file(str(unpacked), file)
    same_bytes(load_file(usual), load_file(file))


def test_the_type_is_chosen_and_too_large_numbers_are_refused(checkpoint, tmp_path):
    source, _ = checkpoint("sd1")
    folder, file = tmp_path / "half", tmp_path / "half.safetensors"
    assert main([str(source), "--out", str(folder), "--dtype", "bf16"]) == 0
    assert main([str(folder), "--out", str(file), "--dtype", "fp16"]) == 0
    half = load_file(file)
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}
    for name, tensor in load_file(source).items():
        assert torch.equal(half[name], tensor.bfloat16().half()), name
    large = load_file(source)
    large["first_stage_model.quant_conv.bias"] += 1e6
    save_file(large, source)
    with pytest.raises(UserError, match=r"quant_conv.bias has numbers that float16 cannot hold; take bf16 or fp32"):
        file_to_folder(str(source), tmp_path / "other", "fp16")
    assert not (tmp_path / "other").exists()


def test_what_a_folder_does_not_hold_is_told_and_what_nobody_knows_is_refused(checkpoint, tmp_path):
    source, _ = checkpoint("sd1", {"modelspec.title": "x"})
    beside = {
        "model_ema.diffusion_modeltime_embed0weight": torch.ones(2),
        "betas": torch.ones(3),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    tensors = load_file(source)
    save_file(tensors | beside, source, {"modelspec.title": "x"})
    said = file_to_folder(str(source), tmp_path / "folder")
    assert len([line for line in said if "left out: 1 tensor, " in line]) == 3
    assert "1 entry of its header" in said[-1]
    save_file(tensors | {"edm_mean": torch.ones(1), "edm_std": torch.ones(1)}, source)
    with pytest.raises(UserError, match=r"has EDM's latents, as Playground 2.5 has \(edm_mean\)"):
        file_to_folder(str(source), tmp_path / "strange")
    assert not (tmp_path / "strange").exists()


def test_an_inpainting_model_keeps_its_channels_and_its_class(checkpoint, tmp_path):
    source, _ = checkpoint("sd1")
    first = "model.diffusion_model.input_blocks.0.0.weight"
    tensors = load_file(source)
    wider = torch.randn(tensors[first].shape[0], 9, 3, 3, generator=torch.Generator().manual_seed(0))
    save_file(tensors | {first: wider}, source)
    folder, file = tmp_path / "folder", tmp_path / "back.safetensors"
    file_to_folder(str(source), folder)
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "StableDiffusionInpaintPipeline"
    assert UNet2DConditionModel.from_pretrained(folder / "unet").config["in_channels"] == 9
    folder_to_file(str(folder), file)
    same_bytes(load_file(source), load_file(file))
    save_file(tensors | {first: wider[:, :8].contiguous()}, source)
    with pytest.raises(UserError, match=r"takes 8 channels; text-to-image \(4\) and inpainting \(9\) are known"):
        file_to_folder(str(source), tmp_path / "other")


UNSAYABLE = [
    (
        "unet/config.json",
        {"act_fn": "gelu"},
        r"cannot say that its unet has act_fn gelu \(readers take silu\)",
    ),
    ("unet/config.json", {"sample_size": [4, 8]}, "a single file says that of squares only"),
    ("vae/config.json", {"scaling_factor": 0.5}, "its vae has scaling_factor 0.5"),
    ("text_encoder/config.json", {"hidden_act": "gelu"}, "its text_encoder has hidden_act gelu"),
    ("scheduler/scheduler_config.json", {"beta_end": 0.02}, "its scheduler has beta_end 0.02"),
    ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "its model predicts 'sample'"),
    ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "its noise ends without signal"),
    ("model_index.json", {"_class_name": "FluxPipeline"}, "a FluxPipeline with a UNet of 4 channels has no"),
]


def test_what_a_single_file_cannot_say_is_refused(unpacked):
    for name, values, words in UNSAYABLE:
        before = (unpacked / name).read_text()
        (unpacked / name).write_text(json.dumps(json.loads(before) | values))
        with pytest.raises(UserError, match=words) as caught:
            held(PipelineFiles(unpacked))
        assert len(caught.value.problems) == 1
        (unpacked / name).write_text(before)


def test_what_only_concerns_sampling_is_told(unpacked):
    assert held(PipelineFiles(unpacked)).told == []
    for name, values in (
        ("scheduler/scheduler_config", {"_class_name": "PNDMScheduler", "steps_offset": 0}),
        ("vae/config", {"force_upcast": False}),
        ("model_index", {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}),
    ):
        path = unpacked / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    assert held(PipelineFiles(unpacked)).told == [
        "force_upcast False of its vae (readers take True)",
        "its sampler PNDMScheduler (readers choose their own)",
        "its safety_checker",
    ]


def test_missing_and_strange_tensors_of_a_folder_are_named(unpacked, tmp_path):
    file = tmp_path / "x.safetensors"
    weights = unpacked / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_out.odd"] = tensors.pop("conv_out.bias")
    save_file(tensors, weights)
    with pytest.raises(UserError) as caught:
        folder_to_file(str(unpacked), file)
    lacks, strange = caught.value.problems
    assert "lacks 1 of 686 tensors, first conv_out.bias" in lacks
    assert "has 1 tensors that a single file has no name for, first conv_out.odd" in strange


def test_the_embedded_base_has_another_size_than_single_files_mean(tmp_path, capsys):
    assert run_command(main, ["pocket", "--out", str(tmp_path / "x.safetensors")]) == 2
    told = capsys.readouterr().err
    assert "block_out_channels [64, 128, 160] (readers take [320, 640, 1280, 1280])" in told
    assert "its tokenizer has" in told


@pytest.mark.parametrize(
    ("source", "out", "words"),
    [
        ("model.ckpt", "folder", "a pickle can run code"),
        ("none.safetensors", "folder", "there is no such file"),
        ("./nowhere", "x.safetensors", "there is no such folder"),
        ("a.safetensors", "b.safetensors", "both single files"),
        ("pocket", "folder", "both folders"),
        ("pocket", "no/x.safetensors", "there is no folder"),
        ("none.safetensors", ".", "give another, or --force"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, monkeypatch, capsys, source, out, words):
    monkeypatch.chdir(tmp_path)
    assert run_command(main, [source, "--out", out]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_folder_of_other_things_is_never_replaced(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/me.jpg").write_bytes(b"precious")
    assert run_command(main, ["x.safetensors", "--out", str(tmp_path / "photos"), "--force"]) == 2
    assert (
        "holds what loraloom did not write, or what was changed since (me.jpg): it is never" in capsys.readouterr().err
    )
    assert (tmp_path / "photos/me.jpg").read_bytes() == b"precious"


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "loraloom convert downloads/model.safetensors --out models/my-model/" in capsys.readouterr().out
