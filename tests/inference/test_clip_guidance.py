"""The maths of CLIP guidance, by numbers from elsewhere."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import CLIPImageProcessor

from loraloom.configs.errors import UserError
from loraloom.inference.clip_guidance import clip_pixels, predicted_original, steered

ALPHA = 0.36  # sqrt(alpha) = 0.6, sqrt(1 - alpha) = 0.8


@pytest.mark.parametrize("size", [(48, 48), (40, 64), (90, 41)])
def test_images_reach_clip_as_its_own_processor_has_them(size):
    """Which rounds to 256 levels between resizing and normalising: half a level is 0.0075 after that."""
    height, width = size
    rows, columns = np.mgrid[0:height, 0:width]
    image = np.stack([rows * 2, columns * 2, rows + columns], axis=-1).astype(np.uint8)
    processor = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    wanted = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    ours = clip_pixels(torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1, size=24)
    assert_close(ours, wanted, atol=0.02, rtol=0)


def test_the_original_comes_back_from_either_prediction():
    original, noise = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    sample = 0.6 * original + 0.8 * noise
    assert_close(predicted_original(sample, noise, ALPHA, "epsilon"), original)
    assert_close(predicted_original(sample, 0.6 * noise - 0.8 * original, ALPHA, "v_prediction"), original)


def test_both_predictions_are_steered_to_the_same_original():
    """eps' = eps - 0.8 g, so that x0' = x0 + 0.64 / 0.6 g."""
    sample, noise, gradient = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    original = predicted_original(sample, noise, ALPHA, "epsilon")
    for kind, prediction in (("epsilon", noise), ("v_prediction", 0.6 * noise - 0.8 * original)):
        moved = predicted_original(sample, steered(prediction, gradient, ALPHA, kind), ALPHA, kind)
        assert_close(moved, original + 0.64 / 0.6 * gradient)


def test_other_predictions_are_refused():
    with pytest.raises(UserError, match="not 'sample'"):
        predicted_original(torch.zeros(1), torch.zeros(1), ALPHA, "sample")
