"""`loraloom init --from`: settings of other trainers become a config that loads, and none of them is lost."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from loraloom.configs.choices import find, names
from loraloom.configs.errors import UserError
from loraloom.configs.loader import load_config
from loraloom.configs.problems import known_keys
from loraloom.configs.schema import RunConfig
from loraloom.launch.init import main
from loraloom.launch.translation import table, translated, values
from loraloom.launch.translation.peer import PEERS, Asked, Translation, translate
from loraloom.launch.translation.peers import diffusers, kohya

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_images(folder: str, count: int) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.new("RGB", (8, 8)).save(Path(folder, f"{index}.png"))


def write(text: str, name: str = "in.toml") -> Path:
    Path(name).write_text(text)
    return Path(name)


def loaded(file: Path, *arguments: str) -> RunConfig:
    """The config that is written."""
    assert main(["--from", str(file), "--out", "out.yaml", "--force", *arguments]) == 0
    return load_config("out.yaml")


def given_of(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(exclude_unset=True)


def lists(translation: Translation) -> dict[str, dict[str, str]]:
    """Setting -> what is said of it, for each list."""
    return {
        name: {line.setting.name: line.words for line in getattr(translation, name)}
        for name in ("carried", "differs", "lost")
    }


TRAINING = """
[model_arguments]
v2 = false
pretrained_model_name_or_path = "org/sd15"

[additional_network_arguments]
unet_lr = 0.0005
text_encoder_lr = 0.0001
network_dim = 16
network_alpha = 8
network_module = "networks.lora"
network_args = ["conv_dim=8", "conv_alpha=4"]

[optimizer_arguments]
learning_rate = 0.0005
lr_scheduler = "cosine_with_restarts"
lr_scheduler_num_cycles = 3
lr_warmup_steps = 0.05
optimizer_type = "AdamW8bit"
optimizer_args = ["weight_decay=0.1", "betas=[0.9,0.99]"]

[training_arguments]
max_train_epochs = 10
save_every_n_epochs = 1
save_last_n_epochs = 4
train_batch_size = 2
gradient_accumulation_steps = 2
clip_skip = 2
seed = 42
mixed_precision = "bf16"
save_precision = "fp16"
output_dir = "output"
output_name = "my dog"
sample_prompts = "prompts.txt"
sample_every_n_epochs = 1
min_snr_gamma = 5.0
noise_offset = 0.05
max_token_length = 225
xformers = true
cache_latents = true
color_aug = true
colour_aug = true
huggingface_token = "hf_abc"
train_data_dir = "photos"
reg_data_dir = "classes"
prior_loss_weight = 0.5
resolution = "512,768"
enable_bucket = true
flip_aug = true
shuffle_caption = true
keep_tokens = 1
caption_extension = ".txt"
caption_dropout_rate = 0.05
"""
PROMPTS = """\
# not a prompt
a sks dog --w 512 --h 768 --d 1 --s 20 --l 5 --n bad, ugly
a sks dog on the moon
"""
CONVOLUTIONS = r"(conv1|conv2|samplers\.0\.conv|conv_in|conv_out)$"


def test_settings_of_sd_scripts() -> None:
    make_images("photos/10_sks dog", 6)
    make_images("photos/no repeats", 1)
    make_images("classes/1_dog", 3)
    write(PROMPTS, "prompts.txt")
    config = loaded(write(TRAINING))
    assert given_of(config) == {
        "model": {"base": "org/sd15", "dtype": "bf16", "clip_skip": 1},
        "data": {
            "sources": [
                {"path": "photos/10_sks dog", "caption": "sks dog", "share": 0.5},
                {"path": "classes/1_dog", "caption": "dog", "share": 0.5, "loss_weight": 0.5},
            ],
            "resolution": 624,  # sqrt(512 * 768), a multiple of 8
            "captions": {"shuffle": True, "keep_tokens": 1, "dropout": 0.05},
            "token_windows": 3,
            "buckets": {"enabled": True, "step": 64, "max_aspect": 4.0},
            "flip": 0.5,
            "cache": {"latents": True, "latent_draw": "once"},
        },
        "adapter": {
            "method": "lora",
            "rank": 16,
            "alpha": 8.0,
            "parts": {
                "unet": ["attention", "ff", "conv", r"re:.*\.time_emb_proj"],
                "text_encoder": "attention+ff",
            },
            "rank_pattern": {CONVOLUTIONS: 8},
            "alpha_pattern": {CONVOLUTIONS: 4.0},
        },
        "noise": {"min_snr_gamma": 5.0, "offset": 0.05},
        "optimizer": {
            "name": "adamw_8bit",
            "learning_rate": 0.0005,
            "parts": {"text_encoder": {"learning_rate": 0.0001}},
            "weight_decay": 0.1,
            "schedule": "cosine_with_restarts",
            "schedule_cycles": 3,
            "warmup_steps": 15,
            "options": {"beta1": 0.9, "beta2": 0.99},
        },
        # 60 samples and as many class images in batches of 2, two batches to a step: 30 steps an epoch
        "loop": {"steps": 300, "batch_size": 4, "micro_batch": 2, "precision": "bf16", "seed": 42},
        "checkpoint": {"every": 30, "keep": 4},
        "validation": {
            "every": 30,
            "at_start": False,
            "prompts": [
                {"prompt": "a sks dog", "negative_prompt": "bad, ugly", "steps": 20, "guidance": 5.0, "seed": 1},
                "a sks dog on the moon",
            ],
            "num_images": 1,
            "steps": 30,
            "guidance": 7.5,
        },
        "output": {"dir": "output/my-dog", "name": "my-dog", "formats": ["kohya"], "dtype": "fp16"},
    }


def test_the_summary_and_the_file_say_what_is_not_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    make_images("photos/10_sks dog", 6)
    write(PROMPTS, "prompts.txt")
    assert main(["--from", str(write(TRAINING)), "--name", "mine"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "mine.yaml: from in.toml (sd-scripts)"
    assert out[1].endswith("11 not quite the same, 5 not here (--verbose lists all)")
    assert any(line.startswith("  in.toml:23: max_train_epochs = 10 -> loop.steps: 10 times 30 steps") for line in out)
    lost = out[out.index("Not here:") + 1 : out.index("next:") - 1]
    assert lost == [
        "  in.toml:41: color_aug = true: colours are not changed",
        '  in.toml:42: colour_aug = true: sd-scripts is not known to have it (did you mean "color_aug"?)',
        "  in.toml:43: huggingface_token = (a secret): nothing is uploaded unless `output.push_to` names a repository",
        '  prompts.txt:2: width = "512": pictures are squares with the side `data.resolution`',
        '  prompts.txt:2: height = "768": pictures are squares with the side `data.resolution`',
    ]
    verbs = [line.split()[1] for line in out[out.index("next:") :] if line.startswith("  loraloom ")]
    assert verbs == ["preview", "plan", "train"]
    text = Path("mine.yaml").read_text()
    assert text.startswith("# loraloom train mine.yaml\n# From in.toml (sd-scripts): loraloom init --from in.toml\n")
    assert "hf_abc" not in text
    assert all(f"# {line}" in text for line in lost)
    assert "  rank: 16  # network_dim" in text
    assert main(["--from", "in.toml", "--name", "mine", "--force", "--verbose"]) == 0
    verbose = capsys.readouterr().out
    assert "\n  in.toml:9: network_dim = 16 -> adapter.rank\n" in verbose
    assert "default of sd-scripts: bucket_reso_steps = 64 -> data.buckets.step" in verbose


DATA_SETS = """
[general]
caption_extension = ".txt"
keep_tokens = 1
shuffle_caption = true

[[datasets]]
resolution = 768
batch_size = 4

  [[datasets.subsets]]
  image_dir = "one"
  class_tokens = "sks dog"
  num_repeats = 3

  [[datasets.subsets]]
  image_dir = "two"
  keep_tokens = 2
  flip_aug = true
  alpha_mask = true

[[datasets]]
resolution = 512

  [[datasets.subsets]]
  image_dir = "three"
  is_reg = true
"""


def test_data_sets_of_sd_scripts() -> None:
    for folder, count in (("one", 2), ("two", 6), ("three", 1)):
        make_images(folder, count)
    file = write(DATA_SETS.replace("is_reg = true", ""), "data.toml")
    config = loaded(file, "--base", "pocket", "--name", "dog")
    assert given_of(config)["data"] == {
        "resolution": 768,
        "flip": 0.5,
        "buckets": {"enabled": False},
        "sources": [
            {"path": "one", "caption": "sks dog", "repeats": 3, "captions": {"shuffle": True, "keep_tokens": 1}},
            {"path": "two", "mask": "alpha", "captions": {"shuffle": True, "keep_tokens": 2}},
            {"path": "three", "captions": {"shuffle": True, "keep_tokens": 1}},
        ],
    }
    assert (config.loop.steps, config.loop.batch_size, config.output.dir) == (1600, 4, "runs/dog")
    said = translate(file, Asked()).differs
    assert [(line.setting.place, line.setting.name, line.words) for line in said if "all data" in line.words] == [
        ("data.toml:19", "flip_aug", "data.flip has one value for all data here"),
        ("data.toml:23", "resolution", "data.resolution has one value for all data here"),
    ]


def test_class_images_are_as_many_as_the_others() -> None:
    for folder, count in (("one", 2), ("two", 6), ("three", 1)):
        make_images(folder, count)
    sets = DATA_SETS.replace("[[datasets]]\nresolution = 512\n", "")
    write(sets, "data.toml")
    settings = 'pretrained_model_name_or_path = "pocket"\nmax_train_epochs = 2\ndataset_config = "data.toml"\n'
    config = loaded(write(settings + "prior_loss_weight = 0.7\nnetwork_train_unet_only = true"))
    assert [(source.share, source.loss_weight) for source in config.data.sources] == [
        (0.25, 1.0),  # 2 * 3 of 12 images, and as many class images
        (0.25, 1.0),
        (0.5, 0.7),
    ]
    assert config.loop.steps == 2 * 24 / 4
    assert config.adapter.parts == {"unet": "attention+ff"}


def test_a_data_set_beside_the_file_that_names_it() -> None:
    make_images("one", 1)
    Path("inner").mkdir()
    write('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "one"', "inner/data.toml")
    config = loaded(write('pretrained_model_name_or_path = "pocket"\ndataset_config = "data.toml"', "inner/in.toml"))
    assert config.data.sources[0].model_dump(exclude_unset=True) == {"path": "one"}


def test_epochs_ask_for_the_images() -> None:
    file = write('pretrained_model_name_or_path = "pocket"\ntrain_data_dir = "gone"\nmax_train_epochs = 4\n')
    with pytest.raises(UserError, match=r"in\.toml:3: max_train_epochs: .* gone is not here; give --data .* --steps"):
        main(["--from", str(file)])
    assert loaded(file, "--steps", "80").loop.steps == 80
    make_images("mine", 5)
    config = loaded(file, "--data", "mine")
    assert (config.loop.steps, config.data.sources[0].model_dump(exclude_unset=True)) == (20, {"path": "mine"})


SDXL = """\
set BASE=models/xl
call venv\\Scripts\\activate.bat
accelerate launch --num_cpu_threads_per_process 1 --num_processes=2 sd-scripts/sdxl_train_network.py ^
  --pretrained_model_name_or_path="%BASE%" --train_data_dir photos --resolution=1024,1024 --enable_bucket ^
  --network_module=networks.lora --network_args "conv_dim=4" "rank_dropout=0.1" --text_encoder_lr 1e-5 2e-5 ^
  --unet_lr=1e-4 --train_batch_size=2 --clip_skip=2 --max_train_steps=10 --config_file more --network_dim=32
"""


def test_a_command_of_sd_scripts() -> None:
    make_images("photos", 2)
    write("network_dim = 8\nlowram = true", "more.toml")
    config = loaded(write(SDXL, "train.bat"))
    assert config.model.base == "models/xl"
    assert config.adapter.rank == 32  # the command line, not the file that it names
    assert config.adapter.alpha_pattern == {}  # both are 1
    assert config.adapter.rank_pattern == {CONVOLUTIONS: 4}
    assert list(config.adapter.parts) == ["unet", "text_encoder", "text_encoder_2"]
    assert (config.loop.batch_size, config.loop.micro_batch, config.model.clip_skip) == (4, None, 0)
    assert config.optimizer.learning_rate == 1e-4
    assert {part: own.learning_rate for part, own in config.optimizer.parts.items()} == {
        "text_encoder": 1e-5,
        "text_encoder_2": 2e-5,
    }
    found = lists(translate(Path("train.bat"), Asked()))
    assert found["lost"] == {"network_args.rank_dropout": "lora has no such option here"}
    assert set(found["differs"]) == {"launcher.num_processes", "train_data_dir", "clip_skip", "enable_bucket"}


NETWORK = 'pretrained_model_name_or_path = "org/xl"\ntrain_data_dir = "photos"\nnetwork_train_unet_only = true\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {"method": "lora", "rank": 4, "alpha": 1.0, "parts": {"unet": "attention+ff"}}),
        ("network_dim = 8\nnetwork_alpha = 0", {"rank": 8, "alpha": 8.0}),
        ("network_dropout = 0.1", {"options": {"dropout": 0.1}}),
        ("network_weights = 'x.safetensors'", {"start_from": "x.safetensors"}),
        ("network_module = 'networks.oft'", {"method": "oft", "parts": {"unet": "attention"}}),
        (
            "network_module = 'lycoris.kohya'\nnetwork_dim = 8\nnetwork_alpha = 4\n"
            "network_args = ['algo=loha', 'preset=attn-mlp', 'rank_dropout=0.1', 'conv_dim=2']",
            {
                "method": "loha",
                "alpha": 4.0,
                "parts": {"unet": "attention+ff"},
                "options": {"rank_dropout": 0.1},
                "rank_pattern": {CONVOLUTIONS: 2},
            },
        ),
        (
            "network_module = 'lycoris.kohya'\nnetwork_dim = 100000\n"
            "network_args = ['algo=lokr', 'factor=6', 'decompose_both=True', 'preset=full-lin']",
            {
                "method": "lokr",
                "rank": 100_000,
                "alpha": 100_000.0,
                "options": {"factor": 6, "decompose_both": True},
                "parts": {
                    "unet": [
                        "attention",
                        "ff",
                        r"re:.*\.time_emb_proj",
                        r"re:time_embedding\.linear_[12]",
                        r"re:.*\.conv_shortcut",
                    ]
                },
            },
        ),
        (
            "network_module = 'lycoris.kohya'\nnetwork_args = ['dora_wd=True', 'rs_lora=True']",
            {"method": "lora", "options": {"dora": True, "rslora": True}},
        ),
    ],
)
def test_networks(text: str, expected: dict[str, Any]) -> None:
    make_images("photos", 1)
    adapter = given_of(loaded(write(NETWORK + text)))["adapter"]
    assert {key: adapter[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {"name": "adamw", "weight_decay": 0.01, "learning_rate": 2e-6}),
        ("use_8bit_adam = true", {"name": "adamw_8bit", "weight_decay": 0.01}),
        ("optimizer_type = 'Lion'\noptimizer_args = ['betas=0.8,0.9']", {"name": "lion", "weight_decay": 0.0}),
        (
            "optimizer_type = 'Prodigy'\nlearning_rate = 1\n"
            "optimizer_args = ['decouple=True', 'weight_decay=0.02', 'd_coef=2', 'use_bias_correction=True']",
            {
                "name": "prodigy",
                "learning_rate": 1.0,
                "weight_decay": 0.02,
                "options": {"d_coef": 2, "bias_correction": True},
            },
        ),
        (
            "optimizer_type = 'AdaFactor'\n"
            "optimizer_args = ['relative_step=False', 'scale_parameter=False', 'warmup_init=False']",
            {
                "name": "transformers.optimization.Adafactor",
                "options": {"relative_step": False, "scale_parameter": False, "warmup_init": False},
            },
        ),
        ("optimizer_type = 'SGDNesterov'", {"name": "torch.optim.SGD", "options": {"nesterov": True, "momentum": 0.9}}),
        ("optimizer_type = 'DAdaptLion'", {"name": "dadaptation.DAdaptLion", "weight_decay": 0.0}),
        ("optimizer_type = 'RAdam'", {"name": "torch.optim.RAdam"}),
        ("optimizer_type = 'AdamWScheduleFree'\nlr_scheduler = 'cosine'", {"schedule": "constant"}),
        ("lr_scheduler = 'polynomial'\nlr_scheduler_power = 2", {"schedule": "polynomial", "schedule_power": 2.0}),
        ("lr_scheduler = 'constant_with_warmup'\nlr_warmup_steps = 7", {"schedule": "constant", "warmup_steps": 7}),
        (
            "lr_scheduler = 'piecewise_constant'\nlr_scheduler_args = ['step_rules=1:10,0.1']",
            {"schedule": "piecewise_constant", "schedule_rules": "1:10,0.1"},
        ),
        ("max_grad_norm = 0", {"max_grad_norm": 1e9}),
        ("learning_rate = 1e-4\nunet_lr = 2e-4", {"learning_rate": 2e-4}),
        ("network_module = 'networks.lora'\nnetwork_args = ['loraplus_lr_ratio=16']", {"lora_plus_ratio": 16.0}),
    ],
)
def test_optimizers(text: str, expected: dict[str, Any]) -> None:
    make_images("photos", 1)
    optimizer = given_of(loaded(write(NETWORK + text)))["optimizer"]
    assert {key: optimizer[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("text", "parts", "rates"),
    [
        ("learning_rate = 1e-4", ["unet", "text_encoder"], {}),
        ("unet_lr = 1e-4", ["unet", "text_encoder"], {"text_encoder": 2e-6}),  # sd-scripts' own default
        ("learning_rate = 1e-4\ntext_encoder_lr = 0", ["unet"], {}),
        ("learning_rate = 1e-4\nunet_lr = 0", ["text_encoder"], {}),
        ("learning_rate = 1e-4\nnetwork_train_text_encoder_only = true", ["text_encoder"], {}),
        ("learning_rate = 1\ntext_encoder_lr = 0.5\noptimizer_type = 'prodigy'", ["unet", "text_encoder"], {}),
    ],
)
def test_parts_and_their_rates(text: str, parts: list[str], rates: dict[str, float]) -> None:
    make_images("photos", 1)
    base = NETWORK.replace("network_train_unet_only = true\n", "").replace("xl", "sd15")
    config = loaded(write(base + text))
    assert list(config.adapter.parts) == parts
    assert {part: own.learning_rate for part, own in config.optimizer.parts.items()} == rates


@pytest.mark.parametrize(
    ("text", "section", "expected"),
    [
        ("v_parameterization = true", "noise", {"prediction": "v_prediction"}),
        ("zero_terminal_snr = true", "noise", {"zero_terminal_snr": True}),
        ("min_timestep = 10\nmax_timestep = 900", "noise", {"min_timestep": 10, "max_timestep": 899}),
        ("ip_noise_gamma = 0.1", "noise", {"input_perturbation": 0.1}),
        ("debiased_estimation_loss = true", "noise", {"debiased": True}),
        (
            "multires_noise_iterations = 6\nmultires_noise_discount = 0.4",
            "noise",
            {"multires_octaves": 5, "multires_discount": 0.4},
        ),
        ("loss_type = 'huber'", "loss", {"kind": "huber", "options": {"delta": 0.1, "delta_schedule": "snr"}}),
        (
            "loss_type = 'smooth_l1'\nhuber_c = 0.2\nhuber_scale = 2\nhuber_schedule = 'constant'",
            "loss",
            {"kind": "smooth_l1", "options": {"delta": 0.4, "delta_schedule": "constant"}},
        ),
        ("v2 = true\nclip_skip = 1", "model", {"base": "org/sd", "family": "sd2", "clip_skip": 0}),
        (
            "base_weights = ['a.safetensors', 'b.safetensors']\nbase_weights_multiplier = [0.5]",
            "model",
            {"base": "org/sd", "adapters": ["a.safetensors:0.5", "b.safetensors:1"]},
        ),
    ],
)
def test_noise_loss_and_base(text: str, section: str, expected: dict[str, Any]) -> None:
    make_images("photos", 1)
    config = loaded(write(NETWORK.replace("xl", "sd") + text))
    assert given_of(config)[section] == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("loss_type = 'l1'", "the squared error is trained"),
        ("min_snr_gamma = 5\ndebiased_estimation_loss = true", "there is one weight here"),
        ("lr_scheduler = 'inverse_sqrt'", "the rate is constant"),
        ("caption_extension = '.cap'", "captions are read from .txt and .caption"),
        ("network_module = 'lycoris.kohya'\nnetwork_args = ['algo=glora']", "no method of that kind"),
        ("network_args = ['down_lr_weight=1,0']", "ranks and rates by block"),
        ("network_module = 'networks.lora_flux'", "not known here: lora is trained"),
        ("optimizer_args = ['amsgrad=True']", "adamw has no such option here"),
        ("save_every_n_epochs = 1\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'gone'", "set `checkpoint.every`"),
        ("sample_prompts = 'gone.txt'", "no such file here"),
        ("lr_scheduller = 'x'", 'did you mean "lr_scheduler"?'),
    ],
)
def test_what_is_not_here(text: str, said: str) -> None:
    make_images("photos", 1)
    file = write(NETWORK + text)
    lost = translate(file, Asked()).lost
    assert [said in line.words for line in lost] == [True]
    with pytest.raises(UserError, match=r"in\.toml:\d+: .*\(--strict\)$"):
        main(["--from", str(file), "--strict"])
    assert not Path("in.yaml").exists()


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_prompts_in_other_formats(suffix: str) -> None:
    make_images("photos", 1)
    content = {
        "toml": '[prompt]\nscale = 6\nsample_steps = 10\n[[prompt.subset]]\nprompt = "x"\nseed = 2\nheight = 512',
        "json": '[{"prompt": "x", "scale": 6, "sample_steps": 10, "seed": 2, "height": 512}]',
    }[suffix]
    write(content, f"prompts.{suffix}")
    config = loaded(write(NETWORK + f"sample_prompts = 'prompts.{suffix}'\nresolution = 512\nsample_at_first = true"))
    assert [each.model_dump(exclude_unset=True) for each in config.validation.prompts if not isinstance(each, str)] == [
        {"prompt": "x", "guidance": 6.0, "steps": 10, "seed": 2}
    ]
    assert config.validation.at_start


DREAMBOOTH = """\
#!/bin/bash
export MODEL_NAME="org/sd15"
export INSTANCE_DIR="photos"
OUTPUT_DIR=${NOT_SET:-runs}/dog

accelerate launch --mixed_precision="fp16" train_dreambooth_lora.py \\
  --pretrained_model_name_or_path=$MODEL_NAME  \\
  --instance_data_dir=$INSTANCE_DIR --class_data_dir=classes \\
  --output_dir=$OUTPUT_DIR \\
  --with_prior_preservation --prior_loss_weight=0.5 \\
  --instance_prompt="a photo of sks dog" --class_prompt='a photo of dog' \\
  --resolution=512 --train_batch_size=1 --gradient_accumulation_steps=2 \\
  --learning_rate 1e-4 --train_text_encoder --use_8bit_adam \\
  --lr_scheduler="cosine" --lr_warmup_steps=10 --num_class_images=200 --num_train_epochs=4 \\
  --validation_prompt="A photo of sks dog in a bucket" --validation_epochs=2 \\
  --seed="0" --push_to_hub --hub_token hf_abc
"""


def test_dreambooth_of_diffusers() -> None:
    make_images("photos", 6)
    file = write(DREAMBOOTH, "train.sh")
    config = loaded(file)
    assert given_of(config) == {
        "model": {"base": "org/sd15", "dtype": "fp16"},
        "data": {
            "resolution": 512,
            "sources": [
                {"path": "photos", "caption": "a photo of sks dog", "share": 0.5},
                {
                    "prior": "a photo of dog",
                    "count": 200,
                    "share": 0.5,
                    "loss_weight": 0.5,
                    "steps": 50,
                    "guidance": 7.5,
                },
            ],
            "buckets": {"enabled": False},
            "crop": "random",
        },
        "adapter": {
            "method": "lora",
            "rank": 4,
            "alpha": 4.0,
            "parts": {"unet": "attention", "text_encoder": "attention"},
            "options": {"init": "gaussian"},
        },
        "optimizer": {
            "name": "adamw_8bit",
            "learning_rate": 1e-4,
            "weight_decay": 0.01,
            "schedule": "cosine",
            "warmup_steps": 10,
        },
        # 200 pairs of an image and a class image, two of them to a step: 100 steps an epoch
        "loop": {"steps": 400, "batch_size": 4, "micro_batch": 2, "precision": "fp16", "seed": 0},
        "checkpoint": {"every": 500},
        "validation": {
            "every": 200,
            "at_start": False,
            "prompts": ["A photo of sks dog in a bucket"],
            "steps": 25,
            "guidance": 7.5,
        },
        "output": {"dir": "runs/dog", "name": "dog", "formats": ["diffusers"]},
    }
    found = lists(translate(file, Asked()))
    assert "twice that" in found["differs"]["with_prior_preservation"]
    assert set(found["differs"]) == {"with_prior_preservation", "class_data_dir", "seed"}
    assert set(found["lost"]) == {"push_to_hub", "hub_token"}
    make_images("classes", 200)
    assert loaded(file).data.sources[1].model_dump(exclude_unset=True) == {
        "path": "classes",
        "caption": "a photo of dog",
        "share": 0.5,
        "loss_weight": 0.5,
    }


def test_dreambooth_sdxl_of_diffusers() -> None:
    make_images("photos", 3)
    command = (
        "python train_dreambooth_lora_sdxl.py --pretrained_model_name_or_path=org/xl --instance_data_dir=photos "
        "--instance_prompt='sks' --optimizer=prodigy --learning_rate=1.0 --train_text_encoder --use_dora --rank=8 "
        "--repeats=2 --center_crop --random_flip --snr_gamma=5 --lr_scheduler=constant --max_train_steps=500"
    )
    config = loaded(write(command, "x.txt"))
    assert given_of(config)["adapter"] == {
        "method": "lora",
        "rank": 8,
        "alpha": 8.0,
        "parts": {"unet": "attention", "text_encoder": "attention", "text_encoder_2": "attention"},
        "options": {"init": "gaussian", "dora": True},
    }
    assert given_of(config)["optimizer"] == {
        "name": "prodigy",
        "learning_rate": 1.0,
        "weight_decay": 1e-4,
        "parts": {"text_encoder": {"weight_decay": 1e-3}, "text_encoder_2": {"weight_decay": 1e-3}},
        "schedule": "constant",
        "options": {"bias_correction": True, "safeguard_warmup": True},
    }
    assert given_of(config)["data"] == {
        "resolution": 1024,
        "sources": [{"path": "photos", "caption": "sks", "repeats": 2}],
        "buckets": {"enabled": False},
        "crop": "center",
        "flip": 0.5,
    }
    assert config.output.formats == ["kohya"]
    assert (config.output.dir, config.noise.min_snr_gamma, config.loop.batch_size) == ("runs/x", 5.0, 4)
    config = loaded(write(command.replace("--train_text_encoder ", ""), "x.txt"))
    assert (config.output.formats, config.adapter.options) == (["diffusers"], {"init": "gaussian", "dora": True})
    plain = command.replace("--optimizer=prodigy", "").replace("--use_dora", "--output_kohya_format")
    config = loaded(write(plain, "x.txt"))
    assert config.optimizer.parts["text_encoder_2"].learning_rate == 5e-6
    assert config.output.formats == ["diffusers", "kohya"]


def test_captions_of_diffusers() -> None:
    command = (
        "accelerate launch --num_processes=2 train_text_to_image_lora.py --pretrained_model_name_or_path=org/sd15 "
        "--dataset_name=org/images --dataset_config_name=one --caption_column=words --max_train_samples=50 "
        "--resolution=512 --train_batch_size=2 --scale_lr --learning_rate=1e-4 --noise_offset=0.1 --seed 1 "
        "--validation_prompt='a dog' --report_to=all --checkpoints_total_limit=2"
    )
    file = write(command, "x.sh")
    with pytest.raises(UserError, match=r"num_train_epochs: how many steps .* org/images is not here"):
        main(["--from", str(file)])
    config = loaded(file, "--steps", "1000")
    assert config.data.sources[0].model_dump(exclude_unset=True) == {
        "dataset": "org/images",
        "subset": "one",
        "caption_column": "words",
        "split": "train[:50]",
    }
    assert (config.loop.steps, config.loop.batch_size, config.optimizer.learning_rate) == (1000, 4, 4e-4)
    assert config.trackers == ["tensorboard", "wandb"]
    assert config.validation.every == 1000 // 100
    make_images("photos", 8)
    config = loaded(file, "--data", "photos")
    assert config.data.sources[0].model_dump(exclude_unset=True) == {"path": "photos", "caption_column": "words"}
    assert config.loop.steps == 100 * 2


def test_new_words_of_diffusers() -> None:
    make_images("cat", 2)
    command = (
        "textual_inversion.py --pretrained_model_name_or_path=org/sd15 --train_data_dir=cat --learnable_property=style "
        "--placeholder_token='<cat-toy>' --initializer_token=toy --num_vectors=3 --learning_rate=5e-4 --seed=0"
    )
    config = loaded(write(command, "x.sh"))
    assert given_of(config)["adapter"] == {
        "method": "textual_inversion",
        "tokens": [{"token": "<cat-toy>", "init": "toy", "vectors": 3}],
    }
    assert given_of(config)["data"] == {
        "resolution": 512,
        "sources": [{"path": "cat", "caption": "a painting in the style of <cat-toy>"}],
        "buckets": {"enabled": False},
        "crop": "center",
        "flip": 0.5,
    }
    assert (config.loop.steps, config.loop.batch_size, config.checkpoint.every) == (5000, 16, 500)


def test_full_fine_tuning_of_diffusers() -> None:
    """The method is named whether this version has it or not."""
    make_images("photos", 2)
    command = (
        "train_dreambooth.py --pretrained_model_name_or_path=org/sd15 --instance_data_dir=photos --offset_noise "
        "--instance_prompt=sks --train_text_encoder --max_train_steps=10 --mixed_precision=fp16"
    )
    file = write(command, "x.sh")
    values = {key: chosen.value for key, chosen in translate(file, Asked()).values.items()}
    assert values["adapter.method"] == "full"
    assert [values[f"adapter.parts.{part}"] for part in ("unet", "text_encoder")] == ["all", "all"]
    assert (values["loop.precision"], values["noise.offset"], "model.dtype" in values) == ("fp16", 0.1, False)
    if "full" in names("adapters.methods"):
        assert loaded(file).adapter.method == "full"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("network_dim = 'many'", r"in\.toml:1: network_dim: should be a whole number, found \"many\""),
        ("flip_aug = 3", r"in\.toml:1: flip_aug: should be true or false, found 3"),
        (
            "keep_tokens = -1",
            r"in\.toml:1: data\.captions\.keep_tokens: should be greater than or equal to 0, found -1",
        ),
        ("x = ", r"in\.toml:1: not valid TOML"),
        ("dataset_config = 'none.toml'", r"in\.toml:1: dataset_config: none\.toml: no such file"),
        ("dataset_config = 'data.json'", r"in\.toml:1: dataset_config: data\.json: only TOML is read"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(text: str, answer: str) -> None:
    make_images("photos", 1)
    write("{}", "data.json")
    with pytest.raises(UserError, match=answer):
        main(["--from", str(write(f"{text}\n{NETWORK}"))])


def test_what_cannot_be_used_is_said() -> None:
    make_images("photos", 1)
    write(NETWORK)
    write("accelerate launch flux_train_network.py --x", "flux.sh")
    write('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"\n[[datasets.subsets]]\nimage_dir = "b"', "two.toml")
    write("lowram = true", "none.toml")
    write("hello", "odd.txt")
    write("train_dreambooth_lora.py --pretrained_model_name_or_path=x --max_train_steps=1", "short.sh")
    for arguments, answer in [
        ([], "which images? --data FOLDER, or --from FILE"),
        (["--data", "photos", "--strict"], "--strict: only with --from"),
        (["--from", "in.toml", "--trigger", "sks"], "--trigger: not with --from"),
        (["--from", "gone.toml"], "gone.toml: no such file; --from is a file"),
        (["--from", "."], "a folder; --from is a file"),
        (["--from", "flux.sh"], "flux.sh: flux_train_network.py trains FLUX, which is not here"),
        (["--from", "odd.txt"], "odd.txt: holds nothing that can be read; there is: command lines with diffusers'"),
        (["--from", "in.toml", "--env", "NO_SUCH"], "--env NO_SUCH: is not set"),
        (["--data", "photos", "--env", "HOME"], "--env: only with --from"),
        (["--from", "none.toml"], "none.toml: names no images"),
        (["--from", "two.toml"], "names no base model; give --base"),
        (["--from", "two.toml", "--data", "photos"], "in place of which folder? there are: a, b"),
        (["--from", "short.sh"], "short.sh: --instance_data_dir is missing"),
        (["--from", "in.toml", "--data", "gone"], "gone: no such folder"),
    ]:
        with pytest.raises(UserError) as error:
            main(arguments)
        assert answer in str(error.value)


WINDOW = {
    "LoRA_type": "LyCORIS/LoKr",
    "LyCORIS_preset": "attn-mlp",
    "additional_parameters": '--noise_offset=0.1 --lr_scheduler_type "CosineAnnealingLR"',
    "clip_skip": "2",
    "conv_dim": 8,
    "epoch": 3,
    "factor": 6,
    "keep_tokens": "0",
    "learning_rate": 0.0001,
    "lr_scheduler": "cosine",
    "lr_warmup": 10,
    "max_resolution": "768,768",
    "max_train_epochs": "",
    "mixed_precision": "bf16",
    "multires_noise_iterations": 6,
    "network_alpha": 1,
    "network_dim": 16,
    "noise_offset_type": "Original",
    "optimizer": "Prodigy",
    "optimizer_args": '"d_coef=2" "weight_decay=0.4"',
    "pretrained_model_name_or_path": "org/xl",
    "sample_prompts": "a dog --s 20 --d -1\na cat --d 7",
    "sample_every_n_steps": 200,
    "sdxl": True,
    "sdxl_no_half_vae": True,
    "text_encoder_lr": 0,
    "train_batch_size": 2,
    "train_data_dir": "photos",
    "train_on_input": True,
    "unet_lr": 1.0,
    "wandb_api_key": "hidden",
    "xformers": "sdpa",
}
"""As the window of sd-scripts saves it, empty fields and all."""


def test_the_json_of_kohyas_window(capsys: pytest.CaptureFixture[str]) -> None:
    make_images("photos/2_sks dog", 5)
    config = loaded(write(json.dumps(WINDOW, indent=2), "w.json"))
    given = given_of(config)
    assert given["model"] == {"base": "org/xl", "dtype": "bf16"}
    assert given["data"]["sources"] == [{"path": "photos/2_sks dog", "caption": "sks dog", "repeats": 2}]
    assert given["data"]["resolution"] == 768
    assert given["adapter"]["method"] == "lokr"
    assert (given["adapter"]["rank"], given["adapter"]["alpha"]) == (16, 1.0)
    assert given["adapter"]["parts"] == {"unet": "attention+ff"}  # a rate of 0 freezes the text encoders
    assert given["adapter"]["options"] == {"factor": 6}
    assert given["noise"] == {"offset": 0.1}  # the other kind of offset is off
    assert given["optimizer"]["name"] == "prodigy"
    assert given["optimizer"]["weight_decay"] == 0.4
    assert (given["optimizer"]["schedule"], given["optimizer"]["warmup_steps"]) == ("cosine", 1)
    assert given["loop"] == {"steps": 15, "batch_size": 2, "precision": "bf16"}
    assert given["validation"]["prompts"] == [{"prompt": "a dog", "steps": 20}, {"prompt": "a cat", "seed": 7}]
    said = capsys.readouterr().out
    assert "w.json:4: lr_scheduler_type" in said  # the line of the field
    assert "hidden" not in said + Path("out.yaml").read_text()


@pytest.mark.slow
@given(st.data())
def test_no_setting_of_kohyas_window_is_lost(data: st.DataObject) -> None:
    """Each that is on is known, or is of the window alone; nothing that is off is said."""
    from loraloom.launch.translation.peers.kohya import gui

    chosen = data.draw(st.dictionaries(st.sampled_from(sorted(WINDOW)), st.just(None)))
    values = {name: WINDOW[name] for name in chosen} | {"LoRA_type": data.draw(st.sampled_from(TYPES))}
    write(json.dumps(values), "w.json")
    found = gui.read_gui(Path("w.json"))
    assert found is not None
    names = {each.name for each in found.settings}
    known = {name for name in names if kohya.rule_of(name) or name.startswith("network_args.")}
    assert names == known
    assert not {each.name for each in found.settings if each.value in ("", None, False)}


TYPES = ["Standard", "Kohya LoCon", "LoRA-FA", "LyCORIS/LoHa", "LyCORIS/LoKr", "LyCORIS/Diag-OFT", "LyCORIS/iA3"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.yaml", "job: extension\nconfig:\n  process:\n  - {type: sd_trainer}\n", "a config of ai-toolkit"),
        ("a.yml", "job: x\nconfig: {process: [{model: {is_flux: true}}]}", "a config of ai-toolkit for FLUX"),
        ("a.json", '{"training_method": "LORA", "model_type": "STABLE_DIFFUSION_15"}', "a config of OneTrainer"),
        ("a.json", '{"training_method": "LORA", "model_type": "FLUX_DEV_1"}', "OneTrainer for FLUX, which is not here"),
        ("a.json", '{"--model_family": "sdxl", "--data_backend_config": "x"}', "a config of SimpleTuner"),
        ("a.env", "export MODEL_FAMILY=sdxl", "a config of SimpleTuner"),
        ("a.json", '{"LoRA_type": "Flux1"}', "trains FLUX, which is not here"),
        ("a.json", '{"max_resolution": "1,1"}', "settings of kohya_ss for all weights of a model"),
        ("a.json", '{"max_resolution": "1,1", "token_string": "x"}', "settings of kohya_ss for new words"),
        ("a.sh", 'docker run x bash -c "python train_network.py --a 1"', "names train_network.py, but no command"),
        ("a.sh", 'eval "python train_dreambooth_lora.py --a 1"', "without eval, quotes or a container"),
        ("a.sh", "# python train_network.py --a 1", "holds nothing that can be read"),
        ("a.fish", "set B pocket\npython train_network.py --x $B", "is a script of fish"),
        ("a.ipynb", "{}", "is a notebook, which is not read: copy its training command"),
        ("a.safetensors", "x", "`loraloom reproduce a.safetensors`"),
        ("a.yaml", "model: {base: pocket}\ndata: {}\nloop: {}", "is a config of ours already"),
        (
            "a.sh",
            "accelerate launch train_db.py --x",
            "train_db.py trains all weights, which is",
        ),
        ("a.ps1", '$t = "x/sd3_train_network.py"\npython $t', "trains Stable Diffusion 3, which is not here"),
        ("a.toml", "a = " + "[" * 5000, "nested too deeply"),
        ("a.json", "[" * 5000, "nested more than"),
        ("a.toml", "a = " + "9" * 5000, "not valid TOML"),
    ],
)
def test_files_of_others_are_named_and_answered(name: str, text: str, said: str) -> None:
    with pytest.raises(UserError) as told:
        translate(write(text, name), Asked())
    (line,) = told.value.problems
    assert said in line and "\n" not in line and len(line) < (400 if said.startswith("holds") else 250)


@pytest.mark.slow
@given(st.lists(st.sampled_from([1024, 768, 512, 256]), min_size=1, max_size=4, unique=True), st.integers(1, 3))
def test_one_folder_at_several_resolutions(sides: list[int], folders: int) -> None:
    subsets = "".join(f"[[datasets.subsets]]\nimage_dir = 'f{number}'\n" for number in range(folders))
    text = "".join(f"[[datasets]]\nresolution = {side}\n{subsets}" for side in sides)
    found = translate(write(text, "d.toml"), Asked(base="org/sd15", steps=1))
    assert [source["path"].value for source in found.sources] == [f"f{number}" for number in range(folders)]
    assert found.values["data.resolution"].value == (sides if len(sides) > 1 else sides[0])
    assert not [line for line in found.differs if line.setting.name == "resolution"]
    if folders == 1:  # another folder is there in place of the one
        Path("mine").mkdir(exist_ok=True)
        mine = translate(Path("d.toml"), Asked(base="org/sd15", steps=1, data=Path("mine")))
        assert [source["path"].value for source in mine.sources] == ["mine"]


def test_whatever_else_is_said_of_a_resolution_it_is_one_for_all() -> None:
    sets = [f"[[datasets]]\nresolution = {each}\n[[datasets.subsets]]\nimage_dir = 'f{each}'\n" for each in (64, 512)]
    file = write("".join(sets).replace("= 512", "= [512, 768]").replace("f512", "g"), "d.toml")
    (line,) = [
        each for each in translate(file, Asked(base="org/sd15", steps=1)).differs if each.setting.name == "resolution"
    ]
    assert "here one of 624 x 624" in line.words and "data.resolution has one value for all data here" in line.words


def test_different_folders_at_different_resolutions_are_said() -> None:
    text = "[[datasets]]\nresolution = {}\n[[datasets.subsets]]\nimage_dir = '{}'\n"
    found = translate(write(text.format(512, "a") + text.format(768, "b"), "d.toml"), Asked(base="org/sd15", steps=1))
    assert len(found.sources) == 2
    assert [line.words for line in found.differs if line.setting.name == "resolution"] == [
        "data.resolution has one value for all data here"
    ]


def test_what_is_wrong_in_a_prompt_has_its_line() -> None:
    make_images("photos", 1)
    write("a dog --s 5\na cat --s 0\n", "prompts.txt")
    with pytest.raises(UserError, match=r"prompts\.txt:2: sample_steps: should be a whole number from 1 on"):
        main(["--from", str(write("sample_prompts = 'prompts.txt'\n" + NETWORK)), "--steps", "1"])


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=8)
VALUES: dict[Any, st.SearchStrategy[Any]] = {
    values.whole: st.integers(1, 40),
    values.positive: st.integers(1, 40),
    values.number: st.floats(0, 2),
    values.flag: st.booleans(),
    values.text: st.sampled_from(["x", "photos", "constant", "huber", "bf16", "snr", "all", ".txt"]),
    values.texts: st.lists(st.sampled_from(["algo=lokr", "conv_dim=4", "betas=0.9,0.99", "eps=1e-8", "y"]), max_size=3),
    values.numbers: st.integers(8, 64).map(lambda side: 8 * side),
    values.plain: st.one_of(st.booleans(), st.integers(0, 5), st.just("")),
}


def settings_of(peer: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Some of a tool's settings with values of their types, and some that it does not have."""
    known = {name: VALUES[rule.of] for name, rule in peer.RULES.items() if "." not in name and name not in READ}
    chosen = st.fixed_dictionaries({}, optional=known)
    return st.builds(lambda one, two: one | two, chosen, st.dictionaries(st.sampled_from(["rnak", "zzz"]), WORDS))


READ = {"dataset_config", "config_file", "sample_prompts", "resolution", "text_encoder_lr", "script", "is_reg"}
"""Files that have to be there, values of several kinds, and what leaves no images but class images."""
SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def told(translation: Translation) -> Counter[str]:
    return Counter(line.setting.name for name in ("carried", "differs", "lost") for line in getattr(translation, name))


@settings(max_examples=40, deadline=None, suppress_health_check=SLOW)
@pytest.mark.slow
@given(settings_of(kohya))
def test_no_setting_of_sd_scripts_is_lost(chosen: dict[str, Any]) -> None:
    make_images("photos", 1)
    chosen |= {"train_data_dir": "photos", "pretrained_model_name_or_path": "org/sd", "max_train_epochs": 2}
    text = "\n".join(f"{name} = {spelled(value)}" for name, value in chosen.items())
    asked = {name: chosen[name] for name in kohya.LISTED if chosen.get(name)}
    expected = Counter(name for name in chosen if name not in asked)
    expected += Counter(f"{name}.{each.split('=')[0]}" for name, entries in asked.items() for each in entries)
    assert told(translate(write(text), Asked())) == expected


def spelled(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(spelled, value))}]"
    return quoted(value) if isinstance(value, str) else str(value).lower()


def quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


@settings(max_examples=40, deadline=None, suppress_health_check=SLOW)
@pytest.mark.slow
@given(settings_of(diffusers), st.sampled_from(list(diffusers.SCRIPTS)))
def test_no_setting_of_diffusers_is_lost(chosen: dict[str, Any], script: str) -> None:
    make_images("photos", 1)
    needed = {
        "instance_data_dir": "photos",
        "train_data_dir": "photos",
        "placeholder_token": "<x>",
        "class_prompt": "a",
    }
    chosen = {name: value for name, value in chosen.items() if value is not False} | needed
    flags = [f"--{name}" if value is True else f"--{name}={quoted(plain(value))}" for name, value in chosen.items()]
    translation = translate(write(f"accelerate launch {script} " + " ".join(flags), "x.sh"), Asked(steps=10))
    assert told(translation) == Counter(["script", *chosen])


def plain(value: Any) -> str:
    return (value[0] if value else "x") if isinstance(value, list) else str(value).replace("$", "").replace("`", "")


@pytest.mark.parametrize("peer", names(PEERS))
def test_rules_name_keys_that_there_are(peer: str) -> None:
    known = {".".join(map(str, path)) for path in known_keys()}
    free = ("adapter.options", "loss.options", "optimizer.options")
    for name, rule in find(PEERS, peer).RULES.items():
        assert not rule.ours or rule.ours in known or rule.ours.startswith(free), name


def test_the_page_has_the_tables_of_the_rules() -> None:
    assert (ROOT / "docs" / "from-other-trainers.md").read_text().endswith(table.tables() + "\n")


@pytest.mark.slow
def test_a_translated_config_can_be_planned(capsys: pytest.CaptureFixture[str], cache_of_the_tests: Path) -> None:
    from loraloom.launch import cli

    text = f"""
pretrained_model_name_or_path = "pocket"
learning_rate = 1e-3
network_dim = 8
network_alpha = 4
network_args = ["conv_dim=4"]
max_train_epochs = 5
train_batch_size = 2
enable_bucket = true
bucket_reso_steps = 8
min_bucket_reso = 32
max_bucket_reso = 128
[[datasets]]
resolution = 64
[[datasets.subsets]]
image_dir = "{ROOT / "examples" / "sks"}"
class_tokens = "a sks creature"
num_repeats = 2
"""
    assert loaded(write(text)).loop.steps == 5 * 6
    assert cli.run(["plan", "out.yaml"]) == 0
    out = capsys.readouterr().out
    assert "6 captions from `caption`" in out
    assert "30 optimiser steps of 2 samples = 60 samples" in out
    assert "lora, rank 8, alpha 4, on the frozen base 'pocket'" in out


def test_a_translation_needs_no_torch() -> None:
    make_images("photos", 1)
    file = write(NETWORK + "network_module = 'lycoris.kohya'\nnetwork_args = ['algo=lokr']")
    code = "import sys; from loraloom.launch.cli import run; run(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", code, "init", "--from", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not {"torch", "peft", "diffusers", "transformers"} & set(done.stderr.split())


def test_said_is_one_line_whatever_a_value_holds() -> None:
    make_images("photos", 1)
    file = write(NETWORK + '"a\\nb" = "x\\n# y\\u2028z"\n')
    (line,) = translate(file, Asked()).lost
    assert translated.said(line).isprintable()
    assert loaded(file).model.base == "org/xl"
