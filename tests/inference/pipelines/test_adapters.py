"""Adapters work in custom pipelines, which share the parts that carry them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from loraloom.adapters.artifact import AdapterArtifact, Weights
from loraloom.adapters.format import write
from loraloom.inference.adapter_file import format_names
from loraloom.inference.custom_pipeline import load_pipeline
from loraloom.inference.engine import Engine
from loraloom.inference.weighted_file import AdapterFile

pytestmark = pytest.mark.slow

ENDINGS = {"unet": (".to_q", ".to_v"), "text_encoder": (".q_proj", ".v_proj")}


@pytest.fixture(scope="module")
def adapter(tiny_base, tmp_path_factory) -> Path:
    """A LoRA of both models with random weights, none zero."""
    engine = Engine.load(str(tiny_base))
    names, generator = format_names(engine.family, engine.parts), torch.Generator().manual_seed(0)
    modules = {}
    for component, endings in ENDINGS.items():
        for path, shape in names.module_paths[component].items():
            if path.endswith(endings):
                down, up = (0.3 * torch.randn(size, generator=generator) for size in ((4, shape[1]), (shape[0], 4)))
                modules[component, path] = Weights("lora", {"down": down, "up": up}, 1.0)
    file = tmp_path_factory.mktemp("adapter") / "mine.safetensors"
    write(AdapterArtifact(modules), file, "diffusers", names)
    return file


def picture(pipeline, **options) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("a star", num_inference_steps=2, generator=generator, output_type="np", **options).images


def engine_with(tiny_base, adapters=()) -> Engine:
    engine = Engine.load(str(tiny_base))
    engine.attach(adapters)
    return engine


def test_what_the_engine_is_given_changes_the_custom_pipeline_too(tiny_base, adapter, clip):
    """Even later; by its weight; and without CLIP's pull the two are one."""
    engine, asked = Engine.load(str(tiny_base)), {"clip_guidance_scale": 20}
    pipeline = load_pipeline(engine, "clip_guided", **clip)
    base = picture(pipeline, **asked)
    engine.attach([AdapterFile(adapter, 0.5)])
    half = picture(pipeline, **asked)
    whole = picture(load_pipeline(engine_with(tiny_base, [AdapterFile(adapter)]), "clip_guided", **clip), **asked)
    assert np.abs(whole - base).max() > np.abs(half - base).max() > 0.01
    assert (picture(pipeline, clip_guidance_scale=0) == picture(engine.pipeline)).all()


def test_diffusers_own_loading_into_the_custom_pipeline_is_the_same(tiny_base, adapter, clip):
    asked = {"clip_guidance_scale": 20}
    ours = load_pipeline(engine_with(tiny_base, [AdapterFile(adapter)]), "clip_guided", **clip)
    theirs = load_pipeline(str(tiny_base), "clip_guided", **clip)
    theirs.load_lora_weights(str(adapter))
    np.testing.assert_allclose(picture(theirs, **asked), picture(ours, **asked), atol=1e-4)


def test_the_template_shares_them_too(tiny_base, adapter):
    template = Path(__file__).parents[3] / "examples/custom_pipeline"
    without, carrying = (
        picture(load_pipeline(engine_with(tiny_base, adapters), str(template), trust_remote_code=True))
        for adapters in ([], [AdapterFile(adapter)])
    )
    assert np.abs(without - carrying).max() > 0.01
