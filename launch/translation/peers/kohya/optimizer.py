"""sd-scripts' optimiser, its arguments, rates and schedule."""

import ast
from typing import Any, NamedTuple

from ...peer import NOTHING, Outcome, Rule, Settings, lost, own
from ...values import flag, number, plain, text, texts, whole
from .network import text_rates, trained
from .run import Run


class Kind(NamedTuple):
    """An optimiser of sd-scripts in our words."""

    name: str  # of ours, or an import path
    weight_decay: float = 0.0  # its own default
    options: dict[str, Any] = {}
    words: str = ""


FACTORED = "transformers.optimization.Adafactor"
KINDS = {
    "adamw": Kind("adamw", 0.01),
    "adamw8bit": Kind("adamw_8bit", 0.01),
    "pagedadamw": Kind("bitsandbytes.optim.PagedAdamW", 0.01),
    "pagedadamw8bit": Kind("bitsandbytes.optim.PagedAdamW8bit", 0.01),
    "pagedadamw32bit": Kind("bitsandbytes.optim.PagedAdamW32bit", 0.01),
    "lion": Kind("lion"),
    "lion8bit": Kind("bitsandbytes.optim.Lion8bit"),
    "pagedlion8bit": Kind("bitsandbytes.optim.PagedLion8bit"),
    "sgdnesterov": Kind("torch.optim.SGD", 0.0, {"nesterov": True, "momentum": 0.9}),
    "sgdnesterov8bit": Kind("bitsandbytes.optim.SGD8bit", 0.0, {"nesterov": True, "momentum": 0.9}),
    "prodigy": Kind("prodigy"),
    "adamwschedulefree": Kind("schedule_free"),
    "radamschedulefree": Kind("schedule_free", 0.0, {}, "schedule-free AdamW is trained, not RAdam"),
    "dadaptation": Kind("dadaptation.experimental.DAdaptAdamPreprint"),
    "dadaptadampreprint": Kind("dadaptation.experimental.DAdaptAdamPreprint"),
    "dadaptadanip": Kind("dadaptation.experimental.DAdaptAdanIP"),
    **{f"dadapt{name.lower()}": Kind(f"dadaptation.DAdapt{name}") for name in ("AdaGrad", "Adam", "Adan")},
    **{f"dadapt{name.lower()}": Kind(f"dadaptation.DAdapt{name}") for name in ("Lion", "SGD")},
}
OLD_FLAGS = {"use_8bit_adam": "AdamW8bit", "use_lion_optimizer": "Lion"}
SCHEDULES = ("constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "piecewise_constant")
OPTIONS = {  # of ours, by what sd-scripts calls it; all that a class takes goes to a class
    "adamw": {"betas": ("beta1", "beta2"), "eps": ("eps",)},
    "adamw_8bit": {"betas": ("beta1", "beta2"), "eps": ("eps",)},
    "lion": {"betas": ("beta1", "beta2")},
    "schedule_free": {"betas": ("beta1", "beta2")},
    "prodigy": {
        "betas": ("beta1", "beta2"),
        "d_coef": ("d_coef",),
        "safeguard_warmup": ("safeguard_warmup",),
        "use_bias_correction": ("bias_correction",),
    },
    "adafactor": {"clip_threshold": ("clip",), "decay_rate": ("beta2_decay",)},
}
ALWAYS = {"prodigy": {"decouple": True}}
"""What ours does anyway."""


def kind(settings: Settings) -> Kind:
    """The optimiser of a run."""
    name = settings.value("optimizer_type", text, "AdamW")
    if name == "AdamW":  # flags of older versions, which may not stand beside another optimiser
        name = next((each for flag_name, each in OLD_FLAGS.items() if settings.asked(flag_name)), name)
    if name.lower() == "adafactor":
        return _adafactor(settings)
    return KINDS.get(name.lower()) or Kind(name if "." in name else f"torch.optim.{name}")


def _adafactor(settings: Settings) -> Kind:
    """transformers' own where it has a rate; its rate by itself is nothing that ours does."""
    if not settings.value("optimizer_args.relative_step", flag, True):
        return Kind(FACTORED)
    words = "it finds its rates by itself there (`relative_step`); here they are those of the config"
    return Kind("adafactor", 0.0, {}, words)


def optimizer(value: Any, settings: Settings) -> Outcome:
    """With the optimiser's own weight decay, as ours is another."""
    found = kind(settings)
    values: dict[str, Any] = {"optimizer.name": found.name}
    values |= {f"optimizer.options.{name}": each for name, each in found.options.items()}
    if settings.find("optimizer_args.weight_decay") is None:
        values["optimizer.weight_decay"] = found.weight_decay
    return Outcome(values, found.words)


def _if_on(value: bool, settings: Settings) -> Outcome:
    return optimizer(value, settings) if value else NOTHING


def argument(name: str) -> Rule:
    """The rule of one of `optimizer_args`."""

    def apply(value: Any, settings: Settings) -> Outcome:
        ours, found = kind(settings).name, _literal(value)
        if name == "weight_decay":
            return Outcome({"optimizer.weight_decay": number(value)})
        if "." in ours:
            return Outcome({f"optimizer.options.{name}": found})
        if ALWAYS.get(ours, {}).get(name) == found or (name == "relative_step" and ours == "adafactor"):
            return NOTHING
        keys = OPTIONS.get(ours, {}).get(name)
        if keys is None:
            return Outcome(lost=f"{ours} has no such option here")
        return Outcome({f"optimizer.options.{key}": each for key, each in zip(keys, _several(found), strict=False)})

    return own(plain, apply, "optimizer.options")


def _literal(value: Any) -> Any:
    """What Python makes of the words, as sd-scripts does."""
    try:
        found = ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        return value
    return list(found) if isinstance(found, tuple) else found


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def rates(settings: Settings) -> dict[str, tuple[float, str]]:
    """Trained part -> its rate and the setting that says it; 2e-6 where nothing does."""
    common = settings.value("learning_rate", number, 2e-6), "learning_rate"
    encoders = dict(zip(("text_encoder", "text_encoder_2"), text_rates(settings) * 2, strict=False))
    unet = settings.value("unet_lr", number, common[0]), "unet_lr" if settings.find("unet_lr") else "learning_rate"
    found = {"unet": unet} | {
        part: common if rate is None else (rate, "text_encoder_lr") for part, rate in encoders.items()
    }
    return {part: found[part] for part in trained(settings)}


def rate(name: str) -> Rule:
    """What one of the settings says: the rate of the first part, and of others that differ from it."""

    def apply(value: Any, settings: Settings) -> Outcome:
        (_, (first, origin)), *others = rates(settings).items()
        values = {"optimizer.learning_rate": first} if origin == name else {}
        different = {part: own_rate for part, (own_rate, origin) in others if origin == name and own_rate != first}
        if different and kind(settings).name == "prodigy":
            return Outcome(values, "prodigy finds one rate for all parts")
        return Outcome(values | {f"optimizer.parts.{part}.learning_rate": each for part, each in different.items()})

    ours = "optimizer.learning_rate" if name == "learning_rate" else "optimizer.parts"
    return own(plain if name == "text_encoder_lr" else number, apply, ours)


def schedule(value: str, settings: Settings) -> Outcome:
    name = "constant" if value == "constant_with_warmup" else value
    if kind(settings).name == "schedule_free":
        return Outcome({"optimizer.schedule": "constant"}, said="a schedule-free optimiser takes none, there as well")
    if value.startswith("adafactor"):
        return Outcome({"optimizer.schedule": "constant"}, "Adafactor's own rates are not here")
    if name not in SCHEDULES:
        return Outcome(lost=f"the rate is constant; there are: {', '.join(SCHEDULES)}")
    return Outcome({"optimizer.schedule": name})


def warmup(value: Any, run: Run) -> Outcome:
    """A fraction below 1 is one of all steps."""
    exact = number(value)
    return Outcome({"optimizer.warmup_steps": int(exact * run.steps) if 0 < exact < 1 else int(exact)})


def of_schedule(key: str, of: Any, name: str) -> Rule:
    """A value that one schedule has."""

    def apply(value: Any, settings: Settings) -> Outcome:
        return Outcome({key: value}) if settings.value("lr_scheduler", text, "constant") == name else NOTHING

    return own(of, apply, key)


def bound(value: float, settings: Settings) -> Outcome:
    """0 switches clipping off there."""
    if value == 0:
        return Outcome({"optimizer.max_grad_norm": 1e9}, "gradients are never cut: a bound that none reaches")
    return Outcome({"optimizer.max_grad_norm": value})


def _nothing(value: Any, settings: Settings) -> Outcome:
    return NOTHING


RULES: dict[str, Rule] = {
    "optimizer_type": own(text, optimizer, "optimizer.name"),
    "use_8bit_adam": own(flag, _if_on, "optimizer.name"),
    "use_lion_optimizer": own(flag, _if_on, "optimizer.name"),
    "optimizer_args": own(texts, _nothing, "optimizer.options"),
    **{name: rate(name) for name in ("learning_rate", "unet_lr", "text_encoder_lr")},
    "max_grad_norm": own(number, bound, "optimizer.max_grad_norm"),
    "lr_scheduler": own(text, schedule, "optimizer.schedule"),
    "lr_warmup_steps": own(number, warmup, "optimizer.warmup_steps"),
    "lr_scheduler_num_cycles": of_schedule("optimizer.schedule_cycles", whole, "cosine_with_restarts"),
    "lr_scheduler_power": of_schedule("optimizer.schedule_power", number, "polynomial"),
    "lr_scheduler_args": own(texts, _nothing, "optimizer.options"),
    "lr_scheduler_args.step_rules": of_schedule("optimizer.schedule_rules", text, "piecewise_constant"),
    "lr_scheduler_type": lost("only schedules with a name of their own: `optimizer.schedule`"),
    "lr_decay_steps": lost("no schedule here has a decay of its own length"),
    "lr_scheduler_timescale": lost("no schedule here has it"),
    "lr_scheduler_min_lr_ratio": lost("rates fall to 0"),
    "fused_backward_pass": lost("the optimiser steps once for all weights"),
    "scale_weight_norms": lost("norms of changes are not bounded; `optimizer.weight_decay` keeps them small"),
}
"""Settings of the optimiser; those in `optimizer_args` have their rules from `argument`."""
