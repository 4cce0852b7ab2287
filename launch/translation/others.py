"""Files that no reader takes: whose they are, and what to do with them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...configs.bounded import CONFIG, parse_json, parse_yaml, read_text
from ...configs.errors import UserError
from .shell import read_commands, scripts_of

BEGIN = "begin with `loraloom init --data FOLDER --base BASE`, and set rank, rate and steps in what it writes"
FAMILIES = {
    "flux": "FLUX",
    "sd3": "Stable Diffusion 3",
    "stable_diffusion_3": "Stable Diffusion 3",
    "stable_cascade": "Stable Cascade",
    **{
        name: name.replace("_", " ").title()
        for name in ("lumina", "hunyuan", "sana", "qwen", "wan", "hidream", "cogview", "cogvideo", "anima", "chroma")
        + ("pixart", "wuerstchen", "kandinsky", "ltx", "z_image", "kolors", "krea", "auraflow", "hunyuan_image")
    },
}
"""Models that are not here, by what stands in names of scripts and types."""
ABSENT = "which is not here: only Stable Diffusion 1, 2 and XL are"
TRAINS = re.compile(r"(?:\w*train\w*|fine_tune|\w*finetune\w*|textual_inversion\w*|lcm_distill\w*)\.py")
HIDDEN = re.compile(
    r"^(?!\s*(?:#|rem\b|::)).*?\b((?:sdxl_)?train_(?:network|dreambooth\w*|text_to_image\w*)\.py)", re.M | re.I
)
BY_ITSELF = "write that command by itself, without eval, quotes or a container around it"
DREAMBOOTH = "trains all weights, which is `adapter.method: full` here"
SCRIPTS = {
    "control": "trains ControlNets, which are not trained here",
    "textual_inversion": "trains new words, which is `adapter.method: textual_inversion` with `adapter.tokens` here",
    "train_db": DREAMBOOTH,
    "fine_tune": DREAMBOOTH,
    "sdxl_train.py": DREAMBOOTH,
    "train_text_to_image_sdxl.py": DREAMBOOTH,
    "pix2pix": "trains a model that edits pictures, which is not here",
    "distill": "trains a distilled model, which is not here",
    "unconditional": "trains a model without prompts, which is not here",
    "advanced": "trains pivotal tuning, which is `adapter.tokens` beside `adapter.method: lora` here",
}
"""What scripts train that are not read, by a part of their names."""


def named(path: Path) -> str | None:
    """Whose file it is and what to do, in one line; None where nobody knows."""
    ending = path.suffix.lower()
    fixed = {
        ".ipynb": "is a notebook, which is not read: copy its training command into a file such as train.sh",
        ".safetensors": f"holds weights: `loraloom reproduce {path}` writes the config of an adapter of ours",
        ".ckpt": "is a model, not a config",
        ".pt": "is a model, not a config",
    }
    if ending in fixed:
        return f"{path}: {fixed[ending]}"
    text = read_text(path, CONFIG)
    return _structure(path, text, ending) or _script(path, text)


def _structure(path: Path, text: str, ending: str) -> str | None:
    """Of JSON and YAML."""
    if ending in (".yaml", ".yml"):
        values = parse_yaml(text, str(path))
    elif ending == ".json" or text.lstrip().startswith("{"):
        values = parse_json(text, str(path))
    else:
        return None
    if isinstance(values, list) and values and all(isinstance(each, dict) for each in values):
        values = values[0] | {"a list": True}
    if not isinstance(values, dict):
        return None
    keys = {str(key).lstrip("-") for key in values}
    model = next((name for name in map(_family, _models(values)) if name), None)
    for marks, words in TOOLS:
        if keys >= marks:
            known = words.partition(", which")[0]
            return f"{path}: {known} for {model}, {ABSENT}" if model and BEGIN in words else f"{path}: {words}"
    return None


TOOLS: list[tuple[set[str], str]] = [
    ({"job", "config"}, f"is a config of ai-toolkit, which is not read yet: {BEGIN}"),
    ({"training_method", "model_type"}, f"is a config of OneTrainer, which is not read yet: {BEGIN}"),
    ({"base_model_name", "concept_file_name"}, f"is a config of OneTrainer, which is not read yet: {BEGIN}"),
    ({"data_backend_config"}, f"is a config of SimpleTuner, which is not read yet: {BEGIN}"),
    ({"model_family"}, f"is a config of SimpleTuner, which is not read yet: {BEGIN}"),
    ({"a list", "instance_data_dir"}, f"are data sets of SimpleTuner, which are not read yet: {BEGIN}"),
    ({"model", "data", "loop"}, "is a config of ours already: `loraloom plan` shows it, `extends:` builds upon it"),
    ({"extends"}, "is a config of ours already: `loraloom plan` shows it, `extends:` builds upon it"),
    ({"nodes", "links"}, "is a workflow of ComfyUI, which makes pictures and trains nothing"),
    ({"_class_name"}, "is the config of a part of a model; give its folder to --base"),
    ({"peft_type"}, "is the config of an adapter; `loraloom adapter inspect` reads its folder"),
]
"""Names that a tool's file has, all of them, and what it is."""


def _models(values: Mapping[str, Any]) -> list[str]:
    """What a config says of its model, as far as that is text."""
    config: Any = values.get("config")
    process: Any = config.get("process") if isinstance(config, dict) else None
    first: Any = process[0] if isinstance(process, list) and process else None
    model: Any = first.get("model") if isinstance(first, dict) else None
    model = model if isinstance(model, dict) else {}
    flags = [str(key) for key, value in model.items() if str(key).startswith("is_") and value is True]
    said = [model.get("arch"), model.get("name_or_path")]
    said += [values.get(name, values.get(f"--{name}")) for name in ("model_type", "model_family", "base_model_name")]
    return [*flags, *(each for each in said if isinstance(each, str))]


def _family(name: str) -> str | None:
    plain = re.sub(r"[^a-z0-9]+", "_", name.lower())
    return next((words for part, words in FAMILIES.items() if re.search(rf"(?<![a-z]){part}", plain)), None)


def _script(path: Path, text: str) -> str | None:
    """Of a command that starts another script."""
    for words in read_commands(text, path.suffix):
        for name in scripts_of(words, TRAINS):
            what = next((words for part, words in SCRIPTS.items() if part in name), "is not read")
            if family := _family(name):
                return f"{path}: {name} trains {family}, {ABSENT}"
            return f"{path}: {name} {what}" + ("" if "not here" in what or "not trained" in what else f"; {BEGIN}")
    if found := HIDDEN.search(text):
        return f"{path}: names {found[1]}, but no command that can be read starts it: {BY_ITSELF}"
    if re.search(r"simpletuner|MULTIDATABACKEND|MODEL_FAMILY", text):
        return f"{path}: is a config of SimpleTuner, which is not read yet: {BEGIN}"
    return None


def refuse(path: Path, reads: list[str]) -> UserError:
    """For a file that nobody reads."""
    return UserError(named(path) or f"{path}: holds nothing that can be read; there is: {'; '.join(reads)}")
