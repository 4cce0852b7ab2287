"""The loop and only the loop."""

import contextlib
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Self

import torch

from ..adapters.sharded import whole
from ..data.draws import key_seed
from ..data.sample import Batch
from .callback import Callback
from .guard import Guard, fault_of, spoil, step_unless
from .objective import Losses, Objective
from .optim import clip_gradients, drop_stopped
from .readings import Unread, read_all
from .run import Run, StepResult
from .run_folder import locked, write_failure
from .together import not_for_long


class Trainer:
    """Trains the adapters of a run, one optimiser step after the other."""

    def __init__(self, run: Run, batches: Iterator[Batch], objective: Objective, callbacks: Sequence[Callback] = ()):
        self.run, self.batches, self.objective, self.callbacks = run, batches, objective, callbacks
        self.guard = Guard()
        self.unread: list[Unread] = []
        self.steps = 0  # made here
        self.named = run.adapters.named_parameters()  # to look for them takes longer than to average them
        run.read = self.read
        loop, self.world = run.config.loop, run.accelerator.num_processes
        self.accumulation = loop.batch_size // ((loop.micro_batch or loop.batch_size // self.world) * self.world)

    def close(self) -> None:
        """Ends the workers that read images, which Python would wait for at its own end. `fit` does it by itself."""
        if isinstance(self.batches, Generator):
            self.batches.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fit(self) -> None:
        """All steps that are left, with the callbacks around them. UserError while another process trains there."""
        run = self.run
        with self, locked(run.folder, main=run.is_main), contextlib.ExitStack() as stack:
            try:
                for callback in self.callbacks:
                    stack.callback(callback.on_exit, run)
                    callback.on_start(run)
                while not run.is_last_step:
                    self.step()
                self.read()
                for callback in self.callbacks:
                    callback.on_end(run)
            except Exception as error:
                if run.is_main:
                    write_failure(run, error)
                raise

    def step(self) -> None:
        """One optimiser step and all callbacks."""
        # the first one may compile, or wait for others that do
        with not_for_long(self.run.accelerator) if self.steps else contextlib.nullcontext():
            self.train_step()
        self.steps += 1
        for callback in self.callbacks:
            with self.run.timed(type(callback).__name__):
                callback.on_step(self.run)

    def train_step(self) -> list[StepResult]:
        """Forward and backward of every micro-batch, then one update; the results that were read after it, if any."""
        run, started = self.run, time.perf_counter()
        rates = {group["name"]: group["lr"] for group in run.optimizer.param_groups}
        with run.timed("data"):
            batches = [next(self.batches) for _ in range(self.accumulation)]
        losses = [self._accumulate(index, batch) for index, batch in enumerate(batches)]
        with run.timed("optimiser"):
            norm = self._update(losses)
        seconds = time.perf_counter() - started
        run.seconds += seconds
        named = [(batch.sources, batch.files, own) for batch, own in zip(batches, losses, strict=True)]
        self.unread.append(Unread(run.step, named, norm, rates, seconds))
        return self.read() if run.is_due(run.config.guard.every or 1) else []

    def read(self) -> list[StepResult]:
        """Fetches the losses of the steps since the last time, tells the callbacks, and lets the guard look at them."""
        unread, self.unread = self.unread, []
        if not unread:
            return []
        results = read_all(self.run.accelerator, unread)
        for callback in self.callbacks:
            with self.run.timed(type(callback).__name__):
                callback.on_results(self.run, results)
        self.guard.look(self.run, results)
        return results

    def _update(self, losses: Sequence[Losses]) -> torch.Tensor:
        """One step of the optimiser, unless it is faulty; the norm of the gradient before it was clipped."""
        run = self.run
        drop_stopped(run.optimizer, run.step)
        loss, scaled = torch.stack([each.total for each in losses]).sum(), run.accelerator.scaler is not None
        if scaled:
            spoil(run, fault_of(run, loss))
        norm = whole(clip_gradients(run, run.config.optimizer.max_grad_norm))
        if scaled and any(parameter.grad is not None for parameter in run.trained()):
            run.optimizer.step()  # in any case: a scaler that is not asked stays in the middle of a step
        elif not scaled:
            step_unless(run.optimizer, fault_of(run, loss, norm))
        run.schedule.step()
        run.optimizer.optimizer.zero_grad()  # accelerate's looks up its arguments each time
        run.step += 1
        if run.ema is not None:
            run.ema.update(self.named, run.step)
        return norm

    def _accumulate(self, index: int, batch: Batch) -> Losses:
        run = self.run
        with contextlib.ExitStack() as stack:
            if index < self.accumulation - 1:
                for module in run.trainable_modules():
                    stack.enter_context(run.accelerator.no_sync(module))
            losses = self.forward(batch)
            with run.timed("backward"):
                run.accelerator.backward(losses.total * self.world)  # DDP averages over the processes: undone here
        return Losses(losses.total.detach(), losses.per_sample.detach())

    def forward(self, batch: Batch) -> Losses:
        """The losses of one micro-batch, with the dropout that belongs to it."""
        run = self.run
        with torch.random.fork_rng(devices=[]), run.accelerator.autocast():
            # adapter dropout uses torch's global generator: the micro-batch's first position is its key
            _seed(run.accelerator.device, key_seed(self.objective.seed, "dropout", batch.positions[0]))
            with run.timed("encode"):
                inputs = self.objective.inputs(run.parts, batch, run.accelerator.device)
            with run.timed("forward"):
                return self.objective.losses(run.parts, batch, inputs)

    def timesteps(self, batch: Batch) -> list[int]:
        """Those at which `forward` looks at the samples of a micro-batch."""
        return self.objective.noised(self.run.parts, batch, self.run.accelerator.device)[0].timesteps.tolist()


def _seed(device: torch.device, seed: int) -> None:
    """`torch.manual_seed` for one device: of those that are not in use it keeps a stack trace at every call."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
