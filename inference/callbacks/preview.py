"""The picture as it comes, shown while it is sampled.

It shows the latents as diffusers has them after a step: the picture so far and the noise that is still in it. Those of
schedulers that do not keep the variance, such as Euler's, begin far out of range, and are cut to what a colour can be.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...configs.errors import UserError
from ...configs.ownership import writing
from ..callback import Callback, is_due
from ..latent_images import decoded, mapped

Show = Callable[[list[Image.Image], int], object]


class Preview(Callback):
    """Gives the images to `show(images, steps done)`, and to `folder` as `<image>-<steps done>.png`, or to one of them.

    After each `every`-th step and after the last one, by the linear map of the family, which must be known then (see
    `Call`), or with `vae` through the VAE, which is exact and can cost as much as a step. Images of one call at a time.
    """

    tensor_inputs = ["latents"]

    def __init__(
        self, show: Show | None = None, *, folder: str | Path | None = None, every: int = 1, vae: bool = False
    ) -> None:
        if show is None and folder is None:
            raise UserError("Preview: give it a function, show(images, step), or a folder, or both")
        if every < 1:
            raise UserError(f"Preview: every={every} is not 1 or more")
        self.show, self.every, self.vae = show, every, vae
        self.folder = None if folder is None else Path(folder)

    @contextmanager
    def around(self, pipeline: Any, num_steps: int) -> Iterator[None]:
        if not self.vae:
            self._factors(pipeline)
        if self.folder:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"Preview: folder {self.folder} cannot be made ({error.strerror})") from error
        yield

    def callback_fn(
        self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        if is_due(pipeline, step_index, self.every):
            rows = self.call.by_image(callback_kwargs["latents"])
            images = self._images(pipeline, torch.stack(list(rows.values())))
            if self.folder:
                for place, image in zip(rows, images, strict=True):
                    with writing(self.folder / f"{place:04d}-{step_index + 1:03d}.png") as new:
                        image.save(new, format="PNG")
            if self.show:
                self.show(images, step_index + 1)
        return callback_kwargs

    def _images(self, pipeline: Any, latents: Tensor) -> list[Image.Image]:
        if self.vae:
            return decoded(pipeline, latents)
        return mapped(latents, self._factors(pipeline), pipeline.vae_scale_factor)

    def _factors(self, pipeline: Any) -> Tensor:
        if self.call.family is None:
            raise UserError("Preview: without a family (attached(..., call=Call(family))) it needs vae=True")
        return self.call.family.latent_rgb(pipeline.components)
