"""`train_dreambooth_lora.py` of diffusers, as it is. It encodes the image in every step; alpha is the rank."""

from pathlib import Path

from ..turns import Contestant
from ..work import CAPTION, DECAY, RATE, SEED, Prepared

MODELS = {"sd1": "train_dreambooth_lora.py", "sdxl": "train_dreambooth_lora_sdxl.py"}
"""Model -> the script in the folder of examples."""
NAME = "diffusers"


def contestant(prepared: Prepared, script: Path, python: Path, steps: int) -> Contestant:
    """The script of the model, which lies beside that of Stable Diffusion 1.5, in the environment of `python`."""
    work, run = prepared.work, prepared.run(NAME)
    settings = {
        "pretrained_model_name_or_path": prepared.base,
        "instance_data_dir": prepared.images,
        "instance_prompt": CAPTION,
        "resolution": work.resolution,
        "train_batch_size": work.batch,
        "rank": work.rank,
        "learning_rate": RATE,
        "adam_weight_decay": DECAY,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "max_train_steps": steps,
        "checkpointing_steps": 100_000_000,
        "mixed_precision": "no" if work.dtype == "fp32" else work.dtype,
        "seed": SEED,
        "output_dir": run,
    }
    options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [str(python), str(script.with_name(MODELS[work.model])), *options, "--center_crop"]
    return Contestant(NAME, command, run.with_suffix(".log"), prepared.environment(peer=True))
