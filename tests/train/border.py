"""One case of the border table, trained for two steps and again from its first; run by tests, in one process or two."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from loraloom.configs.loader import load_config
from loraloom.configs.schema import RunConfig
from loraloom.train import build
from loraloom.train.trainer import Trainer

SCALE = 2.0**10  # of losses in fp16: the first steps would only look for it


@contextmanager
def with_scaler() -> Iterator[None]:
    """Within, fp16 trains on a CPU, with the gradient scaler that torch has for it and accelerate refuses."""
    make = build.make_accelerator

    def make_accelerator(config: RunConfig):
        AcceleratorState._reset_state()
        fp16 = config.loop.precision == "fp16"
        loop = config.loop.model_copy(update={"precision": "no"}) if fp16 else config.loop
        accelerator = make(config.model_copy(update={"loop": loop}))
        if fp16:
            accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)  # type: ignore[assignment]
        return accelerator

    build.make_accelerator = make_accelerator
    try:
        yield
    finally:
        build.make_accelerator = make
        AcceleratorState._reset_state()


def train_case(file: Path) -> dict[str, list[str]]:
    """Trains a config of two steps whole, and its second step from the first checkpoint.

    Answers with the weights that got no gradient, and those that are others after the second way.
    """
    config = load_config(file)
    with with_scaler():
        trainer = build.build_trainer(config)
        without = _without_gradient(trainer)
        trainer.fit()
        first = Path(config.output.dir) / "checkpoints" / "step-000001"
        again = build.build_trainer(config, checkpoint=first)
        again.callbacks = []
        again.fit()
    last = load_state(first.with_name("step-000002"))
    other = [
        f"{part}.{name}"
        for part, state in again.run.adapters.states().items()
        for name, tensor in state.items()
        if not torch.equal(tensor, last[part][name])
    ]
    return {"without gradient": sorted(without), "others when resumed": other}


def _without_gradient(trainer: Trainer) -> set[str]:
    """Names of trained weights; each leaves the set when it gets a gradient."""
    left: set[str] = set()
    for part, named in trainer.run.adapters.named_parameters().items():
        for name, parameter in named.items():
            left.add(f"{part}.{name}")
            parameter.register_post_accumulate_grad_hook(lambda _, own=f"{part}.{name}": left.discard(own))
    return left


def load_state(checkpoint: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Part -> tensors of a checkpoint."""
    found = {file.stem.removeprefix("adapter_"): load_file(file) for file in checkpoint.glob("adapter_*.safetensors")}
    assert found, checkpoint
    return found


def main(files: Sequence[str]) -> None:
    """Each case, one after the other; what was found goes beside its config, one file for each process."""
    for file in map(Path, files):
        found = train_case(file)
        rank = AcceleratorState._shared_state.get("process_index") or torch.distributed.get_rank()
        file.with_suffix(f".{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
