"""Full fine-tuning: the base's own weights train, and a pipeline folder comes out that diffusers reads."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from loraloom.configs.command import run_command
from loraloom.configs.errors import AfterTrainingError, UserError
from loraloom.configs.loader import load_config
from loraloom.configs.schema import ModelSection
from loraloom.inference.__main__ import main as sample
from loraloom.inference.pipeline_folder import write_pipeline
from loraloom.inference.verify import probe, verify_pipeline
from loraloom.models.load import Base
from loraloom.train.__main__ import main
from loraloom.train.build import build_trainer
from loraloom.train.plan import main as plan

pytestmark = pytest.mark.slow

IMAGES = {"prompts": ["a hill"], "num_images": 1, "steps": 2, "every": 100, "at_start": False}


@pytest.fixture
def config_of(write_config):
    """A config of ours without the parts that the fixture adapts, with an adapter section of its own."""

    def config_of(name="run", adapter=None, **sections) -> Path:
        file = write_config(name, **{"optimizer": {"learning_rate": 1e-3}, **sections})
        content = yaml.safe_load(file.read_text())
        content["adapter"] = {"method": "full", **(adapter or {})}
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        return file

    return config_of


def base_in(folder: Path) -> Base:
    return Base(ModelSection(base=str(folder)))


def changed(one: Path, other: Path) -> dict[str, int]:
    """Part -> tensors of its file that differ between two pipeline folders; names and shapes are the same."""
    found = {}
    for file in sorted(one.glob("*/*.safetensors")):
        old, new = load_file(file), load_file(other / file.relative_to(one))
        assert {n: t.shape for n, t in old.items()} == {n: t.shape for n, t in new.items()}
        found[file.parent.name] = sum(not torch.equal(tensor, new[name]) for name, tensor in old.items())
    return found


def test_a_pipeline_folder_comes_out_that_makes_the_same_images(config_of, tiny_base, tmp_path):
    config = config_of(validation=IMAGES, loop={"steps": 3})
    assert main([str(config)]) == 0
    folder = config.parent / "run"
    record = json.loads((folder / "run.json").read_text())
    assert record["files"] == ["tiny"]
    assert record["verify"]["pipeline"]["delta_difference"] == 0
    all_of_unet = len(load_file(next((tiny_base / "unet").glob("*.safetensors"))))
    assert changed(tiny_base, folder / "tiny") == {"text_encoder": 0, "unet": all_of_unet, "vae": 0}
    assert record["modules"]["unet"] > 200
    words = ["--base", str(folder / "tiny"), "--resolution", "32", "--num-images", "1", "--steps", "2"]
    assert sample([*words, "--prompt", "a hill", "--out", str(tmp_path / "s")]) == 0
    (wanted,) = (folder / "samples/step-000003").glob("00-*.png")
    assert (np.asarray(Image.open(tmp_path / "s/0000.png")) == np.asarray(Image.open(wanted))).all()
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "tiny")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    assert pipeline("a hill", height=32, width=32, num_inference_steps=1, output_type="np").images.shape == (
        1,
        32,
        32,
        3,
    )
    assert "rank" not in (folder / "report.html").read_text().split("<dt>Adapter</dt>")[1].split("</dd>")[0]


def test_text_encoder_and_unet_resume_to_the_same_bytes(config_of):
    parts = {"parts": {"unet": "attention", "text_encoder": "all"}}
    sections = {
        "optimizer": {"ema_decay": 0.9, "learning_rate": 1e-3},
        "checkpoint": {"every": 2},
        "loop": {"steps": 4},
    }
    config = config_of("whole", parts, **sections)
    assert main([str(config)]) == 0
    folder = config.parent / "whole"
    files = {file: file.read_bytes() for file in (folder / "tiny").rglob("*") if file.is_file()}
    (folder / "checkpoints/step-000004/manifest.json").unlink()
    assert main(["--resume", str(folder)]) == 0
    assert files == {file: file.read_bytes() for file in (folder / "tiny").rglob("*") if file.is_file()}
    base = Path(load_config(config).model.base)
    found = changed(base, folder / "tiny")
    biases = sum(name.endswith(("to_out.0.bias",)) for name in load_file(next((base / "unet").glob("*.safetensors"))))
    assert found["unet"] == 128 + biases
    assert found["text_encoder"] > 30
    assert found["vae"] == 0


def test_only_what_was_selected_moves_and_everything_of_it(config_of):
    trainer = build_trainer(load_config(config_of(adapter={"parts": {"unet": ["re:.*attn2.*to_[kv]"]}})))
    trainer.callbacks = []
    unet = trainer.run.adapters.carriers["unet"]
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    for _ in range(2):
        trainer.train_step()
    moved = {name for name, tensor in unet.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if ".attn2.to_k." in name or ".attn2.to_v." in name}
    assert moved == set(trainer.run.adapters.named_parameters()["unet"])


def test_file_names_of_old_bases_stay_as_they_are(tiny_base, tmp_path):
    """Bases on the hub have `text_model.` in the keys of their text encoder, models of today do not."""
    base = base_in(tiny_base)
    parts = base.load(["text_encoder"])
    state = {name: parameter.detach() + 1 for name, parameter in parts["text_encoder"].named_parameters()}
    for spelling in ("text_model.", ""):
        old = tmp_path / f"old{spelling}"
        shutil.copytree(tiny_base, old)
        file = old / "text_encoder/model.safetensors"
        tensors = {f"{spelling}{name.removeprefix('text_model.')}": t for name, t in load_file(file).items()}
        file.unlink()
        save_file(tensors, file)
        write_pipeline(base_in(old), {"text_encoder": state}, tmp_path / f"new{spelling}", "fp32", {})
        written = load_file(tmp_path / f"new{spelling}/text_encoder/model.safetensors")
        assert written.keys() == tensors.keys()
        assert all(
            torch.equal(tensor, tensors[name] + 1) for name, tensor in written.items() if "position_ids" not in name
        )


def test_a_folder_with_a_swapped_tensor_does_not_verify(tiny_base, tmp_path):
    base = base_in(tiny_base)
    parts = base.load()
    state = {name: parameter.detach() * 1.01 for name, parameter in parts["unet"].named_parameters()}
    for name, value in state.items():
        parts["unet"].get_parameter(name).data.copy_(value)
    trained = probe(base.family, parts)
    write_pipeline(base, {"unet": state}, tmp_path / "new", "fp32", {})
    assert verify_pipeline(tmp_path / "new", {"unet": state}, trained).delta_difference == 0
    (file,) = (tmp_path / "new/unet").glob("*.safetensors")
    tensors = load_file(file)
    one, other = "mid_block.resnets.0.conv1.weight", "mid_block.resnets.1.conv1.weight"
    tensors[one], tensors[other] = tensors[other], tensors[one]
    file.unlink()
    save_file(tensors, file)
    with pytest.raises(AfterTrainingError, match="does not verify"):
        verify_pipeline(tmp_path / "new", {"unet": state}, trained)


def test_what_has_no_place_in_the_base_is_refused_and_nothing_is_left(tiny_base, tmp_path):
    with pytest.raises(UserError, match=r"unet: its files have no place for 1 trained tensors, first 'nope.weight'"):
        write_pipeline(base_in(tiny_base), {"unet": {"nope.weight": torch.ones(1)}}, tmp_path / "new", "fp32", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("adapter", "sections", "words"),
    [
        ({"rank": 4}, {}, "adapter.rank: full trains the weights themselves"),
        ({"start_from": "x.safetensors"}, {}, "x.safetensors: there is no such file"),
        ({}, {"output": {"formats": ["diffusers"]}}, "full is written as a pipeline folder"),
        ({"method": "lora", "parts": {"unet": "all"}}, {}, "no preset 'all'"),
        (
            {"parts": {"text_encoder": "all"}, "tokens": [{"token": "<sks>"}]},
            {"data": {"captions": {"trigger": "<sks>"}}},
            "trains the words of a text encoder too",
        ),
        ({}, {"optimizer": {"parts": {"text_encoder": {"learning_rate": 1e-4}}}}, "text_encoder is not trained"),
    ],
)
def test_settings_that_mean_nothing_are_refused(adapter, sections, words, config_of, capsys):
    config = config_of(adapter=adapter, **sections)
    assert run_command(main, [str(config)]) == 2
    assert words in capsys.readouterr().err


def test_the_plan_says_what_is_trained_and_written(config_of, capsys):
    assert plan([str(config_of())]) == 0
    told = capsys.readouterr().out
    assert "full, of the base" in told
    assert "weights of the base on 0 frozen ones" in told
    assert "tiny/ (a diffusers pipeline)" in told


def test_new_words_beside_it_get_a_file_of_their_own(config_of, photos):
    config = config_of(
        adapter={"parts": {"unet": "attention"}, "tokens": [{"token": "<sks>"}]},
        data={"sources": [{"path": str(photos), "caption": "a <sks> creature"}]},
        loop={"steps": 2},
    )
    assert main([str(config)]) == 0
    record = json.loads((config.parent / "run/run.json").read_text())
    assert record["files"] == ["tiny", "tiny.embedding.safetensors"]
    assert record["verify"]["embedding"]["prediction_difference"] < 1e-5
