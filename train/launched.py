"""What accelerate's variables say beside the config: what would change the training is refused or not used."""

import os
from collections.abc import Iterator, Mapping

from ..configs.errors import UserError
from ..configs.schema import LoopSection

REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "deepspeed takes clipping and the optimiser's step into its own hands",
    "ACCELERATE_USE_MEGATRON_LM": "megatron_lm takes clipping and the optimiser's step into its own hands",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker's own processes are not known here",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context and sequence parallelism are not known here",
}
UNUSED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "loop.micro_batch and loop.batch_size say it"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "loop.compile says it"),
    "ACCELERATE_MIXED_PRECISION": ("no", "loop.precision says it"),
}
"""What each is without a wish, and which setting of ours it would override."""


def check_environment(environment: Mapping[str, str] = os.environ) -> None:
    """UserError for what no run can honour. An own reading of base weights by accelerate is switched off."""
    for name, why in REFUSED.items():
        if environment.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t"):
            raise UserError(f"{name}={environment[name]}: {why}; shard with launch/accelerate/fsdp2.yaml, or unset it")
    device = environment.get("ACCELERATE_TORCH_DEVICE")
    if device is not None:
        import torch

        try:
            there = torch.empty(0, device=device).device.type != "meta"  # which computes nothing
        except (RuntimeError, AssertionError, ImportError):  # the second: this torch is built without it
            there = False
        if not there:
            raise UserError(f"ACCELERATE_TORCH_DEVICE={device}: torch finds no such device here; unset it")
    if environment is os.environ:
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # else only one process would read the weights


def unused(loop: LoopSection, environment: Mapping[str, str] = os.environ) -> Iterator[str]:
    """A line for each wish that is not followed."""
    for name, (neutral, instead) in UNUSED.items():
        wish = environment.get(name, neutral)
        if wish.lower() not in (neutral, "no", loop.precision if "PRECISION" in name else ""):
            yield f"{name}={wish} is not used: {instead}"
