"""`train_network.py` of kohya's sd-scripts, as it is, with its cache of latents. It encodes the prompt in every step.

By itself it adapts 192 modules: a start file with the 128 of the others says which, at which rank and alpha.
"""

import shutil
from pathlib import Path

from ..turns import Contestant
from ..work import CAPTION, DECAY, RATE, SEED, Prepared

MODELS = ("sd1",)
NAME = "kohya"
TOKENIZER = "openai_clip-vit-large-patch14"


def contestant(prepared: Prepared, checkout: Path, python: Path, steps: int) -> Contestant:
    """The script in the environment of `python`."""
    work, run = prepared.work, prepared.run(NAME)
    start = prepared.start
    settings = {
        "pretrained_model_name_or_path": prepared.base,
        "tokenizer_cache_dir": _tokenizer(prepared),
        "train_data_dir": _images(prepared),
        "caption_extension": ".txt",
        "resolution": work.resolution,
        "train_batch_size": work.batch,
        "network_module": "networks.lora",
        "network_weights": start,
        "network_dim": work.rank,
        "network_alpha": work.rank,
        "optimizer_type": "AdamW",
        "optimizer_args": f"weight_decay={DECAY}",
        "learning_rate": RATE,
        "lr_scheduler": "constant",
        "max_grad_norm": 1,
        "max_train_steps": steps,
        "max_data_loader_n_workers": 0,
        "mixed_precision": "no" if work.dtype == "fp32" else work.dtype,
        "save_precision": "float",
        "save_model_as": "safetensors",
        "seed": SEED,
        "output_dir": run,
        "output_name": "sks",
    }
    options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    switches = ["--dim_from_weights", "--network_train_unet_only", "--sdpa", "--cache_latents"]
    command = [str(python), str(checkout / "train_network.py"), *options, *switches]
    return Contestant(NAME, command, run.with_suffix(".log"), prepared.environment(peer=True))


def _tokenizer(prepared: Prepared) -> Path:
    """It never reads the base's: a folder that looks like its own cache."""
    folder = prepared.folder / "kohya-tokenizers"
    shutil.copytree(Path(prepared.base) / "tokenizer", folder / TOKENIZER, dirs_exist_ok=True)
    return folder


def _images(prepared: Prepared) -> Path:
    """A folder whose name begins with the repeats, and captions beside the images."""
    folder = prepared.folder / "kohya-images"
    shutil.copytree(prepared.images, folder / "1_sks", dirs_exist_ok=True)
    for file in (folder / "1_sks").glob("*.png"):
        file.with_suffix(".txt").write_text(CAPTION)
    return folder
