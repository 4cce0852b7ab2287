"""Where samples come from: folders of images, and class images that a run has made for itself."""

from pathlib import Path

from ..configs.schema import FolderSource, PriorSource
from .sample import Sample
from .scan import image_files


def folder_samples(source: FolderSource) -> list[Sample]:
    """All images of a folder with the source's caption."""
    folder = Path(source.path)
    return [Sample(file, source.caption, source.loss_weight, folder.name) for file in image_files(folder)]


def prior_samples(source: PriorSource, files: list[Path]) -> list[Sample]:
    """Class images, made before training, with their prompt as the caption."""
    return [Sample(file, source.prior, source.loss_weight, "prior") for file in files]
