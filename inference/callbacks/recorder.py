"""The latents of the whole denoising of each image, kept, and drawn as a strip or an animation.

They are as diffusers has them after a step, with the noise that is still in them.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...configs.errors import UserError
from ...configs.ownership import writing
from ...models.family import ModelFamily
from ..callback import Callback, is_due
from ..latent_images import mapped, strip


class Recorder(Callback):
    """Keeps latents after each `every`-th step and after the last one, of one request at a time."""

    tensor_inputs = ["latents"]

    def __init__(self, every: int = 1) -> None:
        if every < 1:
            raise UserError(f"Recorder: every={every} is not 1 or more")
        self.every = every
        self.begin()

    def begin(self) -> None:
        self._frames: dict[int, list[Tensor]] = defaultdict(list)
        self._pipeline: Any = None
        self._family: ModelFamily | None = None

    @property
    def latents(self) -> list[Tensor]:
        """Of each image that was begun: (frames, C, h, w), scaled, on the CPU, in the pipeline's type."""
        return [torch.stack(frames) for _, frames in sorted(self._frames.items())]

    def callback_fn(
        self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        self._pipeline, self._family = pipeline, self.call.family
        if is_due(pipeline, step_index, self.every):
            for place, row in self.call.by_image(callback_kwargs["latents"]).items():
                self._frames[place].append(row.detach().to("cpu", copy=True))
        return callback_kwargs

    def write_strip(self, file: str | Path) -> None:
        """A row for each image, a column for each frame. UserError where there are none, or no family is known."""
        drawn = strip(self._drawn())
        with writing(Path(file)) as new:
            drawn.save(new, format=_format_of(file))

    def write_gif(self, file: str | Path, milliseconds: int = 100) -> None:
        """Images side by side, a frame after another; the last one of an image stays. UserError as for the strip."""
        rows = self._drawn()
        length = max(map(len, rows))
        first, *rest = [strip([[row[min(k, len(row) - 1)] for row in rows]]) for k in range(length)]
        with writing(Path(file)) as new:
            first.save(new, format="GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0)

    def _drawn(self) -> list[list[Image.Image]]:
        if not self._frames:
            raise UserError("Recorder: nothing was recorded; give it to the call as a callback")
        if self._family is None:
            raise UserError("Recorder: colours need a family: attached(..., call=Call(family)); `latents` do not")
        factors = self._family.latent_rgb(self._pipeline.components)
        return [mapped(latents, factors, self._pipeline.vae_scale_factor) for latents in self.latents]


def _format_of(file: str | Path) -> str:
    """Of a picture, by its ending. UserError for one that is not known."""
    ending = Path(file).suffix.lower()
    if ending not in Image.registered_extensions():
        raise UserError(f"{file}: should end as a picture does, such as .png")
    return Image.registered_extensions()[ending]
