"""The example scripts of diffusers: what each of them trains, its defaults, and how many steps a run of it has."""

import math
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from .....configs.errors import UserError
from .....data.sources.folder import image_files
from ...launcher import processes
from ...peer import Settings
from ...values import text, whole


class Script(NamedTuple):
    """What a script trains, on what."""

    method: str  # ours
    images: str  # "instance" of DreamBooth, with "captions", or of new "words"
    sdxl: bool
    sample_steps: int  # of validation images
    defaults: dict[str, Any]


USUAL: dict[str, Any] = {
    "resolution": 512,
    "train_batch_size": 4,
    "num_train_epochs": 1,
    "checkpointing_steps": 500,
    "adam_weight_decay": 0.01,
    "center_crop": False,
    "num_class_images": 100,
    "lr_warmup_steps": 500,
}
LORA = {"rank": 4}
CAPTIONS = {"learning_rate": 1e-4, "train_batch_size": 16, "num_train_epochs": 100}
WORDS = CAPTIONS | {"max_train_steps": 5000, "validation_steps": 100, "learnable_property": "object"}
PRODIGY = {"prodigy_use_bias_correction": True, "prodigy_safeguard_warmup": True}
ENCODERS = {"text_encoder_lr": 5e-6, "adam_weight_decay": 1e-4, "adam_weight_decay_text_encoder": 1e-3}
LARGE = {"resolution": 1024}
DREAMBOOTH = LORA | {"validation_epochs": 50}
STEPS = {"learning_rate": 5e-6, "validation_steps": 100}
EPOCH = CAPTIONS | LORA | {"validation_epochs": 1}
FULL = CAPTIONS | {"validation_epochs": 5}
SCRIPTS = {
    "train_dreambooth_lora.py": Script("lora", "instance", False, 25, DREAMBOOTH | {"learning_rate": 5e-4}),
    "train_dreambooth_lora_sdxl.py": Script(
        "lora", "instance", True, 25, DREAMBOOTH | LARGE | ENCODERS | PRODIGY | {"learning_rate": 1e-4}
    ),
    "train_dreambooth.py": Script("full", "instance", False, 25, STEPS),
    "train_text_to_image_lora.py": Script("lora", "captions", False, 30, EPOCH),
    "train_text_to_image_lora_sdxl.py": Script("lora", "captions", True, 25, EPOCH | LARGE),
    "train_text_to_image.py": Script("full", "captions", False, 20, FULL),
    "textual_inversion.py": Script("textual_inversion", "words", False, 25, WORDS),
    "textual_inversion_sdxl.py": Script("textual_inversion", "words", True, 25, WORDS),
}


class Run(Settings):
    """The settings of a run."""

    @cached_property
    def script(self) -> Script:
        """The script that is run."""
        return SCRIPTS[self.value("--script", text, "")]

    @property
    def has_classes(self) -> bool:
        """Whether prior preservation is on."""
        return self.asked("with_prior_preservation")

    @property
    def folder(self) -> str:
        """Of the images; "" for a dataset."""
        name = "instance_data_dir" if self.script.images == "instance" else "train_data_dir"
        return self.value("--data", text, "") or ("" if self.dataset else self.value(name, text, ""))

    @property
    def dataset(self) -> str:
        """A dataset's name; "" for a folder."""
        return "" if self.find("--data") else self.value("dataset_name", text, "")

    @property
    def encoders(self) -> list[str]:
        """Text encoders that are trained."""
        if self.script.images == "words" or not self.asked("train_text_encoder"):
            return []
        return ["text_encoder", "text_encoder_2"] if self.script.sdxl else ["text_encoder"]

    @property
    def micro_batch(self) -> int:
        """Samples of one forward pass: a class image comes with each other one."""
        return max(1, self.value("train_batch_size", whole, 1)) * (2 if self.has_classes else 1)

    @property
    def accumulated(self) -> int:
        """Forward passes of a step."""
        return max(1, self.value("gradient_accumulation_steps", whole, 1))

    @cached_property
    def epoch(self) -> int | None:
        """Optimiser steps of an epoch; None where images cannot be counted."""
        epochs, steps = self.value("num_train_epochs", whole, 0), self.value("--steps", whole, 0)
        if not self.folder or not Path(self.folder).is_dir():
            return max(1, steps // epochs) if epochs and steps else None
        samples = len(image_files(Path(self.folder))) * self.value("repeats", whole, 1)
        samples = max(samples, self.value("num_class_images", whole, 0) if self.has_classes else 0)
        batches = math.ceil(samples / max(1, self.value("train_batch_size", whole, 1)))
        return max(1, math.ceil(math.ceil(batches / processes(self)) / self.accumulated))

    @property
    def steps(self) -> int:
        """Optimiser steps of the run. UserError for epochs of images that cannot be counted."""
        steps = self.value("--steps", whole, 0) or self.value("max_train_steps", whole, 0)
        if steps:
            return steps
        if self.epoch is None:
            epochs = self.find("num_train_epochs")
            raise UserError(
                f"{epochs.place if epochs else ''}: num_train_epochs: how many steps that is depends on the images, "
                f"and {self.folder or self.dataset or 'their folder'} is not here; give --data FOLDER or --steps N"
            )
        return self.value("num_train_epochs", whole, 1) * self.epoch
