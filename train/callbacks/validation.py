"""Images sampled during training, with the weights as they are, by the engine that `loraloom sample` uses."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers.callbacks import PipelineCallback

from ...configs.errors import TrainingError
from ...configs.ownership import write_file
from ...configs.progress import say
from ...inference.engine import Engine, Request
from ...inference.finite import NotFinite
from ...inference.pictures.png import image_grid, save_png
from ..callback import Callback, own_callbacks
from ..captions import prompt_options
from ..contrast import collapsed, contrast
from ..footprint import RUN
from ..journal import tolerated
from ..run import Run
from ..run_folder import read_pictures
from ..together import together

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import nn


class Validation(Callback):
    """Writes `samples/step-N/`; nothing that it draws at random touches training."""

    def on_start(self, run: Run) -> None:
        if run.config.validation.at_start and run.step == 0:
            self._sample(run, base=True)

    def on_step(self, run: Run) -> None:
        if run.is_due(run.config.validation.every) and not run.stop:
            self._sample(run)

    def _sample(self, run: Run, base: bool = False) -> None:
        if run.config.validation.prompts:
            together(run.accelerator, lambda: self._pictures(run, base) if run.takes_part else None)

    def _pictures(self, run: Run, base: bool) -> None:
        """Weights that make no finite latents are a fault as a loss is; what the VAE does to them is said."""
        try:
            sample_prompts(run, run.folder / "samples" / f"step-{run.step:06d}", base=base)
        except NotFinite as error:
            words = f"step {run.step}: validation: {error}"
            if error.latents and run.config.guard.on_fault == "stop":
                raise TrainingError(
                    f"{words}. Training goes on without a look at it by `guard.on_fault: skip`"
                ) from error
            say(f"warning: {words}")


def requests_of(run: Run) -> list[Request]:
    """The images of a validation; neighbouring prompts with the same settings are sampled together."""
    section = run.config.validation
    groups = groupby(section.sections, lambda each: (each.negative_prompt, each.steps, each.guidance))
    return [
        Request(
            prompts=[each.prompt for each in prompts for _ in range(section.num_images)],
            seeds=[(each.seed or 0) + k for each in prompts for k in range(section.num_images)],
            steps=steps or section.steps,
            guidance=section.guidance if guidance is None else guidance,
            negative_prompt=negative,
            resolution=max(run.config.data.resolutions),
            prompt_options=prompt_options(run.config),
        )
        for (negative, steps, guidance), found in groups
        for prompts in [list(found)]
    ]


@contextmanager
def sampling(run: Run) -> Iterator[Engine]:
    """Within, an engine on the modules in memory, all in the denoiser's type; what decodes is loaded for it.

    Text encoders of another type stay away: embeddings are `run.encode`'s, and a pipeline would cast them to that type.
    """
    family, parts = run.family, run.parts | run.adapters.carriers
    dtype = _type_of(parts[family.denoiser])
    others = [part for part in (*family.text_encoders, *family.image_encoders) if part in parts]
    parts = {name: part for name, part in parts.items() if name not in others or _type_of(part) == dtype}
    absent = [part for part in family.image_encoders if part not in parts]
    with run.exported():
        yield Engine(family, parts | run.load(absent, dtype), encode=run.encode)


def _type_of(module: "nn.Module") -> "torch.dtype":
    return next(module.parameters()).dtype


def sample_prompts(run: Run, folder: Path, base: bool = False) -> None:
    """All validation prompts, as files, with a list of them and a grid (one row for each prompt).

    `base` samples without the adapter, where its method can do without.
    """
    requests = requests_of(run)
    with sampling(run) as engine, run.adapters.disabled() if base and run.adapters.can_disable else nullcontext():
        progress = "validation" if run.is_main else None
        own = own_callbacks(run.config.validation.callbacks, PipelineCallback, "validation.callbacks")
        found = [engine.generate(request, callbacks=own, progress=progress) for request in requests]
    images = [image for group in found for image in group]
    if run.is_main:
        with tolerated(f"pictures of step {run.step}"):
            _write_pictures(run, folder, images, requests)


def _write_pictures(run: Run, folder: Path, images: "Sequence[Image]", requests: Sequence[Request]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    listed, num_images = [], run.config.validation.num_images
    asked = [pair for request in requests for pair in zip(request.prompts, request.seeds, strict=True)]
    for index, (image, (prompt, seed)) in enumerate(zip(images, asked, strict=True)):
        row, column = divmod(index, num_images)
        name = f"{row:02d}-{slug(prompt)}-{column}.png"
        save_png(image, folder / name, run.folder, RUN, prompt=prompt, seed=seed, step=run.step)
        listed.append({"file": name, "prompt": prompt, "seed": seed, "contrast": contrast(image)})
    write_file(folder / "samples.json", json.dumps(listed, indent=1), run.folder, RUN)
    save_png(image_grid(images, num_images), folder / "grid.png", run.folder, RUN)
    _warn_of_collapse(run, folder)


def _warn_of_collapse(run: Run, folder: Path) -> None:
    base = folder.with_name("step-000000") / "samples.json"
    found, before = (
        read_pictures({step: file}, [step]) if file.is_file() else []
        for step, file in ((run.step, folder / "samples.json"), (0, base))
    )
    if run.step and (words := collapsed(found, before)):
        say(f"warning: step {run.step}: {words}")


def slug(prompt: str) -> str:
    """A file name that still can be read."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "empty"
