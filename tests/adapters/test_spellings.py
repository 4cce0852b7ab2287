"""Files as other tools write them: whatever the spelling, the same adapter comes out; other bases are said."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loraloom.adapters import format
from loraloom.adapters.artifact import AdapterArtifact, Weights, largest_difference
from loraloom.adapters.format import FormatNames
from loraloom.adapters.origin import TRANSFORMER, architecture_of
from loraloom.adapters.spellings import ENDINGS, OTHERS
from loraloom.configs.errors import UserError
from loraloom.inference.adapter_file import names_of

SDXL, SD1 = names_of("sdxl"), names_of("sd1")
TO_K = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
TO_OUT = "up_blocks.0.attentions.1.transformer_blocks.3.attn1.to_out.0"
Q = "text_model.encoder.layers.3.self_attn.q_proj"
CONV = "down_blocks.0.resnets.1.conv1"


def factors(seed: int, out: int, into: int, rank: int = 4, kernel: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ones = [1] * len(kernel)
    down = torch.randn(rank, into, *kernel, generator=generator)
    return down, torch.randn(out, rank, *ones, generator=generator)


def read(tensors: dict[str, Tensor], folder: Path, names: FormatNames = SDXL, **header: str) -> AdapterArtifact:
    save_file(tensors, folder / "x.safetensors", header or None)
    return format.read(folder / "x.safetensors", names)


SPELLED = {
    TO_K: [
        f"unet.{TO_K}.lora_A.weight unet.{TO_K}.lora_B.weight",
        f"unet.{TO_K}.lora.down.weight unet.{TO_K}.lora.up.weight",
        f"unet.{TO_K}.lora_A.default.weight unet.{TO_K}.lora_B.default.weight",
        f"unet.{TO_K}.lora_A unet.{TO_K}.lora_B",
        f"base_model.model.{TO_K}.lora_A.weight base_model.model.{TO_K}.lora_B.weight",
        *(
            f"{start}{TO_K[:-5]}.processor.to_k_lora.down.weight {start}{TO_K[:-5]}.processor.to_k_lora.up.weight"
            for start in ("", "unet.")
        ),
        *(
            f"{name}.lora_down.weight {name}.lora_up.weight"
            for name in (
                "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k",
                "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
                "lycoris_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k",
                "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k",
            )
        ),
    ],
    TO_OUT: [
        f"unet.{TO_OUT}.lora_A.weight unet.{TO_OUT}.lora_B.weight",
        f"unet.{TO_OUT[:-9]}.processor.to_out_lora.down.weight unet.{TO_OUT[:-9]}.processor.to_out_lora.up.weight",
        *(
            f"lora_unet_{name}.lora_down.weight lora_unet_{name}.lora_up.weight"
            for name in (
                "output_blocks_1_1_transformer_blocks_3_attn1_to_out_0",
                "up_blocks_0_attentions_1_transformer_blocks_3_attn1_to_out_0",
            )
        ),
    ],
    Q: [
        *(
            f"{name}.{first} {name}.{second}"
            for name in (f"text_encoder.{Q}", f"text_encoder.{Q.removeprefix('text_model.')}")
            for first, second in (
                ("lora_A.weight", "lora_B.weight"),
                ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
            )
        ),
        "text_encoder.text_model.encoder.layers.3.self_attn.to_q_lora.down.weight "
        "text_encoder.text_model.encoder.layers.3.self_attn.to_q_lora.up.weight",
        *(
            f"{start}_{layers}_3_self_attn_q_proj.lora_down.weight {start}_{layers}_3_self_attn_q_proj.lora_up.weight"
            for start in ("lora_te1", "lora_te")
            for layers in ("text_model_encoder_layers", "encoder_layers")
        ),
    ],
}
SIZES = {TO_K: (640, 2048), TO_OUT: (1280, 1280), Q: (768, 768)}


@pytest.mark.parametrize(("path", "spelled"), [(path, each) for path, several in SPELLED.items() for each in several])
def test_every_spelling_is_the_same_module(path: str, spelled: str, tmp_path: Path):
    down, up = factors(0, *SIZES[path])
    artifact = read(dict(zip(spelled.split(), (down, up), strict=True)), tmp_path)
    ((component, found), weights) = next(iter(artifact.modules.items()))
    assert (component, found) == ("text_encoder" if path == Q else "unet", path)
    assert torch.equal(weights.tensors["down"], down) and torch.equal(weights.tensors["up"], up)
    assert weights.scale == 1.0


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_no_two_modules_of_a_base_have_one_spelling(kind: str):
    """UserError otherwise; and every module of the base can be written and found again in both ways of kohya's."""
    names = names_of(kind)
    known = names.spellings()
    for component, paths in names.module_paths.items():
        for path in paths:
            assert known.parse(f"{component}.{path}.lora_A.weight") == ((component, path), "down")
    assert len({*names.original.values()}) == len(names.original) == len(names.module_paths["unet"])


CLIPS = {"sd1": {"text_encoder": "clip_l"}, "sd2": {"text_encoder": "clip_h"}}
CLIPS["sdxl"] = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
TEXTS = ("text_encoders.{clip}.transformer.{path}", "text_encoders.{clip}.{path}", "{clip}.{path}")
UNETS = ("diffusion_model.{path}", "model.diffusion_model.{path}", "unet.{path}", "{path}")


@pytest.mark.parametrize("kind", CLIPS)
def test_names_of_comfyui_and_onetrainer(kind: str):
    """Every layer of every base, the second text encoder's projection too: COMFY, ORIGINAL and diffusers' words."""
    names = names_of(kind)
    known, seen = names.spellings(), set()
    for component, paths in names.module_paths.items():
        for path in paths:
            is_unet = component == "unet"
            spelled = names.original[path] if is_unet else path
            clip = CLIPS[kind].get(component, "")
            for pattern in UNETS if is_unet else TEXTS:
                name = f"{pattern.format(clip=clip, path=spelled)}.lora_up.weight"
                assert known.parse(name) == ((component, path), "up"), name
                seen.add(name)
    assert (kind == "sdxl") == ("text_encoders.clip_g.transformer.text_projection.lora_up.weight" in seen)


TRANSFORMERS = {
    "FLUX without single blocks": "transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight",
    "HunyuanVideo": "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
    "FLUX of kohya": "lora_unet_single_blocks_9_linear1.lora_down.weight",
    "PixArt": "transformer.transformer_blocks.9.attn1.to_q.lora_A.weight",
    "LTX-Video": "diffusion_model.transformer_blocks.9.attn2.to_k.lora_A.weight",
    "Wan": "diffusion_model.blocks.3.self_attn.q.lora_A.weight",
    "Wan of kohya": "lora_unet_blocks_3_cross_attn_k.lora_down.weight",
    "Z-Image": "diffusion_model.layers.4.attention.qkv.lora_A.weight",
    "Qwen-Image": "transformer_blocks.9.attn.add_k_proj.lora_A.weight",
}


@pytest.mark.parametrize("what", TRANSFORMERS)
def test_an_architecture_is_named_only_where_it_is_certain(what: str):
    """By numbers of layers, widths and words that several have, it is not; by the file's own header it is."""
    shapes = {TRANSFORMERS[what]: (4, 2048)}
    assert architecture_of(shapes, {}) == TRANSFORMER
    assert architecture_of(shapes, {"modelspec.architecture": "flux-1-dev/lora"}) == "flux-1-dev"
    assert architecture_of({"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": (4, 8)}, {}) == (
        "stable-diffusion-3"
    )


def test_a_name_that_is_certain_is_said():
    for deep in (
        "lora_unet_input_blocks_7_1_transformer_blocks_9_attn1_to_q",
        "unet.mid_block.attentions.0.transformer_blocks.9.ff",
    ):
        assert architecture_of({f"{deep}.lora_down.weight": (4, 8)}, {}) == "stable-diffusion-xl-v1-base"


SHAPES = {
    "LoHa of OneTrainer": {
        "hada_w1_a": (320, 4, 1, 1), "hada_w1_b": (4, 320, 3, 3),
        "hada_w2_a": (320, 4, 1, 1), "hada_w2_b": (4, 320, 3, 3),
    },
    "DyLoRA of LyCORIS": {"lora_down.weight": (4, 320, 3, 3), "lora_up.weight": (320, 4)},
    "LoRA": {"lora_down.weight": (4, 320, 3, 3), "lora_up.weight": (320, 4, 1, 1)},
}  # fmt: skip


@pytest.mark.parametrize("what", SHAPES)
def test_factors_of_convolutions_in_other_shapes(what: str, tmp_path: Path):
    """The change that the same numbers make as plain matrices."""
    generator, start = torch.Generator().manual_seed(0), "lora_unet_down_blocks_0_resnets_0_conv1"
    tensors = {name: torch.randn(*shape, generator=generator) for name, shape in SHAPES[what].items()}
    flat = [each.flatten(1) for each in tensors.values()]
    wanted = flat[0] @ flat[1] * (flat[2] @ flat[3]) if len(flat) == 4 else flat[1] @ flat[0]
    (weights,) = read({f"{start}.{name}": each for name, each in tensors.items()}, tmp_path, SD1).modules.values()
    torch.testing.assert_close(weights.delta(torch.zeros(320, 320, 3, 3)).flatten(1), wanted, rtol=1e-4, atol=1e-4)


BUNDLED = {"SD1": (SD1, {"emb_params": 768}), "SD1, as ComfyUI": (SD1, {"clip_l": 768})}
BUNDLED["SDXL"] = (SDXL, {"clip_l": 768, "clip_g": 1280})


@pytest.mark.parametrize("what", BUNDLED)
def test_words_beside_a_lora(what: str, tmp_path: Path):
    """Of OneTrainer; a word may have dots."""
    names, widths = BUNDLED[what]
    word = {f"bundle_emb.zyx-v1.5.{key}": torch.randn(2, width) for key, width in widths.items()}
    width = 768 if names is SD1 else 2048
    path = SD_K if names is SD1 else "input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    layers = kohya(path, width) if names is SD1 else kohya(path, width, out=640)
    artifact = read(layers | word, tmp_path, names)
    assert len(artifact.modules) == 1
    assert {part: [*own] for part, own in artifact.embeddings.items()} == {
        part: ["zyx-v1.5"] for part in names.embedding_keys
    }
    with pytest.raises(UserError, match="words for other text encoders"):
        read(layers | {"bundle_emb.a.t5": torch.ones(1, 8)}, tmp_path, names)
    alone = read(word, tmp_path, names)
    assert not alone.modules and alone.embeddings.keys() == artifact.embeddings.keys()
    for part, own in alone.embeddings.items():
        assert own.keys() == {"zyx-v1.5"} and torch.equal(own["zyx-v1.5"], artifact.embeddings[part]["zyx-v1.5"])
    for nameless in ("bundle_emb.clip_l", "bundle_emb..clip_l"):
        for beside in ({}, layers):
            with pytest.raises(UserError, match="not called as bundled words are"):
                read(beside | {nameless: torch.ones(1, 8)}, tmp_path, names)


ROWS = {"vectors": ((3, 768), (3, 768)), "one vector": ((768,), (1, 768))}


@pytest.mark.parametrize("name", ["emb_params", "clip_l", "<cat-toy>", "my word.v2"])
@pytest.mark.parametrize("what", ROWS)
def test_a_word_under_any_name_and_of_one_vector(name: str, what: str, tmp_path: Path):
    """As A1111, ComfyUI and diffusers have it."""
    shape, wanted = ROWS[what]
    artifact = read({name: torch.ones(*shape)}, tmp_path, SD1)
    ((word, rows),) = artifact.embeddings["text_encoder"].items()
    assert word == ("" if name in ("emb_params", "clip_l") else name)
    assert rows.shape == wanted
    for odd in (torch.ones(2, 3, 4), torch.ones(0, 768), torch.tensor(1.0), torch.ones(2, 768, dtype=torch.int64)):
        with pytest.raises(UserError, match="the vectors of a word"):
            read({name: odd}, tmp_path, SD1)


@pytest.mark.parametrize("width", [1, 7, 32, 769])
def test_one_stray_vector_is_no_word(width: int, tmp_path: Path):
    """Unless it is as wide as those of real text encoders, or has the name of a word's."""
    with pytest.raises(UserError, match="holds no LoRA in a known format"):
        read({"step_count": torch.ones(width)}, tmp_path, SD1)
    save_file({"step_count": torch.ones(width)}, tmp_path / "stray.safetensors")
    with pytest.raises(UserError, match="holds no LoRA in a known format"):
        format.recognised(tmp_path / "stray.safetensors")


def test_what_holds_no_adapter_is_named_too(tmp_path: Path):
    """Without a key beside it that is known."""
    for ending, what in OTHERS.items():
        with pytest.raises(UserError, match="which is not read here") as caught:
            read({f"lora_unet_{SD_K}{ending}": torch.ones(1)}, tmp_path, SD1)
        assert what in str(caught.value)
    for name in ("lora_controlnet", "input_hint_block.0.weight"):
        with pytest.raises(UserError, match="control-LoRA"):
            read({name: torch.ones(1), "input_blocks.0.0.up": torch.ones(1)}, tmp_path, SD1)


def test_a_folder_with_one_file_is_that_file(tmp_path: Path):
    """As a repository of the hub is downloaded."""
    down, up = factors(0, 320, 768)
    tensors = {f"lora_unet_{SD_K}.lora_down.weight": down, f"lora_unet_{SD_K}.lora_up.weight": up}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    (tmp_path / "README.md").write_text("a LoRA")
    assert format.recognised(tmp_path) == "kohya"
    assert len(format.read(tmp_path, SD1).modules) == 1
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"holds 2 \.safetensors files: name one"):
        format.read(tmp_path, SD1)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="the folder of a pipeline"):
        format.read(tmp_path, SD1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_ranks_alphas_and_types_of_every_module_are_its_own(dtype: torch.dtype, tmp_path: Path):
    start = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to"
    tensors, wanted = {}, {}
    for number, (layer, rank, alpha) in enumerate([("k", 2, 1.0), ("v", 8, 8.0), ("q", 3, None)]):
        down, up = (each.to(dtype) for each in factors(number, 640, 640 if layer == "q" else 2048, rank))
        tensors |= {f"{start}_{layer}.lora_down.weight": down, f"{start}_{layer}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{start}_{layer}.alpha"] = torch.tensor(alpha, dtype=dtype)
        scale = 1.0 if alpha is None else alpha / rank
        wanted["unet", f"{TO_K[:-1]}{layer}"] = Weights("lora", {"down": down.float(), "up": up.float()}, scale)
    assert largest_difference(read(tensors, tmp_path), AdapterArtifact(wanted))[0] == 0.0


def test_a_tucker_decomposition_is_a_plain_one(tmp_path: Path):
    """delta = up x (core x down), convolved: computed here by convolving unit pictures through the three layers."""
    generator = torch.Generator().manual_seed(0)
    down, core, up = (torch.randn(*shape, generator=generator) for shape in ((4, 8, 1, 1), (4, 4, 3, 3), (6, 4, 1, 1)))
    start = "lora_unet_input_blocks_2_0_in_layers_2"
    tensors = {f"{start}.lora_down.weight": down, f"{start}.lora_mid.weight": core, f"{start}.lora_up.weight": up}
    tensors[f"{start}.alpha"] = torch.tensor(2.0)
    (weights,) = read(tensors, tmp_path).modules.values()
    pictures = torch.randn(2, 8, 5, 5, generator=generator)
    through = torch.conv2d(torch.conv2d(torch.conv2d(pictures, down), core, padding=1), up) * 0.5
    torch.testing.assert_close(torch.conv2d(pictures, weights.delta(), padding=1), through, atol=1e-4, rtol=1e-5)


MAGNITUDES = [
    (".dora_scale", 640, (640,), "magnitude"),
    (".dora_scale", 640, (640, 1), "magnitude"),
    (".dora_scale", 640, (1, 640), "input_magnitude"),  # as many outputs as inputs: the spelling tells
    (".lora_magnitude_vector", 640, (640,), "magnitude"),
    (".lora_magnitude_vector", 640, (1, 640), "magnitude"),
    (".magnitude", 640, (640,), "magnitude"),  # of ai-toolkit
    (".dora_scale", 2048, (1, 640), "magnitude"),
    (".dora_scale", 2048, (640, 1), "magnitude"),
    (".dora_scale", 2048, (1, 2048), "input_magnitude"),
    (".lora_magnitude_vector.weight", 2048, (640, 1), "magnitude"),
    (".dora_scale", 640, (3, 1), None),
    (".dora_scale", 640, (32, 20), None),
    (".dora_scale", 2048, (2048, 1), None),
    (".lora_magnitude_vector", 2048, (1, 2048), None),
    (".magnitude", 2048, (2048,), None),
]


@pytest.mark.parametrize("kernel", [(), (1, 1)], ids=["linear", "convolution"])
@pytest.mark.parametrize(("ending", "inputs", "shape", "kind"), MAGNITUDES)
def test_the_lengths_of_a_dora_are_of_outputs_or_of_inputs(
    ending: str, inputs: int, shape: tuple[int, ...], kind: str | None, kernel: tuple[int, ...], tmp_path: Path
):
    """By the spelling: LyCORIS has both, PEFT and ai-toolkit have those of outputs."""
    where = "attn2_to_k" if inputs == 2048 else "attn1_to_q"
    start = f"lora_unet_input_blocks_4_1_transformer_blocks_0_{where}"
    down, up = (each.reshape(*each.shape, *kernel) for each in factors(0, 640, inputs))
    magnitude = torch.arange(1.0, 1 + math.prod(shape)).reshape(*shape, *(kernel if len(shape) > 1 else ()))
    tensors = {f"{start}.lora_down.weight": down, f"{start}.lora_up.weight": up, f"{start}{ending}": magnitude}
    if kind is None:
        with pytest.raises(UserError, match="neither one number for each of its 640 outputs"):
            read(tensors, tmp_path)
        return
    artifact = read(tensors, tmp_path)
    (weights,) = artifact.modules.values()
    assert torch.equal(weights.tensors[kind].flatten(), magnitude.flatten())
    for form in ("kohya", "loraloom"):
        format.write(artifact, tmp_path / form, form, SDXL)
        (again,) = format.read(tmp_path / form, SDXL).modules.values()
        assert again.kind == weights.kind


@pytest.mark.parametrize("ending", OTHERS)
def test_what_is_not_read_is_called_by_its_name(ending: str, tmp_path: Path):
    start = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    down, up = factors(0, 640, 2048)
    tensors = {f"{start}.lora_down.weight": down, f"{start}.lora_up.weight": up, f"{start}{ending}": torch.ones(1)}
    with pytest.raises(UserError, match="which is not read here") as caught:
        read(tensors, tmp_path)
    assert OTHERS[ending] in str(caught.value)


def test_a_wrong_ending_has_a_hint(tmp_path: Path):
    down, up = factors(0, 640, 2048)
    with pytest.raises(UserError, match=r'did you mean "\.lora_B\.weight"'):
        read({f"unet.{TO_K}.lora_A.weight": down, f"unet.{TO_K}.lora_b.weight": up}, tmp_path)
    assert all(not ending.endswith(tuple(OTHERS)) for ending in ENDINGS)


def kohya(path: str, width: int, out: int = 320, **more: Any) -> dict[str, Tensor]:
    down, up = factors(0, out, width)
    return {f"lora_unet_{path}.lora_down.weight": down, f"lora_unet_{path}.lora_up.weight": up, **more}


SD_K = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
XL = "stable-diffusion-xl-v1-base"
WRONG = {
    "SDXL on SD1": (kohya("input_blocks_4_1_transformer_blocks_0_attn2_to_k", 2048), {}, SD1, XL),
    "SDXL's second text encoder on SD1": (
        kohya(SD_K, 768) | {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(4, 1280)},
        {}, SD1, XL,
    ),
    "FLUX on SD1": ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 8)}, {},
        SD1, TRANSFORMER),
    "SD1 on SDXL": (kohya(SD_K, 768), {}, SDXL, "stable-diffusion-v1"),
    "by the header": (
        {"lora_te_nothing.lora_down.weight": torch.ones(4, 8)}, {"ss_base_model_version": "sd_v2_v"}, SDXL,
        "stable-diffusion-v2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_an_adapter_for_another_base_is_one_line_with_both_sides(case: str, tmp_path: Path):
    tensors, header, names, made_for = WRONG[case]
    with pytest.raises(UserError) as caught:
        read(tensors, tmp_path, names, **header)
    [problem] = caught.value.problems
    assert problem.endswith(f"is an adapter for {made_for}, and this base is {names.architecture}")


def test_layers_of_another_size_are_said_with_both_sizes(names: FormatNames, tmp_path: Path):
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up = factors(0, 64, 64)
    with pytest.raises(UserError, match=r"1 of its 1 modules .* is \(64, 64\) in the file and \(32, 32\) in the base"):
        read({f"unet.{path}.lora_A.weight": down, f"unet.{path}.lora_B.weight": up}, tmp_path, names)


def test_linear_layers_and_convolutions_of_one_pixel_are_the_same(names: FormatNames, tmp_path: Path):
    path = "down_blocks.0.attentions.0.proj_in"  # a convolution in this base
    down, up = factors(0, 32, 32)
    artifact = read({f"unet.{path}.lora_A.weight": down, f"unet.{path}.lora_B.weight": up}, tmp_path, names)
    assert artifact.modules["unet", path].shape == (32, 32, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_of_eight_bits_are_read_and_passed_on(dtype: torch.dtype, tmp_path: Path):
    start = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to"
    tensors = {}
    for layer, rank in (("k", 2), ("v", 4)):
        down, up = (each.to(dtype) for each in factors(rank, 640, 2048, rank))
        tensors |= {f"{start}_{layer}.lora_down.weight": down, f"{start}_{layer}.lora_up.weight": up}
    artifact = read(tensors, tmp_path)
    stored = format.read(tmp_path / "x.safetensors", SDXL, as_stored=True)
    for kind in ("kohya", "diffusers", "loraloom"):
        format.write(stored, tmp_path / kind, kind, SDXL)
        assert largest_difference(artifact, format.read(tmp_path / kind, SDXL))[0] == 0.0
