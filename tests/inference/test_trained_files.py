"""What a run leaves behind works elsewhere: in `loraloom sample` to the bit, and in plain diffusers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loraloom.adapters.artifact import largest_difference
from loraloom.adapters.format import read
from loraloom.configs.errors import AfterTrainingError, UserError
from loraloom.configs.schema import ModelSection
from loraloom.inference.__main__ import main as sample
from loraloom.inference.adapter.__main__ import main as adapter_verb
from loraloom.inference.adapter_file import format_names
from loraloom.inference.engine import Engine
from loraloom.inference.layers import Layers
from loraloom.inference.verify import Fresh, probe, verify_file
from loraloom.inference.weighted_file import AdapterFile
from loraloom.models.encode import encoder_of
from loraloom.train.__main__ import main as train

pytestmark = pytest.mark.slow

PROMPT = "a sks creature on a blue background"


@pytest.fixture(scope="module")
def run_folder(config_writer, tmp_path_factory) -> Path:
    """A finished run whose adapter changes the pictures visibly."""
    config = config_writer(
        tmp_path_factory.mktemp("trained"),
        "run",
        optimizer={"learning_rate": 3e-2},
        validation={"every": 5, "prompts": [PROMPT], "num_images": 3, "steps": 4, "seed": 11},
    )
    assert train([str(config)]) == 0
    return config.parent / "run"


def last_validation(folder: Path) -> list[np.ndarray]:
    step = max((folder / "samples").iterdir())
    listed = json.loads((step / "samples.json").read_text())
    return [np.asarray(Image.open(step / entry["file"])) for entry in listed]


def test_sample_remakes_the_last_validation_images_to_the_bit(run_folder, tiny_base, tmp_path):
    arguments = ["--base", str(tiny_base), "--prompt", PROMPT, "--num-images", "3", "--steps", "4", "--seed", "11"]
    wanted = last_validation(run_folder)
    for file in ("tiny.safetensors", "tiny.kohya.safetensors"):
        sample([*arguments, "--adapter", str(run_folder / file), "--out", str(tmp_path / file)])
        made = [np.asarray(Image.open(tmp_path / file / f"{index:04d}.png")) for index in range(3)]
        assert all((a == b).all() for a, b in zip(made, wanted, strict=True))
    sample([*arguments, "--out", str(tmp_path / "base")])
    assert (np.asarray(Image.open(tmp_path / "base/0000.png")) != wanted[0]).any()


@pytest.mark.parametrize("name", ["tiny.safetensors", "tiny.kohya.safetensors"])
def test_plain_diffusers_makes_the_same_picture(run_folder, tiny_base, name):
    def picture(pipeline) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        return pipeline(PROMPT, num_inference_steps=4, guidance_scale=4.0, generator=generator, output_type="np").images

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base, torch_dtype=torch.float32)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    base = picture(pipeline)
    pipeline.load_lora_weights(run_folder / name)
    engine = Engine.load(str(tiny_base))
    engine.attach([AdapterFile(run_folder / "tiny.safetensors")])
    ours = picture(engine.pipeline)
    assert np.abs(picture(pipeline) - ours).max() < 1e-3
    assert np.abs(base - ours).max() > 1e-2


def test_a_checkpoint_is_made_into_a_file_by_the_verbs(run_folder, tiny_base, tmp_path, capsys):
    """All that was trained at that step, text encoder too; the last one's is what the run has exported."""
    checkpoints = sorted((run_folder / "checkpoints").glob("step-*"))
    names = Layers(str(tiny_base)).names
    exported = read(run_folder / "tiny.safetensors", names)
    made = [tmp_path / f"{folder.name}.safetensors" for folder in checkpoints]
    for folder, file in zip(checkpoints, made, strict=True):
        assert adapter_verb(["convert", str(folder), "--to", "kohya", "--out", str(file)]) == 0
        assert "read again, the largest error of a change is 0" in capsys.readouterr().out
    found = [largest_difference(read(file, names), exported)[0] for file in made]
    assert found[-1] == 0 and all(apart > 0 for apart in found[:-1])
    assert adapter_verb(["inspect", str(checkpoints[0]), "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)
    assert facts["modules"].keys() == {"unet", "text_encoder"} and not facts["problems"]
    assert adapter_verb(["diff", str(checkpoints[-1]), str(made[-1]), "--json"]) == 0
    assert all(row["apart"] == 0 for row in json.loads(capsys.readouterr().out)["blocks"])
    try:
        assert adapter_verb(["convert", str(checkpoints[0])]) == 0  # beside the run's own files, by its name
        step = checkpoints[0].name.removeprefix("step-")
        assert (run_folder / f"tiny-{step}.safetensors").is_file()
    finally:
        (run_folder / f"tiny-{step}.safetensors").unlink()


def test_both_files_spell_text_model(run_folder):
    for name, start in (("tiny", "text_encoder.text_model."), ("tiny.kohya", "lora_te_text_model_")):
        with safe_open(run_folder / f"{name}.safetensors", "pt") as file:
            keys = [key for key in file.keys() if not key.startswith(("unet.", "lora_unet_"))]  # noqa: SIM118
        assert keys
        assert all(key.startswith(start) for key in keys)


def test_the_weight_scales_the_adapter(run_folder, tiny_base):
    file = run_folder / "tiny.safetensors"
    predictions = {}
    for weight in (None, 0.0, 0.5, 1.0):
        engine = Engine.load(str(tiny_base))
        engine.attach([] if weight is None else [AdapterFile.parse(f"{file}:{weight}")])
        predictions[weight] = probe(engine.family, engine.parts)
    assert torch.equal(predictions[None], predictions[0.0])
    assert not torch.equal(predictions[0.5], predictions[1.0])


def test_two_halves_of_an_adapter_make_a_whole(run_folder, tiny_base):
    file = run_folder / "tiny.safetensors"
    whole, halves = Engine.load(str(tiny_base)), Engine.load(str(tiny_base))
    whole.attach([AdapterFile(file, 1.0)])
    halves.attach([AdapterFile(file, 0.5), AdapterFile(file, 0.5)])
    torch.testing.assert_close(
        probe(halves.family, halves.parts), probe(whole.family, whole.parts), rtol=1e-4, atol=1e-5
    )


def test_verification_passes_what_was_trained_and_fails_what_was_not(run_folder, tiny_base, tmp_path):
    from loraloom.adapters.format import read

    engine = Engine.load(str(tiny_base))
    file = run_folder / "tiny.safetensors"
    (artifact,) = engine.attach([AdapterFile(file)])
    prediction, model = probe(engine.family, engine.parts), ModelSection(base=str(tiny_base))
    found = verify_file(file, artifact, Fresh.load(model), prediction)
    assert found.modules == len(artifact.modules)
    assert found.delta_difference == 0.0
    assert found.prediction_difference == 0.0
    tensors = load_file(file)
    first = next(name for name in tensors if "lora_B" in name)
    save_file(tensors | {first: tensors[first] * 1.01}, tmp_path / "other.safetensors")
    with pytest.raises(AfterTrainingError, match="does not verify"):
        verify_file(tmp_path / "other.safetensors", artifact, Fresh.load(model), prediction)
    stem = first.removesuffix("lora_B.weight")
    fewer = {name: tensor for name, tensor in tensors.items() if not name.startswith(stem)}
    save_file(fewer, tmp_path / "fewer.safetensors")
    with pytest.raises(AfterTrainingError, match="missing"):
        verify_file(tmp_path / "fewer.safetensors", artifact, Fresh.load(model), prediction)
    assert read(file, format_names(engine.family, engine.parts)).modules.keys() == artifact.modules.keys()


def test_a_file_that_does_not_verify_ends_with_its_own_exit_code(write_config, monkeypatch, capsys):
    """A writer that loses precision it should keep is found by the run itself."""
    from loraloom.adapters.formats import kohya
    from loraloom.configs.command import run_command

    honest = kohya.to_tensors

    def forgetful(artifact, names):
        tensors, header = honest(artifact, names)
        return {name: tensor * (0.5 if name.endswith("alpha") else 1) for name, tensor in tensors.items()}, header

    monkeypatch.setattr(kohya, "to_tensors", forgetful)
    config = write_config(loop={"steps": 2})
    assert run_command(train, [str(config)]) == 6
    assert "does not verify" in capsys.readouterr().err
    folder = config.parent / "run"
    assert (folder / "tiny.safetensors").exists()
    assert json.loads((folder / "run.json").read_text())["exit_code"] == 6


def test_where_one_format_refuses_it_the_others_are_written(write_config, monkeypatch, capsys):
    """Which is only known at the end where what was trained decides it."""
    from loraloom.adapters.formats import kohya
    from loraloom.configs.command import run_command

    honest = kohya.to_tensors

    def picky(artifact, names):
        if any(weights.tensors["up"].any() for weights in artifact.modules.values()):
            raise UserError("kohya holds no such numbers")
        return honest(artifact, names)

    monkeypatch.setattr(kohya, "to_tensors", picky)
    config = write_config(loop={"steps": 1, "batch_size": 1}, output={"formats": ["kohya", "diffusers"]})
    assert run_command(train, [str(config)]) == 6
    folder, said = config.parent / "run", capsys.readouterr().err
    assert "kohya holds no such numbers" in said
    assert f"{folder / 'tiny.safetensors'} is written and verified" in said
    assert (folder / "tiny.safetensors").is_file() and not (folder / "tiny.kohya.safetensors").exists()


def test_an_adapter_for_another_base_is_refused(run_folder, tiny_base, tmp_path):
    odd = {
        name.replace("down_blocks", "input_blocks"): t for name, t in load_file(run_folder / "tiny.safetensors").items()
    }
    save_file(odd, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match="input_blocks"):
        Engine.load(str(tiny_base)).attach([AdapterFile(tmp_path / "odd.safetensors")])


def test_a_base_in_memory_serves_to_verify_beside_the_adapter_that_it_carries(run_folder, tiny_base, tmp_path):
    """Its weights are shared, not copied, and it comes out as it was."""
    engine, file = Engine.load(str(tiny_base)), run_folder / "tiny.safetensors"
    bare = probe(engine.family, engine.parts)
    (artifact,) = engine.attach([AdapterFile(file)])
    prediction, encode = probe(engine.family, engine.parts), encoder_of(engine.family, engine.parts)
    fresh = Fresh.beside(engine.family, engine.parts, encode)
    kept = {weight.data_ptr() for weight in engine.parts["unet"].parameters()}
    assert torch.equal(probe(engine.family, fresh.mixing.parts), bare)
    assert {weight.data_ptr() for weight in fresh.mixing.parts["unet"].parameters()} < kept
    found = verify_file(file, artifact, fresh, prediction)
    assert (found.delta_difference, found.prediction_difference) == (0.0, 0.0)
    tensors = load_file(file)
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, tmp_path / "other.safetensors")
    with pytest.raises(AfterTrainingError, match="does not verify"):
        verify_file(
            tmp_path / "other.safetensors", artifact, Fresh.beside(engine.family, engine.parts, encode), prediction
        )
    assert torch.equal(probe(engine.family, engine.parts), prediction)


def test_on_a_bf16_base_a_file_is_compared_as_it_trained(run_folder, tiny_base):
    """In fp32: rounded to the base's type it would be off by the rounding of every layer after it."""
    model, file = ModelSection(base=str(tiny_base), dtype="bf16"), run_folder / "tiny.safetensors"
    engine = Engine.load(str(tiny_base), dtype="bf16")
    engine.adapters.exact = True
    (artifact,) = engine.attach([AdapterFile(file)])
    prediction = probe(engine.family, engine.parts)
    for fresh in (
        Fresh.load(model),
        Fresh.beside(engine.family, engine.parts, encoder_of(engine.family, engine.parts)),
    ):
        found = verify_file(file, artifact, fresh, prediction)
        assert (found.delta_difference, found.prediction_difference) == (0.0, 0.0)
    rounded = Engine.load(str(tiny_base), dtype="bf16")
    rounded.attach([AdapterFile(file)])
    assert not torch.equal(probe(rounded.family, rounded.parts), prediction)
