"""Weights are read as safetensors reads them, into memory that begins where torch's own does."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraloom.configs.errors import UserError
from loraloom.configs.schema import ModelSection
from loraloom.models.load import Base
from loraloom.models.weights_file import read_tensors, weight_files

TENSORS = {
    "half": torch.arange(7, dtype=torch.float16),
    "brain": torch.randn(3, 5).bfloat16(),
    "single": torch.randn(2, 3, 4),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(2.5),
    "whole": torch.tensor([1, 2, 3]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_those_of_safetensors(tmp_path, dtype):
    file = tmp_path / "x.safetensors"
    save_file(TENSORS, file, metadata={"format": "pt"})
    found = read_tensors(file, dtype)
    again, wanted = read_tensors(file, dtype), {name: tensor.clone() for name, tensor in load_file(file).items()}
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name].to(dtype) if name != "whole" else wanted[name])
        tensor += 1
        assert torch.equal(again[name], wanted[name].to(again[name].dtype))  # nobody else sees it


@pytest.mark.parametrize("kept", [slice(0, -4), slice(0, 20), slice(0, 5), slice(0, 0)])
def test_a_file_that_is_cut_off_is_not_read(tmp_path, kept):
    file = tmp_path / "x.safetensors"
    save_file(TENSORS, file)
    file.write_bytes(file.read_bytes()[kept])
    with pytest.raises(ValueError, match=r"cut off|Unterminated|Expecting|empty"):
        read_tensors(file, torch.float32)


def test_a_type_of_its_own_is_not_read(tmp_path):
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"ab")
    with pytest.raises(ValueError, match="F8_E4M3"):
        read_tensors(tmp_path / "x.safetensors", torch.float32)


def test_files_of_a_part_are_one_or_those_of_an_index(tmp_path):
    assert weight_files(tmp_path, "model") == []
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "2", "b": "1", "c": "2"}}))
    with pytest.raises(UserError, match="no such file"):
        weight_files(tmp_path, "model")
    for name in "12":
        (tmp_path / name).touch()
    assert weight_files(tmp_path, "model") == [tmp_path / "1", tmp_path / "2"]
    (tmp_path / "model.safetensors").touch()
    assert weight_files(tmp_path, "model") == [tmp_path / "model.safetensors"]


def test_a_unet_is_the_one_of_diffusers(tiny_base, tmp_path):
    from diffusers import UNet2DConditionModel

    ours = Base(ModelSection(base=str(tiny_base))).load(["unet"])["unet"]
    theirs = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
    assert dict(ours.config) == {name: value for name, value in theirs.config.items() if name != "_name_or_path"}
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    assert not ours.training and not any(parameter.requires_grad for parameter in ours.parameters())
