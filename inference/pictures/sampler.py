"""From requests to pictures: what two requests have in common is loaded once."""

import importlib.metadata
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ControlNetModel
from diffusers.callbacks import PipelineCallback
from PIL import Image

from ...configs.errors import UserError
from ...configs.plain import plain
from ...models.base import pin_revision
from ...models.device import chosen_device, chosen_dtype, device_words
from ...models.family import PromptOptions
from ..attention import choose_attention
from ..callbacks.adapter_schedule import AdapterSchedule
from ..callbacks.dynamic_guidance import DynamicGuidance
from ..compilation import compile_blocks
from ..controlnet import Control, check_fits, load_controlnets
from ..engine import Engine, Request
from ..given_pictures import read_mask, read_picture
from ..mixing import adapter_title
from ..schedulers import check_steps, make_scheduler
from .request import AdapterChoice, ControlChoice, PictureRequest

PACKAGES = ("loraloom", "torch", "diffusers", "transformers", "peft")


class Sampler:
    """Makes the pictures of one request after the other."""

    def __init__(self):
        self._engine: Engine | None = None
        self._base: tuple[Any, ...] = ()
        self._fitting: set[tuple[Any, ...]] = set()
        self._attention = "sdpa"
        self._sizes: dict[tuple[Any, ...], int] = {}
        self._adapters: list[str] = []
        self._compiled = False
        self._controlnets: dict[tuple[str, str], ControlNetModel] = {}

    def pictures(self, request: PictureRequest) -> list[Image.Image]:
        """All pictures of a request. UserError for what cannot be made."""
        engine = self.ready(request)
        return engine.generate(self._request(request), callbacks=self._callbacks(engine, request))

    def check(self, request: PictureRequest) -> None:
        """UserError for what can be seen without sampling: sizes, sampler, words, pictures, ControlNets."""
        engine = self._engine_of(request)
        asked = self._request(request)
        engine.check(asked)
        for control in asked.controls:
            check_fits(engine.family, engine.parts, control.model)
        check_steps(make_scheduler(request.scheduler, engine.parts["scheduler"]), request.steps)
        self._check_words(engine, request)
        for choice in request.adapters:
            self._check_adapter(engine, choice)
        if request.fuse and any((choice.start, choice.end) != (0.0, 1.0) for choice in request.adapters):
            raise UserError("fused adapters have one weight in all steps: leave out `fuse`, or `start` and `end`")

    def _check_adapter(self, engine: Engine, choice: AdapterChoice) -> None:
        """That it can be read for this base, once for each."""
        if (self._base, choice.file, str(choice.weight)) not in self._fitting:
            engine.adapters.check_adapter(choice.file, choice.weight)
            self._fitting.add((self._base, choice.file, str(choice.weight)))

    def micro_batch(self, request: PictureRequest) -> int:
        """Pictures of one forward pass."""
        key = self.key(request)
        if key not in self._sizes:
            self._sizes[key] = self._engine_of(request).micro_batch_of(Request([], []))
        return request.micro_batch or self._sizes[key]

    def key(self, request: PictureRequest) -> tuple[Any, ...]:
        """What two requests on the same engine have in common."""
        device = self.device(request)
        dtype = chosen_dtype(request.dtype, device, request.base)
        return request.base, request.revision, dtype, device, request.attention, request.compile

    def device(self, request: PictureRequest) -> str:
        """Where it is made; `cuda` of several processes is that of each one's own number on its machine."""
        device = chosen_device(request.device)
        return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device

    def facts(self, request: PictureRequest) -> dict[str, Any]:
        """What the request left open, as it was decided."""
        revision = pin_revision(request.base, request.revision)
        device = self.device(request)
        kind = device.partition(":")[0]
        return {
            "revision": revision,
            "dtype": chosen_dtype(request.dtype, device, request.base),
            "device": None if kind == "cpu" else kind,  # which the threads tell
            "micro_batch": self.micro_batch(request),
            "attention": self._attention,
            "threads": torch.get_num_threads() if kind == "cpu" else None,
        }

    def words(self, requests: Sequence[PictureRequest]) -> str:
        """Where the pictures are made and in which type: `on the CPU, weights in fp32`."""
        found = [(self.key(request)[3], self.key(request)[2]) for request in requests]
        return "; ".join(device_words(*each) for each in dict.fromkeys(found))

    def ready(self, request: PictureRequest) -> Engine:
        """The engine with the request's adapters and sampler."""
        engine = self._engine_of(request)
        engine.set_scheduler(request.scheduler)
        self._mix(engine, request)
        self._check_words(engine, request)  # the words of adapters are known now
        if request.compile and not self._compiled:  # blocks that get an adapter afterwards are compiled again
            compile_blocks(engine.parts[engine.family.denoiser], engine.family.repeated_blocks)
            self._compiled = True
        return engine

    def _engine_of(self, request: PictureRequest) -> Engine:
        wanted = self.key(request)
        if self._engine is None or wanted != self._base:
            self._engine = None  # two bases at once may be too much
            _, _, dtype, device, *_ = wanted
            self._engine = Engine.load(request.base, revision=request.revision, dtype=dtype, device=device)
            self._base, self._adapters, self._compiled = wanted, [], False
            self._attention = request.attention
            if request.attention != "sdpa":  # which is what a fresh engine has
                chosen = choose_attention(self._engine.pipeline, request.attention, training=False)
                print(plain(chosen), file=sys.stderr)
                self._attention = chosen.backend
        return self._engine

    def _mix(self, engine: Engine, request: PictureRequest) -> None:
        """The adapters in the request's order: another one sums in another order, which are other bits."""
        adapters, files = engine.adapters, [choice.file for choice in request.adapters]
        if adapters.is_fused:
            adapters.unfuse()
        names = [adapter_title(number) for number in range(len(files))]
        if files != self._adapters:
            adapters.unload()
            self._adapters = []
            for name, choice in zip(names, request.adapters, strict=True):
                adapters.load_adapter(choice.file, name, choice.weight)
            self._adapters = files
        if files:
            weighed = adapters.get_names_with_layers()
            adapters.set_adapters({n: c.weight for n, c in zip(names, request.adapters, strict=True) if n in weighed})
            if request.fuse:
                adapters.fuse()

    def _callbacks(self, engine: Engine, request: PictureRequest) -> list[PipelineCallback]:
        found: list[PipelineCallback] = []
        if request.guidance_until < 1:
            found.append(DynamicGuidance(until=request.guidance_until))
        limited = {adapter_title(k): c for k, c in enumerate(request.adapters) if (c.start, c.end) != (0.0, 1.0)}
        if limited:
            found.append(AdapterSchedule(engine.adapters, {name: _between(c) for name, c in limited.items()}))
        return found

    def _request(self, request: PictureRequest) -> Request:
        return Request.repeat(
            [request.prompt],
            request.num_images,
            request.seed,
            steps=request.steps,
            guidance=request.guidance,
            negative_prompt=request.negative_prompt,
            resolution=_resolution(request),
            prompt_options=PromptOptions(request.token_windows, request.clip_skip, request.weighted),
            image=read_picture(request.image) if request.image else None,
            mask=read_mask(request.mask) if request.mask else None,
            strength=request.strength,
            controls=[self._control(choice, self.key(request)[2]) for choice in request.controls],
            micro_batch=request.micro_batch,
            place=request.place,
        )

    def _control(self, choice: ControlChoice, dtype: str) -> Control:
        key = (choice.model, dtype)
        if key not in self._controlnets:
            (self._controlnets[key],) = load_controlnets([choice.model], dtype)
        return Control(self._controlnets[key], read_picture(choice.image), choice.scale)

    def _check_words(self, engine: Engine, request: PictureRequest) -> None:
        """What does not fit would be cut without a word. Weighted prompts are counted where they are parsed."""
        room = request.token_windows * (engine.family.token_window - 2)
        for prompt in (request.prompt, request.negative_prompt):
            (count,) = engine.family.count_tokens(engine.parts, [prompt])
            if count > room and not request.weighted:
                windows = -(-count // (engine.family.token_window - 2))
                raise UserError(
                    f"the prompt {prompt[:40]!r}… has {count} tokens and {room} fit: "
                    f"give token_windows: {windows} (--token-windows {windows}), or fewer words"
                )


def versions() -> str:
    """What made the picture: `torch 2.13.0, …`."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)


def _between(choice: AdapterChoice) -> Any:
    return lambda fraction: choice.weight if choice.start <= fraction < choice.end else 0.0


def _resolution(request: PictureRequest) -> int | tuple[int, int] | None:
    if request.width is None and request.height is None:
        return None
    if request.width is None or request.height is None:
        return request.width or request.height
    return request.width, request.height
