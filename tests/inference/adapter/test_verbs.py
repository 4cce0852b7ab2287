"""`loraloom adapter`: what each verb prints and writes, on a tiny base, and what it refuses."""

import json
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loraloom.adapters.artifact import AdapterArtifact, Weights, block_of, largest_difference
from loraloom.adapters.format import read, write
from loraloom.configs.command import run_command
from loraloom.configs.errors import UserError
from loraloom.configs.ownership import write_file
from loraloom.configs.schema import ModelSection
from loraloom.inference.adapter.__main__ import main
from loraloom.inference.engine import Engine
from loraloom.inference.layers import Layers, names_for
from loraloom.models.load import Base

pytestmark = pytest.mark.slow

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(scope="module")
def layers(base_of) -> Layers:
    return Layers(str(base_of("sd1")))


def lora(layers: Layers, seed: int = 0, rank: int = 4, scale: float = 0.5, dora: bool = False) -> AdapterArtifact:
    """Of all attention, and one convolution."""
    modules = {}
    chosen = [key for key in layers.keys if key[1].endswith((*ATTENTION, "_proj", "resnets.0.conv1"))]
    for number, key in enumerate(key for key in chosen if key[1] != "text_projection"):
        shape, generator = layers.names.module_paths[key[0]][key[1]], torch.Generator().manual_seed(seed + number)
        tensors = {"down": 0.3 * torch.randn(rank, *shape[1:], generator=generator)}
        tensors["up"] = 0.3 * torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator)
        if dora and key[0] == "unet":
            tensors["magnitude"] = 1.2 * layers.weight(key).flatten(1).norm(dim=1)
        modules[key] = Weights("lora", tensors, scale)
    return AdapterArtifact(modules, {"modelspec.title": "mine"})


@pytest.fixture
def file(layers, tmp_path) -> Path:
    write(lora(layers), tmp_path / "mine.safetensors", "diffusers", layers.names)
    return tmp_path / "mine.safetensors"


def distance(one: Path, other: Path, layers: Layers) -> float:
    return largest_difference(read(one, layers.names), read(other, layers.names), layers.weight)[0]


def test_layers_are_those_of_the_loaded_model(layers, base_of):
    parts = Base(ModelSection(base=str(base_of("sd1")))).load(["unet", "text_encoder"])
    for component, path in layers.keys:
        module = parts[component].get_submodule(
            path if component == "unet" or hasattr(parts[component], "text_model") else path.removeprefix("text_model.")
        )
        assert torch.equal(layers.weight((component, path)), module.weight)


# ------------------------------------------------------------------------------- inspect


def test_inspect_shows_what_is_there(file, capsys):
    assert main(["inspect", str(file)]) == 0
    out = capsys.readouterr().out
    for words in ("format        diffusers", "method        lora", "rank          4\n", "NaN or Inf    none", "mine"):
        assert words in out
    assert "text_encoder layers.0" in out and "unet down_blocks.1" in out and "█" in out


def test_inspect_as_json_has_the_norms_of_the_changes(file, layers, capsys):
    assert main(["inspect", str(file), "--json", "--base", layers.title]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    artifact = read(file, layers.names)
    assert found["bytes"] == file.stat().st_size
    assert found["ranks"] == {"4": len(artifact.modules)}
    for block in found["blocks"]:
        deltas = [
            weights.delta().double()
            for key, weights in artifact.modules.items()
            if (key[0], block_of(key)) == (block["component"], block["block"])
        ]
        assert block["modules"] == len(deltas)
        assert block["norm"] == pytest.approx(sum(delta.square().sum().item() for delta in deltas) ** 0.5, rel=1e-5)
    assert sum(block["modules"] for block in found["blocks"]) == len(artifact.modules)


def test_inspect_says_what_is_wrong_beside_what_it_knows(file, tmp_path, capsys):
    tensors = load_file(file)
    tensors[next(iter(tensors))][0, 0] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors", {"modelspec.architecture": "stable-diffusion-v1/lora", "a": "b"})
    assert main(["inspect", str(tmp_path / "nan.safetensors"), str(file)]) == 2
    out = capsys.readouterr().out
    assert "problem: 1 of " in out and "hold NaN or Inf" in out and "\n    a" in out
    assert "method        lora" in out  # of the sound one


@pytest.mark.parametrize("name", ["x.pt", "x.bin", "x.safetensors"])
def test_pickles_are_never_opened(name, tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    for verb in (["inspect"], ["convert", "--to", "kohya"], ["resize", "--rank", "2"]):
        assert run_command(main, [verb[0], str(tmp_path / name), *verb[1:]]) == 2
    assert capsys.readouterr().err.count("they can run code") == 3
    assert not (tmp_path / "sprung").exists()


def test_a_file_whose_base_is_not_known_asks_for_it(tmp_path, capsys):
    save_file({"foreign.to_q.lora_A.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    assert run_command(main, ["convert", str(tmp_path / "x.safetensors"), "--to", "kohya"]) == 2
    assert capsys.readouterr().err.endswith(
        "nothing in it tells its base, whose layers are not known here; give --base\n"
    )


def test_pockets_files_are_read_without_their_base(tmp_path):
    pocket = Layers("pocket")
    write(lora(pocket), tmp_path / "x.safetensors", "kohya", pocket.names)
    names = names_for(tmp_path / "x.safetensors")
    assert names.module_paths.keys() == pocket.names.module_paths.keys()
    assert all(set(names.module_paths[part]) == set(paths) for part, paths in pocket.names.module_paths.items())
    assert (names.original, names.flat) == (pocket.names.original, pocket.names.flat)


# ------------------------------------------------------------------------------- convert


@pytest.mark.parametrize("form", ["kohya", "peft", "loraloom"])
def test_convert_there_and_back(file, layers, tmp_path, form, capsys):
    assert main(["convert", str(file), "--to", form]) == 0
    there = tmp_path / {"kohya": "mine.kohya.safetensors", "peft": "mine.peft"}.get(form, "mine.loraloom.safetensors")
    assert (
        f"wrote {there} ({form}); read again, the largest error of a change is 0.0e+00 of its norm"
        in capsys.readouterr().out
    )
    assert main(["convert", str(there), "--to", "diffusers", "--out", str(tmp_path / "back.safetensors")]) == 0
    assert distance(file, tmp_path / "back.safetensors", layers) == 0.0
    with safe_open(tmp_path / "back.safetensors", "pt") as content:
        assert content.metadata()["modelspec.title"] == "mine"


def test_nothing_is_replaced_unless_it_is_asked_for(file, tmp_path, capsys):
    before = file.read_bytes()
    assert run_command(main, ["convert", str(file), "--to", "diffusers"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert main(["convert", str(file), "--dtype", "fp16", "--force"]) == 0
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}


@pytest.mark.parametrize("verb", ["convert", "resize --rank 1", "merge"])
def test_a_file_of_ours_that_holds_no_weights_is_not_replaced_by_them(file, tmp_path, capsys, verb):
    config = tmp_path / "config.yaml"
    write_file(config, "of a run")
    verb, *options = verb.split()
    assert run_command(main, [verb, str(file), *options, "--out", str(config), "--force"]) == 2
    assert "a name ending in that" in capsys.readouterr().err
    assert config.read_text() == "of a run"


def test_a_part_of_it_at_another_strength(file, layers, tmp_path):
    out = tmp_path / "half.safetensors"
    assert main(["convert", str(file), "--scale", "0.5", "--without", "^text_encoder", "--out", str(out)]) == 0
    whole, half = read(file, layers.names), read(out, layers.names)
    assert {component for component, _ in half.modules} == {"unet"}
    assert all(torch.equal(2 * weights.delta(), whole.modules[key].delta()) for key, weights in half.modules.items())


def test_dora_is_baked_beside_its_base(layers, tmp_path, capsys):
    dora = tmp_path / "dora.safetensors"
    write(lora(layers, dora=True), dora, "loraloom", layers.names)
    arguments = ["convert", str(dora), "--to", "diffusers", "--bake-dora", "--rank", "16"]
    assert run_command(main, [*arguments, "--out", str(tmp_path / "a.safetensors")]) == 2
    assert "needs the base" in capsys.readouterr().err
    assert main([*arguments, "--base", layers.title, "--out", str(tmp_path / "a.safetensors")]) == 0
    assert "of the norm of the change is lost on average" in capsys.readouterr().out
    assert {weights.kind for weights in read(tmp_path / "a.safetensors", layers.names).modules.values()} == {"lora"}


# ------------------------------------------------------------------------------- resize, merge, extract, diff


def test_resize_keeps_what_is_asked_for(file, layers, tmp_path, capsys):
    for name, arguments in {"same": ["--rank", "4"], "one": ["--rank", "1"], "most": ["--norm", "0.8"]}.items():
        assert main(["resize", str(file), *arguments, "--out", str(tmp_path / f"{name}.safetensors")]) == 0
    assert distance(file, tmp_path / "same.safetensors", layers) <= 1e-6
    ranks = [weights.rank for weights in read(tmp_path / "one.safetensors", layers.names).modules.values()]
    assert set(ranks) == {1}
    assert "is lost on average" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["resize", str(file), "--rank", "0"])


def test_merged_into_the_base_and_extracted_it_comes_back(file, layers, tmp_path):
    merged, out = tmp_path / "merged", tmp_path / "back.safetensors"
    assert main(["merge", f"{file}:0.5", "--base", layers.title, "--into-base", "--out", str(merged)]) == 0
    assert main(["extract", str(merged), layers.title, "--rank", "4", "--out", str(out)]) == 0
    before, after = read(file, layers.names), read(out, layers.names)
    assert before.modules.keys() == after.modules.keys()
    for key, weights in before.modules.items():
        error = (after.modules[key].delta() - 0.5 * weights.delta()).norm()
        assert error <= 1e-5 * layers.weight(key).norm()


def test_a_merged_folder_is_what_diffusers_makes_of_adapter_and_base(file, layers, tmp_path):
    from diffusers import StableDiffusionPipeline

    assert main(["merge", str(file), "--base", layers.title, "--into-base", "--out", str(tmp_path / "merged")]) == 0
    fused = StableDiffusionPipeline.from_pretrained(layers.title)
    fused.load_lora_weights(str(file))
    fused.fuse_lora()
    fused.unload_lora_weights()
    merged = StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    for part in ("unet", "text_encoder"):
        wanted = getattr(fused, part).state_dict()
        for name, tensor in getattr(merged, part).state_dict().items():
            torch.testing.assert_close(tensor, wanted[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("how", ["concat", "svd", "ties", "dare"])
def test_several_become_one(file, layers, tmp_path, how):
    other, out = tmp_path / "other.safetensors", tmp_path / "out.safetensors"
    write(lora(layers, seed=99), other, "kohya", layers.names)
    assert main(["merge", f"{file}:0.5", f"{other}:-1", "--how", how, "--rank", "8", "--out", str(out)]) == 0
    one, two, mixed = (read(each, layers.names) for each in (file, other, out))
    cosines = []
    for key, weights in mixed.modules.items():
        wanted = 0.5 * one.modules[key].delta() - two.modules[key].delta()
        cosines.append(torch.cosine_similarity(weights.delta().flatten(), wanted.flatten(), 0).item())
        if how in ("concat", "svd"):
            torch.testing.assert_close(weights.delta(), wanted, atol=1e-5, rtol=1e-4)
    assert np.mean(cosines) > 0.5


def test_diff_says_how_far_two_are_apart(file, layers, tmp_path, capsys):
    half = tmp_path / "half.peft"
    write(read(file, layers.names), half, "peft", layers.names)
    assert main(["diff", str(file), str(half), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["blocks"]
    assert rows[-1]["component"] == "all"
    assert all(row["apart"] == 0.0 and row["cosine"] == pytest.approx(1.0) for row in rows)
    other = tmp_path / "other.safetensors"
    write(lora(layers, seed=99), other, "kohya", layers.names)
    assert main(["diff", str(file), str(other)]) == 0
    out = capsys.readouterr().out
    assert "cosine" in out and "all" in out
    for line in out.splitlines()[1:-1]:
        assert abs(float(line.split()[-1])) < 0.3, line


def test_checkpoints_of_other_layers_are_refused(layers, base_of, capsys):
    assert run_command(main, ["extract", layers.title, "pocket", "--rank", "4", "--out", "x.safetensors"]) == 2
    assert "one was not trained from the other" in capsys.readouterr().err


# ------------------------------------------------------------------------------- verify


def test_verify_shows_errors_and_effect(file, layers, capsys):
    assert main(["verify", str(file), "--base", layers.title]) == 0
    out = capsys.readouterr().out
    assert "largest error of a change      0.0e+00" in out
    assert "effect on a prediction" in out and "changes nothing" not in out


def test_verify_says_ok_of_a_sound_file_whose_change_is_large(layers, tmp_path, capsys):
    """Rounding grows with what is rounded; a change that is wrong is seen module by module."""
    for number, scale in enumerate((0.5, 5.0, 200.0)):
        file = tmp_path / f"{number}.safetensors"
        write(lora(layers, scale=scale), file, "loraloom", layers.names)
        assert run_command(main, ["verify", str(file), "--base", layers.title]) == 0, capsys.readouterr()
        assert capsys.readouterr().out.splitlines()[-1] == "ok"


def test_extract_says_what_no_lora_can_hold(layers, tmp_path, capsys):
    """Biases, norms and embeddings, and what is not of the denoiser or a text encoder."""
    tuned, out = tmp_path / "tuned", tmp_path / "x.safetensors"
    shutil.copytree(layers.title, tuned)
    changed = {"unet": ["conv_out.bias", "conv_norm_out.weight", "conv_in.weight"], "vae": ["encoder.conv_in.weight"]}
    for part, names in changed.items():
        (file,) = (tuned / part).glob("*.safetensors")
        tensors = load_file(file)
        save_file(tensors | {name: tensors[name] + 0.5 for name in names}, file, metadata={"format": "pt"})
    assert main(["extract", str(tuned), layers.title, "--rank", "4", "--out", str(out)]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not in the adapter")]
    assert ["2 tensors of unet" in said[0], "1 tensor of vae" in said[1], len(said)] == [True, True, 2]
    assert all("by up to 0.5" in line for line in said)
    assert {path for _, path in read(out, layers.names).modules} == {"conv_in"}


def test_words_are_left_out_by_their_name(layers, tmp_path):
    """So that a format without words can hold the rest."""
    word = {"text_encoder": {"<sks>": torch.ones(1, 32)}}
    write(replace(lora(layers), embeddings=word), tmp_path / "a.safetensors", "loraloom", layers.names)
    arguments = ["convert", str(tmp_path / "a.safetensors"), "--base", layers.title, "--to", "kohya"]
    assert run_command(main, [*arguments, "--out", str(tmp_path / "b.safetensors")]) == 2
    assert main([*arguments, "--without", "^words", "--out", str(tmp_path / "b.safetensors")]) == 0
    assert len(read(tmp_path / "b.safetensors", layers.names).modules) == len(lora(layers).modules)


def test_dora_for_kohya_is_said_to_be_for_few_readers(layers, tmp_path, capsys):
    write(lora(layers, dora=True), tmp_path / "a.safetensors", "loraloom", layers.names)
    out = tmp_path / "b.safetensors"
    assert (
        main(["convert", str(tmp_path / "a.safetensors"), "--base", layers.title, "--to", "kohya", "--out", str(out)])
        == 0
    )
    assert "compute DoRA otherwise: `loraloom adapter convert FILE --base BASE --bake-dora" in capsys.readouterr().out


def test_help_of_every_verb_has_examples(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    for verb in ("convert", "diff", "extract", "inspect", "merge", "resize", "verify"):
        assert f"\n  {verb} " in listed
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        assert f"loraloom adapter {verb} " in capsys.readouterr().out.partition("examples:")[2]
    assert run_command(main, ["inspct"]) == 2


# ------------------------------------------------------------------------------- what cannot be, and what is told


@pytest.mark.parametrize(
    ("weight", "dtype", "words"),
    [("1e8", "fp16", "weight has numbers that float16 cannot hold"), ("1e39", "fp32", "too large for float32")],
)
def test_a_merged_weight_that_its_type_cannot_hold_is_named(weight, dtype, words, file, layers, tmp_path, capsys):
    """In files and in memory; Inf was written without a word."""
    out, twice = tmp_path / "merged", f"{file}:{float(weight) / 10:g}"
    arguments = ["merge", *[twice] * (1 if dtype == "fp16" else 9), "--base", layers.title, "--into-base"]
    assert run_command(main, [*arguments, "--dtype", dtype, "--out", str(out)]) == 2
    assert re.search(words, capsys.readouterr().err)
    assert not out.exists()
    if dtype == "fp32":
        with pytest.raises(UserError, match=f"weight: .*{words}"):
            Engine.load(layers.title, dtype="fp32", device="cpu", merged=[twice] * 9)


@pytest.mark.parametrize("form", ["embedding", "loraloom", "any name"])
def test_words_of_another_width_are_refused_where_they_are_read(form, layers, tmp_path, capsys):
    file = tmp_path / "cat.safetensors"
    if form == "any name":
        save_file({"<cat>": torch.ones(1, 48)}, file)
    else:
        write(AdapterArtifact({}, embeddings={"text_encoder": {"<cat>": torch.ones(1, 48)}}), file, form, layers.names)
    for verb in (["inspect"], ["convert", "--to", "loraloom", "--out", str(tmp_path / "out.safetensors")]):
        assert run_command(main, [*verb, str(file), "--base", layers.title]) == 2
        said = capsys.readouterr()
        assert "the word '<cat>' has vectors of 48 numbers, this text_encoder has 32" in said.out + said.err


def test_a_word_without_a_name_is_shown_as_its_file(layers, tmp_path, capsys):
    save_file({"emb_params": torch.ones(2, 32)}, tmp_path / "my-cat.embedding.safetensors")
    assert main(["inspect", str(tmp_path / "my-cat.embedding.safetensors"), "--base", layers.title]) == 0
    assert "words         my-cat: 2\n" in capsys.readouterr().out


TOLD = {
    "header": ({"base": "pocket"}, 0, "ok"),
    "merged before": ({"base": "pocket", "adapters": ["sha256:0123456789abcdef:1"]}, 2, "does not tell its base"),
    "hidden": ({"base": "sha256:0123456789abcdef"}, 2, "does not tell its base; --base is needed"),
    "nothing": ({}, 2, "does not tell its base; --base is needed"),
    "of another type": ({"base": ["pocket"]}, 2, "does not tell its base; --base is needed"),
    "not here": ({"base": "owner/name", "revision": "0" * 40}, 2, "owner/name, which is not on this machine"),
}


@pytest.mark.parametrize("what", TOLD)
def test_verify_takes_the_base_that_the_file_tells(what, tmp_path, capsys):
    model, code, words = TOLD[what]
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{key}.lora_A.weight": torch.ones(1, 160), f"{key}.lora_B.weight": torch.ones(160, 1)}
    save_file(tensors, tmp_path / "a.safetensors", {"loraloom.config": json.dumps({"model": model})})
    assert run_command(main, ["verify", str(tmp_path / "a.safetensors")]) == code
    said = capsys.readouterr()
    assert words in said.out + said.err


WORDS_ALONE = {
    "resize": (["resize", "a", "--rank", "2"], "holds words alone"),
    "scale": (["convert", "a", "--to", "loraloom", "--scale", "0.5"], "holds words alone"),
    "weight": (["merge", "a:0.5", "--to", "loraloom"], "the word 'a' has no weight: leave out 0.5"),
    "two meanings": (["merge", "a", "b", "--to", "loraloom"], "the word 'a' is in two of the adapters"),
    "into a base": (["merge", "a", "--into-base"], "the new words a cannot be merged"),
    "too large": (["convert", "c", "--to", "embedding", "--dtype", "fp16"], "too large for torch.float16 in the word"),
}


@pytest.mark.parametrize("what", WORDS_ALONE)
def test_what_words_cannot_do_is_said_and_nothing_is_written(what, layers, tmp_path, capsys):
    save_file({"emb_params": torch.ones(2, 32)}, tmp_path / "a.safetensors")
    save_file({"a": torch.zeros(2, 32)}, tmp_path / "b.safetensors")
    save_file({"emb_params": torch.full((1, 32), 1e30)}, tmp_path / "c.safetensors")
    arguments, words = WORDS_ALONE[what]
    files = re.compile("[abc](:0.5)?")
    given = [re.sub("^.", rf"{tmp_path}/\g<0>.safetensors", x) if files.fullmatch(x) else x for x in arguments]
    out = tmp_path / ("out" if what == "into a base" else "out.safetensors")
    assert run_command(main, [*given, "--base", layers.title, "--out", str(out)]) == 2
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_words_keep_their_names_and_are_compared(layers, tmp_path, capsys):
    one, other = tmp_path / "cat.safetensors", tmp_path / "other.safetensors"
    save_file({"emb_params": torch.ones(2, 32)}, one)
    assert main(["convert", str(one), "--to", "loraloom", "--base", layers.title, "--out", str(other)]) == 0
    assert [*read(other, layers.names).embeddings["text_encoder"]] == ["cat"]
    save_file(
        {
            "cat": torch.zeros(2, 32),
        },
        other,
    )
    assert main(["diff", str(one), str(other), "--base", layers.title]) == 0
    assert "the word 'cat' of text_encoder differs by 8, and has the norm 8" in capsys.readouterr().out
