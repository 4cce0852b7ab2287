"""Writes the trained adapter in every wanted format and verifies the files; run.json says how the run stands."""

from collections import Counter
from dataclasses import asdict, replace
from datetime import datetime
from typing import Any

from tqdm import tqdm

from ...adapters import format as adapter_format
from ...adapters.artifact import AdapterArtifact
from ...configs.errors import AfterTrainingError, UserError
from ...inference.adapter_file import format_names
from ...inference.verify import probe, probe_prompt, verify_file
from ..callback import Callback
from ..captions import prompt_options
from ..fits import formats_of
from ..run import Run
from ..run_folder import write_run_file
from ..state import checkpoint_of, load_checkpoint


class Export(Callback):
    """The end of a run that was not stopped."""

    def on_start(self, run: Run) -> None:
        counts = {part: sum(map(_numel, parameters)) for part, parameters in run.adapters.parameters().items()}
        run.facts["trainable_parameters"] = sum(counts.values())
        run.facts["modules"] = dict(Counter(part for part, _ in run.adapters.artifact().modules))
        run.facts["started"] = datetime.now().astimezone().isoformat(timespec="seconds")
        write_run_file(run, state="running")

    def on_end(self, run: Run) -> None:
        if run.stop:
            write_run_file(run, state="stopped", exit_code=5, message=f"stopped by {run.stop}")
        elif run.is_main:
            self._export(run)
        run.accelerator.wait_for_everyone()

    def _export(self, run: Run) -> None:
        if run.ended:
            run.facts["ended"] = run.ended
        if run.best is not None:
            run.facts["best"] = {"step": run.best.step, "held_out": run.best.loss}
        if run.config.output.weights == "best":
            _load_best(run)
        try:
            with run.exported():
                run.facts["files"], run.facts["verify"] = write_and_verify(run)
        except AfterTrainingError:
            raise
        except (UserError, OSError) as error:
            raise AfterTrainingError(f"the adapter was trained but cannot be written: {error}") from error
        write_run_file(run, state="done", exit_code=0)


def _load_best(run: Run) -> None:
    """The state of the best validation; at step 0 there is nothing to export but what the adapter began as."""
    assert run.best is not None
    if run.best.step not in (0, run.step):
        last = run.step, run.seconds
        load_checkpoint(run, checkpoint_of(run.folder, run.best.step))
        run.step, run.seconds = last
    elif run.best.step == 0:
        tqdm.write("warning: no validation was better than the base; the weights of the last step are exported")
        return
    run.facts["weights"] = f"of step {run.best.step}"


def write_and_verify(run: Run) -> tuple[list[str], dict[str, Any]]:
    """The names of the files, one for each format, and what the verification of each found."""
    artifact, output, model = make_artifact(run), run.config.output, run.config.model
    parts = run.parts | run.adapters.carriers
    files = {kind: run.folder / adapter_format.file_name(output.name, kind) for kind in formats_of(run.config)}
    for kind, file in files.items():
        adapter_format.write(artifact, file, kind, format_names(run.family, parts), output.dtype)
    precision = run.config.loop.precision
    dtypes, device = {output.dtype, model.dtype, "fp32" if precision == "no" else precision}, run.accelerator.device
    trained, results = probe(run.family, parts, run.encode, probe_prompt(artifact)), {}
    for kind, file in files.items():
        prompts = prompt_options(run.config)
        found = verify_file(file, artifact, model, trained, dtypes=dtypes, device=str(device), prompts=prompts)
        results[kind] = asdict(found)
        tqdm.write(f"wrote and verified {file}")
    return [file.name for file in files.values()], results


def make_artifact(run: Run) -> AdapterArtifact:
    """The adapter as it is now."""
    return replace(run.adapters.artifact(), metadata=_header(run))


def _header(run: Run) -> dict[str, str]:
    resolution = max(run.config.data.resolutions)
    return {"modelspec.title": run.config.output.name, "modelspec.resolution": f"{resolution}x{resolution}"}


def _numel(tensor: Any) -> int:
    return tensor.numel()
