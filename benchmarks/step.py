"""make bench: one training step of ours against a bare hand-written loop, on the embedded base.

Bare: precomputed latents and embeddings, the same LoRA by PEFT, AdamW, nothing else. Ours: everything, from files to
callbacks. The two take turns (A B A B …), so that what else the machine does falls on both; the ratio is of medians.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from ..configs.schema import ModelSection, RunConfig
from ..data.draws import Draws
from ..models.load import Base
from ..train.build import build_trainer, make_adapters

ROUNDS, STEPS, BATCH = 6, 10, 8
IMAGES = Path(__file__).parent.parent / "examples" / "sks"


def main() -> None:
    """Prints medians and ratios as a Markdown table."""
    with tempfile.TemporaryDirectory() as folder:
        bare_unet = bare_step(make_config(folder, {"unet": "attention"}))
        ours_unet = our_step(make_config(folder, {"unet": "attention"}))
        ours_both = our_step(make_config(folder, {"unet": "attention", "text_encoder": "attention"}))
        times = take_turns({"bare": bare_unet, "loraloom, unet": ours_unet, "loraloom, unet + text encoder": ours_both})
    bare = statistics.median(times["bare"])
    print(f"pocket, 64 px, batch {BATCH}, rank 8, fp32, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| step | median, ms | ratio to bare | min .. max, ms |\n|---|---|---|---|")
    for name, values in times.items():
        middle = statistics.median(values)
        spread = f"{min(values) * 1e3:.0f} .. {max(values) * 1e3:.0f}"
        print(f"| {name} | {middle * 1e3:.0f} | {middle / bare:.2f} | {spread} |")
    print("\n" + json.dumps({name: [round(value, 4) for value in values] for name, values in times.items()}))


def take_turns(steps: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Seconds of one step, for each round of each contestant."""
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            started = time.perf_counter()
            for _ in range(STEPS):
                step()
            times[name].append((time.perf_counter() - started) / STEPS)
    return times


def make_config(folder: str, parts: dict[str, str]) -> RunConfig:
    """A run on the demo's images that never ends within the benchmark."""
    return RunConfig.model_validate(
        {
            "model": {"base": "pocket"},
            "data": {"resolution": 64, "sources": [{"path": str(IMAGES), "caption": "a sks creature"}]},
            "adapter": {"parts": parts},
            "loop": {"steps": 10_000, "batch_size": BATCH},
            "trackers": [],
            "output": {"dir": f"{folder}/{len(parts)}"},
        }
    )


def our_step(config: RunConfig) -> Callable[[], None]:
    """The trainer's step with its callbacks, which write the history and look for signals."""
    trainer = build_trainer(config)
    trainer.callbacks = [each for each in trainer.callbacks if type(each).__name__ in ("Tracking", "Requests")]
    for callback in trainer.callbacks:
        callback.on_start(trainer.run)

    def step() -> None:
        trainer.train_step()
        for callback in trainer.callbacks:
            callback.on_step(trainer.run)

    return step


def bare_step(config: RunConfig) -> Callable[[], None]:
    """What one would write by hand, with everything precomputed that can be."""
    base = Base(ModelSection(base="pocket"))
    family, parts = base.family, base.load()
    adapters = make_adapters(config, family, parts)
    unet = parts["unet"].train()
    parameters = adapters.parameters()["unet"]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    latents = Draws(0, range(BATCH)).normal("latents", family.latent_shape(parts, 64, 64))
    with torch.no_grad():
        embeddings = family.encode_prompts(parts, ["a sks creature"] * BATCH).prompt_embeds

    def step() -> None:
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (BATCH,))
        noisy = parts["scheduler"].add_noise(latents, noise, timesteps)
        loss = F.mse_loss(unet(noisy, timesteps, embeddings).sample, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
