"""What a LoRA run of full-size Stable Diffusion needs on its device, by arithmetic and not by measuring.

    python -m loraloom.benchmarks.memory configs/sdxl/*.yaml

The UNet runs forward and backward on torch's `meta` device, where tensors have shapes and no numbers, and every
storage is counted for as long as it lives. Autocast and flash attention, which `meta` does not know, are played by what
they keep. Not in it: workspaces of kernels, fragmentation, and the 0.5 GiB or so that CUDA itself takes.
"""

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers.utils import logging
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..configs.choices import find
from ..configs.dtypes import torch_dtype
from ..configs.loader import load_config
from ..configs.schema import RunConfig
from ..models.family import Conditioning, ModelFamily
from ..models.noise.process import Noised
from ..models.part_tensors import meta_model
from ..models.single_file import shipped_configs
from ..train.build import checkpoint_gradients, make_adapters

GIB = 2**30
MOMENTS = {"adamw": 8, "adamw_8bit": 2}
"""Bytes of the optimiser's state for each trained value."""
CASTS = {torch.bfloat16: ("linear", "conv2d"), torch.float32: ("group_norm", "layer_norm")}
"""What autocast computes in which type (pytorch.org/docs/stable/amp.html)."""


COLUMNS = ("base", "adapter", "gradient", "optimiser", "activations", "together", "images", "verifying")


def main(configs: Sequence[str]) -> None:
    """A line of a Markdown table, in GiB, for each config."""
    logging.set_verbosity_error()
    print("| config | " + " | ".join(COLUMNS) + " |\n|---" + "|---" * len(COLUMNS) + "|")
    for name in configs:
        needs = needs_of(load_config(name))
        print(f"| {name} | " + " | ".join(f"{needs[column] / GIB:.2f}" for column in COLUMNS) + " |", flush=True)


def needs_of(config: RunConfig) -> dict[str, float]:
    """Bytes on the device: what training needs and their sum, then for validation images, then for verifying."""
    assert config.model.family, "model.family is needed: no base is opened here"
    family: ModelFamily = find("models.families", config.model.family).FAMILY
    dtype = torch_dtype(config.model.dtype)
    configs = {name.removesuffix("/config.json"): each for name, each in shipped_configs(family.name).items()}
    parts = {part: meta_model(part, configs[part]) for part in ("unet", "vae", *family.text_encoders)}
    parts = {part: model.to(dtype).requires_grad_(False) for part, model in parts.items()}
    sizes, unet, vae = {part: _size(model) for part, model in parts.items()}, parts["unet"], parts["vae"]
    with torch.device("meta"):
        adapters = make_adapters(config, family, {"unet": unet})
        if config.loop.gradient_checkpointing:
            checkpoint_gradients(adapters.carriers, config.loop.gradient_checkpointing)
        activations, images = _of_a_step(family, unet.train(), config), _of_images(vae, config)
    trained = sum(each.numel() for each in adapters.parameters()["unet"])
    held = {"base": sizes["unet"], "adapter": 4 * trained, "gradient": 4 * trained}
    held["optimiser"] = MOMENTS[config.optimizer.name] * trained
    beside = sum(held.values())
    held |= {"activations": activations, "together": beside + activations}
    return held | {"images": beside + sizes["vae"] + images, "verifying": sum(sizes.values())}


def _of_a_step(family: ModelFamily, unet: Any, config: RunConfig) -> float:
    """The most that forward and backward keep at one time."""
    count, side = config.loop.samples_at_once(), max(config.data.resolutions) // 8
    latents, dtype = torch.empty(count, 4, side, side), torch_dtype(config.model.dtype)
    noised = Noised(latents, torch.empty(count), torch.empty_like(latents), torch.empty(count), torch.empty(count))
    width = unet.config.cross_attention_dim
    words = Conditioning(
        torch.empty(count, family.token_window, width, dtype=dtype), torch.empty(count, 1280, dtype=dtype)
    )
    with Storages(unet) as storages, played():
        prediction = family.predict({"unet": unet}, noised, words, torch.empty(count, 6))
        loss = F.mse_loss(prediction.float(), noised.target)
        loss.backward()
    return storages.most


def _of_images(vae: Any, config: RunConfig) -> float:
    """The most that decoding keeps, of as many images as are sampled at one time."""
    side = max(config.data.resolutions) // 8
    with Storages(vae) as storages, torch.no_grad():
        vae.decode(torch.empty(1, 4, side, side, dtype=vae.dtype))
    return storages.most


class Storages(TorchDispatchMode):
    """Bytes of the storages that are made within: now, and the most at one time. The model's own are not counted."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        own = [*model.parameters(), *model.buffers()]
        self.alive = dict.fromkeys((each.untyped_storage()._cdata for each in own), 0)
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)


@contextmanager
def played() -> Iterator[None]:
    """Within, layers cast as autocast does on a GPU, and attention keeps what a flash kernel keeps.

    Functions are replaced, not intercepted: torch's modes for that are off where checkpointed blocks run again.
    """
    players: dict[str, Any] = {"scaled_dot_product_attention": _flash}
    players |= {name: _casting(getattr(F, name), dtype) for dtype, names in CASTS.items() for name in names}
    with patch.multiple(F, **players):
        yield


def _casting(function: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
    def cast(*args: Any, **kwargs: Any) -> Tensor:
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(dtype), (args, kwargs))
        return function(*args, **kwargs)

    return cast


def _flash(query: Tensor, key: Tensor, value: Tensor, **others: Any) -> Tensor:
    return Flash.apply(query, key, value)  # type: ignore[return-value]


class Flash(torch.autograd.Function):
    """Keeps queries, keys, values, the output and one number for each query (Dao et al. 2022, algorithm 1)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, torch.empty(query.shape[:-1]))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(each) for each in ctx.saved_tensors[:3])


def _size(model: nn.Module) -> int:
    return sum(each.numel() * each.element_size() for each in model.parameters())


if __name__ == "__main__":
    main(sys.argv[1:])
