"""sd-scripts' settings of a run: the base, its images and the loop, and all tables together."""

from pathlib import Path
from typing import Any

from ...peer import NOTHING, Outcome, Rule, alike, lost, needless, own, same, switch, with_others
from ...values import flag, numbers, text, texts, whole
from . import data, files, network, noise, optimizer
from .data import MASKS, SOURCE
from .run import Run, numbered

PICKLES = (".ckpt", ".pt")
PICKLE = "a pickle is never opened here, as it can run code: save it as .safetensors, and name that"
FOLDER = "not here: words and repeats in the names of its folders, `10_sks dog`, could not be read"
NO_FOLDERS = "has no folders such as `10_sks dog`: its own images are taken"
JSON = "captions of sd-scripts' JSON: write them as metadata.jsonl with `file_name` and `text`"
SEED = "random numbers have keys here: other ones with the same seed"
ONE_BY_ONE = "images and captions are encoded one by one"
CACHED = "what is cached is kept on disk, under a name of what it holds"
MEMORY = "nothing to set for it"
WORDS = "sd-scripts' textual inversion is not read: `adapter.method: textual_inversion` with `adapter.tokens`"
DEEPSPEED = "DeepSpeed is not here: FSDP2 spreads weights over GPUs, launch/accelerate/fsdp2.yaml"


def base(value: str, run: Run) -> Outcome:
    """Which text encoders there are is guessed where nothing tells."""
    said = [PICKLE] if value.lower().endswith(PICKLES) else []
    told = run.find("--script") or network.pipeline(run)
    if not told and any(part != "unet" for part in network.trained(run)):
        kind = "SDXL" if network.is_sdxl(run) else "Stable Diffusion 1 or 2"
        said.append(f"taken for {kind} by its name; SDXL has `text_encoder_2` in adapter.parts, the others have not")
    return Outcome({"model.base": value}, "; ".join(said))


def merged(value: list[str], run: Run) -> Outcome:
    weights = run.value("base_weights_multiplier", numbers, [])
    weights = [*weights, *[1.0] * len(value)]
    return Outcome({"model.adapters": [f"{file}:{weight:g}" for file, weight in zip(value, weights, strict=False)]})


def skip(value: int, run: Run) -> Outcome:
    """1 is the last layer there, 0 is here."""
    if network.is_sdxl(run):
        return Outcome(differs="SDXL's script does not use it, so it is left out") if value else NOTHING
    return Outcome({"model.clip_skip": max(0, value - 1)})


def precision(value: str, run: Run) -> Outcome:
    """The frozen base is cast there too."""
    return NOTHING if value == "no" else Outcome({"loop.precision": value, "model.dtype": value})


def steps(value: int, run: Run) -> Outcome:
    if run.value("max_train_epochs", whole, 0):
        return Outcome(said="`max_train_epochs` counts, there as well")
    return Outcome({"loop.steps": run.steps}, "--steps counts" if run.find("--steps") else "")


def epochs(value: int, run: Run) -> Outcome:
    if not value:
        return NOTHING
    words = f"{value} times {run.epoch} steps; buckets that are not full add some there"
    return Outcome({"loop.steps": run.steps}, "--steps counts" if run.find("--steps") else words)


def windows(value: int, run: Run) -> Outcome:
    return Outcome({"data.token_windows": max(1, value // 75)})


def images(value: str, run: Run) -> Outcome:
    """`train_data_dir` or `reg_data_dir`."""
    if run.find("dataset_config"):
        return Outcome(said="`dataset_config` counts, there as well")
    if not Path(value).is_dir():
        return Outcome({SOURCE + "path": value}, FOLDER)
    return Outcome({SOURCE + "path": value}, "" if numbered(value) else NO_FOLDERS)


def train_images(value: str, run: Run) -> Outcome:
    return Outcome(differs="--data counts") if run.find("--data") else images(value, run)


RULES: dict[str, Rule] = {
    **network.RULES,
    **optimizer.RULES,
    **noise.RULES,
    **files.RULES,
    **data.RULES,
    # base
    "pretrained_model_name_or_path": own(text, base, "model.base", "a single file has to be .safetensors"),
    "v2": switch({"model.family": "sd2"}),
    "clip_skip": own(whole, skip, "model.clip_skip", "counted from 0 here, from 1 there; SDXL's script ignores it"),
    "base_weights": own(texts, merged, "model.adapters"),
    "base_weights_multiplier": with_others("model.adapters", numbers),
    "network_weights": same("adapter.start_from", text),
    "dim_from_weights": lost("ranks are those of the config: `adapter.rank` and `adapter.rank_pattern`"),
    "vae": lost("the base's own VAE is used: put another into the pipeline folder"),
    "no_half_vae": needless("SDXL's VAE stays in fp32 where its config asks for it"),
    "tokenizer_cache_dir": lost("tokenizers are those of the base"),
    # images
    "train_data_dir": own(text, train_images, SOURCE + "path", "folders `10_sks dog` are read where they are here"),
    "reg_data_dir": own(text, images, SOURCE + "path", "folders `10_sks dog` are read where they are here"),
    "dataset_config": with_others("data.sources", text),
    "in_json": lost(JSON),
    "dataset_class": lost("sources are folders, datasets and shards"),
    "max_token_length": own(whole, windows, "data.token_windows"),
    "weighted_captions": lost("words in captions have no weights"),
    "masked_loss": lost(MASKS),
    "cache_latents": switch({"data.cache.latents": True, "data.cache.latent_draw": "once"}),
    "cache_text_encoder_outputs": switch({"data.cache.prompts": True}),
    **alike(needless(CACHED), "cache_latents_to_disk", "cache_text_encoder_outputs_to_disk", "skip_cache_check"),
    **alike(needless(ONE_BY_ONE), "vae_batch_size", "text_encoder_batch_size"),
    "max_data_loader_n_workers": same("data.workers", whole),
    "persistent_data_loader_workers": needless(MEMORY),
    "debug_dataset": lost("`loraloom preview CONFIG` shows the images as they are trained"),
    # loop
    "max_train_steps": own(whole, steps, "loop.steps"),
    "max_train_epochs": own(whole, epochs, "loop.steps", "epochs become steps, counted from the images"),
    "gradient_accumulation_steps": with_others("loop.micro_batch", whole),
    "mixed_precision": own(text, precision, "loop.precision"),
    "gradient_checkpointing": same("loop.gradient_checkpointing", flag),
    "seed": own(whole, lambda value, run: Outcome({"loop.seed": value}, SEED), "loop.seed", SEED),
    **alike(lost("adapter weights train in fp32"), "full_fp16", "full_bf16"),
    **alike(lost("the base is kept in fp32, bf16 or fp16: `model.dtype`"), "fp8_base", "fp8_base_unet"),
    "torch_compile": switch({"loop.compile": True}),
    "dynamo_backend": lost("torch's inductor compiles: `loop.compile`", "inductor", "no", "NO"),
    "cpu_offload_checkpointing": lost("activations are computed again, not moved: `loop.gradient_checkpointing`"),
    "blocks_to_swap": lost("the whole denoiser stays on the device"),
    **alike(needless("torch's own fused attention is used anyway"), "xformers", "sdpa", "mem_eff_attn"),
    **alike(needless(MEMORY), "lowram", "highvram", "disable_mmap_load_safetensors"),
    **alike(lost("accelerate's own is used"), "ddp_timeout", "ddp_gradient_as_bucket_view", "ddp_static_graph"),
    "config_file": needless("its settings are read too"),
    "stop_text_encoder_training": lost("`optimizer.parts.text_encoder.stop_after` counts the steps"),
    # what is not here
    **alike(
        lost(DEEPSPEED, 2),
        *("deepspeed", "zero_stage", "zero3_init_flag", "zero3_save_16bit_model", "fp16_master_weights_and_gradients"),
        *(f"offload_{name}" for name in ("optimizer_device", "optimizer_nvme_path", "param_device", "param_nvme_path")),
    ),
    "weighting_scheme": lost("of other models; `noise.density` chooses timesteps", "uniform"),
    **alike(lost("of other models", 0.0, 1.0, 1.29), "logit_mean", "logit_std", "mode_scale"),
    **alike(lost(WORDS, 1), "token_string", "init_word", "num_vectors_per_token", "weights"),
    **alike(lost(WORDS), "use_object_template", "use_style_template"),
}
"""All settings of a run, and of its data sets."""

DEFAULTS: dict[str, Any] = {
    "max_train_steps": 1600,
    "train_batch_size": 1,
    "learning_rate": 2e-6,
    "optimizer_type": "AdamW",
    "network_module": "networks.lora",
    "network_dim": 4,
    "network_alpha": 1.0,
    "enable_bucket": False,
    "bucket_reso_steps": 64,
    "min_bucket_reso": 256,
    "max_bucket_reso": 1024,
    "caption_extension": ".caption",
}
"""What sd-scripts takes where nothing is said, and we do not."""
