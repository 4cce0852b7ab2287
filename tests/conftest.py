"""A tiny base with the real block topology of Stable Diffusion 1.x, and six small pictures."""

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from loraloom.models.pocket.tokenizer import build_tokenizer

# one thread each when pytest-xdist shares the cores: threads that wait for each other's cores crawl
THREADS = max(1, min(2, len(os.sched_getaffinity(0)) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))
os.environ["OMP_NUM_THREADS"] = str(THREADS)


@pytest.fixture(scope="session", autouse=True)
def few_threads():
    """The bits of a kernel depend on the number of threads: one number for the whole suite."""
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory):
    """Latents and scans of tests stay out of the user's cache; processes that tests start share this one."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["LORALOOM_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_base(base_of) -> Path:
    """The tiny base of Stable Diffusion 1.x."""
    return base_of("sd1")


@pytest.fixture(scope="session")
def base_of(tmp_path_factory):
    """A pipeline folder for a family, random and tiny, with the blocks of the real one; 32 px, an 8-times VAE."""

    @functools.cache
    def base_of(family: str) -> Path:
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("tiny") / family
        {"sd1": _sd1, "sd2": _sd2, "sdxl": _sdxl}[family](folder)
        return folder

    return base_of


CROSS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def _sd1(folder: Path) -> None:
    pipeline = StableDiffusionPipeline(
        unet=_unet(CROSS, width=32), text_encoder=CLIPTextModel(_clip()), **_shared(), **NO_SAFETY
    )
    pipeline.save_pretrained(folder)


def _sd2(folder: Path) -> None:
    """Linear projections, heads of one size, OpenCLIP's activation, v."""
    pipeline = StableDiffusionPipeline(
        unet=_unet(CROSS, width=48, use_linear_projection=True, attention_head_dim=(2, 4, 4, 4)),
        text_encoder=CLIPTextModel(_clip(hidden_size=48, hidden_act="gelu")),
        **_shared(prediction_type="v_prediction"),
        **NO_SAFETY,
    )
    pipeline.save_pretrained(folder)


def _sdxl(folder: Path) -> None:
    """Three blocks with 0, 2 and 10 transformer layers, two text encoders, size conditions."""
    blocks = ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2, ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",)
    sizes = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    pipeline = StableDiffusionXLPipeline(
        unet=_unet(
            blocks,
            width=32 + 48,
            use_linear_projection=True,
            transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=(2, 4, 4),
            projection_class_embeddings_input_dim=40 + 6 * 8,
            **sizes,
        ),
        text_encoder=CLIPTextModel(_clip()),
        text_encoder_2=CLIPTextModelWithProjection(_clip(hidden_size=48, hidden_act="gelu", projection_dim=40)),
        tokenizer_2=build_tokenizer(),
        **_shared(scaling_factor=0.13025),
    )
    pipeline.save_pretrained(folder)


NO_SAFETY = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def _shared(scaling_factor: float = 0.18215, **scheduler) -> dict:
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
        scaling_factor=scaling_factor,
    )
    noise = DDPMScheduler(clip_sample=False, **BETAS, **scheduler)
    return {"vae": vae, "tokenizer": build_tokenizer(), "scheduler": noise}


def _unet(blocks, width: int, **options) -> UNet2DConditionModel:
    down, up = blocks
    return UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(16, 32, 48, 48)[: len(down)],
        down_block_types=down,
        up_block_types=up,
        layers_per_block=2,
        cross_attention_dim=width,
        norm_num_groups=8,
        **{"attention_head_dim": 2} | options,
    )


def _clip(**options) -> CLIPTextConfig:
    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return CLIPTextConfig(vocab_size=len(tokenizer), **tokens, **sizes | options)


@pytest.fixture(scope="session")
def small_base(tmp_path_factory):
    """The folder of a still smaller base for a family, for tests that look at many settings; see `small_base.py`."""

    @functools.cache
    def small_base(family: str) -> Path:
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("small") / family
        _small.pipeline_of(family).save_pretrained(folder)
        return folder

    return small_base


def _neighbour(path: str) -> Any:
    """A module of the tests, which are no package."""
    file = Path(__file__).parent / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_small = _neighbour("small_base.py")
checkpoint = _neighbour("models/checkpoints.py").checkpoint


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Six pictures of noise, larger than the training resolution and not square."""
    folder = tmp_path_factory.mktemp("photos")
    for index in range(6):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def config_writer(tiny_base, photos):
    """Writes `<folder>/<name>.yaml` for a small run into `<folder>/<name>`; keywords replace or add to its sections."""

    def write(folder: Path, name: str, **sections: dict) -> Path:
        content: dict = {
            "model": {"base": str(tiny_base)},
            "data": {"resolution": 32, "sources": [{"path": str(photos), "caption": "a sks creature"}]},
            "adapter": {"rank": 4, "alpha": 8, "parts": {"unet": "attention", "text_encoder": "attention"}},
            "optimizer": {"learning_rate": 1e-2},
            "loop": {"steps": 10, "batch_size": 2, "threads": THREADS},
            "checkpoint": {"every": 4},
            "trackers": [],
            "output": {"dir": str(folder / name), "name": "tiny"},
        }
        for section, values in sections.items():
            content[section] = values if isinstance(values, list) else content.get(section, {}) | values
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        return file

    return write


@pytest.fixture
def write_config(config_writer, tmp_path):
    """`config_writer` for the test's own folder."""

    def write(name: str = "run", **sections: dict) -> Path:
        return config_writer(tmp_path, name, **sections)

    return write
