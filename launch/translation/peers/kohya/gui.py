"""kohya_ss, the graphical interface of sd-scripts: its JSON files, as the settings that it starts the scripts with.

https://github.com/bmaltais/kohya_ss
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .....configs.bounded import CONFIG, parse_json, read_text
from .....configs.errors import UserError
from ... import launcher
from ...peer import Setting
from ...shell import flags_of, read_commands
from ...values import number

MARKS = ("LoRA_type", "max_resolution", "lr_warmup", "train_on_input", "stop_text_encoder_training_pct")
"""Names that only its files have."""
OFF = ("", None, False, 0, "0", "0.0", "None", "none")
"""Values with which it passes a setting on to nobody."""
RENAMED = {
    "max_resolution": "resolution",
    "optimizer": "optimizer_type",
    "lora_network_weights": "network_weights",
}
MODULES = {
    "Standard": "networks.lora",
    "Kohya LoCon": "networks.lora",
    "LoRA-FA": "networks.lora_fa",
    "Kohya DyLoRA": "networks.dylora",
}
ALGORITHMS = {
    "LyCORIS/LoCon": "locon",
    "LyCORIS/LoHa": "loha",
    "LyCORIS/LoKr": "lokr",
    "LyCORIS/DyLoRA": "dylora",
    "LyCORIS/GLoRA": "glora",
    "LyCORIS/iA3": "ia3",
    "LyCORIS/Diag-OFT": "diag-oft",
    "LyCORIS/BOFT": "boft",
    "LyCORIS/Native Fine-Tuning": "full",
}
OF_KOHYA = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas", "block_lr_zero_threshold") + (
    *("down_lr_weight", "mid_lr_weight", "up_lr_weight", "rank_dropout", "module_dropout"),
)
OF_LYCORIS = ("conv_dim", "conv_alpha", "rank_dropout", "module_dropout", "use_tucker", "use_cp", "use_scalar") + (
    *("rank_dropout_scale", "train_norm", "bypass_mode", "dora_wd"),
)
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "Standard": OF_KOHYA,
    "LoRA-FA": OF_KOHYA,
    "Kohya LoCon": ("conv_dim", "conv_alpha", *OF_KOHYA),
    "Kohya DyLoRA": ("conv_dim", "conv_alpha", "unit", *OF_KOHYA),
    "LyCORIS/LoKr": (*OF_LYCORIS, "factor", "decompose_both", "full_matrix"),
    "LyCORIS/Diag-OFT": (*OF_LYCORIS, "constrain", "rescaled"),
}
"""What goes into `network_args` for a type; the other types of LyCORIS have OF_LYCORIS."""
PLUS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
FAMILIES = {"flux1_checkbox": "FLUX", "sd3_checkbox": "Stable Diffusion 3"}
LAUNCHER = ("num_cpu_threads_per_process", "num_processes", "num_machines")
SHOWN_ELSEWHERE = {
    *("LoRA_type", "LyCORIS_preset", "epoch", "lr_warmup", "sdxl", "xformers", "noise_offset_type", "use_wandb"),
    *(
        "sample_prompts",
        "stop_text_encoder_training_pct",
        "additional_parameters",
        "sdxl_no_half_vae",
        "sdxl_cache_text_encoder_outputs",
    ),
    *("conv_dim", "conv_alpha", "factor", "decompose_both", "full_matrix", "constrain", "rescaled", "unit"),
    *OF_KOHYA,
    *OF_LYCORIS,
    *PLUS,
    *FAMILIES,
    *LAUNCHER,
}
"""What is looked at together with others, below."""
NOT_TRAINING = ("model_list", "train_on_input", "save_as_bool", "gpu_ids", "multi_gpu", "main_process_port") + (
    *("dynamo_mode", "dynamo_use_dynamic", "dynamo_use_fullgraph", "extra_accelerate_launch_args", "no_token_padding"),
    *("logging_dir", "save_as", "headless", "print_only", "file_path"),
)
"""Settings of the window itself, of the launcher, and of pictures that nothing is learnt from."""


class Chosen(NamedTuple):
    """What the window would start."""

    script: str
    settings: list[Setting]


def read_gui(path: Path) -> Chosen | None:
    """The settings of a JSON file that the window saved; None for another JSON. UserError for what is not here."""
    text = read_text(path, CONFIG)
    values = parse_json(text, str(path))
    if not isinstance(values, dict) or not any(mark in values for mark in MARKS):
        return None
    window = Window(values, text, path)
    window.check()
    return Chosen("sdxl_train_network.py" if values.get("sdxl") else "train_network.py", list(window.settings()))


class Window:
    """The values of one file, and the lines that they stand in."""

    def __init__(self, values: Mapping[str, Any], text: str, path: Path):
        self.values, self.path = values, path
        found = re.finditer(r'(?:^|[,{])\s*"([^"]+)"\s*:', text, re.MULTILINE)
        self.lines = {each[1]: text.count("\n", 0, each.start(1)) + 1 for each in reversed([*found])}

    def check(self) -> None:
        """UserError for other models, and for full fine-tuning and DreamBooth without a network."""
        kind = str(self.values.get("LoRA_type", ""))
        families = [words for name, words in FAMILIES.items() if self.values.get(name)]
        families += ["FLUX"] if kind.startswith("Flux") else []
        if families:
            raise UserError(
                f"{self.path}: trains {families[0]}, which is not here: only Stable Diffusion 1, 2 and XL are"
            )
        if "LoRA_type" not in self.values and "network_dim" not in self.values:
            if "token_string" in self.values:
                raise UserError(
                    f"{self.path}: settings of kohya_ss for new words, which are not read: begin with `loraloom init "
                    "--data FOLDER`, `adapter.method: textual_inversion` and `adapter.tokens`"
                )
            begin = "begin with `loraloom init --data FOLDER` and `adapter.method: full`"
            raise UserError(
                f"{self.path}: settings of kohya_ss for all weights of a model, which are not read: {begin}"
            )

    def setting(self, name: str, value: Any, origin: str = "") -> Setting:
        line = self.lines.get(origin or name)
        return Setting(name, value, f"{self.path}:{line}" if line else str(self.path))

    def on(self, name: str) -> bool:
        return self.values.get(name) not in OFF

    def settings(self) -> Iterator[Setting]:
        """All that are on, by the names of sd-scripts."""
        skipped = {*SHOWN_ELSEWHERE, *NOT_TRAINING, *self._unused()}
        for name, value in self.values.items():
            if name not in skipped and (self.on(name) or name == "network_alpha"):  # 0 stands for the rank
                yield self.setting(RENAMED.get(name, name), self._spelled(name, value), name)
        yield from (
            self.setting(f"{launcher.PREFIX}{name}", self.values[name], name) for name in LAUNCHER if self.on(name)
        )
        yield from self._prompts()
        yield from self._network()
        yield from self._switches()
        yield from self._rates()
        yield from self._more()

    def _spelled(self, name: str, value: Any) -> Any:
        """Lists stand in one text there, with quotes around their words."""
        if name not in ("optimizer_args", "lr_scheduler_args") or not isinstance(value, str):
            return value
        return [word.strip("\"'") for word in re.findall(r"\"[^\"]*\"|'[^']*'|\S+", value)]

    def _prompts(self) -> Iterator[Setting]:
        """A file, or the prompts themselves, which the window writes into a file."""
        value = self.values.get("sample_prompts")
        if isinstance(value, str) and value.strip():
            is_file = len(value) < 1000 and "\n" not in value and Path(value).suffix in (".txt", ".toml", ".json")
            yield self.setting("sample_prompts" if is_file else "sample_prompts.text", value, "sample_prompts")

    def _unused(self) -> Iterator[str]:
        """One kind of noise offset is passed on, and the steps or the epochs."""
        multires = self.values.get("noise_offset_type") == "Multires"
        original = ("noise_offset", "adaptive_noise_scale", "noise_offset_random_strength")
        yield from original if multires else ("multires_noise_iterations", "multires_noise_discount")
        if not self.values.get("multires_noise_iterations"):
            yield "multires_noise_discount"
        if self.values.get("loss_type", "l2") in ("l1", "l2"):
            yield from ("huber_c", "huber_schedule", "huber_scale")
        if not self.on("ip_noise_gamma"):
            yield "ip_noise_gamma_random_strength"
        yield from (name for name in self.values if name.startswith(("flux1_", "sd3_", "t5xxl", "lumina_")))
        yield from ("ae", "clip_l", "clip_g", "guidance_scale", "discrete_flow_shift", "model_prediction_type")
        yield from (
            "timestep_sampling",
            "train_blocks",
            "split_mode",
            "weighting_scheme",
            "logit_mean",
            "logit_std",
            "mode_scale",
        )

    def _network(self) -> Iterator[Setting]:
        kind = str(self.values.get("LoRA_type") or "Standard")
        module = MODULES.get(kind, "lycoris.kohya" if kind.startswith("LyCORIS/") else kind)
        yield self.setting("network_module", module, "LoRA_type")
        arguments = [name for name in ARGUMENTS.get(kind, OF_LYCORIS) if self.on(name)]
        if module == "lycoris.kohya":
            yield self.setting("network_args.algo", ALGORITHMS.get(kind, kind.partition("/")[2].lower()), "LoRA_type")
            yield self.setting("network_args.preset", self.values.get("LyCORIS_preset") or "full", "LyCORIS_preset")
            arguments = [name for name in arguments if (name, self.values[name]) != ("factor", -1)]
        for name in [*arguments, *(name for name in PLUS if self.on(name))]:
            yield self.setting(f"network_args.{name}", self.values[name], name)

    def _switches(self) -> Iterator[Setting]:
        attention = self.values.get("xformers")
        if attention not in OFF:
            yield self.setting("sdpa" if attention == "sdpa" else "xformers", True, "xformers")
        for name in ("no_half_vae", "cache_text_encoder_outputs"):
            if self.values.get("sdxl") and self.on(f"sdxl_{name}"):
                yield self.setting(name, True, f"sdxl_{name}")
        if self.on("use_wandb") and not self.on("log_with"):
            yield self.setting("log_with", "wandb", "use_wandb")

    def _rates(self) -> Iterator[Setting]:
        """A rate of 0 freezes a part, epochs stand under two names, and the warm-up is a percentage."""
        unet, words = (self._number(name, 1.0) for name in ("unet_lr", "text_encoder_lr"))
        if words == 0 and unet != 0 and "text_encoder_lr" in self.values:
            yield self.setting("network_train_unet_only", True, "text_encoder_lr")
        if unet == 0 and words != 0 and "unet_lr" in self.values:
            yield self.setting("network_train_text_encoder_only", True, "unet_lr")
        if self.on("epoch") and not self.on("max_train_epochs") and not self.on("max_train_steps"):
            yield self.setting("max_train_epochs", self.values["epoch"], "epoch")
        if self.on("lr_warmup") and not self.on("lr_warmup_steps"):
            yield self.setting("lr_warmup_steps", self._number("lr_warmup", 0.0) / 100, "lr_warmup")
        if self.on("stop_text_encoder_training_pct"):
            yield self.setting("stop_text_encoder_training", self.values["stop_text_encoder_training_pct"])

    def _number(self, name: str, otherwise: float) -> float:
        value = self.values.get(name)
        try:
            return (
                otherwise if value in ("", None) else number(value[0] if isinstance(value, list) and value else value)
            )
        except ValueError as error:
            raise UserError(f"{self.setting(name, value).place}: {name}: should be {error}, found {value!r}") from error

    def _more(self) -> Iterator[Setting]:
        """The field for further flags of the command line."""
        place = self.setting("additional_parameters", "").place
        for words in read_commands(str(self.values.get("additional_parameters") or "")):
            yield from flags_of(words, lambda word: place)
