"""Folders that PEFT itself has saved hold here what they do there: its own forward is the judge."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from loraloom.adapters import format
from loraloom.adapters.artifact import base_modules
from loraloom.adapters.format import FormatNames

pytestmark = pytest.mark.slow

RANKS, ALPHAS = st.sampled_from([1, 2, 3, 8, 64]), st.sampled_from([1, 4, 16])


class Model(nn.Module):
    """Two linear layers and two convolutions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.to_q, self.to_k = nn.Linear(16, 16), nn.Linear(16, 24)
        self.conv, self.pixel = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1)

    def forward(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        flat, image, square = (torch.randn(2, *size, generator=generator) for size in ((16,), (4, 5, 5), (8, 5, 5)))
        outputs = self.to_q(flat), self.to_k(flat), self.conv(image), self.pixel(square)
        return dict(zip(("to_q", "to_k", "conv", "pixel"), outputs, strict=True))


def config_of(method: str, rank: int, alpha: int, odd: tuple[int, int] | None, flags: tuple[bool, bool]) -> Any:
    patterns = {"rank_pattern": {"to_k": odd[0]}, "alpha_pattern": {"to_k": odd[1]}} if odd else {}
    common = {"r": rank, "target_modules": ["to_q", "to_k", "conv", "pixel"], **patterns}
    if method in ("lora", "dora"):
        return peft.LoraConfig(lora_alpha=alpha, use_dora=method == "dora", use_rslora=flags[0], **common)
    if method == "loha":
        return peft.LoHaConfig(alpha=alpha, use_effective_conv2d=flags[0], **common)
    return peft.LoKrConfig(alpha=alpha, use_effective_conv2d=flags[0], decompose_both=flags[1], **common)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.sampled_from(["lora", "dora", "loha", "lokr", "lokr"]),
    rank=RANKS,
    alpha=ALPHAS,
    odd=st.none() | st.tuples(RANKS, ALPHAS),
    flags=st.tuples(st.booleans(), st.booleans()),
)
def test_a_folder_of_peft_is_what_peft_computes(
    method: str, rank: int, alpha: int, odd: tuple[int, int] | None, flags: tuple[bool, bool], tmp_path: Path
):
    """Whole factors of LoKr, too, which PEFT multiplies with alpha / r and LyCORIS does not."""
    wrapped = peft.get_peft_model(Model(), config_of(method, rank, alpha, odd, flags))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data + noise if "magnitude" in name else noise
    wrapped.save_pretrained(tmp_path)
    wanted, base = wrapped.eval()(), Model()
    names = FormatNames({"unet": base_modules("unet", Model())}, {"unet": "lora_unet"}, "stable-diffusion-v1", "sd_v1")
    artifact = format.read(tmp_path, names)
    assert len(artifact.modules) == 4
    for (_, path), weights in artifact.modules.items():
        layer = base.get_submodule(path)
        layer.weight.data += weights.delta(layer.weight.data).reshape(layer.weight.shape)
    for path, found in base().items():
        torch.testing.assert_close(found, wanted[path], rtol=1e-4, atol=1e-5)
