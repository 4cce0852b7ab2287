"""A run of sd-scripts: where its images are, how many there are, and how many steps that makes."""

import math
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from .....configs.errors import UserError
from .....data.sources.folder import image_files
from ...launcher import processes
from ...peer import Setting, Settings
from ...values import text, whole

NUMBERED = re.compile(r"(?P<repeats>\d+)_(?P<words>.*)")


class Run(Settings):
    """The settings of a run, and the subsets of its data sets."""

    data: list[list[Settings]]

    @property
    def subsets(self) -> list[Settings]:
        """Of all data sets."""
        return [subset for subsets in self.data for subset in subsets]

    @cached_property
    def epoch(self) -> int | None:
        """Optimiser steps of an epoch; None where images cannot be counted."""
        samples = [samples_of(subsets) for subsets in self.data]
        if not samples or None in samples:
            epochs, steps = self.value("max_train_epochs", whole, 0), self.value("--steps", whole, 0)
            return max(1, steps // epochs) if epochs and steps else None
        pairs = zip(self.data, samples, strict=True)
        batches = sum(math.ceil((count or 0) / batch_size_of(subsets[0])) for subsets, count in pairs)
        return max(1, math.ceil(batches / processes(self) / accumulated(self)))

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        epochs = self.value("max_train_epochs", whole, 0)
        asked = self.value("--steps", whole, 0)
        if asked or not epochs:
            return asked or self.value("max_train_steps", whole, 0)
        if self.epoch is None:
            raise UserError(self._uncounted())
        return epochs * self.epoch

    def _uncounted(self) -> str:
        epochs = self.find("max_train_epochs")
        absent = next((folder(subset) for subset in self.subsets if count_of(subset) is None), "their folder")
        return (
            f"{epochs.place if epochs else ''}: max_train_epochs: how many steps that is depends on the images, and "
            f"{absent} is not here; give --data FOLDER or --steps N"
        )


def accumulated(settings: Settings) -> int:
    """Forward passes of a step."""
    return max(1, settings.value("gradient_accumulation_steps", whole, 1))


def folder(subset: Settings) -> str:
    """The path of a subset's images."""
    return subset.value("image_dir", text, "")


def is_class(subset: Settings) -> bool:
    """Whether a subset holds regularisation images."""
    return subset.asked("is_reg")


def repeats_of(subset: Settings) -> int:
    return subset.value("num_repeats", whole, 0) or subset.value("dataset_repeats", whole, 1)


def batch_size_of(subset: Settings) -> int:
    return max(1, subset.value("batch_size", whole, 0) or subset.value("train_batch_size", whole, 1))


def count_of(subset: Settings) -> int | None:
    """Images of a subset; None where its folder is not here."""
    path = Path(folder(subset))
    return len(image_files(path)) if folder(subset) and path.is_dir() else None


def samples_of(subsets: list[Settings]) -> int | None:
    """Of an epoch of a data set; class images are as many as the others."""
    counts = [(count_of(subset), repeats_of(subset)) for subset in subsets if not is_class(subset)]
    if any(count is None for count, _ in counts):
        return None
    return sum((count or 0) * repeats for count, repeats in counts) * (2 if any(map(is_class, subsets)) else 1)


def folders_of(run: Settings, name: str, path: str) -> Iterator[Settings]:
    """`train_data_dir` or `reg_data_dir` as subsets: its folders `10_sks dog`, or itself where it has none of these."""
    place = found.place if (found := run.find(name)) else name
    reg = [Setting("is_reg", True, place)] if name == "reg_data_dir" else []
    for inner, repeats, words in numbered(path):
        spelled = {"image_dir": str(inner), "num_repeats": repeats, "class_tokens": words}
        yield Settings([*(Setting(key, value, place) for key, value in spelled.items()), *reg], run)
    if not numbered(path):
        yield Settings([Setting("image_dir", path, place), *reg], run)


def numbered(path: str) -> list[tuple[Path, int, str]]:
    """The folders `<repeats>_<words>` in a folder."""
    inside = sorted(Path(path).iterdir()) if Path(path).is_dir() else []
    found = [(each, NUMBERED.fullmatch(each.name)) for each in inside if each.is_dir()]
    return [(each, int(match["repeats"]), match["words"]) for each, match in found if match and int(match["repeats"])]


def with_folder(run: Run, path: str) -> list[list[Settings]]:
    """The data sets with another folder for their images. UserError where several have images."""
    # one folder may be there at several resolutions
    train = list(dict.fromkeys(folder(subset) for subset in run.subsets if not is_class(subset)))
    if len(train) != 1:
        raise UserError(f"--data {path}: in place of which folder? there are: {', '.join(train) or 'none'}")
    replaced = [Setting("image_dir", path, "--data")]
    return [[subset if is_class(subset) else Settings(replaced, subset) for subset in subsets] for subsets in run.data]
