"""The loop is right: its losses are those of a bare loop, to the bit, and a step can be repeated."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from PIL import Image

from loraloom.configs.loader import load_config
from loraloom.data.draws import Draws, key_seed
from loraloom.train.build import build_trainer
from loraloom.train.callback import Callback

pytestmark = pytest.mark.slow


class Recorder(Callback):
    """Keeps the losses."""

    def __init__(self):
        self.losses = []

    def on_results(self, run, results):
        self.losses += [result.loss for result in results]


def train(config_file):
    """Losses and final adapter state of a run, without any other callback."""
    config = load_config(config_file)
    trainer, recorder = build_trainer(config, overwrite=True), Recorder()
    trainer.callbacks = [recorder]
    trainer.fit()
    return recorder.losses, trainer.run.adapters.states()


def bare_loop(base, photos, steps, batch_size, learning_rate):
    """DreamBooth's LoRA loop as one would write it by hand, on the same keyed draws."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import CLIPTextModel, CLIPTokenizer

    from loraloom.data.order import Order

    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet").requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae").requires_grad_(False)
    text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder").requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
    scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    for module in (unet, vae, text_encoder):
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()  # aligned as ours: kernels round by where their operands begin
    targets = {
        "text_encoder": (text_encoder, ["q_proj", "k_proj", "v_proj", "out_proj"]),
        "unet": (unet, ["to_q", "to_k", "to_v", "to_out.0"]),
    }
    for index, (module, names) in enumerate(targets.values()):
        torch.manual_seed(key_seed(0, "adapter") + index)
        inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=names), module)
    modules = [unet.train(), text_encoder.train()]
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01, fused=True)
    files, order = sorted(photos.glob("*.png")), Order(0, [np.zeros(6, int)])
    losses = []
    for step in range(steps):
        positions = list(range(step * batch_size, (step + 1) * batch_size))
        draws = Draws(0, positions)
        latents = torch.empty(batch_size, 4, 4, 4)
        for row, (position, draw) in enumerate(zip(positions, draws.normal("vae", (4, 4, 4)), strict=True)):
            box = (3 * 48 / 38, 0, 35 * 48 / 38, 40)  # 48 x 40 scaled to 38 x 32, and the middle 32 x 32 of that
            image = Image.open(files[order[position][1]]).resize((32, 32), Image.Resampling.LANCZOS, box)
            pixels = torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
            posterior, scale = vae.encode(pixels).latent_dist, vae.config.scaling_factor  # one by one, as in the cache
            latents[row] = posterior.mean[0] * scale + posterior.std[0] * scale * draw
        noise, timesteps = draws.normal("noise", (4, 4, 4)), draws.integers("timestep", 0, 1000)
        tokens = tokenizer(["a sks creature"] * batch_size, padding="max_length", max_length=77, return_tensors="pt")
        hidden = text_encoder(tokens.input_ids)[0]
        predicted = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, hidden).sample
        loss = F.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3)).sum() / batch_size
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_losses_are_those_of_a_bare_loop_to_the_bit(write_config, tiny_base, photos):
    losses, _ = train(write_config(loop={"fast": False}))
    assert losses == bare_loop(tiny_base, photos, steps=10, batch_size=2, learning_rate=1e-2)
    assert len(set(losses)) == 10


def test_a_run_with_every_option_on_repeats_to_the_bit(write_config, photos):
    """What all promises of exactness stand on."""
    sources = [
        {"path": str(photos), "caption": "a, sks, creature", "share": 0.5},
        {"path": str(photos), "caption": "a creature", "share": 0.5, "target": "base", "loss_weight": 0.5},
    ]
    options = {
        "data": {"sources": sources, "captions": {"shuffle": True, "dropout": 0.2}, "crop": "random", "flip": 0.5},
        "noise": {
            "min_snr_gamma": 5.0,
            "offset": 0.1,
            "multires_octaves": 2,
            "input_perturbation": 0.1,
            "density": "logit_normal",
            "min_timestep": 10,
        },
        "loss": {"kind": "huber", "options": {"delta_schedule": "snr"}},
        "adapter": {"options": {"dropout": 0.5, "dora": True}, "rank_pattern": {"mid_block": 2}},
        "optimizer": {
            "schedule": "cosine",
            "warmup_steps": 2,
            "ema_decay": 0.9,
            "lora_plus_ratio": 4,
            "parts": {"text_encoder": {"learning_rate": 1e-3, "stop_after": 2}},
        },
        "loop": {"steps": 3, "batch_size": 4, "micro_batch": 2, "gradient_checkpointing": True},
        "output": {"formats": ["loraloom"]},
    }
    first_losses, first = train(write_config("first", **options))
    torch.rand(17)  # whatever else uses the global generator must not matter
    second_losses, second = train(write_config("second", **options))
    assert first_losses == second_losses
    for part, state in first.items():
        assert all(torch.equal(tensor, second[part][name]) for name, tensor in state.items())
    calm = {"adapter": {"options": {"dropout": 0.0, "dora": True}, "rank_pattern": {"mid_block": 2}}}
    plain, _ = train(write_config("plain", **options | calm))
    assert plain != first_losses


def test_another_seed_trains_another_adapter(write_config):
    first, _ = train(write_config("first", loop={"steps": 2, "seed": 0}))
    second, _ = train(write_config("second", loop={"steps": 2, "seed": 1}))
    assert first != second


def test_accumulation_agrees_with_one_large_micro_batch(write_config):
    """Kernels round another number of samples differently: gradients to 1e-5, losses at a usual rate to 1e-4."""
    optimizer, found = {"learning_rate": 1e-4}, {}
    for size in (4, 2):
        config = write_config(
            f"by {size}", loop={"steps": 10, "batch_size": 4, "micro_batch": size}, optimizer=optimizer
        )
        trainer = build_trainer(load_config(config), overwrite=True)
        trainer.callbacks = []
        batches = [next(trainer.batches) for _ in range(trainer.accumulation)]
        for index, batch in enumerate(batches):
            trainer._accumulate(index, batch)
        gradients = torch.cat([p.grad.flatten() for p in trainer.run.trained() if p.grad is not None])
        found[size] = gradients, torch.tensor(train(config)[0])
    (whole, losses), (split, others) = found[4], found[2]
    assert (whole - split).norm() <= 1e-5 * whole.norm()
    torch.testing.assert_close(others, losses, rtol=0, atol=1e-4)


def test_loss_weight_scales_the_loss_of_a_source(write_config, photos):
    source = {"path": str(photos), "caption": "a creature"}
    weights = {}
    for weight in (1.0, 0.25):
        config = write_config(f"w{weight}", data={"sources": [source | {"loss_weight": weight}]}, loop={"steps": 1})
        weights[weight] = train(config)[0][0]
    assert weights[0.25] == weights[1.0] * 0.25


@pytest.mark.parametrize("lower", [{"model": {"dtype": "bf16"}}, {"loop": {"steps": 3, "precision": "bf16"}}])
def test_a_bf16_base_or_forward_trains_fp32_adapters(write_config, lower):
    AcceleratorState._reset_state(True)  # one precision for each process, accelerate says
    exact, _ = train(write_config("exact", loop={"steps": 3}))
    AcceleratorState._reset_state(True)
    losses, states = train(write_config("lower", **{"loop": {"steps": 3}} | lower))
    AcceleratorState._reset_state(True)
    assert losses != exact
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(exact), rtol=0.05, atol=0)
    assert {tensor.dtype for state in states.values() for tensor in state.values()} == {torch.float32}


def test_dropout_is_that_of_torchs_own_seed(write_config):
    """Runs of before go on with the same masks."""
    trainer = build_trainer(load_config(write_config()))
    batch, states = next(trainer.batches), []
    trainer.run.parts["unet"].register_forward_pre_hook(lambda *_: states.append(torch.get_rng_state()))
    before = torch.get_rng_state()
    trainer.forward(batch)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(key_seed(0, "dropout", batch.positions[0]))
    assert torch.equal(states[0], torch.get_rng_state())
