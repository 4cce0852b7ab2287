"""Which kernel computes a denoiser's attention: torch's own (SDPA), or another that diffusers knows, tried before use.

diffusers' `set_attention_backend` reaches transformers, but not UNets: their processor calls torch itself, and the
call changes nothing, without a word. A UNet's layers therefore get a processor that asks diffusers' dispatcher.
"""

import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.utils import logging
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from ..configs.choices import did_you_mean
from ..configs.errors import UserError

NATIVE = "native"
ALIASES = {"sdpa": NATIVE}
BACKENDS = tuple(name.value for name in AttentionBackendName)
AUTOMATIC = ("_flash_3", "flash", "xformers")
"""What `auto` tries, in this order."""
NEEDS = (
    (r"_hub$", "kernels", "pip install kernels"),
    (r"^_native_npu$", "torch_npu", "pip install torch_npu"),
    (r"^_native_xla$", "torch_xla", "pip install torch_xla"),
    (r"^xformers$", "xformers", 'pip install "loraloom[xformers]"'),
    (r"sage", "sageattention", "pip install sageattention"),
    (r"^_flash(_varlen)?_3$", "flash_attn_interface", "it is built from the sources of flash-attention"),
    (r"^flash", "flash_attn", "pip install flash-attn"),
)
"""Pattern of a back-end's name, the package that has it, how that is installed; the first that matches counts."""


@dataclass(frozen=True, slots=True)
class Attention:
    """What was chosen."""

    backend: str  # diffusers' name
    reason: str = ""  # why `auto` took torch's own

    def __str__(self) -> str:
        """One line for people."""
        return f"attention: {self.backend}" + (f" ({self.reason})" if self.reason else "")


def choose_attention(
    model: Any, name: str = "auto", *, dtype: torch.dtype | None = None, training: bool = True
) -> Attention:
    """Sets the attention of a pipeline's denoiser, or of a denoiser, after a trial on its device.

    `name` is `auto`, `sdpa`, or a back-end of diffusers (BACKENDS). `dtype` is what attention computes in where that
    is not the denoiser's own (autocast). With `training` it must have gradients as well, which `sage` has not.
    UserError for an unknown name, and for one that cannot run here; `auto` says why in its `reason` and takes SDPA.
    """
    denoiser: Any = model if isinstance(model, torch.nn.Module) else denoiser_of(model)
    device, kind = denoiser.device, dtype or denoiser.dtype
    if name == "auto":
        chosen = _automatic(device, kind, training)
    elif (backend := ALIASES.get(name, name)) not in BACKENDS:
        there = ", ".join(("auto", *ALIASES, *BACKENDS))
        raise UserError(f"attention {name!r} is unknown{did_you_mean(name, BACKENDS)}; there are: {there}")
    elif problem := why_not(backend, device, kind, training):
        raise UserError(f"attention {name!r} cannot be used on {device} in {kind}: {problem}; `auto` takes what can")
    else:
        chosen = Attention(backend)
    _set(denoiser, chosen.backend)
    return chosen


def denoiser_of(pipeline: Any) -> Any:
    """Its UNet or its transformer."""
    return getattr(pipeline, "unet", None) or pipeline.transformer


def _automatic(device: torch.device, dtype: torch.dtype, training: bool) -> Attention:
    problems = {name: why_not(name, device, dtype, training) for name in AUTOMATIC}
    if usable := next((name for name, problem in problems.items() if not problem), None):
        return Attention(usable)
    return Attention(NATIVE, "; ".join(f"{name}: {problem}" for name, problem in problems.items()))


# ---------------------------------------------------------------------------- the trial


def why_not(backend: str, device: torch.device, dtype: torch.dtype, training: bool = True) -> str:
    """Why a back-end cannot compute a small attention (with its gradients) here, in a line; empty where it can."""
    for pattern, package, install in NEEDS:
        if re.search(pattern, backend):
            if find_spec(package) is None:
                return f"{package} is not installed ({install})"
            break
    try:
        difference = _trial(backend, device, dtype, training)
    except Exception as error:  # each of these packages fails in its own way
        return _first_line(error)
    return "" if difference < 0.1 else f"its numbers are off torch's own by {difference:.3g}"


def _trial(backend: str, device: torch.device, dtype: torch.dtype, training: bool) -> float:
    """Largest difference from torch's own attention of 2 x 64 tokens in 2 heads, and of its gradients."""
    inputs = torch.randn(3, 2, 64, 2, 64, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    found, expected = (_attend(name, inputs, training) for name in (backend, NATIVE))
    differences = [(a - b).abs().max().item() for a, b in zip(found, expected, strict=True)]
    return max(differences) if all(value == value for value in differences) else float("inf")


def _attend(backend: str, inputs: torch.Tensor, training: bool) -> list[torch.Tensor]:
    """Output of (3, B, tokens, heads, width) and, in training, the gradients of query, key and value."""
    query, key, value = heads = [each.detach().requires_grad_(training) for each in inputs]
    with torch.set_grad_enabled(training), attention_backend(backend):
        output = dispatch_attention_fn(query, key, value)
        gradients = torch.autograd.grad(output.float().square().sum(), heads) if training else ()
    return [output.detach().float(), *(gradient.float() for gradient in gradients)]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


# ---------------------------------------------------------------------------- a UNet's layers


class DispatchedProcessor(AttnProcessor2_0):
    """diffusers' processor of UNets, with its attention computed by `_attention_backend`, as transformers call it."""

    _attention_backend: Any = None
    _parallel_config = None

    def __call__(self, *arguments: Any, **options: Any) -> torch.Tensor:
        with _Dispatched(self._attention_backend):
            return super().__call__(*arguments, **options)


class _Dispatched(TorchFunctionMode):
    """While it lasts, `scaled_dot_product_attention` is diffusers' dispatcher."""

    def __init__(self, backend: Any):
        super().__init__()
        self.backend = backend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = (tensor.transpose(1, 2) for tensor in args)  # (B, heads, tokens, width) in SDPA
        return dispatch_attention_fn(query, key, value, **(kwargs or {}), backend=self.backend).transpose(1, 2)


def _set(denoiser: Any, backend: str) -> None:
    """In every attention layer of the denoiser, and in no other model.

    UserError, before anything changes, where a layer has a processor that computes attention in one way only.
    """
    layers = [layer for layer in denoiser.modules() if hasattr(layer, "processor")]
    plain, told = AttnProcessor2_0, DispatchedProcessor
    own = {type(layer.processor) for layer in layers if not hasattr(layer.processor, "_attention_backend")} - {plain}
    if backend != NATIVE and own:
        names = ", ".join(sorted(kind.__name__ for kind in own))
        raise UserError(f"attention {backend!r}: {names} of this model cannot be told to use it")
    before, after = (told, plain) if backend == NATIVE else (plain, told)
    for layer in layers:
        if type(layer.processor) is before:
            layer.set_processor(after())
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # each call says that it is experimental
    try:
        with attention_backend():  # what it changes for every other model of the process is as before afterwards
            denoiser.set_attention_backend(backend)
    finally:
        logging.set_verbosity(verbosity)
