"""Engines for callbacks, and one way to sample latents with them."""

import functools

import pytest
import torch

from loraloom.inference.callback import attached
from loraloom.inference.engine import Engine

PROMPTS = ("a red star", "a blue moon", "a heart")


@pytest.fixture(scope="session")
def engine_of(base_of):
    """`sd1` and `sdxl`, tiny, and `pocket`: each is loaded once, so a callback that leaves a trace is found out."""
    return functools.cache(lambda name: Engine.load("pocket" if name == "pocket" else str(base_of(name))))


@pytest.fixture(scope="session")
def sample():
    """Latents of a pipeline with callbacks: image k has the prompt and the seed k, of `images`."""

    def sample(pipeline, *callbacks, images=(0, 1), steps=4, guidance=4.0, call=None, **arguments):
        arguments = {
            "prompt": [PROMPTS[k] for k in images],
            "generator": [torch.Generator().manual_seed(k) for k in images],
            "guidance_scale": guidance,
            "output_type": "latent",
            **arguments,
        }
        with attached(pipeline, callbacks, steps, call) as further:
            return pipeline(num_inference_steps=steps, **arguments | further).images

    return sample
