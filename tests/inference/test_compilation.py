"""Compiled blocks compute the same, equal ones share a compilation, and none is silently left out."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch._dynamo.utils import counters

from loraloom.configs.errors import UserError
from loraloom.inference.compilation import compile_blocks
from loraloom.models.families.sd1 import FAMILY


@pytest.fixture
def unet() -> UNet2DConditionModel:
    """One size of blocks in all: 4 transformer blocks, 3 residual blocks, and 2 that take what skips as well."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    return UNet2DConditionModel(
        sample_size=2,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=2,
    ).eval()


@torch.no_grad()
def predict(unet: UNet2DConditionModel) -> torch.Tensor:
    draws = torch.Generator().manual_seed(1)
    latents, words = (torch.randn(shape, generator=draws) for shape in ((1, 4, 2, 2), (1, 5, 8)))
    return unet(latents, 500, words).sample


def test_numbers_are_those_of_eager_blocks_and_equal_blocks_share_a_compilation(unet):
    expected = predict(unet)
    count = compile_blocks(unet, ("BasicTransformerBlock",), backend="aot_eager")
    assert count == 4
    assert (predict(unet) - expected).abs().max() <= 1e-5
    assert counters["stats"]["unique_graphs"] == 1
    predict(unet)
    assert counters["stats"]["unique_graphs"] == 1  # the next step finds it


def test_every_kind_of_block_is_compiled_beyond_torch_s_own_limit(unet, monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)  # as 8 is for a UNet of usual size
    expected = predict(unet)
    assert compile_blocks(unet, FAMILY.repeated_blocks, backend="eager") == 9
    assert torch.equal(predict(unet), expected)
    kinds = 4  # transformer blocks; residual blocks on the way down, in the middle (scaled by 1, not 1.0) and up
    assert counters["stats"]["unique_graphs"] == kinds
    assert counters["frames"]["total"] == counters["frames"]["ok"] == kinds  # a frame that is given up counts in total


def test_a_model_without_such_blocks_is_told(unet):
    with pytest.raises(UserError, match="UNet2DConditionModel has no blocks of the classes to compile: FluxBlock"):
        compile_blocks(unet, ("FluxBlock",))
