"""python -m loraloom.benchmarks.inputs CONFIG FILE: what the denoiser is given in each step of a run, as safetensors.

`noisy`, `target`, `timesteps`, `prompt_embeds` and, where the family has them, `pooled_prompt_embeds` and `sizes`, each
with one row for every step; and the adapter's weights of before the first, as `start/<PEFT's name>`. The same adapter
is written beside the file as `start.kohya.safetensors`.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..adapters.format import write
from ..configs.loader import load_config
from ..inference.adapter_file import format_names
from ..train.build import build_trainer
from ..train.objective import size_conditions


def main(config_file: str, file: str) -> None:
    """Fills the run's caches on the way; nothing is trained."""
    trainer = build_trainer(load_config(config_file), overwrite=True)
    run, device = trainer.run, trainer.run.accelerator.device
    rows: dict[str, list[torch.Tensor]] = {}
    for batch in trainer.batches:
        noised, _ = trainer.objective.noised(run.parts, batch, device)
        assert batch.prompts is not None, "prompts are cached"
        row = {"noisy": noised.latents, "target": noised.target, "timesteps": noised.timesteps}
        row |= {name: torch.stack([prompt[name] for prompt in batch.prompts]) for name in batch.prompts[0]}
        if "pooled_prompt_embeds" in row:
            row["sizes"] = size_conditions(batch.samples)
        for name, tensor in row.items():
            rows.setdefault(name, []).append(tensor.cpu())
    start = {f"start/{name}": tensor.cpu().contiguous() for name, tensor in run.adapters.states()["unet"].items()}
    artifact = run.adapters.artifact()
    assert artifact is not None
    write(artifact, Path(file).with_name("start.kohya.safetensors"), "kohya", format_names(run.family, run.parts))
    save_file({name: torch.stack(each) for name, each in rows.items()} | start, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
