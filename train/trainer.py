"""The loop and only the loop."""

import contextlib
import time
from collections.abc import Iterator, Sequence

import torch

from ..data.draws import key_seed
from ..data.sample import Batch
from .callback import Callback
from .guard import Guard, SampleLoss
from .objective import Losses, Objective
from .optim import drop_stopped
from .run import Run, StepResult


class Trainer:
    """Trains the adapters of a run, one optimiser step after the other."""

    def __init__(self, run: Run, batches: Iterator[Batch], objective: Objective, callbacks: Sequence[Callback] = ()):
        self.run, self.batches, self.objective, self.callbacks = run, batches, objective, callbacks
        self.guard = Guard()
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
                    with run.timed(type(callback).__name__):
                        callback.on_step(run, result)
            for callback in self.callbacks:
                callback.on_end(run)

    def train_step(self) -> StepResult:
        """Forward and backward of every micro-batch, then one update."""
        run, started = self.run, time.perf_counter()
        rates = {group["name"]: group["lr"] for group in run.optimizer.param_groups}
        with run.timed("data"):
            batches = [next(self.batches) for _ in range(self.accumulation)]
        loss, samples = self._gather([self._accumulate(index, batch) for index, batch in enumerate(batches)])
        with run.timed("optimiser"):
            norm = self._update(loss, samples)
        seconds = time.perf_counter() - started
        run.seconds += seconds
        return StepResult(loss, source_means(samples), norm, rates, seconds)

    def _update(self, loss: float, samples: Sequence[SampleLoss]) -> float:
        """One step of the optimiser, unless the guard says no; the norm of the gradient before it was clipped."""
        run = self.run
        drop_stopped(run.optimizer, run.step)
        norm = float(run.accelerator.clip_grad_norm_(self._parameters(), run.config.optimizer.max_grad_norm) or 0.0)
        if self.guard.allows(run, loss, norm, samples):
            run.optimizer.step()
        run.schedule.step()
        run.optimizer.zero_grad()
        run.step += 1
        if run.ema is not None:
            run.ema.update(run.adapters.named_parameters(), run.step)
        return norm

    def _accumulate(self, index: int, batch: Batch) -> tuple[float, list[SampleLoss]]:
        run = self.run
        with contextlib.ExitStack() as stack:
            if index < self.accumulation - 1:
                for module in run.trainable_modules():
                    stack.enter_context(run.accelerator.no_sync(module))
            with run.timed("forward"):
                losses = self.forward(batch)
            with run.timed("backward"):
                run.accelerator.backward(losses.total * self.world)  # DDP averages over the processes: undone here
        values = losses.per_sample.tolist()
        return losses.total.item(), [SampleLoss(*each) for each in zip(batch.sources, batch.files, values, strict=True)]

    def forward(self, batch: Batch) -> Losses:
        """The losses of one micro-batch, with the dropout that belongs to it."""
        run = self.run
        with torch.random.fork_rng(devices=[]), run.accelerator.autocast():
            # adapter dropout uses torch's global generator: the micro-batch's first position is its key
            torch.manual_seed(key_seed(self.objective.seed, "dropout", batch.positions[0]))
            return self.objective(run.parts, batch, run.accelerator.device)

    def timesteps(self, batch: Batch) -> list[int]:
        """Those at which `forward` looks at the samples of a micro-batch."""
        return self.objective.noised(self.run.parts, batch, self.run.accelerator.device)[0].timesteps.tolist()

    def _gather(self, losses: list[tuple[float, list[SampleLoss]]]) -> tuple[float, list[SampleLoss]]:
        """Loss of the step and of each sample, over all processes."""
        total = sum(loss for loss, _ in losses)
        samples = [sample for _, those in losses for sample in those]
        if self.world > 1:
            from accelerate.utils import gather_object

            total, samples = sum(gather_object([total])), gather_object(samples)
        return total, samples

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameters in self.run.adapters.parameters().values() for parameter in parameters]


def source_means(samples: Sequence[SampleLoss]) -> dict[str, float]:
    """Mean loss of each source's samples."""
    by_source: dict[str, list[float]] = {}
    for sample in samples:
        by_source.setdefault(sample.source, []).append(sample.value)
    return {source: sum(values) / len(values) for source, values in sorted(by_source.items())}
