"""The types of weights by the names that users write; torch comes when one is looked up, so that help needs none."""

from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import torch

DType = Literal["fp32", "bf16", "fp16"]
DTYPES: tuple[str, ...] = get_args(DType)
AUTO = "auto"
"""The type, or the device, that suits the machine."""
ChosenDType = Literal["auto", "fp32", "bf16", "fp16"]


def torch_dtype(name: str) -> "torch.dtype":
    """Of one of DTYPES."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
