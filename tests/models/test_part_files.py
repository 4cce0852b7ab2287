"""A base's own configs, whatever they hold, are read or refused before a library sees them."""

import json
import os
import random
import shutil

import pytest
from safetensors.torch import load_file, save_file

from loraloom.benchmarks.hostile_files import odd_value
from loraloom.configs.errors import UserError
from loraloom.inference.engine import Engine
from loraloom.models import pocket
from loraloom.models.base import PipelineFiles
from loraloom.models.part_files import check_part

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


@pytest.fixture
def base(tmp_path):
    shutil.copytree(pocket.FOLDER, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "base"


def refused(part) -> str | None:
    try:
        return check_part(part)
    except UserError as error:
        return str(error)


def test_sound_parts_pass(base):
    assert all(PipelineFiles(base).config(part) for part in PARTS)
    for part in PARTS:
        check_part(base / part)


@pytest.mark.parametrize("part", PARTS)
def test_other_values_are_read_or_refused_in_one_line(base, part):
    file = next(file for file in sorted((base / part).glob("*config.json")))
    text = file.read_text()
    for number in range(100):
        values = json.loads(text)
        odd_value(values, random.Random(number))
        file.write_text(json.dumps(values))
        said = refused(base / part) or f"{file}: is read"
        assert said.startswith(f"{file}: ") and "\n" not in said


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("unet/config.json", "block_out_channels", [10**9]),
        ("unet/config.json", "layers_per_block", 10**6),
        ("text_encoder/config.json", "num_hidden_layers", 10**6),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**9),
        ("scheduler/scheduler_config.json", "beta_start", "x"),
    ],
)
def test_what_would_take_all_memory_or_time_is_named(base, name, key, value):
    (base / name).write_text(json.dumps(json.loads((base / name).read_text()) | {key: value}))
    with pytest.raises(UserError, match=key):
        check_part((base / name).parent)


def test_a_part_with_a_pipe_is_not_opened(base):
    (base / "tokenizer" / "vocab.json").unlink()
    os.mkfifo(base / "tokenizer" / "vocab.json")
    with pytest.raises(UserError, match="no regular file"):
        check_part(base / "tokenizer")
    for index in ("[1]", '{"unet": [[1]]}', "[" * 10_000):
        (base / "model_index.json").write_text(index)
        with pytest.raises(UserError, match="model_index"):
            PipelineFiles(base)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["vae", "text_encoder", "unet"])
def test_weights_that_lack_a_tensor_are_one_line(small_base, tmp_path, part):
    """Libraries would draw numbers for it."""
    shutil.copytree(small_base("sd1"), tmp_path / "base")
    (file,) = (tmp_path / "base" / part).glob("*.safetensors")
    tensors = load_file(file)
    left_out = max(tensors)
    save_file({name: tensor for name, tensor in tensors.items() if name != left_out}, file)
    with pytest.raises(UserError) as found:
        Engine.load(str(tmp_path / "base"))
    assert part in str(found.value) and left_out in str(found.value) and "\n" not in str(found.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_max_length": None}, "model_max_length is missing"),  # transformers says 10^30
        ({"eos_token": "../x"}, "eos_token that its text encoder does not know"),
        ({"bos_token": "../x"}, "bos_token that its text encoder does not know"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_one_line(small_base, tmp_path, change, words):
    shutil.copytree(small_base("sd1"), tmp_path / "base")
    file = tmp_path / "base" / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | change
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    with pytest.raises(UserError, match=words):
        Engine.load(str(tmp_path / "base"))
