"""sd-scripts' network: its module, and LyCORIS' algorithms, as a method, its parts, ranks and options."""

from pathlib import Path
from typing import Any, NamedTuple

from .....configs.bounded import read_json
from ...peer import NOTHING, Outcome, Rule, Settings, alike, lost, own, with_others
from ...values import flag, number, numbers, text, texts, whole

TIME = r"re:.*\.time_emb_proj"
EDGES = r"re:conv_in|conv_out"
TIME_EMBEDDING = r"re:time_embedding\.linear_[12]"
BOTH = "attention+ff"
LARGE_KERNELS = r"(conv1|conv2|samplers\.0\.conv|conv_in|conv_out)$"
"""Convolutions of 3 x 3, whose rank is `conv_dim`."""
WHOLE = 10_000  # ranks from here on ask LyCORIS for whole matrices


class Preset(NamedTuple):
    """Which modules of LyCORIS' preset are trained, in our words."""

    unet: str | list[str]
    text: str | None  # of each text encoder


PRESETS = {
    "full": Preset(["attention", "ff", "conv", TIME, EDGES, TIME_EMBEDDING], BOTH),
    "full-lin": Preset(["attention", "ff", TIME, TIME_EMBEDDING, r"re:.*\.conv_shortcut"], BOTH),
    "attn-mlp": Preset(BOTH, BOTH),
    "attn-only": Preset("attention", "attention"),
    "unet-only": Preset(["attention", "ff", "conv", TIME, EDGES, TIME_EMBEDDING], None),
    "unet-transformer-only": Preset(BOTH, None),
    "unet-convblock-only": Preset(["conv", TIME, EDGES], None),
}
METHODS = {"lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr", "full": "full"}
"""LyCORIS' algorithms that are methods here."""
ALONE = {
    "networks.lora": ("lora", ""),
    "networks.lora_fa": ("lora", "A stays frozen there; here it is trained too"),
    "networks.dylora": ("lora", "ranks are not drawn here"),
    "networks.oft": ("oft", "blocks are of `adapter.options.block_size` inputs, there `network_dim` blocks of outputs"),
}
"""sd-scripts' own modules."""


def is_lycoris(settings: Settings) -> bool:
    return _module(settings).startswith("lycoris")


def _module(settings: Settings) -> str:
    return settings.value("network_module", text, "networks.lora")


def algorithm(settings: Settings) -> str:
    return settings.value("network_args.algo", text, "lora").lower()


def method(settings: Settings) -> str:
    """Ours; `lora` in place of what we do not have."""
    if is_lycoris(settings):
        return METHODS.get(algorithm(settings), "lora")
    return ALONE.get(_module(settings), ("lora", ""))[0]


def is_sdxl(settings: Settings) -> bool:
    """What the script says, else the base's index, else names that are of SDXL only."""
    script = settings.value("--script", text, "")
    if script:
        return script.startswith("sdxl")
    kind = pipeline(settings)
    base = settings.value("pretrained_model_name_or_path", text, "").lower()
    return "XL" in kind if kind else "xl" in base or settings.asked("cache_text_encoder_outputs")


def pipeline(settings: Settings) -> str:
    """The class that a base's folder names; "" where it cannot be seen."""
    base = settings.value("pretrained_model_name_or_path", text, "")
    index = Path(base, "model_index.json")
    if base == "pocket" or not index.is_file():
        return "StableDiffusionPipeline" if base == "pocket" else ""
    return str(read_json(index).get("_class_name", ""))


def preset(settings: Settings) -> Preset:
    """What is trained where, before anything is frozen."""
    if is_lycoris(settings):
        return PRESETS.get(settings.value("network_args.preset", text, "full"), PRESETS["full"])
    if method(settings) == "oft":
        return Preset("attention", None)
    with_convolutions: list[str] = ["attention", "ff", "conv", TIME]
    return Preset(with_convolutions if conv_rank(settings) else BOTH, BOTH)


def trained(settings: Settings) -> dict[str, str | list[str]]:
    """Our parts: sd-scripts trains the text encoders unless it is told not to."""
    chosen = preset(settings)
    parts: dict[str, str | list[str]] = {}
    if not settings.asked("network_train_text_encoder_only") and settings.value("unet_lr", number, 1.0) != 0:
        parts["unet"] = chosen.unet
    frozen = settings.asked("network_train_unet_only") or settings.asked("cache_text_encoder_outputs")
    if chosen.text and not frozen:
        rates = text_rates(settings)
        encoders = ["text_encoder", "text_encoder_2"] if is_sdxl(settings) else ["text_encoder"]
        parts |= {encoder: chosen.text for encoder, rate in zip(encoders, rates * 2, strict=False) if rate != 0}
    return parts or {"unet": chosen.unet}


def text_rates(settings: Settings) -> list[float | None]:
    """Of the text encoders, as many as are given; None for the common one."""
    return settings.value("text_encoder_lr", _rates, [None])


def _rates(value: Any) -> list[float | None]:
    return [None] if value == [] else [*numbers(value)]


def network(value: str, settings: Settings) -> Outcome:
    """The method, its parts and the file format."""
    ours = method(settings)
    values: dict[str, Any] = {"adapter.method": ours}
    values |= {f"adapter.parts.{part}": selection for part, selection in trained(settings).items()}
    if ours in ("lora", "loha", "lokr"):
        values["output.formats"] = ["kohya"]
    if not is_lycoris(settings) and value not in ALONE:
        return Outcome(values, lost=f"not known here: {ours} is trained")
    return Outcome(values, FULL if ours == "full" else ALONE.get(value, ("", ""))[1])


def rank(value: int, settings: Settings) -> Outcome:
    return NOTHING if method(settings) in ("oft", "full") else Outcome({"adapter.rank": value})


def alpha(value: float, settings: Settings) -> Outcome:
    """0 stands for the rank; LoKr with whole matrices has the scale 1 there."""
    size = settings.value("network_dim", whole, 4)
    if method(settings) in ("oft", "full"):
        return NOTHING
    if method(settings) == "lokr" and size >= WHOLE:
        words = f"LyCORIS takes 1 for the scale of whole matrices: alpha is the rank {size} here"
        return Outcome({"adapter.alpha": float(size)}, words if value != size else "")
    return Outcome({"adapter.alpha": value or float(size)})


def conv_rank(settings: Settings) -> int:
    """Of convolutions of 3 x 3; 0 for none."""
    usual = settings.value("network_dim", whole, 4) if is_lycoris(settings) else 0
    return settings.value("network_args.conv_dim", whole, usual)


def conv_dim(value: int, settings: Settings) -> Outcome:
    """Its alpha is 1 in sd-scripts where none is given."""
    if value == 0:
        return Outcome(lost="take `conv` out of `adapter.parts`") if is_lycoris(settings) else NOTHING
    size = settings.value("network_dim", whole, 4)
    values: dict[str, Any] = {} if value == size else {"adapter.rank_pattern": {LARGE_KERNELS: value}}
    given = settings.find("network_args.conv_alpha") is not None
    return Outcome(values if given or is_lycoris(settings) else values | dict(conv_alpha(1.0, settings).values))


def conv_alpha(value: float, settings: Settings) -> Outcome:
    if not conv_rank(settings) or value == settings.value("network_alpha", number, 1.0):
        return NOTHING
    return Outcome({"adapter.alpha_pattern": {LARGE_KERNELS: value or float(conv_rank(settings))}})


def algo(value: str, settings: Settings) -> Outcome:
    if algorithm(settings) in METHODS:
        return NOTHING
    return Outcome(lost="no method of that kind is here: lora is trained")


def lycoris_preset(value: str, settings: Settings) -> Outcome:
    return NOTHING if value in PRESETS else Outcome(lost=f"no preset of LyCORIS that is known: {', '.join(PRESETS)}")


def option(key: str, of: Any, *methods: str, words: str = "") -> Rule:
    """An option of some methods; for others it is lost."""

    def apply(value: Any, settings: Settings) -> Outcome:
        if method(settings) in methods:
            return Outcome({f"adapter.options.{key}": value}, words if value else "")
        return Outcome(lost=f"{method(settings)} has no such option here") if value else NOTHING

    return own(of, apply, f"adapter.options.{key}", words)


def ratio(value: float, settings: Settings) -> Outcome:
    encoders = [part for part in trained(settings) if part != "unet"]
    words = "one ratio for all parts here" if encoders else ""
    return Outcome({"optimizer.lora_plus_ratio": value}, words)


def _nothing(value: Any, settings: Settings) -> Outcome:
    return NOTHING


FULL = "weights themselves are trained here, and a pipeline folder is written"
BLOCKS = "ranks and rates by block: `adapter.rank_pattern` sets ranks by module names, rates are by part"
DROPOUT = "inputs of A are dropped here, there what lies between A and B"

BY_BLOCK = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas", "block_lr_zero_threshold") + (
    *("down_lr_weight", "mid_lr_weight", "up_lr_weight"),
)
OTHERS = ("use_tucker", "use_cp", "use_conv_cp", "disable_conv_cp", "use_scalar", "train_norm", "bypass_mode") + (
    *("rescaled", "constraint", "constrain", "block_size", "full_matrix", "unbalanced_factorization"),
    *("unit", "enable_all_linear", "enable_conv", "train_t5xxl"),
)

RULES: dict[str, Rule] = {
    "network_module": own(text, network, "adapter.method"),
    "network_dim": own(whole, rank, "adapter.rank"),
    "network_alpha": own(number, alpha, "adapter.alpha"),
    "network_dropout": option("dropout", number, "lora", words=DROPOUT),
    "network_train_unet_only": with_others("adapter.parts", flag),
    "network_train_text_encoder_only": with_others("adapter.parts", flag),
    "network_args": own(texts, _nothing, "adapter.options"),
    "network_args.algo": own(text, algo, "adapter.method"),
    "network_args.preset": own(text, lycoris_preset, "adapter.parts"),
    "network_args.conv_dim": own(whole, conv_dim, "adapter.rank_pattern"),
    "network_args.conv_alpha": own(number, conv_alpha, "adapter.alpha_pattern"),
    "network_args.dropout": option("dropout", number, "lora", words=DROPOUT),
    "network_args.rank_dropout": option("rank_dropout", number, "loha", "lokr"),
    "network_args.module_dropout": option("module_dropout", number, "loha", "lokr"),
    "network_args.factor": option("factor", whole, "lokr"),
    "network_args.decompose_both": option("decompose_both", flag, "lokr"),
    "network_args.dora_wd": option("dora", flag, "lora"),
    "network_args.rs_lora": option("rslora", flag, "lora"),
    "network_args.loraplus_lr_ratio": own(number, ratio, "optimizer.lora_plus_ratio"),
    "network_args.loraplus_unet_lr_ratio": own(number, ratio, "optimizer.lora_plus_ratio"),
    "network_args.loraplus_text_encoder_lr_ratio": lost("one ratio for all parts: `optimizer.lora_plus_ratio`"),
    **alike(lost(BLOCKS), *(f"network_args.{name}" for name in BY_BLOCK)),
    **alike(lost("no such option here"), *(f"network_args.{name}" for name in OTHERS)),
    "network_args.wd_on_output": lost("lengths are of outputs", True, "true"),
}
"""Settings of the network, and what stands in `network_args`."""
