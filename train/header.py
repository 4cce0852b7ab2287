"""What a training run writes into the headers of its files: ModelSpec, kohya's `ss_` entries, and its record.

The same run gives the same header: times are in it only where SOURCE_DATE_EPOCH sets them. By itself it tells no path,
folder, caption, prompt or trigger word; what `output.metadata: full` adds is in `_modelspec` and in `record.WORDS`.
"""

import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ..configs.data_sections import PriorSource
from ..configs.errors import UserError
from ..models.base import hub_id
from .facts import trigger_words
from .record import record_entries

if TYPE_CHECKING:
    from .run import Run

EPOCH = "SOURCE_DATE_EPOCH"
"""Seconds since 1970 (https://reproducible-builds.org/specs/source-date-epoch/)."""


def run_header(run: "Run") -> dict[str, str]:
    """The entries that all files of a run have; formats add what they make from the weights."""
    return {**_modelspec(run), **_kohya(run), **record_entries(run)}


def build_time() -> datetime | None:
    """The time that SOURCE_DATE_EPOCH sets, if it does; UserError if it is no number of seconds."""
    text = os.environ.get(EPOCH)
    if not text:
        return None
    try:
        return datetime.fromtimestamp(int(text), UTC)
    except (ValueError, OverflowError, OSError):
        raise UserError(f"{EPOCH} is {text!r}: give seconds since 1970, or unset it") from None


def check_build_time() -> list[str]:
    """Problems of SOURCE_DATE_EPOCH."""
    try:
        build_time()
    except UserError as error:
        return error.problems
    return []


def _modelspec(run: "Run") -> dict[str, str]:
    """ModelSpec 1.0.1 (https://github.com/Stability-AI/ModelSpec), as far as a run knows it."""
    config, time = run.config, build_time()
    resolution, skip = max(config.data.resolutions), config.model.clip_skip
    full = config.output.metadata == "full"
    predicted = run.parts["scheduler"].config["prediction_type"]
    return _known(
        {
            "modelspec.title": config.output.name,
            "modelspec.resolution": f"{resolution}x{resolution}",
            "modelspec.prediction_type": "v" if predicted == "v_prediction" else predicted,
            "modelspec.encoder_layer": str(skip + 1) if skip else None,
            "modelspec.trigger_phrase": trigger_words(config.model_dump()) if full else None,
            "modelspec.date": time and time.isoformat(),
        }
    )


def _kohya(run: "Run") -> dict[str, str]:
    """What web UIs show of an adapter, spelled as sd-scripts' train_network.py does: `str()` of its values."""
    config, time = run.config, build_time()
    resolution, skip = max(config.data.resolutions), config.model.clip_skip
    return _known(
        {
            "ss_output_name": config.output.name,
            "ss_sd_model_name": hub_id(config.model.base, config.model.revision),
            "ss_resolution": str((resolution, resolution)),
            "ss_clip_skip": str(skip + 1 if skip else None),
            "ss_seed": str(config.loop.seed),
            "ss_learning_rate": str(config.optimizer.learning_rate),
            "ss_optimizer": _optimizer(run),
            "ss_num_train_images": str(_num_train_images(run)),
            "ss_training_started_at": time and str(time.timestamp()),
        }
    )


def _optimizer(run: "Run") -> str:
    """Import path of the class, and what it was given beside the learning rate."""
    from .fast import plain_class  # brings torch: preflight checks times by this module

    kind, section = plain_class(run.optimizer.optimizer), run.config.optimizer
    options = {"weight_decay": section.weight_decay, **section.options}
    return f"{kind.__module__}.{kind.__name__}({','.join(f'{name}={value}' for name, value in options.items())})"


def _num_train_images(run: "Run") -> int:
    """As often as each counts in an epoch; class images are counted by themselves in sd-scripts."""
    sources = zip(run.config.data.sources, run.data["sources"], strict=True)
    return sum(section.repeats * found["images"] for section, found in sources if not isinstance(section, PriorSource))


def _known(entries: dict[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in entries.items() if value is not None}
