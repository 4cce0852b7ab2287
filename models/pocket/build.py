"""The recipe that trains pocket: draw scenes, train the VAE, then the UNet with its text encoder, then export.

    python -m loraloom.models.pocket.build --out models/pocket/weights

Seeded, and resumable: run the same command again and it goes on from the state of 250 steps ago or less.
"""

# diffusers annotates `tuple[int]` where it means any number, and methods by one of their two return types:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..single_file import write_legacy_tokenizer
from .scenes import SIZE, Scene, caption, draw, random_scene
from .tokenizer import WINDOW, build_tokenizer

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # SD 1.x
CARD = Path(__file__).parent / "card.md"
MIN_SNR_GAMMA = 5.0
SAVE_EVERY = 250  # steps


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, with the device and the versions of the libraries."""

    seed: int = 0
    num_scenes: int = 30_000
    vae_steps: int = 3_200
    vae_batch: int = 16
    vae_learning_rate: float = 2e-3
    unet_steps: int = 4_000
    unet_batch: int = 32
    unet_learning_rate: float = 1e-3
    debiased_from: int = 1_750  # step; see `loss_weights`
    precision: str = "bf16"  # autocast of the forward passes; weights and optimiser stay fp32


# ---------------------------------------------------------------------------- models


def make_vae() -> AutoencoderKL:
    """64 px RGB to (4, 16, 16) latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIZE,
    )


def make_unet() -> UNet2DConditionModel:
    """SD's block topology, small: cross-attention at 8 x 8 and 4 x 4."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 160),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,  # heads per attention, by diffusers' naming of SD 1.x
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text model of 3 layers and width 128 that is trained together with the UNet."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        projection_dim=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=WINDOW,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_scheduler() -> DDPMScheduler:
    """The training noise schedule of SD 1.x."""
    return DDPMScheduler(num_train_timesteps=1000, clip_sample=False, steps_offset=1, **SCHEDULE)


# ---------------------------------------------------------------------------- scenes


def draw_scenes(seed: int, count: int, first: int = 0) -> tuple[list[Scene], np.ndarray]:
    """`count` scenes and their pictures, (count, 64, 64, 3) uint8; scene i depends on (seed, i) alone."""
    scenes = [random_scene(np.random.default_rng([seed, 0, first + i])) for i in range(count)]
    pictures = np.stack([np.asarray(draw(scene)) for scene in tqdm(scenes, desc="drawing scenes", unit="scene")])
    return scenes, pictures


def to_pixels(pictures: np.ndarray) -> Tensor:
    """(n, h, w, 3) uint8 to (n, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


# ---------------------------------------------------------------------------- training


class Stage:
    """One stage of training: a loop over steps whose whole state is saved, so that it can be interrupted."""

    def __init__(self, name: str, module: nn.Module, steps: int, learning_rate: float, work: Path, decay: float = 0.0):
        self.name, self.module, self.steps, self.path = name, module, steps, work / f"{name}.pt"
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=1e-2, betas=(0.9, 0.99))
        warmup = min(200, max(1, steps // 10))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / warmup, max(0.01, 1 - step / steps))
        )
        self.ema = EMAModel(module.parameters(), decay=decay) if decay else None
        self.step, self.seconds = 0, 0.0
        if self.path.exists():
            self._load(torch.load(self.path, weights_only=True))

    def _load(self, state: dict) -> None:
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        state = {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "step": self.step,
            "seconds": self.seconds,
        }
        partial = self.path.with_suffix(".tmp")
        torch.save(state, partial)
        partial.replace(self.path)

    def __iter__(self) -> Iterator[int]:
        """The steps still to do; the state is saved after every 250 of them and at the end."""
        started = time.perf_counter() - self.seconds
        progress = tqdm(total=self.steps, initial=self.step, desc=self.name, unit="step")
        while self.step < self.steps:
            yield self.step
            self.step += 1
            self.seconds = time.perf_counter() - started
            progress.update()
            if self.step % SAVE_EVERY == 0 or self.step == self.steps:
                self.save()
        progress.close()

    def update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        if self.ema is not None:
            self.ema.step(self.module.parameters())


def _generator(seed: int, purpose: int, step: int) -> tuple[torch.Generator, np.random.Generator]:
    rng = np.random.default_rng([seed, purpose, step])
    return torch.Generator().manual_seed(int(rng.integers(2**62))), rng


def train_vae(recipe: Recipe, pictures: np.ndarray, work: Path, device: torch.device) -> AutoencoderKL:
    """L1 + MSE + 1e-5 KL (Kingma & Welling 2013)."""
    torch.manual_seed(recipe.seed)
    vae = make_vae().to(device)
    stage = Stage("vae", vae, recipe.vae_steps, recipe.vae_learning_rate, work)
    for step in stage:
        generator, rng = _generator(recipe.seed, 1, step)
        pixels = to_pixels(pictures[rng.integers(len(pictures), size=recipe.vae_batch)]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            posterior = vae.encode(pixels).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        error = decoded.float() - pixels
        kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        stage.update(error.abs().mean() + error.square().mean() + 1e-5 * kl)
    return vae.eval()


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, pictures: np.ndarray, work: Path, device: torch.device) -> Tensor:
    """Latents of unit deviation, (n, 4, 16, 16); sets the VAE's scaling factor."""
    cache = work / "latents.safetensors"
    if cache.exists():
        latents = load_file(cache)["latents"]
    else:
        chunks = torch.split(torch.arange(len(pictures)), 100)
        means = [
            vae.encode(to_pixels(pictures[chunk.numpy()]).to(device)).latent_dist.mean.cpu()
            for chunk in tqdm(chunks, desc="encoding scenes")
        ]
        latents = torch.cat(means).contiguous()  # as they come from the cache: sums round by the order in memory
        save_file({"latents": latents}, cache)
    scale = 1.0 / latents.std().item()
    vae.register_to_config(scaling_factor=scale)
    return latents * scale


def loss_weights(snr: Tensor, *, debiased: bool) -> Tensor:
    """Weight of each sample's squared error of the noise, (B,).

    First min-SNR-5 (Hang et al. 2023): outlines are learnt quickly, at middle noise. Colours are decided at high
    noise, where an error of the picture hardly shows in the noise; 1 / sqrt(SNR) (Yu et al. 2023, "Debias the
    training of diffusion models") makes up for that.
    """
    return snr.rsqrt() if debiased else snr.clamp(max=MIN_SNR_GAMMA) / snr


class Denoiser(nn.Module):
    """UNet and text encoder, trained as one."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.unet = make_unet()
        self.text_encoder = make_text_encoder(tokenizer)

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        return self.unet(noisy, timesteps, self.text_encoder(tokens).last_hidden_state).sample


def train_unet(
    recipe: Recipe, scenes: list[Scene], latents: Tensor, tokenizer: CLIPTokenizer, work: Path, device: torch.device
) -> Denoiser:
    """Noise prediction (Ho et al. 2020) with `loss_weights`, EMA 0.999."""
    torch.manual_seed(recipe.seed + 1)
    denoiser, scheduler = Denoiser(tokenizer).to(device), make_scheduler()
    stage = Stage("unet", denoiser, recipe.unet_steps, recipe.unet_learning_rate, work, decay=0.999)
    for step in stage:
        generator, rng = _generator(recipe.seed, 2, step)
        chosen = rng.integers(len(scenes), size=recipe.unet_batch)
        captions = [caption(scenes[i], rng) for i in chosen]
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        clean = latents[torch.from_numpy(chosen)]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(0, 1000, (len(clean),), generator=generator)
        noisy = scheduler.add_noise(clean, noise, timesteps)  # type: ignore[arg-type]
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            predicted = denoiser(noisy.to(device), timesteps.to(device), tokens.to(device))
        snr = compute_snr(scheduler, timesteps)
        weight = loss_weights(snr, debiased=step >= recipe.debiased_from).to(device)
        loss = F.mse_loss(predicted.float(), noise.to(device), reduction="none").mean((1, 2, 3))
        stage.update((weight * loss).mean())
    assert stage.ema is not None
    stage.ema.copy_to(denoiser.parameters())
    return denoiser.eval()


# ---------------------------------------------------------------------------- export


def export(folder: Path, vae: AutoencoderKL, denoiser: Denoiser, tokenizer: CLIPTokenizer) -> None:
    """A Stable Diffusion pipeline folder, fp16, with the text encoder's keys spelled `text_model.`."""
    pipeline = StableDiffusionPipeline(
        vae=vae.cpu().half(),
        text_encoder=denoiser.text_encoder.cpu().half(),
        tokenizer=tokenizer,
        unet=denoiser.unet.cpu().half(),
        scheduler=make_scheduler(),
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    _spell_text_model(folder / "text_encoder" / "model.safetensors")
    _load_as_fp32(folder / "text_encoder" / "config.json")
    write_legacy_tokenizer(folder / "tokenizer", tokenizer)
    if CARD.exists():
        (folder / "README.md").write_text(CARD.read_text())
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors leaves 0600


def _spell_text_model(file: Path) -> None:
    """transformers >= 5.6 saves a CLIPTextModel made from a config with flat keys that older versions cannot read."""
    prefix = "text_model."
    state = {key if key.startswith(prefix) else prefix + key: value for key, value in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})


def _load_as_fp32(config: Path) -> None:
    """transformers loads in the type that the config names, diffusers in fp32: without this they would not fit."""
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


# ---------------------------------------------------------------------------- command


def build(recipe: Recipe, out: Path, work: Path, device: torch.device) -> None:
    """All stages in order; a stage that is complete in `work` is read, not repeated."""
    work.mkdir(parents=True, exist_ok=True)
    recorded = work / "recipe.json"
    if recorded.exists() and json.loads(recorded.read_text()) != vars(recipe):
        raise SystemExit(f"{work} holds the state of another recipe: give another --work, or delete it")
    recorded.write_text(json.dumps(vars(recipe), indent=1))
    tokenizer = build_tokenizer()
    scenes, pictures = draw_scenes(recipe.seed, recipe.num_scenes)
    vae = train_vae(recipe, pictures, work, device)
    latents = encode_scenes(vae, pictures, work, device)
    denoiser = train_unet(recipe, scenes, latents, tokenizer, work, device)
    export(out, vae, denoiser, tokenizer)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"wrote {out}: {size / 1e6:.1f} MB. Measure it: python -m loraloom.models.pocket.check --base {out}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loraloom.models.pocket.build", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/pocket-build/pocket"), help="pipeline folder to write")
    parser.add_argument("--work", type=Path, default=Path("runs/pocket-build/work"), help="states, to resume from")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, field in Recipe.__dataclass_fields__.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), default=field.default, help=f"({field.default})")
    args = vars(parser.parse_args())
    out, work, device = args.pop("out"), args.pop("work"), torch.device(args.pop("device"))
    torch.set_num_threads(args.pop("threads"))
    build(Recipe(**args), out, work, device)


if __name__ == "__main__":
    main()
