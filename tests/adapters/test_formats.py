"""What is written is read back, here and by diffusers; and no bad adapter replaces a good file."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor

from loraloom.adapters import format
from loraloom.adapters.artifact import AdapterArtifact, Weights, largest_difference
from loraloom.adapters.format import FormatNames
from loraloom.configs.errors import UserError

if TYPE_CHECKING:
    from conftest import Trained

FORMATS = ("diffusers", "kohya")
every_format = pytest.mark.parametrize("format_name", FORMATS)


def lora(down: torch.Tensor, up: torch.Tensor, scale: float) -> Weights:
    return Weights("lora", {"down": down, "up": up}, scale)


def header_in(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as content:
        return content.metadata()


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    return {name: (a[name] - b[name]).abs().max().item() for name in a}


# ---- there and back


@every_format
def test_written_and_read_again(trained: "Trained", format_name: str, names: FormatNames, tmp_path: Path):
    file = tmp_path / format.file_name("x", format_name)
    format.write(trained.artifact, file, format_name, names, "fp32")
    value, key = largest_difference(trained.artifact, format.read(file, names))
    powers_of_two = all(weights.scale in (1.0, 2.0) for weights in trained.artifact.modules.values())
    assert value <= (0.0 if powers_of_two else 1e-6), key


@every_format
def test_diffusers_reads_the_file(
    trained: "Trained",
    format_name: str,
    names: FormatNames,
    diffusers_outputs: Callable[[Path], dict[str, Tensor]],
    base_outputs: dict[str, Tensor],
    tmp_path: Path,
):
    file = tmp_path / "x.safetensors"
    format.write(trained.artifact, file, format_name, names)
    loaded = diffusers_outputs(file)
    assert max(distance(loaded, trained.outputs).values()) < 1e-5
    assert min(distance(loaded, base_outputs).values()) > 1e-2


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranks=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    alphas=st.lists(st.floats(0.01, 100.0), min_size=4, max_size=4),
    dtype=st.sampled_from(list(format.DTYPES)),
    format_name=st.sampled_from(FORMATS),
    seed=st.integers(0, 1000),
)
def test_reading_undoes_writing(
    ranks: list[int], alphas: list[float], dtype: str, format_name: str, seed: int, tmp_path: Path
):
    kernels = {("unet", "a.b_c"): (), ("unet", "a_b.d"): (1, 1), ("unet", "conv.0"): (3, 3)}
    kernels["text_encoder", "text_model.encoder.layers.0.mlp.fc1"] = ()
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for (key, kernel), rank, alpha in zip(kernels.items(), ranks, alphas, strict=True):
        down = torch.randn(rank, 5, *kernel, generator=generator)
        up = torch.randn(6, rank, *(1 for _ in kernel), generator=generator)
        modules[key] = lora(down, up, alpha / rank)
    artifact = AdapterArtifact(modules, metadata={"modelspec.title": "tïtle", "ss_output_name": "x"})
    paths = {part: [path for component, path in modules if component == part] for part in ("unet", "text_encoder")}
    names = FormatNames(paths, {"unet": "lora_unet", "text_encoder": "lora_te"}, "stable-diffusion-v1", "sd_v1")

    format.write(artifact, tmp_path / "x.safetensors", format_name, names, dtype)
    again = format.read(tmp_path / "x.safetensors", names)

    assert (again.method, again.metadata) == (artifact.method, artifact.metadata)
    for part in ("unet", "text_encoder"):  # diffusers before 0.40 takes the first one's for all
        assert len({weights.rank for (own, _), weights in again.modules.items() if own == part}) == 1
    relative = {"fp32": 1e-6, "bf16": 2**-7, "fp16": 2**-10}[dtype]  # two roundings of half a unit in the last place
    for key, weights in modules.items():
        absolute = (
            weights.scale
            * (weights.tensors["up"].abs().flatten(1) @ weights.tensors["down"].abs().flatten(1)).max().item()
        )
        difference = (again.modules[key].delta() - weights.delta()).abs().max().item()
        assert difference <= 1.1 * relative * absolute + 1e-6, (key, difference)


# ---- names, headers, bytes


def test_diffusers_keys_are_raw_peft_names(artifact: AdapterArtifact, names: FormatNames, tmp_path: Path):
    format.write(artifact, tmp_path / "x.safetensors", "diffusers", names)
    tensors = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in tensors)
    assert "text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_A.weight" in tensors
    assert tensors["unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"].shape == (4, 32, 1, 1)
    header = header_in(tmp_path / "x.safetensors")
    assert header == {
        "format": "pt",
        "loraloom.method": "lora",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "mine",
    }


def test_kohya_has_one_rank_and_alpha(mixed: "Trained", names: FormatNames, tmp_path: Path):
    format.write(mixed.artifact, tmp_path / "x.safetensors", "kohya", names)
    tensors = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert {tensor.shape[0] for key, tensor in tensors.items() if key.endswith("lora_down.weight")} == {8}
    alphas = [tensor for key, tensor in tensors.items() if key.endswith(".alpha")]
    assert len(alphas) == len(mixed.artifact.modules)
    assert all(alpha.dtype == torch.float32 and alpha.shape == () and alpha == 8 for alpha in alphas)
    to_q = tensors["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight"]
    assert to_q[:2].abs().min() > 0 and to_q[2:].abs().max() == 0
    assert "lora_te_text_model_encoder_layers_1_self_attn_q_proj.lora_up.weight" in tensors


def test_kohya_header(artifact: AdapterArtifact, names: FormatNames, tmp_path: Path):
    format.write(artifact, tmp_path / "x.safetensors", "kohya", names)
    header = header_in(tmp_path / "x.safetensors")
    training = {name: value for name, value in header.items() if name.startswith("ss_")}
    assert training == {
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "4.0",
        "ss_network_args": '{"conv_dim": "4", "conv_alpha": "4.0"}',
    }
    assert header["modelspec.architecture"] == "stable-diffusion-v1/lora"


def test_kohya_hashes_are_those_of_the_library_file(names: FormatNames, tmp_path: Path):
    """As sd-scripts computes them: from a second file that has only the `ss_` entries."""
    key = ("unet", "down_blocks.0.resnets.0.conv1")
    large = lora(torch.randn(1, 300_000), torch.randn(2, 1), 1.0)  # beyond the first MiB
    format.write(AdapterArtifact({key: large}), tmp_path / "x.safetensors", "kohya", names)
    header = header_in(tmp_path / "x.safetensors")
    training = {name: value for name, value in header.items() if name.startswith("ss_")}
    content = safetensors.torch.save(safetensors.torch.load_file(tmp_path / "x.safetensors"), training)
    assert len(content) > 0x110000
    payload = content[8 + int.from_bytes(content[:8], "little") :]
    assert header["sshs_model_hash"] == hashlib.sha256(payload).hexdigest()
    assert header["sshs_legacy_hash"] == hashlib.sha256(content[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]


@every_format
def test_the_same_adapter_gives_the_same_bytes(
    artifact: AdapterArtifact, format_name: str, names: FormatNames, tmp_path: Path
):
    for name in ("a", "b"):
        format.write(artifact, tmp_path / name, format_name, names, "bf16")
    format.write(format.read(tmp_path / "a", names), tmp_path / "c", format_name, names, "bf16")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_nothing_stale_goes_from_one_format_into_the_other(
    artifact: AdapterArtifact, names: FormatNames, tmp_path: Path
):
    format.write(artifact, tmp_path / "direct", "diffusers", names)
    format.write(artifact, tmp_path / "kohya", "kohya", names)
    format.write(format.read(tmp_path / "kohya", names), tmp_path / "detour", "diffusers", names)
    assert (tmp_path / "direct").read_bytes() == (tmp_path / "detour").read_bytes()


@every_format
def test_stale_header_entries_are_not_written(
    artifact: AdapterArtifact, format_name: str, names: FormatNames, tmp_path: Path
):
    """Alpha is in the weights already: a reader that found it in the header as well would apply it twice."""
    metadata = {"lora_adapter_metadata": '{"unet.lora_alpha": 8}', "sshs_model_hash": "0", "ss_output_name": "mine"}
    format.write(replace(artifact, metadata=metadata), tmp_path / "x", format_name, names)
    header = header_in(tmp_path / "x")
    assert "lora_adapter_metadata" not in header and header.get("sshs_model_hash") != "0"
    assert header["ss_output_name"] == "mine"


def test_a_file_is_replaced_and_never_written_into(artifact: AdapterArtifact, names: FormatNames, tmp_path: Path):
    good = written(artifact, tmp_path / "x", names)
    os.link(tmp_path / "x", tmp_path / "the same file")
    format.write(artifact, tmp_path / "x", "kohya", names)
    assert (tmp_path / "the same file").read_bytes() == good != (tmp_path / "x").read_bytes()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_permissions_follow_the_umask(
    artifact: AdapterArtifact, names: FormatNames, tmp_path: Path, umask: int, mode: int
):
    before = os.umask(umask)
    try:
        format.write(artifact, tmp_path / "x.safetensors", "diffusers", names)
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == mode


def test_file_names():
    assert [format.file_name("sks", name) for name in FORMATS] == ["sks.safetensors", "sks.kohya.safetensors"]


# ---- files of other tools


@pytest.mark.parametrize(("fixture", "alpha", "rslora"), [("double", 8, False), ("stabilised", 6, True)])
def test_a_file_saved_by_diffusers(
    fixture: str, alpha: int, rslora: bool, names: FormatNames, tmp_path: Path, request: pytest.FixtureRequest
):
    """Its own writer renames the attention layers only, leaves `text_model.` out, and has alpha in the header."""
    trained: Trained = request.getfixturevalue(fixture)
    config = {"r": 4, "lora_alpha": alpha, "use_rslora": rslora, "rank_pattern": {}}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=diffusers_layers(trained.models["unet"]),
        text_encoder_lora_layers=diffusers_layers(trained.models["text_encoder"]),
        unet_lora_adapter_metadata=config,
        text_encoder_lora_adapter_metadata=config,
    )
    file = tmp_path / "pytorch_lora_weights.safetensors"
    keys = list(safetensors.torch.load_file(file))
    for ending in ("to_q.lora.down.weight", "q_proj.lora_linear_layer.up.weight", "conv1.lora_A.weight"):
        assert any(key.endswith(ending) for key in keys)
    assert largest_difference(trained.artifact, format.read(file, names))[0] == 0.0
    assert "lora_adapter_metadata" not in format.read(file, names).metadata


def diffusers_layers(model: torch.nn.Module) -> dict[str, Tensor]:
    from diffusers.utils import convert_state_dict_to_diffusers

    return convert_state_dict_to_diffusers(get_peft_model_state_dict(model, adapter_name="mine"))


def save(tensors: dict[str, Tensor], file: Path, **header: str) -> Path:
    safetensors.torch.save_file(tensors, file, header or None)
    return file


UNET_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
PAIR = {f"unet.{UNET_Q}.lora_A.weight": torch.ones(2, 32), f"unet.{UNET_Q}.lora_B.weight": torch.ones(32, 2)}


def test_alphas_of_patterns_in_the_header_are_those_of_peft(mixed: "Trained", names: FormatNames, tmp_path: Path):
    """Names of modules as they are in the library today, and regular expressions, the first of which counts."""
    layers, configs = {}, {}
    for part, model in mixed.models.items():
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(model, adapter_name="mine")
        config = model.peft_config["mine"]
        configs[f"{part}_lora_adapter_metadata"] = {
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "alpha_pattern": config.alpha_pattern,
        }
    StableDiffusionPipeline.save_lora_weights(tmp_path, **layers, **configs)
    again = format.read(tmp_path / "pytorch_lora_weights.safetensors", names)
    assert largest_difference(mixed.artifact, again)[0] <= 1e-7


@pytest.mark.parametrize(("pattern", "scale"), [("to_q", 0.5), (r"attn1\.to_.", 0.5), ("o_q", 4.5), ("to_k", 4.5)])
def test_a_pattern_is_for_the_end_of_a_name(pattern: str, scale: float, names: FormatNames, tmp_path: Path):
    configs = {"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {pattern: 1, "attn1.to_q": 9}}
    file = save(PAIR, tmp_path / "x", lora_adapter_metadata=json.dumps(configs))
    assert [weights.scale for weights in format.read(file, names).modules.values()] == [scale]


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_broken_header_is_said(names: FormatNames, tmp_path: Path, text: str):
    with pytest.raises(UserError, match="in the header is no JSON"):
        format.read(save(PAIR, tmp_path / "x", lora_adapter_metadata=text), names)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (torch.tensor(1), 0.5), (torch.tensor([4.0]), 2.0)])
def test_kohya_alpha(alpha: Tensor | None, scale: float, names: FormatNames, tmp_path: Path):
    name = f"lora_unet_{UNET_Q.replace('.', '_')}"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 32), f"{name}.lora_up.weight": torch.ones(32, 2)}
    if alpha is not None:
        tensors[f"{name}.alpha"] = alpha
    artifact = format.read(save(tensors, tmp_path / "x"), names)
    assert {key: weights.scale for key, weights in artifact.modules.items()} == {("unet", UNET_Q): scale}


# ---- what is refused


def written(artifact: AdapterArtifact, file: Path, names: FormatNames) -> bytes:
    format.write(artifact, file, "diffusers", names)
    return file.read_bytes()


@every_format
def test_nan_leaves_the_good_file_alone(
    artifact: AdapterArtifact, format_name: str, names: FormatNames, tmp_path: Path
):
    good = written(artifact, tmp_path / "x", names)
    (_, path), weights = key_and_weights = next(iter(artifact.modules.items()))
    bad = AdapterArtifact({key_and_weights[0]: lora(weights.tensors["down"].clone(), weights.tensors["up"], 1.0)})
    bad.modules[key_and_weights[0]].tensors["down"][0, 0] = float("nan")  # after the checks of its construction
    with pytest.raises(UserError, match=f"NaN or Inf: unet {path}"):
        format.write(bad, tmp_path / "x", format_name, names)
    assert (tmp_path / "x").read_bytes() == good
    assert sorted(os.listdir(tmp_path)) == [".loraloom.jsonl", "x"]


@every_format
def test_overflow_in_half_precision_is_refused(format_name: str, names: FormatNames, tmp_path: Path):
    large = AdapterArtifact({("unet", UNET_Q): lora(torch.ones(1, 32), torch.full((32, 1), 40_000.0), 2.0)})
    with pytest.raises(UserError, match=rf"too large for torch\.float16 in unet {UNET_Q}"):
        format.write(large, tmp_path / "x", format_name, names, "fp16")
    assert not os.listdir(tmp_path)
    format.write(large, tmp_path / "x", format_name, names, "bf16")


def test_a_failing_disk_leaves_the_good_file_alone(
    artifact: AdapterArtifact, names: FormatNames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    good = written(artifact, tmp_path / "x", names)

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        format.write(artifact, tmp_path / "x", "kohya", names)
    assert (tmp_path / "x").read_bytes() == good
    assert sorted(os.listdir(tmp_path)) == [".loraloom.jsonl", "x"]


def test_writing_checks_its_arguments(artifact: AdapterArtifact, names: FormatNames, tmp_path: Path):
    with pytest.raises(UserError, match="unknown dtype 'fp8'; there are: fp32, bf16, fp16"):
        format.write(artifact, tmp_path / "x", "diffusers", names, "fp8")
    with pytest.raises(ValueError, match="'kohia' is unknown"):
        format.write(artifact, tmp_path / "x", "kohia", names)
    with pytest.raises(UserError, match="there is no folder"):
        format.write(artifact, tmp_path / "missing" / "x", "diffusers", names)
    stranger = AdapterArtifact({("unet", "nowhere"): lora(torch.ones(1, 2), torch.ones(2, 1), 1.0)})
    with pytest.raises(UserError, match="no such modules: unet nowhere"):
        format.write(stranger, tmp_path / "x", "diffusers", names)


def test_an_unknown_key_is_named_with_the_nearest(names: FormatNames, tmp_path: Path):
    odd = f"unet.{UNET_Q[:-1]}p.lora_A.weight"
    with pytest.raises(UserError) as caught:
        format.read(save({**PAIR, odd: torch.ones(2, 32)}, tmp_path / "x"), names)
    [problem] = caught.value.problems
    assert problem.startswith(f"{tmp_path / 'x'}: {odd} is of no module of this base (did you mean ")
    assert f'"unet.{UNET_Q[:-1]}' in problem


def test_an_adapter_of_another_base_is_refused_in_few_lines(names: FormatNames, tmp_path: Path):
    keys = [f"lora_unet_input_blocks_{n}_1_transformer_blocks_0_attn1_to_q.lora_down.weight" for n in range(9)]
    with pytest.raises(UserError) as caught:
        format.read(save({key: torch.ones(2, 32) for key in keys}, tmp_path / "x"), names)
    assert keys[0] in caught.value.problems[0]
    assert caught.value.problems[-1].endswith("6 more keys are unknown")


UNUSABLE = {
    "half a module": (dict([next(iter(PAIR.items()))]), "up is missing from unet down_blocks"),
    "no LoRA at all": ({"unet.conv_in.weight": torch.ones(1)}, "its first key is unet.conv_in.weight"),
    "nothing": ({}, "it is empty"),
    "NaN": ({key: tensor * float("nan") for key, tensor in PAIR.items()}, "1 of 1 modules hold NaN"),
    "shapes": ({**PAIR, f"unet.{UNET_Q}.lora_B.weight": torch.ones(32, 3)}, "down and up do not fit"),
    "twice": ({**PAIR, f"unet.{UNET_Q}.lora.down.weight": torch.ones(2, 32)}, "in the file twice"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_content_is_said(case: str, names: FormatNames, tmp_path: Path):
    tensors, words = UNUSABLE[case]
    with pytest.raises(UserError, match=words) as caught:
        format.read(save(tensors, tmp_path / "x"), names)
    assert str(caught.value).startswith(f"{tmp_path / 'x'}: ")


def test_unusable_files_are_said(artifact: AdapterArtifact, names: FormatNames, tmp_path: Path):
    with pytest.raises(UserError, match="there is no such file"):
        format.read(tmp_path / "x", names)
    (tmp_path / "x.bin").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match=r"not a whole safetensors file .* pickles"):
        format.read(tmp_path / "x.bin", names)
    (tmp_path / "torn").write_bytes(written(artifact, tmp_path / "good", names)[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        format.read(tmp_path / "torn", names)
