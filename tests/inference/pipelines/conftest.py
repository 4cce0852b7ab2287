"""A tiny CLIP with random weights, as the components that a pipeline takes."""

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from loraloom.models.pocket.tokenizer import build_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="session")
def clip() -> dict:
    torch.manual_seed(5)
    tokenizer = build_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {"image_size": 24, "patch_size": 8}
    config = CLIPConfig(text_config=SIZES | text, vision_config=SIZES | vision, projection_dim=16)
    return {"clip": CLIPModel(config).eval().requires_grad_(False), "clip_tokenizer": tokenizer}
