"""Whether what a pipeline decodes are numbers: from NaN, diffusers makes a black picture without a word."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..configs.errors import TrainingError


class NotFinite(TrainingError):
    """What was sampled, or decoded, is not finite; `latents` says whether it was before the VAE saw it."""

    def __init__(self, problem: str, latents: bool):
        super().__init__(problem)
        self.latents = latents


@contextmanager
def decoding_finite(vae: Any, parts: Mapping[str, Any]) -> Iterator[None]:
    """Within, `vae.decode` raises NotFinite, in words that name what is to blame where it can be told."""
    if not hasattr(vae, "decode"):
        yield
        return
    held, decode = vars(vae).get("decode"), vae.decode
    vars(vae)["decode"] = _looked_at(decode, vae, parts)
    try:
        yield
    finally:
        del vars(vae)["decode"]
        if held is not None:
            vars(vae)["decode"] = held


def _looked_at(decode: Callable[..., Any], vae: Any, parts: Mapping[str, Any]) -> Callable[..., Any]:
    def looked_at(latents: Tensor, *arguments: Any, **options: Any) -> Any:
        if not _is_finite(latents):
            raise NotFinite(f"the sampled latents are not finite, so there is no picture: {_why(parts)}", latents=True)
        found = decode(latents, *arguments, **options)
        if not _is_finite(found[0]):
            raise NotFinite(_undecoded(latents, vae), latents=False)
        return found

    return looked_at


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _why(parts: Mapping[str, Any]) -> str:
    if broken := _broken_weight(parts):
        return f"{broken} is not finite in this base, or in what is mixed into it"
    return "guidance, or the weight of an adapter, is too large for this base; or its type is too small (take fp32)"


def _undecoded(latents: Tensor, vae: Any) -> str:
    """Why the VAE makes no numbers of some latents."""
    words = "the VAE makes numbers that are not finite of the sampled latents, so there is no picture"
    if broken := _broken_weight({"vae": vae}):
        return f"{words}: {broken} is not finite"
    largest = f"of latents up to {latents.abs().max():.3g}"
    return f"{words}: {largest} in {_short(latents.dtype)}; lower guidance or adapter weights, or another --dtype"


def _broken_weight(parts: Mapping[str, Any]) -> str | None:
    """The first of the weights that is not finite."""
    models = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    named = ((f"{part}.{name}", p) for part, model in models.items() for name, p in model.named_parameters())
    return next((name for name, parameter in named if not _is_finite(parameter)), None)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
