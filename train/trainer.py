"""The loop and only the loop."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence

import torch

from ..configs.errors import TrainingError
from ..data.draws import key_seed
from ..data.sample import Batch
from .callback import Callback
from .objective import Objective
from .optim import drop_stopped
from .run import Run, StepResult


class Trainer:
    """Trains the adapters of a run, one optimiser step after the other."""

    def __init__(self, run: Run, batches: Iterator[Batch], objective: Objective, callbacks: Sequence[Callback] = ()):
        self.run, self.batches, self.objective, self.callbacks = run, batches, objective, callbacks
        loop, self.world = run.config.loop, run.accelerator.num_processes
        self.accumulation = loop.batch_size // ((loop.micro_batch or loop.batch_size // self.world) * self.world)

    def fit(self) -> None:
        """All steps that are left, with the callbacks around them."""
        run = self.run
        with contextlib.ExitStack() as stack:
            for callback in self.callbacks:
                stack.callback(callback.on_exit, run)
                callback.on_start(run)
            while not run.is_last_step:
                result = self.train_step()
                for callback in self.callbacks:
                    callback.on_step(run, result)
            for callback in self.callbacks:
                callback.on_end(run)

    def train_step(self) -> StepResult:
        """Forward and backward of every micro-batch, then one update."""
        run, started = self.run, time.perf_counter()
        rates = {group["name"]: group["lr"] for group in run.optimizer.param_groups}
        batches = [next(self.batches) for _ in range(self.accumulation)]
        loss, sources = self._gather([self._accumulate(index, batch) for index, batch in enumerate(batches)])
        drop_stopped(run.optimizer, run.step)
        norm = float(run.accelerator.clip_grad_norm_(self._parameters(), run.config.optimizer.max_grad_norm) or 0.0)
        if not math.isfinite(loss) or (run.accelerator.scaler is None and not math.isfinite(norm)):
            files = ", ".join(str(file) for batch in batches for file in batch.files)
            raise TrainingError(
                f"step {run.step + 1}: the loss is {loss:g} and its gradient's norm {norm:g}; nothing of this step is "
                f"kept. Lower the learning rate (now {rates}) or look at its images: {files}"
            )
        run.optimizer.step()
        run.schedule.step()
        run.optimizer.zero_grad()
        run.step += 1
        if run.ema is not None:
            run.ema.update(run.adapters.named_parameters(), run.step)
        seconds = time.perf_counter() - started
        run.seconds += seconds
        return StepResult(loss, sources, norm, rates, seconds)

    def _accumulate(self, index: int, batch: Batch) -> tuple[float, list[tuple[str, float]]]:
        run = self.run
        with contextlib.ExitStack() as stack:
            if index < self.accumulation - 1:
                for module in run.trainable_modules():
                    stack.enter_context(run.accelerator.no_sync(module))
            with torch.random.fork_rng(devices=[]), run.accelerator.autocast():
                # adapter dropout uses torch's global generator: the micro-batch's first position is its key
                torch.manual_seed(key_seed(self.objective.seed, "dropout", batch.positions[0]))
                losses = self.objective(run.parts, batch, run.accelerator.device)
            run.accelerator.backward(losses.total * self.world)  # DDP averages over the processes: undone here
        return losses.total.item(), list(zip(batch.sources, losses.per_sample.tolist(), strict=True))

    def _gather(self, losses: list[tuple[float, list[tuple[str, float]]]]) -> tuple[float, dict[str, float]]:
        """Loss of the step and the mean of each source, over all processes."""
        total = sum(loss for loss, _ in losses)
        pairs = [pair for _, samples in losses for pair in samples]
        if self.world > 1:
            from accelerate.utils import gather_object

            total, pairs = sum(gather_object([total])), gather_object(pairs)
        by_source: dict[str, list[float]] = {}
        for source, value in pairs:
            by_source.setdefault(source, []).append(value)
        return total, {source: sum(values) / len(values) for source, values in sorted(by_source.items())}

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameters in self.run.adapters.parameters().values() for parameter in parameters]
