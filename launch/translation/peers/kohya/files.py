"""sd-scripts' files: checkpoints, the adapter, sample pictures, curves, and what goes to the hub."""

from pathlib import Path

from ...peer import (
    NOTHING,
    Apply,
    Outcome,
    Rule,
    Settings,
    alike,
    converted,
    lost,
    needless,
    own,
    with_others,
)
from ...values import file_word, flag, text, whole
from . import prompts
from .run import Run

DTYPES = {"float": "fp32", "fp16": "fp16", "bf16": "bf16"}
CHECKPOINTS = "a checkpoint holds the state of the run, to resume from; only the last adapter is written as a file"
OWN_FOLDER = "a run has a folder of its own in it"
RESUME = "`loraloom resume` goes on with a run of ours, to the same bytes"
STATE = "each checkpoint holds the state"
HUB = "nothing is uploaded unless `output.push_to` names a repository"
HEADER = "headers of files are written from the run itself"
HELD_OUT = "the loss on held-out images, `validation.sources`, is taken at `validation.every`"


TITLES = ("title", "author", "description", "license", "tags", "usage_hint", "thumbnail", "merged_from") + (
    *("trigger_phrase", "preprocessor", "is_negative_embedding"),
)


def save_epochs(value: int, run: Run) -> Outcome:
    """With `save_every_n_steps` the one that comes first."""
    if not value or run.epoch is None:
        return uncounted("checkpoint.every") if value else NOTHING
    others = run.value("save_every_n_steps", whole, 0)
    steps = value * run.epoch
    return Outcome({"checkpoint.every": min(steps, others or steps)}, CHECKPOINTS)


def sample_epochs(value: int, run: Run) -> Outcome:
    if not value or run.epoch is None:
        return uncounted("validation.every") if value else NOTHING
    return Outcome({"validation.every": value * run.epoch})


def save_steps(value: int, run: Run) -> Outcome:
    """With `save_every_n_epochs` the one that comes first."""
    if not value:
        return NOTHING
    others = run.value("save_every_n_epochs", whole, 0) * (run.epoch or 0)
    return Outcome({"checkpoint.every": min(value, others or value)}, CHECKPOINTS)


def uncounted(key: str) -> Outcome:
    return Outcome(lost=f"how many steps that is depends on images that are not here: set `{key}`")


def kept(name: str) -> Apply:
    """So many steps or epochs back, as a number of checkpoints."""

    def apply(value: int, run: Run) -> Outcome:
        between = run.value(name, whole, 0)
        return Outcome({"checkpoint.keep": max(1, value // between)}, CHECKPOINTS) if value and between else NOTHING

    return apply


def dtype(value: str, run: Run) -> Outcome:
    return Outcome({"output.dtype": DTYPES.get(value, value)})


def run_folder(value: str, run: Run) -> Outcome:
    stem = Path(run.value("--file", text, "")).stem
    name = file_word(run.value("--name", text, run.value("output_name", text, stem)))
    return Outcome({"output.dir": str(Path(value, name))}, OWN_FOLDER)


def adapter_name(value: str, run: Run) -> Outcome:
    asked = run.value("--name", text, "")
    spelled = asked or file_word(value)
    words = "--name counts" if asked else "only letters, digits, '.', '-' and '_'"
    return Outcome({"output.name": spelled}, "" if spelled == value else words)


def samples(value: str, run: Run) -> Outcome:
    """The prompts, and what sd-scripts does where it is told nothing."""
    if not prompt_levels(run):
        return Outcome(lost="no such file here")
    usual = {"num_images": 1, "steps": 30, "guidance": 7.5, "at_start": run.asked("sample_at_first")}
    values = {"validation.prompts": [prompts.section(level) for level in prompt_levels(run)]}
    return Outcome(values | {f"validation.{key}": each for key, each in usual.items()})


def prompt_levels(run: Run) -> list[Settings]:
    """The settings of each sample prompt."""
    if (words := run.find("sample_prompts.text")) is not None:
        return prompts.read_lines(converted(words, text), words.place, run)
    path = beside(run, run.value("sample_prompts", text, ""))
    return prompts.read_prompts(path, run) if path.is_file() else []


def beside(run: Run, name: str) -> Path:
    """A file that a setting names: from here, or from the folder of the file that names it."""
    near_file = Path(run.value("--file", text, "")).parent / name
    return near_file if near_file.is_file() and not Path(name).is_file() else Path(name)


def sample_steps(value: int, run: Run) -> Outcome:
    """Epochs count where both are given."""
    return NOTHING if run.find("sample_every_n_epochs") else Outcome({"validation.every": value})


def trackers(value: str, run: Run) -> Outcome:
    return Outcome({"trackers": ["tensorboard", "wandb"] if value == "all" else [value]})


RULES: dict[str, Rule] = {
    # checkpoints
    "save_every_n_steps": own(whole, save_steps, "checkpoint.every", CHECKPOINTS),
    "save_every_n_epochs": own(whole, save_epochs, "checkpoint.every", CHECKPOINTS),
    "save_last_n_steps": own(whole, kept("save_every_n_steps"), "checkpoint.keep", CHECKPOINTS),
    "save_last_n_epochs": own(whole, kept("save_every_n_epochs"), "checkpoint.keep", CHECKPOINTS),
    "save_n_epoch_ratio": lost("`checkpoint.every` counts steps"),
    **alike(
        needless(STATE), "save_state", "save_state_on_train_end", "save_last_n_epochs_state", "save_last_n_steps_state"
    ),
    **alike(lost(RESUME), "resume", "initial_epoch", "initial_step", "skip_until_initial_step"),
    # the adapter
    "output_dir": own(text, run_folder, "output.dir", OWN_FOLDER),
    "output_name": own(text, adapter_name, "output.name"),
    "save_precision": own(text, dtype, "output.dtype"),
    "save_model_as": lost("files are safetensors", "safetensors"),
    "use_safetensors": needless("files are safetensors"),
    **alike(lost(HEADER), "no_metadata", "training_comment"),
    **alike(lost(HEADER), *(f"metadata_{name}" for name in TITLES)),
    # pictures and curves
    "sample_prompts": own(text, samples, "validation.prompts"),
    "sample_prompts.text": own(text, samples, "validation.prompts"),  # of the window, which writes the file itself
    "sample_every_n_steps": own(whole, sample_steps, "validation.every"),
    "sample_every_n_epochs": own(whole, sample_epochs, "validation.every"),
    "sample_at_first": with_others("validation.at_start", flag),
    "sample_sampler": lost("pictures are sampled with DPM-Solver++", "dpmsolver++"),
    **alike(lost(HELD_OUT), "validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps"),
    "log_with": own(text, trackers, "trackers"),
    "logging_dir": needless("curves are written into the run's folder"),
    "log_config": needless("the run's folder holds its config"),
    **alike(lost("curves have the run's name"), "log_prefix", "log_tracker_name", "wandb_run_name"),
    "log_tracker_config": lost("trackers have no settings of their own"),
    "wandb_api_key": lost("`wandb login` keeps it"),
    **alike(
        lost("messages are lines on the terminal"), *(f"console_log_{name}" for name in ("level", "file", "simple"))
    ),
    "output_config": lost("the run's folder holds its config"),
    # the hub
    **alike(
        lost(HUB),
        *(f"huggingface_{name}" for name in ("repo_id", "repo_type", "path_in_repo", "token", "repo_visibility")),
        *("save_state_to_huggingface", "resume_from_huggingface", "async_upload"),
    ),
}
"""Settings of files and curves."""
