"""Loads a base as a diffusers pipeline and samples images: the only place that does, in training too.

`engine.pipeline` is the real pipeline object, `engine.adapters` what is mixed into it.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from diffusers import ControlNetModel
from diffusers.callbacks import PipelineCallback
from PIL import Image, ImageOps

from ..adapters.artifact import AdapterArtifact
from ..configs.choices import did_you_mean
from ..configs.dtypes import AUTO
from ..configs.errors import UserError
from ..configs.progress import Bar
from ..configs.schema import ModelSection
from ..models.device import chosen_device, chosen_dtype
from ..models.encode import Encode, encoder_of
from ..models.family import ONE_WINDOW, Conditioning, ModelFamily, Parts, PromptOptions
from ..models.quiet import quietly
from .callback import Call, attached, begin, stopped
from .controlnet import Control, controlnet_task, together
from .finite import decoding_finite
from .given_pictures import shown_mask, shown_picture
from .merged import MergedBase
from .mixing import Mixing, adapter_title
from .schedulers import DEFAULT_SCHEDULER, check_steps, make_scheduler
from .weighted_file import AdapterFile

MOST_TIMES = 16
"""The side that a base was trained at; attention takes the fourth power of it."""
MICRO_BATCH = 4  # small images of one forward pass; another number, or another place in it, gives other bits
SMALL = 32  # latents each way; of larger ones each image has a forward pass of its own


@dataclass(frozen=True, slots=True)
class Request:
    """Images to sample: one prompt and one seed for each."""

    prompts: Sequence[str]  # a text alone is one prompt
    seeds: Sequence[int] = ()  # none given: 0 for each
    steps: int = 20
    guidance: float = 4.0  # classifier-free guidance scale; 1 and below: none
    negative_prompt: str = ""
    resolution: int | tuple[int, int] | None = None  # pixels, or (width, height); None: a picture's, or the base's
    prompt_options: PromptOptions = ONE_WINDOW
    image: Image.Image | None = None  # what image-to-image begins with
    mask: Image.Image | None = None  # where it may change, white
    strength: float = 0.8  # how much of the denoising the image goes through, in (0, 1]
    controls: Sequence[Control] = ()  # ControlNets and what they follow
    micro_batch: int | None = None  # images of one forward pass; the engine's when None
    place: int = 0  # of the first image in its forward pass, in [0, micro_batch)

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # frozen; what is shown stays as it is when a request is made from another
        if isinstance(self.prompts, str):
            set_field(self, "prompts", [self.prompts])
        if not self.seeds:
            set_field(self, "seeds", [0] * len(self.prompts))
        if len(self.prompts) != len(self.seeds):
            raise UserError(f"{len(self.prompts)} prompts were given with {len(self.seeds)} seeds")
        if self.mask is not None and self.image is None:
            raise UserError("a mask says where an image may change, so it needs an image")
        if self.image is not None:
            set_field(self, "image", shown_picture(self.image))
        if self.image is not None and self.mask is not None:
            set_field(self, "mask", shown_mask(self.mask, self.image.size))
        if self.image is not None and not 0 < self.strength <= 1:
            raise UserError(f"strength {self.strength:g}: should be above 0 and at most 1")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise UserError(f"micro_batch {self.micro_batch}: should be at least 1")

    @classmethod
    def repeat(cls, prompts: Sequence[str], num_images: int, seed: int, **rest: Any) -> "Request":
        """`num_images` of each prompt; image k of every prompt has the seed `seed + k`."""
        return cls(
            prompts=[prompt for prompt in prompts for _ in range(num_images)],
            seeds=[seed + k for _ in prompts for k in range(num_images)],
            **rest,
        )

    @property
    def task(self) -> str:
        """Which of the family's pipelines makes it."""
        if self.image is None:
            return "text_to_image"
        return "image_to_image" if self.mask is None else "inpaint"

    @property
    def sides(self) -> tuple[int, int] | None:
        """(width, height) in pixels, where they are not the base's own."""
        if self.resolution is not None:
            return (self.resolution, self.resolution) if isinstance(self.resolution, int) else self.resolution
        if self.image is not None:
            return self.image.size
        return self.controls[0].image.size if self.controls else None

    def part(self, indices: Sequence[int]) -> "Request":
        """Some of the images."""
        return replace(self, prompts=[self.prompts[i] for i in indices], seeds=[self.seeds[i] for i in indices])


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Pictures of a request that one call of the pipeline makes."""

    request: Request
    prompts: Sequence[str]  # of the whole forward pass: before and after those that are kept stand repetitions
    kept: range  # their places
    encode: Encode  # with the request's prompt options


class Engine:
    """A base that is ready to sample."""

    def __init__(
        self,
        family: ModelFamily,
        parts: Parts,
        scheduler: str | None = DEFAULT_SCHEDULER,
        encode: Encode | None = None,
        base: str | None = None,
    ):
        """`encode` gives the embeddings of prompts where the text encoders are not loaded; `base` is where it is from.

        Without a `scheduler` it samples with the base's own.
        """
        self.family, self.parts, self.encode, self.base = family, parts, encode, base
        self.scheduler = parts.get("scheduler") if scheduler is None else make_scheduler(scheduler, parts["scheduler"])
        self._pipelines: dict[str, Any] = {}
        self.pipeline: Any = self.pipeline_for("text_to_image")
        self.adapters = Mixing(family, parts, self._replace_part)
        self.around: list[Callable[[MicroBatch], AbstractContextManager[None]]] = []
        """What lasts as long as each call of the pipeline, beside callbacks: see `regional`, `AttentionRecorder`."""
        if hasattr(parts.get("vae"), "enable_slicing"):
            parts["vae"].enable_slicing()  # decodes one by one: four large pictures at once take gigabytes

    def __repr__(self) -> str:
        return f"<Engine {self.base or self.family.name}, adapters: {', '.join(self.adapters.get_names()) or 'none'}>"

    @classmethod
    def load(
        cls,
        base: str,
        *,
        revision: str | None = None,
        dtype: str = AUTO,
        device: str = AUTO,
        scheduler: str = DEFAULT_SCHEDULER,
        merged: Sequence[str] = (),
    ) -> "Engine":
        """From `pocket`, a pipeline folder, a `.safetensors` checkpoint or a hub id.

        `merged` are adapter files that become part of it. By itself it takes the GPU that there is, in half precision,
        and else the CPU in fp32: `models.device`.
        """
        device = chosen_device(device)
        dtype = chosen_dtype(dtype, device, base)
        model = {"base": base, "revision": revision, "dtype": dtype, "adapters": list(merged)}
        found = MergedBase(ModelSection.model_validate(model))
        engine = cls(found.family, found.load(), scheduler, base=base)
        try:
            with quietly():  # diffusers says of fp16 that a CPU has no kernels for it
                engine.pipeline.to(device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
        return engine

    def pipeline_for(self, task: str, **further: Any) -> Any:
        """The family's pipeline for a task (`text_to_image`, `image_to_image`, `inpaint`, …) on the same components.

        `further` are components that the base has not, such as a `controlnet`: then it is made anew each time.
        """
        if task not in self.family.pipelines:
            hint = did_you_mean(task, self.family.pipelines)
            raise UserError(f"task {task!r} is unknown{hint}; there are: {', '.join(self.family.pipelines)}")
        if further or task not in self._pipelines:
            kind = self.family.pipelines[task]
            pipeline = make_pipeline(kind, self.parts | further | self._own(), self.family)
            if further:
                return pipeline
            self._pipelines[task] = pipeline
        return self._pipelines[task]

    def pipeline_with(self, controlnets: Sequence[ControlNetModel], task: str = "text_to_image") -> Any:
        """The base's ControlNet pipeline, of the very parts that `pipeline` has; nothing is loaded or copied.

        With several its call wants a list of images and one of scales (`image`, `controlnet_conditioning_scale`);
        inpainting and image-to-image take the hint as `control_image`. UserError for a ControlNet of another family.
        """
        several = together(self.family, self.parts, controlnets)
        return self.pipeline_for(controlnet_task(task), controlnet=several.to(self.pipeline.device))

    def attach(self, adapters: Sequence[AdapterFile]) -> list[AdapterArtifact]:
        """Loads adapters of any readable format and activates them together, under the names of `adapter_title`."""
        return [
            self.adapters.load_adapter(adapter.file, adapter_title(index), adapter.weight)
            for index, adapter in enumerate(adapters)
        ]

    def _own(self) -> Parts:
        return {} if self.scheduler is None else {"scheduler": self.scheduler}

    def _pipeline_of(self, request: Request) -> Any:
        if request.controls:
            return self.pipeline_with([control.model for control in request.controls], request.task)
        return self.pipeline_for(request.task)

    def set_scheduler(self, name: str) -> None:
        """Another sampler on the base's own noise schedule. UserError with the names that there are."""
        self.scheduler = make_scheduler(name, self.parts["scheduler"])
        self._replace("scheduler", self.scheduler)

    def _replace_part(self, name: str, part: Any) -> None:
        self.parts[name] = part
        self._replace(name, part)

    def _replace(self, name: str, component: Any) -> None:
        for pipeline in self._pipelines.values():
            pipeline.register_modules(**{name: component})

    def generate(
        self, request: Request | str, *, callbacks: Sequence[PipelineCallback] = (), progress: str | None = None
    ) -> list[Image.Image]:
        """One image for each prompt, in order; `progress` is the title of a progress bar. NotFinite instead of black.

        A text alone is a request for one image.

        `callbacks` are ours or diffusers' own, called after each step of each micro-batch. When one of them stops the
        sampling, there are only the images that were begun.
        """
        request = Request([request]) if isinstance(request, str) else request
        return [image for batch in self.stream(request, callbacks=callbacks, progress=progress) for image in batch]

    @torch.no_grad()  # inference_mode cannot read weights that FSDP2 gathers
    def stream(
        self, request: Request, *, callbacks: Sequence[PipelineCallback] = (), progress: str | None = None
    ) -> Iterator[list[Image.Image]]:
        """The same, micro-batch by micro-batch."""
        self.check(request)
        check_steps(self.scheduler, request.steps)
        encode = self.encode or encoder_of(self.family, self.parts, request.prompt_options)
        size, count = self.micro_batch_of(request), len(request.prompts)
        if not count:
            return
        starts = [0, *range(size - request.place % size, count, size)]
        batches = list(zip(starts, [*starts[1:], count], strict=True))
        begin(callbacks)
        for number, (start, end) in enumerate(
            Bar(batches, progress, unit="batch", disable=None if progress else True, leave=False)
        ):
            batch = replace(request.part(range(start, end)), place=0 if number else request.place % size)
            yield self._generate_micro_batch(batch, encode, callbacks, range(start, end))
            if stopped(callbacks):
                break

    def negative(self, request: Request, encode: Encode, count: int) -> Conditioning:
        """Embeddings of the negative prompt for so many images; without one they may be zeros, as the base has it."""
        found = encode([request.negative_prompt] * count)
        return found.zeros() if not request.negative_prompt and self.family.zeroes_empty_negative(self.parts) else found

    def micro_batch_of(self, request: Request) -> int:
        """Images of one forward pass: the request's, or what suits the base, but never how many there are to make."""
        if request.micro_batch is not None:
            return request.micro_batch
        return MICRO_BATCH if max(self.family.native_latents(self.parts)[1:]) <= SMALL else 1

    def check(self, request: Request) -> None:
        """UserError for a request that cannot be met."""
        multiple = self.family.size_multiple
        if (sides := request.sides) and any(side % multiple for side in sides):
            raise UserError(f"resolution {sides[0]} x {sides[1]} is no multiple of {multiple}")
        own = max(self.family.native_latents(self.parts)[1:]) * multiple
        if sides and max(sides) > MOST_TIMES * own:
            raise UserError(
                f"resolution {sides[0]} x {sides[1]} is more than {MOST_TIMES} times the {own} pixels of this base: "
                "it would take hours and draw nothing sensible; ask for less"
            )
        if request.image is not None and (steps := int(request.steps * request.strength)) < 1:
            raise UserError(f"{request.steps} steps at strength {request.strength:g} are {steps}: give more of either")

    def _generate_micro_batch(
        self, request: Request, encode: Encode, callbacks: Sequence[PipelineCallback], indices: Sequence[int]
    ) -> list[Image.Image]:
        """The images of one forward pass, which always has its full number: the first and the last one fill it up."""
        size, count = self.micro_batch_of(request), len(request.prompts)
        padded = request.part([min(max(k - request.place, 0), count - 1) for k in range(size)])
        pipeline = self._pipeline_of(request)
        arguments = {
            **self.family.pipeline_prompts(encode(padded.prompts), self.negative(request, encode, size)),
            **_pictures(request),
            "num_inference_steps": request.steps,
            "guidance_scale": request.guidance,
            "generator": [torch.Generator().manual_seed(seed) for seed in padded.seeds],
            "output_type": "pil",
        }
        call = Call(self.family, [indices[0]] * request.place + list(indices))
        kept = range(request.place, request.place + count)
        with ExitStack() as stack:
            for enter in self.around:
                stack.enter_context(enter(MicroBatch(request, padded.prompts, kept, encode)))
            stack.enter_context(decoding_finite(self.parts.get("vae"), self.parts))
            stack.enter_context(quietly())
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", ".*upcast_vae")  # diffusers', of its own call
            further = stack.enter_context(attached(pipeline, callbacks, request.steps, call))
            return pipeline(**arguments | further).images[kept.start : kept.stop]


def _pictures(request: Request) -> dict[str, Any]:
    """The arguments that say how large an image is, what it begins with and what it follows."""
    size = request.sides
    found: dict[str, Any] = {}
    if size and (request.image is None or request.mask is not None):
        found |= {"width": size[0], "height": size[1]}
    if request.image is not None and size:
        found |= {"image": _fitted(request.image, "RGB", size), "strength": request.strength}
    if request.mask is not None and size:
        found |= {"mask_image": _fitted(request.mask, "L", size)}
    if request.controls:
        name = "image" if request.image is None else "control_image"
        hints = [_fitted(control.image, "RGB", size or control.image.size) for control in request.controls]
        scales = [float(control.scale) for control in request.controls]
        found |= {name: _one_or_all(hints), "controlnet_conditioning_scale": _one_or_all(scales)}
    return found


def _one_or_all(values: list[Any]) -> Any:
    """The pipelines want lists for several ControlNets only."""
    return values[0] if len(values) == 1 else values


def _fitted(image: Image.Image, mode: str, size: tuple[int, int]) -> Image.Image:
    """Cut around its middle to the proportions, and resized."""
    return ImageOps.fit(image.convert(mode), size, Image.Resampling.LANCZOS)


def make_pipeline(kind: str | type, components: Parts, family: ModelFamily) -> Any:
    """A pipeline class of diffusers, or its name, on components that are loaded; without a safety checker or watermark.

    diffusers' own `from_pipe` would cast all of them to float32.
    """
    if isinstance(kind, str):
        with quietly():
            kind = getattr(diffusers, kind)
    assert not isinstance(kind, str)
    wanted = inspect.signature(kind.__init__).parameters
    optional = ("safety_checker", "feature_extractor", *family.prompt_encoders)
    absent = {name: None for name in optional if name in wanted and name not in components}
    off = ("requires_safety_checker", "add_watermarker")  # the watermark changes pixels where its library is there
    extra = {name: False for name in off if name in wanted}
    pipeline: Any = kind(**{name: part for name, part in components.items() if name in wanted}, **absent, **extra)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
