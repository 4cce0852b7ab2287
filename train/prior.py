"""Class images for DreamBooth's prior preservation (Ruiz et al. 2022, section 3.2), made with the base itself."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from ..configs.errors import UserError
from ..configs.files import replacing
from ..configs.schema import ModelSection, PriorSource
from ..data.draws import key_seed
from ..inference.engine import MICRO_BATCH, Engine, Request, png_info


def class_image_paths(source: PriorSource, model: ModelSection, resolution: int, seed: int, folder: Path) -> list[Path]:
    """Where the class images of a run folder lie, made or not.

    The name of their folder holds a hash of everything that decides the pictures, so that others are never mixed in.
    """
    recipe = [model.base, model.revision, model.dtype, source.prior, source.steps, source.guidance, resolution, seed]
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]
    return [folder / f"prior-{digest}" / f"{index:05d}.png" for index in range(source.count)]


def class_image_files(
    source: PriorSource,
    model: ModelSection,
    make_engine: Callable[[], Engine],
    resolution: int,
    seed: int,
    folder: Path,
) -> list[Path]:
    """The files of all class images; those that an earlier start of the run has made are kept.

    The base is loaded, by `make_engine`, only if there are any to make.
    """
    files = class_image_paths(source, model, resolution, seed, folder)
    files[0].parent.mkdir(parents=True, exist_ok=True)
    missing = [index for index, file in enumerate(files) if not file.exists()]
    if missing and not source.generate:
        found = f"{files[0].parent} holds {source.count - len(missing)} of {source.count} class images"
        raise UserError(
            f"prior {source.prior!r}: {found}, and `generate` is false; let it make them, or ask for fewer by `count`"
        )
    engine = make_engine() if missing else None
    for start in range(0, len(missing), 8 * MICRO_BATCH):
        assert engine is not None
        chunk = missing[start : start + 8 * MICRO_BATCH]
        request = Request(
            prompts=[source.prior] * len(chunk),
            seeds=[key_seed(seed, "prior", index) for index in chunk],
            steps=source.steps,
            guidance=source.guidance,
            resolution=resolution,
        )
        images = engine.generate(request, progress=f"class images {start + len(chunk)}/{len(missing)}")
        for index, image in zip(chunk, images, strict=True):
            with replacing(files[index]) as new:
                image.save(new, format="PNG", pnginfo=png_info(prompt=source.prior))
    return files
