"""Which device a picture is made on, and in which type, where nobody said it."""

import torch

from ..configs.dtypes import AUTO
from ..configs.errors import UserError
from .base import EMBEDDED


def best_device() -> str:
    """`cuda`, `mps` or `xpu` where torch can use one, as training takes it; else `cpu`."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "xpu" if hasattr(torch, "xpu") and torch.xpu.is_available() else "cpu"


def chosen_device(name: str | None) -> str:
    """The device of a name; `auto` and None are the best one. UserError for one that torch cannot use here."""
    if name is None or name == AUTO:
        return best_device()
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        words = (str(error) or "it is not here").splitlines()[0]
        raise UserError(f"device {name!r} cannot be used: {words}") from error
    return name


def chosen_dtype(name: str, device: str, base: str = "") -> str:
    """The type of a name; `auto` is half precision where the device computes in it, and what is sure everywhere else.

    bf16 has the range of fp32, so that no base overflows in it; cards that would only imitate it (before Ampere) take
    fp16. Macs and CPUs take fp32, and so does the embedded base, which is too small to gain by less.
    """
    if name != AUTO:
        return name
    if base in EMBEDDED:
        return "fp32"
    kind = torch.device(device).type
    if kind == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 or torch.version.hip else "fp16"
    return "bf16" if kind == "xpu" else "fp32"


def device_words(device: str, dtype: str) -> str:
    """`on cuda (NVIDIA H200), weights in bf16`."""
    kind = torch.device(device).type
    name = f" ({torch.cuda.get_device_name(device)})" if kind == "cuda" else ""
    return f"on {'the CPU' if kind == 'cpu' else device}{name}, weights in {dtype}"
