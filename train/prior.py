"""Class images for DreamBooth's prior preservation (Ruiz et al. 2022, section 3.2), made with the base itself."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..configs.data_sections import PriorSource
from ..configs.errors import UserError
from ..configs.ownership import remove_abandoned
from ..configs.schema import RunConfig
from ..data.draws import key_seed
from ..data.keys import content_key
from ..models.base import PipelineFiles, find_base
from .base_key import base_key
from .footprint import RUN
from .pages.words import shortened

if TYPE_CHECKING:
    from ..inference.engine import Engine


def class_image_paths(source: PriorSource, config: RunConfig) -> list[Path]:
    """Where the class images of a run lie, made or not.

    The name of their folder holds a hash of everything that decides the pictures, so that others are never mixed in.
    A folder of an older version, which took the embeddings of no words where a base wants zeros, goes on being used.
    """
    model = config.model
    made = (model.dtype, source.prior, source.steps, source.guidance, max(config.data.resolutions), config.loop.seed)
    parts = ("class images", tuple(sorted(base_key(config).items())), *made)
    folder = Path(config.output.dir) / f"prior-{content_key(*parts)[:12]}"
    if _zeroes_empty_prompt(config) and not folder.is_dir():
        folder = folder.with_name(f"prior-{content_key(*parts, 'zeros')[:12]}")
    return [folder / f"{index:05d}.png" for index in range(source.count)]


def _zeroes_empty_prompt(config: RunConfig) -> bool:
    """As the base's index says."""
    base = find_base(config.model.base, config.model.revision)
    return base is not None and bool(PipelineFiles(base).index.get("force_zeros_for_empty_prompt"))


def class_image_files(source: PriorSource, config: RunConfig, make_engine: Callable[[], "Engine"]) -> list[Path]:
    """The files of all class images; those that an earlier start of the run has made are kept.

    The base is loaded, by `make_engine`, only if there are any to make.
    """
    files = class_image_paths(source, config)
    files[0].parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(files[0].parent)
    missing = [index for index, file in enumerate(files) if not file.exists()]
    if missing and not source.generate:
        found = f"{files[0].parent} holds {source.count - len(missing)} of {source.count} class images"
        raise UserError(
            f"prior {source.prior!r}: {found}, and `generate` is false; let it make them, or ask for fewer by `count`"
        )
    if missing:
        _make(source, config, files, missing, make_engine())
    return files


def _make(source: PriorSource, config: RunConfig, files: list[Path], missing: list[int], engine: "Engine") -> None:
    from ..inference.engine import MICRO_BATCH, Request  # brings torch and diffusers
    from ..inference.pictures.png import save_png

    # each has its place in one forward pass, whatever is there already: else an interruption changes its last bits
    passes = dict.fromkeys(index // MICRO_BATCH for index in missing)
    wanted = [k for each in passes for k in range(each * MICRO_BATCH, min((each + 1) * MICRO_BATCH, len(files)))]
    for start in range(0, len(wanted), 8 * MICRO_BATCH):
        chunk = wanted[start : start + 8 * MICRO_BATCH]
        request = Request(
            prompts=[source.prior] * len(chunk),
            seeds=[key_seed(config.loop.seed, "prior", index) for index in chunk],
            steps=source.steps,
            guidance=source.guidance,
            resolution=max(config.data.resolutions),
        )
        title = f"{shortened(source.prior, 40)!r} {start + len(chunk)}/{len(wanted)}"
        images = engine.generate(request, progress=f"class images of {title}")
        for index, image in zip(chunk, images, strict=True):
            if not files[index].exists():
                save_png(image, files[index], Path(config.output.dir), RUN, prompt=source.prior)
