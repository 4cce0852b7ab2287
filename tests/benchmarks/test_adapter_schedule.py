"""The table of what a schedule changes: its numbers on paper, and all rows of a small run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from loraloom.benchmarks.adapter_schedule import SCHEDULES, main, pixel_difference, row
from loraloom.models.pocket.scenes import SUBJECT, draw


def test_numbers_on_paper():
    assert pixel_difference(np.uint8([[0, 10], [200, 3]]), np.uint8([[4, 10], [190, 5]])) == 4.0
    subject, grey = draw(SUBJECT), Image.new("RGB", (64, 64), "gray")
    away = pixel_difference(np.asarray(subject), np.asarray(grey))
    assert row("drawn", [subject, grey], [subject, subject]) == f"| drawn | 0.50 | {away / 2:.1f} |"


@pytest.fixture
def adapter(tmp_path) -> Path:
    """Two layers of pocket's UNet and text encoder, random."""
    layers = {  # width, and how large the change is
        "unet.up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_v": (128, 1.0),
        "text_encoder.text_model.encoder.layers.0.self_attn.v_proj": (128, 0.01),
    }
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for path, (width, size) in layers.items():
        tensors[f"{path}.lora_A.weight"] = torch.randn(4, width, generator=generator)
        tensors[f"{path}.lora_B.weight"] = size * torch.randn(width, 4, generator=generator)
    save_file(tensors, tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


@pytest.mark.slow
def test_every_schedule_has_a_row(adapter, capsys):
    assert main(["--adapter", str(adapter), "--prompt", "a creature", "--num-images", "1", "--steps", "2"]) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    changed = {name.removeprefix("| "): float(number.removesuffix(" |")) for name, _, number in lines}
    assert list(changed) == ["the base alone", *SCHEDULES]
    assert changed["the base alone"] == 0
    assert changed["always 0"] > 0  # by the text encoder's part
    assert len(set(changed.values())) > 4  # of two steps, the linear ones are near the others
