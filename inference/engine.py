"""Loads a base as a diffusers pipeline and samples images: the only place that does, in training too.

`engine.pipeline` is the real pipeline object.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.callbacks import PipelineCallback
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm
from transformers.utils import logging

from ..configs.choices import did_you_mean
from ..configs.errors import UserError
from ..configs.schema import ModelSection
from ..models.encode import Encode, encoder_of
from ..models.family import ONE_WINDOW, ModelFamily, Parts, PromptOptions
from .callback import attached
from .merged import MergedBase
from .mixing import Mixing

SCHEDULERS = {
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}
DEFAULT_SCHEDULER = "dpmsolver++"
MICRO_BATCH = 4  # images of one forward pass, fixed: another number gives other bits


@dataclass(frozen=True, slots=True)
class Request:
    """Images to sample: one prompt and one seed for each."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    steps: int = 20
    guidance: float = 4.0  # classifier-free guidance scale; 1 and below: none
    negative_prompt: str = ""
    resolution: int | None = None  # pixels each way; the base's own when None
    prompt_options: PromptOptions = ONE_WINDOW

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.seeds):
            raise UserError(f"{len(self.prompts)} prompts were given with {len(self.seeds)} seeds")

    @classmethod
    def repeat(cls, prompts: Sequence[str], num_images: int, seed: int, **rest: Any) -> "Request":
        """`num_images` of each prompt; image k of every prompt has the seed `seed + k`."""
        return cls(
            prompts=[prompt for prompt in prompts for _ in range(num_images)],
            seeds=[seed + k for _ in prompts for k in range(num_images)],
            **rest,
        )


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Pictures of a request that one call of the pipeline makes."""

    request: Request
    prompts: list[str]  # MICRO_BATCH of them; where fewer are left, the last one again and again
    num_images: int  # that are kept, the first ones
    encode: Encode  # with the request's prompt options


class Engine:
    """A base that is ready to sample."""

    def __init__(
        self,
        family: ModelFamily,
        parts: Parts,
        scheduler: str | None = DEFAULT_SCHEDULER,
        encode: Encode | None = None,
    ):
        """`encode` gives the embeddings of prompts where the text encoders are not loaded.

        Without a `scheduler` it samples with the base's own.
        """
        self.family, self.parts, self.encode = family, parts, encode
        pipeline_class: Any = family.pipeline
        if isinstance(pipeline_class, str):
            pipeline_class = _import_quietly(pipeline_class)
        wanted = inspect.signature(pipeline_class.__init__).parameters
        optional = ("safety_checker", "feature_extractor", *family.prompt_encoders)
        absent = {name: None for name in optional if name in wanted and name not in parts}
        off = ("requires_safety_checker", "add_watermarker")  # the watermark changes pixels where its library is there
        extra = {name: False for name in off if name in wanted}
        self.pipeline: Any = pipeline_class(
            **parts | ({} if scheduler is None else {"scheduler": make_scheduler(scheduler, parts)}), **absent, **extra
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.adapters = Mixing(family, parts, self.pipeline)
        self.around: list[Callable[[MicroBatch], AbstractContextManager[None]]] = []
        """What lasts as long as each call of the pipeline, beside callbacks: see `regional`, `AttentionRecorder`."""

    @classmethod
    def load(
        cls,
        base: str,
        *,
        revision: str | None = None,
        dtype: str = "fp32",
        device: str = "cpu",
        scheduler: str = DEFAULT_SCHEDULER,
        merged: Sequence[str] = (),
    ) -> "Engine":
        """From `pocket`, a pipeline folder or a hub id; `merged` are adapter files that become part of it."""
        model = {"base": base, "revision": revision, "dtype": dtype, "adapters": list(merged)}
        found = MergedBase(ModelSection.model_validate(model))
        engine = cls(found.family, found.load(), scheduler)
        try:
            engine.pipeline.to(device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
        return engine

    @torch.no_grad()  # inference_mode cannot read weights that FSDP2 gathers
    def generate(
        self, request: Request, *, callbacks: Sequence[PipelineCallback] = (), progress: str | None = None
    ) -> list[Image.Image]:
        """One image for each prompt, in order; `progress` is the title of a progress bar.

        `callbacks` are ours or diffusers' own, called after each step of each micro-batch.
        """
        if request.resolution is not None and request.resolution % self.family.size_multiple:
            raise UserError(f"resolution {request.resolution} is no multiple of {self.family.size_multiple}")
        encode = self.encode or encoder_of(self.family, self.parts, request.prompt_options)
        indices = range(len(request.prompts))
        starts = range(0, len(indices), MICRO_BATCH)
        images: list[Image.Image] = []
        for start in tqdm(starts, desc=progress, unit="batch", disable=progress is None, leave=False):
            images += self._generate_micro_batch(request, encode, list(indices[start : start + MICRO_BATCH]), callbacks)
        return images

    def _generate_micro_batch(
        self, request: Request, encode: Encode, indices: list[int], callbacks: Sequence[PipelineCallback]
    ) -> list[Image.Image]:
        padded = indices + indices[-1:] * (MICRO_BATCH - len(indices))
        prompts = [request.prompts[i] for i in padded]
        positive = encode(prompts)
        negative = encode([request.negative_prompt] * MICRO_BATCH)
        arguments = {
            **self.family.pipeline_prompts(positive, negative),
            "num_inference_steps": request.steps,
            "guidance_scale": request.guidance,
            "height": request.resolution,
            "width": request.resolution,
            "generator": [torch.Generator().manual_seed(request.seeds[i]) for i in padded],
            "output_type": "pil",
        }
        with ExitStack() as stack:
            for enter in self.around:
                stack.enter_context(enter(MicroBatch(request, prompts, len(indices), encode)))
            further = stack.enter_context(attached(self.pipeline, callbacks, request.steps))
            output = self.pipeline(**arguments | further)
        return output.images[: len(indices)]


def _import_quietly(pipeline: str) -> Any:
    """A pipeline class. Importing one makes transformers warn of a torchvision that nothing here needs."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return getattr(diffusers, pipeline)
    finally:
        logging.set_verbosity(verbosity)


def make_scheduler(name: str, parts: Parts) -> Any:
    """A sampling scheduler with the base's own noise schedule."""
    if name not in SCHEDULERS:
        hint = did_you_mean(name, SCHEDULERS)
        raise UserError(f"scheduler {name!r} is unknown{hint}; there are: {', '.join(SCHEDULERS)}")
    return getattr(diffusers, SCHEDULERS[name]).from_config(parts["scheduler"].config)


def image_grid(images: Sequence[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Images of one size in rows of `columns`, with white lines between them."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        grid.paste(image, (column * (width + gap), row * (height + gap)))
    return grid


def png_info(**facts: Any) -> PngInfo:
    """PNG text fields, one for each fact that is not None."""
    info = PngInfo()
    for key, value in facts.items():
        if value is not None:
            info.add_itxt(key, str(value))
    return info
