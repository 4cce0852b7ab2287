"""How much arithmetic a training step is, and how fast the device multiplies matrices: the least that it can take."""

import time
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

from ..configs.dtypes import DType, torch_dtype
from ..models.pocket import FOLDER
from .work import Prepared

SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices: larger ones are not faster
TRIES = 20


def step_flops(prepared: Prepared) -> int:
    """Floating-point operations of the bare loop's step, forward and backward, without those of element-wise work.

    The model runs on torch's meta device: shapes alone. Frozen weights have no gradients, so this is about two thirds
    of what full training takes, and nothing is counted that is computed again.
    """
    rank, targets = prepared.work.rank, ["to_q", "to_k", "to_v", "to_out.0"]
    folder = str(FOLDER) if prepared.base == "pocket" else prepared.base
    with torch.device("meta"):
        config: Any = UNet2DConditionModel.load_config(folder, subfolder="unet")
        unet: Any = UNet2DConditionModel.from_config(config)
        unet.requires_grad_(False).train()
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), unet)
        with safe_open(prepared.inputs, "pt") as file:
            names = [name for name in file.keys() if not name.startswith("start/")]  # noqa: SIM118 # not a mapping
            row = {name: torch.empty(file.get_slice(name).get_shape()[1:]) for name in names}
        added = {"text_embeds": row["pooled_prompt_embeds"], "time_ids": row["sizes"]} if "sizes" in row else None
        counter = FlopCounterMode(display=False)
        with counter:
            said = unet(row["noisy"], row["timesteps"], row["prompt_embeds"], added_cond_kwargs=added).sample
            F.mse_loss(said, row["target"]).backward()
    return counter.get_total_flops()


def matrix_rate(dtype: DType, threads: int) -> float:
    """Floating-point operations a second in the best of some products of square matrices, on a GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side, before = SIDE[device], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        left, right = (torch.randn(side, side, device=device, dtype=torch_dtype(dtype)) for _ in range(2))
        return 2 * side**3 / min(_timed(left, right) for _ in range(TRIES))
    finally:
        torch.set_num_threads(before)


def _timed(left: torch.Tensor, right: torch.Tensor) -> float:
    started = time.perf_counter()
    torch.mm(left, right)
    if left.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
