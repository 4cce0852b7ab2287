"""Runs whose weights are spread over the processes: FSDP2 through accelerate, for one part."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..configs.errors import UserError
from .together import shards

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .run import Run

FILE = "optimizer_by_name.bin"


def set_up_sharding(accelerator: "Accelerator") -> None:
    """Refuses what cannot be exact, and shards on CPUs too, which accelerate leaves out without a word."""
    from accelerate.utils import DistributedType

    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(
            f"{kind.value.lower()} takes clipping and the optimiser's step into its own hands, where a faulty step "
            "cannot be left out: shard with launch/accelerate/fsdp2.yaml instead"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("FSDP 1 flattens weights of different types together: use launch/accelerate/fsdp2.yaml")
    if kind == DistributedType.MULTI_CPU:
        from accelerate.state import PartialState
        from accelerate.utils import FullyShardedDataParallelPlugin

        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # as accelerate does for GPUs
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()


def wrap(
    accelerator: "Accelerator", carriers: Mapping[str, Any], optimizer: Any, schedule: Any, blocks: Sequence[str]
) -> tuple[dict[str, Any], Any, Any]:
    """accelerate's wrappers of the parts that train, the optimiser and the schedule. `blocks` are sharded each."""
    if shards(accelerator):
        if len(carriers) > 1:
            raise UserError(
                f"FSDP shards one part, and {' and '.join(carriers)} train here: take one of them out of adapter.parts"
            )
        plugin: Any = accelerator.state.fsdp_plugin
        plugin.transformer_cls_names_to_wrap = list(blocks)
    optimizer, schedule, *wrapped = accelerator.prepare(optimizer, schedule, *carriers.values())
    return dict(zip(carriers, wrapped, strict=True)), optimizer, schedule


class ByName:
    """The state of a sharded optimiser, whole and under the names of its weights."""

    def __init__(self, run: "Run"):
        (self.model,), self.optimizer, self.is_main = run.trainable_modules(), run.optimizer.optimizer, run.is_main

    def save(self, folder: Path) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(self.model, self.optimizer, options=options)
        if self.is_main:
            torch.save(state, folder / FILE)

    def load(self, folder: Path) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        state = torch.load(folder / FILE, weights_only=True)
        set_optimizer_state_dict(self.model, self.optimizer, state, options=StateDictOptions(full_state_dict=True))


def check_optimizer(run: "Run", folder: Path) -> None:
    """UserError for a checkpoint that was saved with sharded weights and goes on without, or the other way round."""
    was_sharded = (folder / FILE).is_file()
    if was_sharded and not run.is_sharded:
        raise UserError(f"{folder}: was saved with FSDP; resume it in the same way, by launch/accelerate/fsdp2.yaml")
    if run.is_sharded and not was_sharded:
        raise UserError(f"{folder}: was saved without FSDP, and its optimiser cannot go on with it")


@contextmanager
def optimizer_by_name(run: "Run") -> Iterator[ByName | None]:
    """Within, accelerate leaves sharded parts and their optimiser alone: it would write the frozen base too.

    None where nothing is sharded and accelerate writes the optimiser as it is.
    """
    if not run.is_sharded:
        yield None
        return
    accelerator: Any = run.accelerator
    models, optimizers = accelerator._models, accelerator._optimizers
    accelerator._models, accelerator._optimizers = [], []
    try:
        yield ByName(run)
    finally:
        accelerator._models, accelerator._optimizers = models, optimizers
