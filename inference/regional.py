"""Regional adapters: another adapter, and another prompt, in each part of a picture.

    left, right = Region(mask, {"sks": 1.0}, "a sks creature"), Region(1 - mask, {"style": 0.8})
    with regional(engine, [left, right]):
        images = engine.generate(request)

A change of a layer's weights acts on the whole picture. So each region has a pass of the denoiser of its own, with its
adapters, and the predicted noise is blended by masks in the latents' size: eps(x, y) = sum_k w_k(x, y) eps_k(x, y)
(MultiDiffusion, Bar-Tal et al. 2023, with a model for each region).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from PIL import Image
from torch import Tensor, nn

from ..adapters import active
from ..adapters.weighing import Weight
from ..configs.errors import UserError
from ..images.decoding import mask_as_shown
from ..models.encode import pool_masks
from ..models.family import Conditioning
from .engine import Engine, MicroBatch


@dataclass(frozen=True, slots=True)
class Region:
    """A part of the picture, and what counts there."""

    mask: Image.Image | Tensor  # white = here; or (H, W) in [0, 1]; of any size, it is pooled to the latents'
    adapters: Mapping[str, Weight] = field(default_factory=dict)  # as `set_adapters` takes them; none: the base alone
    prompt: str | None = None  # in place of the request's


@contextmanager
def regional(engine: Engine, regions: Sequence[Region]) -> Iterator[None]:
    """Pictures that `engine.generate` makes in the block have these regions; afterwards the engine is as before.

    A region predicts what the engine would with its adapters alone: they count in the text encoders too, for its own
    prompt or the request's, and for the negative prompt. Weights of regions that overlap are divided by their sum, as
    are masks between 0 and 1 where no other region is; for a soft border give both of its sides a region. Where no
    mask is above zero, the pipeline predicts as it would without regions.

    A step costs one pass of the denoiser for each region, and one more where some place has none. Callbacks that
    replace the prompt's embeddings or weigh adapters (`AdapterSchedule`) change that last pass only.

    UserError for a mask that is none, unknown adapters, adapters that are fused, and regions within regions.
    """
    if not regions:
        raise UserError("regional was given no region")
    if any(isinstance(each, _Regional) for each in engine.around):
        raise UserError("there are regions around this block already; give all of them in one list")
    around = _Regional(engine, regions)
    engine.around.append(around)
    try:
        yield
    finally:
        engine.around.remove(around)


class _Regional:
    """The denoiser's `forward` for the length of a call of the pipeline."""

    def __init__(self, engine: Engine, regions: Sequence[Region]):
        self._engine, self._regions = engine, regions
        self._masks = [mask_tensor(region.mask) for region in regions]
        self._denoiser: nn.Module = engine.parts[engine.family.denoiser]
        for region in regions:
            with engine.adapters.weighted(region.adapters):
                pass  # what cannot be is said before anything is sampled

    @contextmanager
    def __call__(self, micro_batch: MicroBatch) -> Iterator[None]:
        passes = [self._pass(region, micro_batch) for region in self._regions]
        with _forward(self._denoiser, self._blended(passes)):
            yield

    def _pass(self, region: Region, micro_batch: MicroBatch) -> "_Pass":
        prompts = micro_batch.prompts if region.prompt is None else [region.prompt] * len(micro_batch.prompts)
        with self._engine.adapters.weighted(region.adapters):
            positive = micro_batch.encode(prompts)
            negative = self._engine.negative(micro_batch.request, micro_batch.encode, len(prompts))
            return _Pass(positive, negative, active.switches([self._denoiser]))

    def _blended(self, passes: "Sequence[_Pass]") -> Callable[..., Any]:
        predict = self._denoiser.forward

        def forward(
            sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, return_dict: bool = True, **arguments: Any
        ) -> Any:
            def prediction(own: Mapping[str, Any]) -> Tensor:
                return predict(sample, timestep, return_dict=False, **own)[0]

            arguments["encoder_hidden_states"] = encoder_hidden_states
            weights, bare = blending_weights(self._masks, sample)
            predictions = []
            with active.as_before([self._denoiser]):
                for each in passes:
                    active.switch(each.switches)
                    predictions.append(prediction(each.conditioned(arguments, len(sample))))
            if bare.any():
                predictions.append(prediction(arguments))
                weights = torch.cat([weights, bare[None]])
            blended = blend(predictions, weights)
            return UNet2DConditionOutput(sample=blended) if return_dict else (blended,)

        return forward


@dataclass(frozen=True, slots=True)
class _Pass:
    """What makes a region's prediction its own."""

    positive: Conditioning
    negative: Conditioning
    switches: list[active.Switch]  # of the denoiser's layers

    def conditioned(self, arguments: Mapping[str, Any], batch: int) -> dict[str, Any]:
        """The denoiser's arguments with the region's words; a batch without guidance has no negative half."""
        words = _halves(self.negative.prompt_embeds, self.positive.prompt_embeds, batch)
        own = {**arguments, "encoder_hidden_states": words.to(arguments["encoder_hidden_states"])}
        if self.positive.pooled_prompt_embeds is not None and self.negative.pooled_prompt_embeds is not None:
            pooled = _halves(self.negative.pooled_prompt_embeds, self.positive.pooled_prompt_embeds, batch)
            added = arguments["added_cond_kwargs"]
            own["added_cond_kwargs"] = {**added, "text_embeds": pooled.to(added["text_embeds"])}
        return own


def _halves(negative: Tensor, positive: Tensor, batch: int) -> Tensor:
    """Of the pipeline's order, as many rows as there are samples: without guidance the positive ones."""
    return torch.cat([negative, positive])[-batch:]


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another `forward` for a module, and the one of before: its class's, or one that some hook has put there."""
    held = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if held is not None:
            vars(module)["forward"] = held


# ---------------------------------------------------------------------------- masks


def mask_tensor(mask: Image.Image | Tensor) -> Tensor:
    """(H, W) in [0, 1], fp32, of a picture or such a tensor; UserError for anything else."""
    if isinstance(mask, Image.Image):
        return torch.from_numpy(np.array(mask_as_shown(mask), dtype=np.float32)) / 255
    if mask.ndim != 2 or 0 in mask.shape:
        raise UserError(f"a mask has the shape {tuple(mask.shape)}; it needs two dimensions, (height, width)")
    found = mask.detach().float().cpu()
    if not ((found >= 0) & (found <= 1)).all():
        raise UserError(f"a mask has values from {found.min():g} to {found.max():g}; they need to be in [0, 1]")
    return found


def blending_weights(masks: Sequence[Tensor], latents: Tensor) -> tuple[Tensor, Tensor]:
    """Of K masks (H, W) for (B, C, h, w) latents: (K, h, w), w_k = m_k / sum_j m_j, and (h, w): 1 where all are 0."""
    pooled = torch.stack([pool_masks(mask[None], latents)[0] for mask in masks]).to(latents.device)
    total = pooled.sum(dim=0)
    return pooled / total.where(total > 0, 1), (total == 0).to(pooled)


def blend(predictions: Sequence[Tensor], weights: Tensor) -> Tensor:
    """sum_k w_k eps_k for K predictions (B, C, h, w) and (K, h, w) weights that add up to one."""
    return torch.stack([each * weight.to(each) for each, weight in zip(predictions, weights, strict=True)]).sum(dim=0)
