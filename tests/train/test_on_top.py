"""Training that goes on from an adapter, and on top of others."""

import json

import pytest
import torch

from loraloom.adapters.artifact import largest_difference
from loraloom.adapters.format import read
from loraloom.configs.command import run_command
from loraloom.configs.loader import load_config
from loraloom.configs.schema import ModelSection
from loraloom.inference.engine import Engine
from loraloom.inference.merged import MergedBase
from loraloom.inference.verify import probe
from loraloom.inference.weighted_file import AdapterFile
from loraloom.train.__main__ import main
from loraloom.train.build import build_trainer
from loraloom.train.preflight import check_adapter_files

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def first(config_writer, tmp_path_factory):
    """The adapter file of a run, alpha 8 and rank 4."""
    folder = tmp_path_factory.mktemp("first")
    assert main([str(config_writer(folder, "run", loop={"steps": 3}, optimizer={"learning_rate": 3e-2}))]) == 0
    return folder / "run" / "tiny.safetensors"


def adapters_of(config_file):
    trainer = build_trainer(load_config(config_file), overwrite=True)
    return trainer.run.adapters


@pytest.mark.parametrize("name", ["tiny.safetensors", "tiny.kohya.safetensors"])
def test_training_begins_with_the_weights_of_a_file(write_config, tiny_base, first, name):
    file = first.with_name(name)
    base = MergedBase(ModelSection(base=str(tiny_base)))
    adapters = adapters_of(write_config(adapter={"start_from": str(file), "alpha": 2}))
    assert largest_difference(read(file, base.names), adapters.artifact())[0] < 1e-6
    assert all(p.requires_grad for part in adapters.parameters().values() for p in part)


@pytest.mark.parametrize(("method", "options"), [("loha", {}), ("lokr", {}), ("oft", {"block_size": 4})])
def test_every_method_can_begin_with_its_file(write_config, tiny_base, method, options):
    adapter = {"method": method, "options": options, "parts": {"unet": "attention"}}
    config = write_config(adapter=adapter, output={"formats": ["loraloom"]}, loop={"steps": 2})
    assert main([str(config)]) == 0
    file = config.parent / "run" / "tiny.loraloom.safetensors"
    again = write_config("again", adapter=adapter | {"start_from": str(file)}, loop={"steps": 2})
    trainer = build_trainer(load_config(again))
    found, base = trainer.run.adapters.artifact(), MergedBase(ModelSection(base=str(tiny_base)))
    wanted = read(file, base.names)
    assert all(
        torch.equal(tensor, found.modules[key].tensors[name])
        for key, weights in wanted.modules.items()
        for name, tensor in weights.tensors.items()
    )
    trainer.callbacks = []
    trainer.train_step()
    assert any(
        not torch.equal(tensor, trainer.run.adapters.artifact().modules[key].tensors[name])
        for key, weights in wanted.modules.items()
        for name, tensor in weights.tensors.items()
    )


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"rank": 2}, "take the same method, options and ranks"),
        ({"parts": {"unet": "attention"}}, "are not adapted here"),
        ({"options": {"dora": True}}, "take the same method, options and ranks"),
        ({"options": {"init": "pissa"}}, "give one of the two"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(write_config, first, adapter, words, capsys):
    assert run_command(main, [str(write_config(adapter={"start_from": str(first)} | adapter))]) == 2
    assert words in capsys.readouterr().err


def test_files_that_are_not_there_are_named(write_config, capsys):
    config = write_config(model={"adapters": ["no.safetensors:0.5"]}, adapter={"start_from": "none.safetensors"})
    assert run_command(main, [str(config)]) == 2
    said = capsys.readouterr().err
    assert "model.adapters: no.safetensors: there is no such file" in said
    assert "adapter.start_from: none.safetensors: there is no such file" in said


@pytest.mark.parametrize(
    ("holds", "said"),
    [
        (None, "is a folder; name the .safetensors file of the adapter"),
        ("dog.safetensors", "such as dog.safetensors"),
        ("adapter_config.json", "is a folder of PEFT, and a file is needed"),
        ("run_state.json", "is a checkpoint of a run, and a file is needed"),
        ("unet/adapter_config.json", "--to loraloom --out FILE` makes one"),
    ],
)
def test_a_folder_is_no_adapter_file(holds, said, write_config, tmp_path):
    """A record tells a file by its hash, and a run that goes on needs the same one."""
    folder = tmp_path / "dog"
    folder.mkdir()
    if holds is not None:
        (folder / holds).parent.mkdir(exist_ok=True)
        (folder / holds).touch()
    config = load_config(write_config(model={"adapters": [f"{folder}:0.5"]}, adapter={"start_from": str(folder)}))
    problems = check_adapter_files(config)
    assert [problem.split(":")[0] for problem in problems] == ["model.adapters", "adapter.start_from"]
    assert all(said in problem and "no such file" not in problem for problem in problems)


def test_a_merged_base_says_what_base_and_adapter_say(tiny_base, first):
    merged = MergedBase(ModelSection(base=str(tiny_base), adapters=[f"{first}:0.5"]))
    engine = Engine.load(str(tiny_base))
    engine.attach([AdapterFile(first, 0.5)])
    base = MergedBase(ModelSection(base=str(tiny_base)))
    predictions = [probe(merged.family, parts) for parts in (merged.load(), engine.parts, base.load())]
    torch.testing.assert_close(predictions[0], predictions[1], atol=1e-5, rtol=1e-5)
    assert (predictions[0] - predictions[2]).abs().max() > 1e-4


def test_an_adapter_trains_on_top_of_another_and_verifies_there(write_config, first):
    config = write_config(model={"adapters": [str(first)]}, loop={"steps": 3})
    assert main([str(config)]) == 0
    record = json.loads((config.parent / "run/run.json").read_text())
    assert record["state"] == "done"
    assert record["verify"]["diffusers"]["prediction_difference"] < 1e-5
    alone = write_config("alone", loop={"steps": 3})
    assert main([str(alone)]) == 0
    histories = [(file.parent / file.stem / "logs/history.jsonl").read_text() for file in (config, alone)]
    assert histories[0] != histories[1]
