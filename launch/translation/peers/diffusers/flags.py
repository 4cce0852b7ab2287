"""Settings of diffusers' scripts: base, adapter, optimiser, loop, noise, validation and files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from .....configs.schema import Tracker
from ...launcher import processes
from ...peer import NOTHING, Apply, Outcome, Rule, alike, lost, near, needless, own, same, switch, with_others
from ...values import file_word, flag, number, text, texts, whole
from . import data
from .run import Run

SCHEDULES = ("constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "piecewise_constant")
SEED = "random numbers have keys here: other ones with the same seed"
CHECKED = "checked, not set: the base's scheduler has to say it"
MEMORY = "nothing to set for it"
HUB = "nothing is uploaded unless `output.push_to` names a repository"
UNCOUNTED = "how many steps that is depends on images that are not here: set `validation.every`"
DORA = "with a text encoder it is written as `kohya`: diffusers would lose it there"
AVERAGE = "the memory is 0.9999 from the first step on; there it grows to that"


def script(value: str, run: Run) -> Outcome:
    """What is trained where, and what all scripts do: squares, no buckets."""
    kind = run.script
    values: dict[str, Any] = {"adapter.method": kind.method, "data.buckets.enabled": False}
    if kind.images == "words":
        return Outcome(values | {"data.flip": 0.5})
    where = "all" if kind.method == "full" else "attention"
    values |= {f"adapter.parts.{part}": where for part in ("unet", *run.encoders)}
    if kind.method == "lora":
        values |= {"adapter.options.init": "gaussian", "output.formats": formats(run)}
    return Outcome(values)


def formats(run: Run) -> list[str]:
    """diffusers' own, which would lose DoRA of a text encoder."""
    if run.asked("use_dora") and run.encoders:
        return ["kohya"]
    return ["diffusers", "kohya"] if run.asked("output_kohya_format") else ["diffusers"]


def of_method(method: str, of: Callable[[Any], Any], apply: Apply, ours: str, words: str = "") -> Rule:
    """What only scripts of one method have."""

    def checked(value: Any, run: Run) -> Outcome:
        if run.script.method == method:
            return apply(value, run)
        return Outcome(lost="not of this script") if value else NOTHING

    return own(of, checked, ours, words)


def dora(value: bool, run: Run) -> Outcome:
    return Outcome({"adapter.options.dora": True}, DORA if run.encoders else "") if value else NOTHING


def rank(value: int, run: Run) -> Outcome:
    return Outcome({"adapter.rank": value, "adapter.alpha": float(value)})


def dropout(value: float, run: Run) -> Outcome:
    return Outcome({"adapter.options.dropout": value})


def tokens(value: str, run: Run) -> Outcome:
    token: dict[str, Any] = {"token": value}
    token |= {"init": init} if (init := run.value("initializer_token", text, "")) else {}
    token |= {"vectors": vectors} if (vectors := run.value("num_vectors", whole, 1)) != 1 else {}
    return Outcome({"adapter.tokens": [token]})


def name_of(run: Run) -> str:
    """The optimiser, in our words."""
    if run.value("optimizer", text, "adamw").lower() == "prodigy":
        return "prodigy"
    return "adamw_8bit" if run.asked("use_8bit_adam") else "adamw"


def optimizer(value: Any, run: Run) -> Outcome:
    return Outcome({"optimizer.name": name_of(run)})


def of_prodigy(key: str) -> Rule:
    def apply(value: bool, run: Run) -> Outcome:
        return Outcome({f"optimizer.options.{key}": value}) if name_of(run) == "prodigy" else NOTHING

    return own(flag, apply, f"optimizer.options.{key}")


def epsilon(value: float, run: Run) -> Outcome:
    if name_of(run) == "prodigy":
        return Outcome(lost="prodigy has no such option here") if value != 1e-8 else NOTHING
    return Outcome({"optimizer.options.eps": value})


def rate(value: float, run: Run) -> Outcome:
    """`scale_lr` makes it one of a sample."""
    factor = run.accumulated * run.value("train_batch_size", whole, 1) * processes(run) if run.asked("scale_lr") else 1
    return Outcome({"optimizer.learning_rate": value * factor})


def text_rate(value: float, run: Run) -> Outcome:
    if name_of(run) == "prodigy":
        return Outcome(said="prodigy finds one rate for all parts, there as well") if run.encoders else NOTHING
    return Outcome({f"optimizer.parts.{part}.learning_rate": value for part in run.encoders})


def text_decay(value: float, run: Run) -> Outcome:
    return Outcome({f"optimizer.parts.{part}.weight_decay": value for part in run.encoders})


def schedule(value: str, run: Run) -> Outcome:
    name = "constant" if value == "constant_with_warmup" else value
    if name not in SCHEDULES:
        return Outcome(lost=f"the rate is constant; there are: {', '.join(SCHEDULES)}")
    return Outcome({"optimizer.schedule": name})


def warmup(value: int, run: Run) -> Outcome:
    if run.value("lr_scheduler", text, "constant") == "constant":
        return Outcome(said="the schedule `constant` has none, there as well")
    return Outcome({"optimizer.warmup_steps": value})


def of_schedule(key: str, of: Any, name: str) -> Rule:
    """A value that one schedule has."""

    def apply(value: Any, run: Run) -> Outcome:
        return Outcome({key: value}) if run.value("lr_scheduler", text, "constant") == name else NOTHING

    return own(of, apply, key)


def batch(value: int, run: Run) -> Outcome:
    values = {"loop.batch_size": run.micro_batch * run.accumulated * processes(run)}
    return Outcome(values | ({"loop.micro_batch": run.micro_batch} if run.accumulated > 1 else {}))


def steps(value: int, run: Run) -> Outcome:
    return Outcome({"loop.steps": run.steps}, "--steps counts" if run.find("--steps") else "")


def epochs(value: int, run: Run) -> Outcome:
    if run.find("max_train_steps"):
        return Outcome(said="`max_train_steps` counts, there as well")
    words = "--steps counts" if run.find("--steps") else f"{value} times {run.epoch} steps"
    return Outcome({"loop.steps": run.steps}, said=words)


def precision(value: str, run: Run) -> Outcome:
    """The frozen base is cast there too, what is trained is not."""
    if value == "no":
        return NOTHING
    return Outcome({"loop.precision": value} | ({} if run.script.method == "full" else {"model.dtype": value}))


def launched_precision(value: str, run: Run) -> Outcome:
    return Outcome(said="the script's own counts") if run.find("mixed_precision") else precision(value, run)


def min_snr(value: float, run: Run) -> Outcome:
    words = "class images are weighted too" if run.has_classes else ""
    return Outcome({"noise.min_snr_gamma": value}, words)


def prompts(value: list[str], run: Run) -> Outcome:
    """With what the pipelines do where they are told nothing."""
    usual = {"at_start": False, "steps": run.script.sample_steps, "guidance": 5.0 if run.script.sdxl else 7.5}
    return Outcome({"validation.prompts": value} | {f"validation.{key}": each for key, each in usual.items()})


def has_prompts(run: Run) -> bool:
    return bool(run.find("validation_prompt") or run.find("validation_prompts"))


def validation_epochs(value: int, run: Run) -> Outcome:
    if not has_prompts(run):
        return NOTHING
    return Outcome(lost=UNCOUNTED) if run.epoch is None else Outcome({"validation.every": value * run.epoch})


def validation_steps(value: int, run: Run) -> Outcome:
    return Outcome({"validation.every": value}) if has_prompts(run) else NOTHING


def run_folder(value: str, run: Run) -> Outcome:
    name = run.value("--name", text, file_word(Path(value).name))
    return Outcome({"output.dir": value, "output.name": name})


def trackers(value: str, run: Run) -> Outcome:
    known = {"all": ["tensorboard", "wandb"], "none": []} | {name: [name] for name in get_args(Tracker)}
    if value not in known:
        return Outcome(lost=f"there are: {', '.join(get_args(Tracker))}")
    return Outcome({"trackers": known[value]})


RULES: dict[str, Rule] = {
    **data.RULES,
    "script": own(text, script, "adapter.method"),
    # base
    "pretrained_model_name_or_path": same("model.base", text),
    "revision": same("model.revision", text),
    "variant": lost("files without a variant are loaded: `model.dtype` says in which type they are kept"),
    "tokenizer_name": lost("the tokenizer is the base's own"),
    "pretrained_vae_model_name_or_path": lost("the base's own VAE is used: put another into the pipeline folder"),
    "non_ema_revision": lost("one revision is loaded: `model.revision`"),
    # what is trained
    "rank": of_method("lora", whole, rank, "adapter.rank"),
    "lora_dropout": of_method("lora", number, dropout, "adapter.options.dropout"),
    "use_dora": of_method("lora", flag, dora, "adapter.options.dora", DORA),
    "train_text_encoder": with_others("adapter.parts", flag),
    "placeholder_token": of_method("textual_inversion", text, tokens, "adapter.tokens"),
    "initializer_token": with_others("adapter.tokens", text),
    "num_vectors": with_others("adapter.tokens", whole),
    # optimiser
    "optimizer": own(text, optimizer, "optimizer.name"),
    "use_8bit_adam": own(flag, optimizer, "optimizer.name"),
    "learning_rate": own(number, rate, "optimizer.learning_rate"),
    "scale_lr": with_others("optimizer.learning_rate", flag),
    "text_encoder_lr": own(number, text_rate, "optimizer.parts"),
    "adam_beta1": same("optimizer.options.beta1", number),
    "adam_beta2": same("optimizer.options.beta2", number),
    "adam_epsilon": own(number, epsilon, "optimizer.options.eps"),
    "adam_weight_decay": same("optimizer.weight_decay", number),
    "adam_weight_decay_text_encoder": own(number, text_decay, "optimizer.parts"),
    "prodigy_use_bias_correction": of_prodigy("bias_correction"),
    "prodigy_safeguard_warmup": of_prodigy("safeguard_warmup"),
    "prodigy_decouple": lost("weight decay is always decoupled", True, "True", "true"),
    "prodigy_beta3": lost("prodigy has no such option here"),
    "max_grad_norm": same("optimizer.max_grad_norm", number),
    "lr_scheduler": own(text, schedule, "optimizer.schedule"),
    "lr_warmup_steps": own(whole, warmup, "optimizer.warmup_steps"),
    "lr_num_cycles": of_schedule("optimizer.schedule_cycles", whole, "cosine_with_restarts"),
    "lr_power": of_schedule("optimizer.schedule_power", number, "polynomial"),
    "use_ema": switch({"optimizer.ema_decay": 0.9999}, AVERAGE),
    # loop
    "train_batch_size": own(whole, batch, "loop.batch_size"),
    "gradient_accumulation_steps": with_others("loop.micro_batch", whole),
    "max_train_steps": own(whole, steps, "loop.steps"),
    "num_train_epochs": own(whole, epochs, "loop.steps"),
    "mixed_precision": own(text, precision, "loop.precision"),
    "gradient_checkpointing": same("loop.gradient_checkpointing", flag),
    "seed": near("loop.seed", whole, SEED),
    "pre_compute_text_embeddings": switch({"data.cache.prompts": True}),
    "allow_tf32": lost("matrices are multiplied in the precision of `loop.precision`"),
    "enable_xformers_memory_efficient_attention": needless("torch's own fused attention is used anyway"),
    "enable_npu_flash_attention": lost("torch's own fused attention is used"),
    **alike(needless(MEMORY), "set_grads_to_none", "local_rank", "foreach_ema", "offload_ema"),
    # noise and loss
    "noise_offset": same("noise.offset", number),
    "offset_noise": switch({"noise.offset": 0.1}),
    "input_perturbation": same("noise.input_perturbation", number),
    "snr_gamma": own(number, min_snr, "noise.min_snr_gamma", "class images are weighted too"),
    "prediction_type": near("noise.prediction", text, CHECKED),
    "do_edm_style_training": lost("only models that predict noise or v"),
    "dream_training": lost("no loss of that kind is here"),
    "dream_detail_preservation": lost("no loss of that kind is here", 1, 1.0),
    # validation and files
    "validation_prompt": own(texts, prompts, "validation.prompts"),
    "validation_prompts": own(texts, prompts, "validation.prompts"),
    "num_validation_images": same("validation.num_images", whole),
    "validation_epochs": own(whole, validation_epochs, "validation.every"),
    "validation_steps": own(whole, validation_steps, "validation.every"),
    "validation_scheduler": lost("pictures are sampled with DPM-Solver++", "DPMSolverMultistepScheduler"),
    "checkpointing_steps": same("checkpoint.every", whole),
    "checkpoints_total_limit": same("checkpoint.keep", whole),
    "resume_from_checkpoint": lost("`loraloom resume` goes on with a run of ours, to the same bytes"),
    "save_steps": needless("words are in each checkpoint, and the last ones in a file"),
    "output_dir": own(text, run_folder, "output.dir"),
    "output_kohya_format": with_others("output.formats", flag),
    "save_as_full_pipeline": lost("new words are written as a file of their own"),
    "no_safe_serialization": lost("files are safetensors"),
    "skip_save_text_encoder": lost("what is trained is written"),
    "report_to": own(text, trackers, "trackers"),
    "logging_dir": needless("curves are written into the run's folder"),
    "tracker_project_name": lost("curves have the run's name"),
    "debug_loss": lost("losses of each source have curves anyway"),
    **alike(lost(HUB), "push_to_hub", "hub_token", "hub_model_id"),
}
"""Settings of all scripts."""
LAUNCHED = own(text, launched_precision, "loop.precision")
"""The launcher's `--mixed_precision`, which counts where the script has none."""
