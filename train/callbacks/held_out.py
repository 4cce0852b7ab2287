"""The loss on images that are not trained on: its curve, the best checkpoint, and the end of a run that gets no better.

It is the mean over images and K timesteps, spread evenly over those that are trained, of the squared error. The noise
is keyed by image and timestep, crops are in the middle, and nothing is dropped: two values of a run, or of two runs
with the same images, differ by the weights alone.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...configs.progress import say
from ...data.draws import Draws
from ...models.family import Conditioning
from ...models.noise.process import NoiseProcess
from ..callback import Callback
from ..footprint import RUN
from ..held_out import HeldOutImage
from ..journal import Journal
from ..objective import size_conditions
from ..run import Best, Run

SEED = 0  # of the noise: the same in every run


@dataclass(frozen=True, slots=True)
class HeldOut:
    """All of them, with the noise that they get."""

    images: Sequence[HeldOutImage]
    noise: NoiseProcess
    timesteps: int  # how many
    at_once: int  # forward passes of so many samples

    @torch.no_grad()
    def losses(self, run: Run) -> dict[str, float]:
        """Mean of each source, and of all images as "".

        With several processes each takes as many images; what is left over is looked at twice and counted once.
        """
        rank, world, count = run.accelerator.process_index, run.accelerator.num_processes, len(self.images)
        with run.exported(), run.accelerator.autocast():
            mine = [(k, self._loss(run, k % count)) for k in range(rank, -(-count // world) * world, world)]
        if world > 1:
            from accelerate.utils import gather_object

            mine = gather_object(mine)
        by_source: dict[str, list[float]] = defaultdict(list)
        for number, loss in sorted(mine)[:count]:  # in one order: the sum is the same on any number of processes
            by_source[self.images[number].source].append(loss)
        everything = [loss for losses in by_source.values() for loss in losses]
        return {source: sum(losses) / len(losses) for source, losses in ({"": everything} | by_source).items()}

    def _loss(self, run: Run, number: int) -> float:
        """Mean over the timesteps for one image."""
        image, device = self.images[number], run.accelerator.device
        parts = run.parts | run.adapters.carriers  # not wrapped: nothing waits for others
        grid = self.noise.grid(self.timesteps).to(device)
        draws = Draws(SEED, range(number * len(grid), (number + 1) * len(grid)))
        noise = draws.normal("held out", image.latents.shape).to(device)
        embeddings = run.encode([image.sample.caption]).row(0)
        errors: list[float] = []
        for first in range(0, len(grid), self.at_once):
            timesteps = grid[first : first + self.at_once]
            count = len(timesteps)
            latents = image.latents.to(device).expand(count, *image.latents.shape)
            noised = self.noise.noised(latents, noise[first : first + count], timesteps)
            geometry = size_conditions([image.sample] * count).to(device)
            predicted = run.family.predict(parts, noised, Conditioning.stack([embeddings] * count, device), geometry)
            errors += (predicted.float() - noised.target.float()).square().mean((1, 2, 3)).tolist()
        return sum(errors) / len(errors)


class HeldOutLoss(Callback):
    """Runs before checkpoints are saved, as it may ask for one."""

    curve: Journal | None = None

    def __init__(self, held_out: HeldOut | None = None) -> None:
        """Without images it does nothing."""
        self.held_out = held_out

    def on_start(self, run: Run) -> None:
        if self.held_out is None:
            return
        if run.is_main:
            self.curve = Journal(run.folder / "logs" / "held_out.jsonl", run.folder, RUN)
        if run.step == 0:
            self._measure(run)

    def on_step(self, run: Run) -> None:
        if self.held_out is not None and run.is_due(run.config.validation.every) and not run.stop:
            self._measure(run)

    def on_exit(self, run: Run) -> None:
        if self.curve is not None:
            self.curve.close()

    def _measure(self, run: Run) -> None:
        assert self.held_out is not None
        run.read()  # trackers take steps in their order only
        losses = self.held_out.losses(run)
        total = losses.pop("")
        values = {"held_out": total, **{f"held_out/{source}": loss for source, loss in losses.items()}}
        if self.curve is not None:
            self.curve.add({"step": run.step, **values})
        run.log(values, run.step)
        if run.best is None or total < run.best.loss:
            run.best = Best(run.step, total)
            run.save = run.save or run.step > 0
            return
        patience = run.config.validation.patience
        checks = (run.step - run.best.step) // run.config.validation.every
        if patience is not None and checks >= patience and run.step < run.config.loop.steps:
            run.ended = f"the held-out loss was best at step {run.best.step}, {checks} validations ago"
            if run.is_main:
                say(f"{run.ended}: the run ends early")
