"""A tiny Stable Diffusion 1.x, and a LoRA with random weights trained into nothing in particular."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lokr.layer import factorization
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from loraloom.adapters.artifact import AdapterArtifact, Weights, base_modules
from loraloom.adapters.format import FormatNames
from loraloom.adapters.peft_adapters import read_peft
from loraloom.models.pocket.tokenizer import build_tokenizer

UNET_TARGETS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "conv1",
    "downsamplers.0.conv",
]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]


def make_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()


def make_text_encoder() -> CLIPTextModel:
    torch.manual_seed(0)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=1000,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
        )
    ).eval()


def make_pipeline(tokenizer: Any) -> StableDiffusionPipeline:
    """The base, plain: what a user of diffusers would load."""
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, layers_per_block=1)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=make_text_encoder(),
        tokenizer=tokenizer,
        unet=make_unet(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def outputs(unet: nn.Module, text_encoder: nn.Module) -> dict[str, Tensor]:
    """What both models say to one fixed input."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 7, 32, generator=generator)
    tokens = torch.randint(0, 1000, (2, 77), generator=generator)
    return {
        "unet": unet(latents, torch.tensor([10, 700]), encoder_hidden_states=context).sample,
        "text_encoder": text_encoder(tokens).last_hidden_state,
    }


@dataclass(frozen=True)
class Trained:
    """Models that PEFT has put a LoRA into, and the artifact taken out of them."""

    models: dict[str, nn.Module]
    outputs: dict[str, Tensor]
    artifact: AdapterArtifact


def train(
    *, unet: dict[str, Any] | None = None, text_encoder: dict[str, Any] | None = None, **settings: Any
) -> Trained:
    """Injects PEFT LoRA with LoraConfig's settings, some for one model only; all factors are random, none zero."""
    models = {"unet": make_unet(), "text_encoder": make_text_encoder()}
    targets = {"unet": UNET_TARGETS, "text_encoder": TEXT_TARGETS}
    extra = {"unet": unet or {}, "text_encoder": text_encoder or {}}
    for part, model in models.items():
        config = LoraConfig(target_modules=targets[part], **settings, **extra[part])
        inject_adapter_in_model(config, model, adapter_name="mine")
    torch.manual_seed(2)
    for model in models.values():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.1)
    modules = {key: weights for part in models for key, weights in read_peft(part, models[part], "mine").items()}
    return Trained(models, outputs(**models), AdapterArtifact(modules, metadata={"modelspec.title": "mine"}))


@pytest.fixture(scope="session")
def names() -> FormatNames:
    return FormatNames(
        module_paths={
            "unet": base_modules("unet", make_unet()),
            "text_encoder": base_modules("text_encoder", make_text_encoder()),
        },
        kohya_prefixes={"unet": "lora_unet", "text_encoder": "lora_te"},
        architecture="stable-diffusion-v1",
        kohya_version="sd_v1",
    )


@pytest.fixture(scope="session")
def diffusers_outputs() -> Callable[[Path], dict[str, Tensor]]:
    """What a plain pipeline says after diffusers itself has loaded a LoRA file into it."""
    tokenizer = build_tokenizer()

    def load_and_run(file: Path) -> dict[str, Tensor]:
        pipeline = make_pipeline(tokenizer)
        pipeline.load_lora_weights(str(file))
        return outputs(pipeline.unet, pipeline.text_encoder)

    return load_and_run


@pytest.fixture(scope="session")
def base_outputs() -> dict[str, Tensor]:
    return outputs(make_unet(), make_text_encoder())


@pytest.fixture(scope="session")
def double() -> Trained:
    """alpha = 2 r everywhere: a power of two, so that a float32 file may lose nothing."""
    return train(r=4, lora_alpha=8)


@pytest.fixture(scope="session")
def mixed() -> Trained:
    """Ranks 2, 3, 4 and 8, and alphas 1, 6 and 16."""
    unet_patterns = {"rank_pattern": {"to_q": 2, "proj_in": 3}, "alpha_pattern": {"to_v": 1}}
    text_patterns = {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"k_proj": 16}}
    return train(r=4, lora_alpha=6, unet=unet_patterns, text_encoder=text_patterns)


@pytest.fixture(scope="session")
def stabilised() -> Trained:
    """rsLoRA: the scale is alpha / sqrt(r)."""
    return train(r=4, lora_alpha=6, use_rslora=True)


@pytest.fixture(scope="session", params=["double", "mixed"])
def trained(request: pytest.FixtureRequest) -> Trained:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def artifact(double: Trained) -> AdapterArtifact:
    return double.artifact


KINDS = ("lora", "dora", "dora, inputs", "loha", "loha, core", "lokr", "lokr, both", "lokr, whole", "lokr, core")
"""Of random weights: a method, and which of its factors are there. Only convolutions of several pixels have cores."""


def random_weights(kind: str, shape: tuple[int, ...], rank: int, scale: float, generator: torch.Generator) -> Weights:
    """What a method may have made of a weight of this shape; no number is zero.

    LoKr takes apart what is large beside the rank, as LyCORIS and PEFT do.
    """
    method, _, variant = kind.partition(", ")
    out, into, *kernel = shape
    area = math.prod(kernel)
    core = variant == "core" and area > 1

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    if method in ("lora", "dora"):
        tensors = {"down": draw(rank, into, *kernel), "up": draw(out, rank, *(1 for _ in kernel))}
        if method == "dora":
            tensors["input_magnitude" if variant else "magnitude"] = draw(into if variant else out).abs() + 0.5
        return Weights("lora", tensors, scale)
    if method == "loha":
        sizes = {"a": (rank, out), "b": (rank, into)} if core else {"a": (out, rank), "b": (rank, into * area)}
        tensors = {f"hada_w{number}_{side}": draw(*size) for number in "12" for side, size in sizes.items()}
        cores = {f"hada_t{number}": draw(rank, rank, *kernel) for number in "12"} if core else {}
        return Weights("loha", tensors | cores, scale)
    (out_1, out_2), (in_1, in_2) = factorization(out), factorization(into)
    if variant == "both" and rank < max(out_1, in_1) / 2:
        tensors = {"lokr_w1_a": draw(out_1, rank), "lokr_w1_b": draw(rank, in_1)}
    else:
        tensors = {"lokr_w1": draw(out_1, in_1)}
    if variant == "whole" or rank >= max(out_2, in_2) / 2:
        tensors["lokr_w2"] = draw(out_2, in_2, *kernel)
    elif core:
        tensors |= {"lokr_t2": draw(rank, rank, *kernel)}
        tensors |= {"lokr_w2_a": draw(rank, out_2), "lokr_w2_b": draw(rank, in_2)}
    else:
        tensors |= {"lokr_w2_a": draw(out_2, rank), "lokr_w2_b": draw(rank, in_2 * area)}
    return Weights("lokr", tensors, scale)


@pytest.fixture(scope="session", name="random_weights")
def random_weights_fixture() -> Callable[..., Weights]:
    return random_weights
