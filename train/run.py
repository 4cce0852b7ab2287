"""Run: what the loop and its callbacks share. It is data; the loop is in `trainer.py`."""

import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..configs.machine import peak_memory
from .kernels.adamw import FlatAdamW
from .together import shards

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from accelerate import Accelerator
    from torch import nn

    from ..adapters.adapter import AdapterSet
    from ..configs.schema import RunConfig
    from ..models.encode import Encode
    from ..models.family import ModelFamily, Parts
    from .ema import Ema


@contextmanager
def without_autocast(module: "nn.Module") -> "Iterator[None]":
    """Within, a module's own `forward`: accelerate's answers in fp32, which a VAE of half precision refuses."""
    held = vars(module)
    wrapper = held.get("forward")
    if wrapper is None or "_original_forward" not in held:
        yield
        return
    held["forward"] = held["_original_forward"]
    try:
        yield
    finally:
        held["forward"] = wrapper


@dataclass(slots=True)
class Run:
    """One training run on its way."""

    config: "RunConfig"
    folder: Path
    accelerator: "Accelerator"
    family: "ModelFamily"
    parts: "Parts"  # those that stay loaded; carriers are wrapped by accelerate where it needs to
    adapters: "AdapterSet"  # carriers as they are, not wrapped
    optimizer: Any
    schedule: Any
    encode: "Encode"  # embeddings of prompts for sampling, also where no text encoder is loaded
    load: "Callable[..., Parts]"  # parts of the base that are not in `parts`, in its type or in another
    data: dict[str, Any]  # fingerprint of the images: a resumed run must find the same
    ema: "Ema | None" = None
    step: int = 0  # optimiser steps done
    seconds: float = 0.0  # spent in training steps, over all parts of a run that was resumed
    stop: str | None = None  # why the loop should end after this step, if it should
    skipped: int = 0  # steps that were left out, as their loss or gradients were not finite
    save: bool = False  # whether a checkpoint was asked for
    unsaved: str | None = None  # why the last checkpoint could not be saved, if it could not
    ended: str | None = None  # why the run is done before its last step, if it is
    best: "Best | None" = None
    seconds_of: dict[str, float] = field(default_factory=dict)  # where the time went, since the run was started last
    waits: bool = False  # whether times are those of the device, which then waits for the host
    facts: dict[str, Any] = field(default_factory=dict)  # goes into run.json
    unlogged: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # of steps: what trackers will be told
    read: "Callable[[], object]" = lambda: None  # fetches losses that are still on the device; on all processes

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.accelerator.is_main_process

    @property
    def is_sharded(self) -> bool:
        """Whether weights are spread over the processes (FSDP)."""
        return shards(self.accelerator)

    @property
    def takes_part(self) -> bool:
        """Whether this process runs the model where the main one would be enough."""
        return self.is_main or self.is_sharded

    @property
    def is_last_step(self) -> bool:
        """Whether no step follows."""
        return self.step >= self.config.loop.steps or self.stop is not None or self.ended is not None

    @property
    def peak_memory(self) -> int:
        """Bytes: the most that was in use until now, of the GPU where there is one, else of the process."""
        if self.accelerator.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.accelerator.device)
        return peak_memory()

    def is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps happens after this one."""
        return self.step % every == 0 or self.step >= self.config.loop.steps or self.ended is not None

    def log(self, values: dict[str, float], step: int) -> None:
        """For the trackers, which the callback `tracking` tells of many steps together."""
        if self.is_main and self.accelerator.trackers:
            self.unlogged.append((step, values))

    @contextmanager
    def exported(self) -> "Iterator[None]":
        """Within, carriers hold the weights that are sampled and exported (averages, if there are), without dropout.

        They compute in the types of their weights, as after loading: mixed precision is for training.
        """
        modes = {part: module.training for part, module in self.adapters.carriers.items()}
        with ExitStack() as stack:
            if self.config.loop.compile:
                stack.enter_context(torch.compiler.set_stance("force_eager"))  # the bits of `loraloom sample`
            if hasattr(self.optimizer.optimizer, "eval"):
                self.optimizer.eval()  # of schedule-free optimisers, which train a point beside the average
                stack.callback(self.optimizer.train)
            self._gather_no_more()
            if self.ema is not None:
                stack.enter_context(self.ema.swapped(self.adapters.named_parameters()))
            stack.callback(self._gather_no_more)
            for part, module in self.adapters.carriers.items():
                module.eval()
                stack.callback(module.train, modes[part])
                stack.enter_context(without_autocast(module))
            yield

    def _gather_no_more(self) -> None:
        """FSDP keeps the weights of the last forward pass together, whatever becomes of its shards."""
        for carrier in self.adapters.carriers.values() if self.is_sharded else ():
            for module in carrier.modules():
                if hasattr(module, "reshard"):
                    module.reshard()  # type: ignore[operator]

    def forget_optimizer(self) -> None:
        """Lets go of gradients and of what the optimiser keeps of each weight: no step follows, all is saved."""
        optimizer = self.optimizer.optimizer
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()
        if isinstance(optimizer, FlatAdamW):
            optimizer.forget_rows()

    @contextmanager
    def parked(self) -> "Iterator[None]":
        """Within, what is loaded waits in the machine's own memory: a second base fits where there is room for one."""
        loaded = [part for part in self.parts.values() if hasattr(part, "parameters")]
        modules = [] if self.is_sharded else loaded
        with ExitStack() as stack:
            for module in modules:
                stack.callback(module.to, self.accelerator.device)
                module.to("cpu")
            yield

    @contextmanager
    def timed(self, what: str) -> "Iterator[None]":
        """Adds the time within to `seconds_of`; that of a GPU, which works on its own, where `waits` is set."""
        self._wait()
        started = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            self.seconds_of[what] = self.seconds_of.get(what, 0.0) + time.perf_counter() - started

    def _wait(self) -> None:
        if self.waits and self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)

    def trained(self) -> "list[nn.Parameter]":
        """All weights that the optimiser moves."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def trainable_modules(self) -> "list[nn.Module]":
        """The carriers as the loop calls them."""
        return [self.parts[part] for part in self.adapters.carriers]


@dataclass(frozen=True, slots=True)
class Best:
    """The validation with the lowest held-out loss."""

    step: int
    loss: float


@dataclass(frozen=True, slots=True)
class SampleLoss:
    """The loss of one sample, before any weight."""

    source: str
    file: str
    value: float


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimiser step has to tell, over all processes."""

    step: int  # counted from 1
    loss: float
    samples: "Sequence[SampleLoss]"
    grad_norm: float  # before it was clipped
    learning_rates: dict[str, float]  # of each part
    seconds: float

    @property
    def source_losses(self) -> dict[str, float]:
        """Mean loss of each source's samples."""
        by_source: dict[str, list[float]] = {}
        for sample in self.samples:
            by_source.setdefault(sample.source, []).append(sample.value)
        return {source: sum(values) / len(values) for source, values in sorted(by_source.items())}
