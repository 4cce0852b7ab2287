"""A tiny base with the real block topology of Stable Diffusion 1.x, and six small pictures."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

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
def tiny_base(tmp_path_factory) -> Path:
    """A pipeline folder: four UNet blocks of two layers, width 32, an 8-times VAE, 32 px."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    cross, plain = "CrossAttn{}Block2D", "{}Block2D"
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(32, 32, 32, 32),
        down_block_types=(*[cross.format("Down")] * 3, plain.format("Down")),
        up_block_types=(plain.format("Up"), *[cross.format("Up")] * 3),
        layers_per_block=2,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    folder = tmp_path_factory.mktemp("tiny") / "base"
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


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
        file.write_text(yaml.safe_dump(content))
        return file

    return write


@pytest.fixture
def write_config(config_writer, tmp_path):
    """`config_writer` for the test's own folder."""

    def write(name: str = "run", **sections: dict) -> Path:
        return config_writer(tmp_path, name, **sections)

    return write
