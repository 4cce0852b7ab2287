"""Images sampled during training, with the weights as they are, by the engine that `loraloom sample` uses."""

import json
import re
from pathlib import Path

from ...inference.engine import Engine, Request, image_grid, png_info
from ..callback import Callback
from ..captions import prompt_options
from ..run import Run, StepResult


class Validation(Callback):
    """Writes `samples/step-N/`; nothing that it draws at random touches training."""

    def on_step(self, run: Run, result: StepResult) -> None:
        section = run.config.validation
        if section.prompts and run.is_due(section.every) and run.is_main and not run.stop:
            sample_prompts(run, run.folder / "samples" / f"step-{run.step:06d}")
        run.accelerator.wait_for_everyone()


def sample_prompts(run: Run, folder: Path) -> None:
    """All validation prompts, as files, with a list of them and a grid (one row for each prompt)."""
    section = run.config.validation
    request = Request.repeat(
        section.prompts,
        section.num_images,
        section.seed,
        steps=section.steps,
        guidance=section.guidance,
        resolution=max(run.config.data.resolutions),
        prompt_options=prompt_options(run.config),
    )
    absent = [part for part in run.family.image_encoders if part not in run.parts]
    parts = run.parts | run.adapters.carriers | run.load(absent)  # the decoder is here only while it is needed
    with run.exported():
        images = Engine(run.family, parts, encode=run.encode).generate(request, progress="validation")
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for index, (image, prompt, seed) in enumerate(zip(images, request.prompts, request.seeds, strict=True)):
        row, column = divmod(index, section.num_images)
        name = f"{row:02d}-{slug(prompt)}-{column}.png"
        image.save(folder / name, pnginfo=png_info(prompt=prompt, seed=seed, step=run.step))
        listed.append({"file": name, "prompt": prompt, "seed": seed})
    (folder / "samples.json").write_text(json.dumps(listed, indent=1))
    image_grid(images, section.num_images).save(folder / "grid.png")


def slug(prompt: str) -> str:
    """A file name that still can be read."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "empty"
