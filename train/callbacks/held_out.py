"""The held-out loss over the steps: its curve, the best checkpoint, and the end of a run that no longer gets better."""

from ...configs.progress import say
from ..callback import Callback
from ..footprint import RUN
from ..journal import Journal
from ..run import Best, Run


class HeldOutLoss(Callback):
    """Runs before checkpoints are saved, as it may ask for one."""

    curve: Journal | None = None

    def on_start(self, run: Run) -> None:
        if run.held_out is None:
            return
        if run.is_main:
            self.curve = Journal(run.folder / "logs" / "held_out.jsonl", run.folder, RUN)
        if run.step == 0:
            self._measure(run)

    def on_step(self, run: Run) -> None:
        if run.held_out is not None and run.is_due(run.config.validation.every) and not run.stop:
            self._measure(run)

    def on_exit(self, run: Run) -> None:
        if self.curve is not None:
            self.curve.close()

    def _measure(self, run: Run) -> None:
        assert run.held_out is not None
        run.read()  # trackers take steps in their order only
        losses = run.held_out.losses(run)
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
