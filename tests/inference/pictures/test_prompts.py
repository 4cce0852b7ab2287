"""Adapters that a prompt names, found in folders, and what is said where nobody reads a mark."""

import pytest

from loraloom.configs.errors import UserError
from loraloom.inference.pictures.prompts import advise, with_named_adapters
from loraloom.inference.pictures.request import AdapterChoice, PictureRequest


@pytest.fixture
def folder(tmp_path):
    """Adapter files by name; what is in them is not looked at."""
    for name in ("sks", "style-1.5.v2", "twice", "below/twice", "below/deep", "run/checkpoints/step-1/adapter_unet"):
        file = tmp_path / f"{name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return tmp_path


def asked(prompt: str, folder, **rest) -> PictureRequest:
    (found,) = with_named_adapters([PictureRequest(prompt=prompt, **rest)], [str(folder)])
    return found


@pytest.mark.parametrize(
    ("tag", "name", "weight"),
    [
        ("<lora:sks:0.8>", "sks", 0.8),
        ("<lora:SKS>", "sks", 1.0),
        ("<LoRA: sks :-.5>", "sks", -0.5),
        ("<lyco:style-1.5.v2:0.5:0.5>", "style-1.5.v2", 0.5),
        ("<lora:deep:1>", "below/deep", 1.0),
    ],
)
def test_a_named_adapter_is_found_and_taken_out_of_the_words(folder, tag, name, weight):
    before = AdapterChoice(file="other.safetensors")
    found = asked(f"a {tag} star", folder, adapters=[before])
    assert found.prompt == "a star"
    assert found.adapters == [before, AdapterChoice(file=str(folder / f"{name}.safetensors"), weight=weight)]


@pytest.mark.parametrize(
    ("tag", "words"),
    [
        ("<lora:skss:1>", r"there is no skss\.safetensors in .*did you mean .sks"),
        ("<lora:../sks:1>", r"there is no \.\./sks\.safetensors"),
        ("<lora:adapter_unet:1>", "there is no"),
        ("<lora:twice:1>", "there are several"),
        ("<lora:sks:x>", "its weight is no number"),
        ("<lora:sks:0.5:1>", "several weights"),
    ],
)
def test_what_cannot_be_meant_is_one_line(folder, tag, words):
    with pytest.raises(UserError, match=words) as caught:
        asked(f"a {tag}", folder)
    assert len(caught.value.problems) == 1


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match=r"--adapter-folder .*nothing: there is no such folder"):
        asked("a", tmp_path / "nothing")


def test_without_a_folder_it_is_said_once(capsys):
    requests = [PictureRequest(prompt="a <lora:sks:0.8> (red:1.4)", seed=seed) for seed in range(3)]
    assert with_named_adapters(requests, []) == requests
    advise(requests)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("warning: ") for line in lines)
    advise([PictureRequest(prompt="a (red:1.4) star", weighted=True)])
    assert capsys.readouterr().err == ""
