"""Our files read with nothing of ours: by matrix products, with names mapped by hand, and by the rules of other tools.

And files that hold something else than what was trained, made with plain safetensors: verification says so.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraloom.adapters import format
from loraloom.adapters.artifact import AdapterArtifact, Key, Weights, base_modules
from loraloom.adapters.format import FormatNames
from loraloom.configs.errors import AfterTrainingError
from loraloom.configs.schema import ModelSection
from loraloom.inference.adapter_file import format_names, names_of
from loraloom.inference.engine import Engine
from loraloom.inference.verify import Fresh, probe, verify_file
from loraloom.inference.weighted_file import AdapterFile

if TYPE_CHECKING:
    from conftest import Trained

Tensors = dict[str, Tensor]

ATTENTION = "down_blocks.0.attentions.0"
SD1 = {
    ("unet", f"{ATTENTION}.transformer_blocks.0.attn1.to_q"): (
        "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    ),
    ("unet", f"{ATTENTION}.transformer_blocks.0.ff.net.0.proj"): (
        "down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj"
    ),
    ("unet", f"{ATTENTION}.proj_in"): "down_blocks_0_attentions_0_proj_in",
    ("unet", "mid_block.resnets.1.conv1"): "mid_block_resnets_1_conv1",
    ("unet", "down_blocks.0.downsamplers.0.conv"): "down_blocks_0_downsamplers_0_conv",
    ("text_encoder", "text_model.encoder.layers.1.self_attn.v_proj"): "text_model_encoder_layers_1_self_attn_v_proj",
    ("text_encoder", "text_model.encoder.layers.0.mlp.fc1"): "text_model_encoder_layers_0_mlp_fc1",
}
"""A module -> what kohya's files for Stable Diffusion 1.x call it, behind `lora_unet_` or `lora_te_`."""
SDXL = {
    ("unet", "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"): (
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k"
    ),
    ("unet", "down_blocks.2.attentions.1.proj_out"): "lora_unet_input_blocks_8_1_proj_out",
    ("unet", "down_blocks.1.downsamplers.0.conv"): "lora_unet_input_blocks_6_0_op",
    ("unet", "mid_block.attentions.0.transformer_blocks.9.attn1.to_out.0"): (
        "lora_unet_middle_block_1_transformer_blocks_9_attn1_to_out_0"
    ),
    ("unet", "mid_block.resnets.1.conv2"): "lora_unet_middle_block_2_out_layers_3",
    ("unet", "up_blocks.0.upsamplers.0.conv"): "lora_unet_output_blocks_2_2_conv",
    ("unet", "up_blocks.1.attentions.2.proj_in"): "lora_unet_output_blocks_5_1_proj_in",
    ("unet", "up_blocks.2.resnets.0.conv_shortcut"): "lora_unet_output_blocks_6_0_skip_connection",
    ("unet", "up_blocks.2.resnets.2.time_emb_proj"): "lora_unet_output_blocks_8_0_emb_layers_1",
    ("text_encoder", "text_model.encoder.layers.11.mlp.fc2"): "lora_te1_text_model_encoder_layers_11_mlp_fc2",
    ("text_encoder_2", "text_model.encoder.layers.31.self_attn.out_proj"): (
        "lora_te2_text_model_encoder_layers_31_self_attn_out_proj"
    ),
}


def product(up: Tensor, down: Tensor) -> Tensor:
    """(out, in * k * k)."""
    return up.double().flatten(1) @ down.double().flatten(1)


def as_diffusers(tensors: Tensors, key: Key) -> Tensor:
    """No alpha: the scale is 1."""
    start = ".".join(key)
    return product(tensors[f"{start}.lora_B.weight"], tensors[f"{start}.lora_A.weight"])


def as_sd_scripts(tensors: Tensors, name: str) -> Tensor:
    """networks/lora.py: a missing alpha is the rank, and the scale is alpha / rank of this module."""
    down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
    alpha = tensors.get(f"{name}.alpha", torch.tensor(float(len(down))))
    return alpha.double() / len(down) * product(up, down)


COMFYUI = (
    (".lora_up.weight", ".lora_down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    (".lora_B", ".lora_A"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
)


def as_comfyui(tensors: Tensors, name: str) -> Tensor:
    """comfy/weight_adapter/lora.py: the first spelling that is there; without an alpha the scale is 1."""
    up, down = next((tensors[name + up], tensors[name + down]) for up, down in COMFYUI if name + up in tensors)
    scale = float(tensors[f"{name}.alpha"]) / len(down) if f"{name}.alpha" in tensors else 1.0
    return scale * product(up, down)


def assert_is(found: Tensor, weights: Weights) -> None:
    wanted = weights.scale * product(weights.tensors["up"], weights.tensors["down"])
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def written(artifact: AdapterArtifact, name: str, names: FormatNames, folder: Path) -> Tensors:
    format.write(artifact, folder / name, name, names)
    return load_file(folder / name)


# ---- what we write


def test_diffusers_file(trained: "Trained", names: FormatNames, tmp_path: Path):
    tensors = written(trained.artifact, "diffusers", names, tmp_path)
    for key in SD1:
        assert_is(as_diffusers(tensors, key), trained.artifact.modules[key])
        assert_is(as_comfyui(tensors, ".".join(key)), trained.artifact.modules[key])
    assert len(tensors) == 2 * len(trained.artifact.modules)


def test_kohya_file(trained: "Trained", names: FormatNames, tmp_path: Path):
    tensors = written(trained.artifact, "kohya", names, tmp_path)
    for (part, path), end in SD1.items():
        name = f"{'lora_unet' if part == 'unet' else 'lora_te'}_{end}"
        for read in (as_sd_scripts, as_comfyui):
            assert_is(read(tensors, name), trained.artifact.modules[part, path])
    assert len(tensors) == 3 * len(trained.artifact.modules)
    assert all(name.startswith(("lora_unet_", "lora_te_")) for name in tensors)


def test_a_reader_that_ignores_alpha_is_right_too(mixed: "Trained", names: FormatNames, tmp_path: Path):
    tensors = written(mixed.artifact, "kohya", names, tmp_path)
    without = {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}
    for (part, path), end in SD1.items():
        name = f"{'lora_unet' if part == 'unet' else 'lora_te'}_{end}"
        assert_is(as_comfyui(without, name), mixed.artifact.modules[part, path])


def test_kohya_file_for_sdxl(random_weights: Callable[..., Weights], tmp_path: Path):
    generator, names = torch.Generator().manual_seed(0), names_of("sdxl")
    modules = {key: random_weights("lora", (6, 4), 1 + n % 3, 0.7, generator) for n, key in enumerate(SDXL)}
    tensors = written(AdapterArtifact(modules), "kohya", names, tmp_path)
    assert {name.partition(".")[0] for name in tensors} == {*SDXL.values()}
    for key, name in SDXL.items():
        assert_is(as_sd_scripts(tensors, name), modules[key])


# ---- what we read


@pytest.mark.parametrize(("up", "down"), COMFYUI)
@pytest.mark.parametrize("alpha", [None, 1.0, 6.0])
def test_what_comfyui_accepts(up: str, down: str, alpha: float | None, names: FormatNames, tmp_path: Path):
    key = ("unet", f"{ATTENTION}.transformer_blocks.0.attn1.to_q")
    path = f"unet.{key[1]}".replace("to_q", "processor.to_q") if up.startswith("_") else f"unet.{key[1]}"
    tensors = {path + up: torch.randn(32, 3), path + down: torch.randn(3, 32)}
    if alpha is not None:
        tensors[f"{path}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "x")
    assert_is(as_comfyui(tensors, path), format.read(tmp_path / "x", names).modules[key])


# ---- what verification catches

TO = f"{ATTENTION}.transformer_blocks.0.attn1.to"
SQUARE = [("unet", f"{TO}_{name}") for name in "qkv"]
PLACES = [*SQUARE, ("unet", "mid_block.resnets.1.conv1"), ("unet", "down_blocks.0.downsamplers.0.conv")]
PLACES += [("text_encoder", "text_model.encoder.layers.1.self_attn.v_proj")]


def names_in(tensors: Tensors, part: str) -> list[str]:
    return [name for name in tensors if name.endswith(part)]


def scaled(tensors: Tensors, number: int, factor: float = 1.001) -> Tensors:
    name = names_in(tensors, "lora_up.weight")[number]
    return tensors | {name: factor * tensors[name]}


def with_other_alpha(tensors: Tensors, number: int) -> Tensors:
    name = names_in(tensors, ".alpha")[number]
    return tensors | {name: 2 * tensors[name]}


def swapped(tensors: Tensors, one: int, other: int, part: str) -> Tensors:
    first, second = names_in(tensors, part)[one], names_in(tensors, part)[other]
    return tensors | {first: tensors[second], second: tensors[first]}


def transposed(tensors: Tensors) -> Tensors:
    """Of a square weight: (B A)^T = A^T B^T has the same shape."""
    down, up = (names_in(tensors, part)[0] for part in ("lora_down.weight", "lora_up.weight"))
    return tensors | {down: tensors[up].T.contiguous(), up: tensors[down].T.contiguous()}


def dropped(tensors: Tensors, number: int) -> Tensors:
    start = names_in(tensors, ".alpha")[number].removesuffix("alpha")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(start)}


WRONG: dict[str, Callable[[Tensors], Tensors]] = {
    "a larger module": lambda tensors: scaled(tensors, 0),
    "a larger convolution": lambda tensors: scaled(tensors, 3),
    "another sign": lambda tensors: scaled(tensors, 1, -1.0),
    "twice the alpha": lambda tensors: with_other_alpha(tensors, 2),
    "two up": lambda tensors: swapped(tensors, 0, 1, "lora_up.weight"),
    "two down": lambda tensors: swapped(tensors, 1, 2, "lora_down.weight"),
    "transposed": transposed,
    "without a module": lambda tensors: dropped(tensors, 1),
    "without the text encoder": lambda tensors: dropped(tensors, 5),
}


@pytest.fixture(scope="module")
def verified(tiny_base: Path, random_weights: Callable[..., Weights], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An artifact, its file, and what the base says with it."""
    engine = Engine.load(str(tiny_base))
    shapes = {part: base_modules(part, engine.parts[part]) for part in ("unet", "text_encoder")}
    generator = torch.Generator().manual_seed(0)
    modules = {k: random_weights("lora", shapes[k[0]][k[1]], 4, 0.1, generator) for k in PLACES}
    artifact, file = AdapterArtifact(modules), tmp_path_factory.mktemp("verified") / "x.safetensors"
    format.write(artifact, file, "kohya", format_names(engine.family, engine.parts))
    engine.attach([AdapterFile(file)])
    return file, artifact, ModelSection(base=str(tiny_base)), probe(engine.family, engine.parts)


def test_the_file_itself_verifies(verified: Any, tmp_path: Path):
    file, artifact, model, prediction = verified
    assert verify_file(file, artifact, Fresh.load(model), prediction).modules == len(PLACES)
    save_file(load_file(file), tmp_path / "x")  # and so does one without a header
    verify_file(tmp_path / "x", artifact, Fresh.load(model), prediction)


@pytest.mark.slow
@pytest.mark.parametrize("what", WRONG)
def test_another_adapter_does_not_verify(what: str, verified: Any, tmp_path: Path):
    file, artifact, model, prediction = verified
    tensors = load_file(file)
    starts = {"unet": "lora_unet", "text_encoder": "lora_te"}
    order = {f"{starts[part]}_{path.replace('.', '_')}": number for number, (part, path) in enumerate(PLACES)}
    tensors = dict(sorted(tensors.items(), key=lambda item: order[item[0].partition(".")[0]]))
    save_file(WRONG[what](tensors), tmp_path / "x")
    with pytest.raises(AfterTrainingError, match="does not verify"):
        verify_file(tmp_path / "x", artifact, Fresh.load(model), prediction)
