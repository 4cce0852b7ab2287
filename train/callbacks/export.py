"""Writes the trained adapter in every wanted format and verifies the files; run.json says how the run stands."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from ...adapters import format as adapter_format
from ...adapters.artifact import AdapterArtifact
from ...adapters.readers import note
from ...adapters.sharded import whole
from ...configs.errors import AfterTrainingError, TrainingError, UserError
from ...configs.files import as_os_error, reason
from ...configs.ownership import enter_folder
from ...configs.progress import say
from ...inference.adapter_file import format_names
from ...inference.merged import MergedBase
from ...inference.pipeline_folder import write_pipeline
from ...inference.verify import Fresh, Verification, probe, probe_prompt, verify_file, verify_pipeline
from ...models.encode import PROBE_PROMPT
from ...models.noise.ddpm import scheduler_changes
from ..callback import Callback
from ..captions import prompt_options
from ..fits import changes_base, formats_of, kind_of, words_of_method
from ..footprint import by_result
from ..header import run_header
from ..run import Run
from ..run_folder import write_run_file
from ..state import checkpoint_of, find_damage, load_checkpoint, saved_so_far
from ..together import together


class Export(Callback):
    """The end of a run that was not stopped."""

    def on_start(self, run: Run) -> None:
        counts = {part: sum(map(_numel, parameters)) for part, parameters in run.adapters.parameters().items()}
        run.facts["trainable_parameters"] = sum(counts.values())
        run.facts["adapter"] = words_of_method(run.config)
        run.facts["family"] = run.family.name
        run.facts["modules"] = dict(Counter(part for part, _ in run.adapters.modules()))
        run.facts["started"] = datetime.now().astimezone().isoformat(timespec="seconds")
        write_run_file(run, state="running")

    def on_end(self, run: Run) -> None:
        if run.stop:
            write_run_file(run, state="stopped", exit_code=5, message=f"stopped by {run.stop}")
        else:
            together(run.accelerator, lambda: self._export(run) if run.takes_part else None)

    def _export(self, run: Run) -> None:
        if run.ended:
            run.facts["ended"] = run.ended
        if run.best is not None:
            run.facts["best"] = {"step": run.best.step, "held_out": run.best.loss}
        if run.config.output.weights == "best":
            _load_best(run)
        try:
            with run.exported(), as_os_error():
                run.facts["files"], run.facts["verify"] = write_and_verify(run)
        except AfterTrainingError:
            raise
        except (UserError, OSError) as error:
            raise _not_written(run, error) from error
        if run.unsaved:
            files = ", ".join(run.facts["files"])
            raise AfterTrainingError(f"wrote and verified {files}, but no checkpoint of step {run.step}: {run.unsaved}")
        write_run_file(run, state="done", exit_code=0)


def _not_written(run: Run, error: Exception) -> UserError:
    """With a checkpoint of its last step a run has lost nothing, however the export went."""
    why = (
        "; ".join(error.problems)
        if isinstance(error, UserError)
        else reason(error)
        if isinstance(error, OSError)
        else error
    )
    words = f"the adapter was trained but cannot be written: {why}"
    if run.unsaved is None:
        return AfterTrainingError(f"{words}; `loraloom resume {run.folder}` tries it again")
    return TrainingError(f"{words}; nor could a checkpoint be saved, {saved_so_far(run.folder)}: the rest is lost")


def _load_best(run: Run) -> None:
    """The state of the best validation; at step 0 there is nothing to export but what the adapter began as."""
    assert run.best is not None
    if run.best.step not in (0, run.step):
        checkpoint = checkpoint_of(run.folder, run.best.step)
        last = run.step, run.seconds, run.skipped, run.best
        if damage := find_damage(checkpoint):
            say(f"warning: {checkpoint}, the best one: {damage}; the weights of the last step are exported")
            return
        load_checkpoint(run, checkpoint)
        run.step, run.seconds, run.skipped, run.best = last
    elif run.best.step == 0:
        say("warning: no validation was better than the base; the weights of the last step are exported")
        return
    run.facts["weights"] = f"of step {run.best.step}"


@dataclass(frozen=True, slots=True)
class Trained:
    """What a run has to write, and what it predicts."""

    artifact: AdapterArtifact | None  # beside the base
    states: dict[str, dict[str, Tensor]]  # of the base itself, by part
    predictions: dict[str, Tensor]  # of the probe, by prompt


def write_and_verify(run: Run) -> tuple[list[str], dict[str, Any]]:
    """The names of what was written, and what the verification of each found; on the main process."""
    trained, results = what_was_trained(run), {}
    if not run.is_main:
        return [], {}
    if trained.states:
        results["pipeline"] = _write_pipeline(run, trained)
    if trained.artifact is not None:
        results |= _write_files(run, trained.artifact, trained.predictions[probe_prompt(trained.artifact)])
    return [path.name for path, _ in results.values()], {kind: asdict(found) for kind, (_, found) in results.items()}


def what_was_trained(run: Run) -> Trained:
    """Copies, which every process has to ask for where the weights are sharded."""
    artifact, states, prompts = run.adapters.artifact(), {}, [PROBE_PROMPT]
    if artifact is not None:
        artifact = replace(artifact, metadata=run_header(run))
        prompts = [probe_prompt(artifact)]
    if changes_base(run.config):
        found = {part: state for part, state in run.adapters.states().items() if part in run.family.targets}
        states = {part: {name: whole(tensor) for name, tensor in state.items()} for part, state in found.items()}
        prompts.append(PROBE_PROMPT)
    parts = run.parts | run.adapters.carriers
    predictions = {prompt: probe(run.family, parts, run.encode, prompt) for prompt in dict.fromkeys(prompts)}
    return Trained(artifact, states, predictions)


def _write_files(run: Run, artifact: AdapterArtifact, prediction: Tensor) -> dict[str, tuple[Path, Verification]]:
    """An adapter file in each format."""
    output, parts, results = run.config.output, run.parts | run.adapters.carriers, {}
    files = {kind: run.folder / adapter_format.file_name(output.name, kind) for kind in formats_of(run.config)}
    problems: dict[str, UserError] = {}
    for kind, file in files.items():
        try:
            by, names = by_result(output.name), format_names(run.family, parts)
            adapter_format.write(artifact, file, kind, names, output.dtype, run.folder, by)
        except UserError as error:  # the other formats may hold it
            problems[kind] = error
    for kind, file in files.items():
        if kind in problems:
            continue
        try:
            with _fresh_base(run, artifact) as fresh:
                results[kind] = file, verify_file(file, artifact, fresh, prediction, _types(run), output.dtype)
        except AfterTrainingError as error:
            problems[kind] = error
        else:
            advice = note(kind, kind_of(run.config))
            say(f"wrote and verified {file}{f' ({advice})' if advice else ''}")
    if problems:
        run.facts["files"] = [file.name for file, _ in results.values()]
        raise _incomplete(problems, [file for file, _ in results.values()])
    return results


def _incomplete(problems: Mapping[str, UserError], sound: Sequence[Path]) -> UserError:
    """Of the formats that refused the adapter, or whose files do not verify."""
    lines = [f"{kind}: {line}" if len(problems) > 1 else line for kind, e in problems.items() for line in e.problems]
    if sound:
        lines[-1] += f"; {', '.join(map(str, sound))} {'is' if len(sound) == 1 else 'are'} written and verified"
    kind = AfterTrainingError if any(isinstance(e, AfterTrainingError) for e in problems.values()) else UserError
    return kind(lines)


@contextmanager
def _fresh_base(run: Run, artifact: AdapterArtifact) -> Iterator[Fresh]:
    """On the weights in memory where they are those of the base, else from its files."""
    model, prompts = run.config.model, prompt_options(run.config)
    if changes_base(run.config):
        model = model.model_copy(
            update={"base": str(run.folder / run.config.output.name), "revision": None, "adapters": []}
        )
    elif run.adapters.can_disable and not run.is_sharded and not artifact.embeddings:
        yield Fresh.beside(run.family, run.parts | run.adapters.carriers, run.encode, prompts)
        return
    with run.parked():
        yield Fresh.load(model, str(run.accelerator.device), prompts)


def _write_pipeline(run: Run, trained: Trained) -> tuple[Path, Verification]:
    """The base with what was trained in it."""
    output, folder, base = run.config.output, run.folder / run.config.output.name, MergedBase(run.config.model)
    merged, states = base.changed(), trained.states
    changed = {part: merged.get(part, {}) | states.get(part, {}) for part in merged.keys() | states}
    write_pipeline(base, changed, folder, output.dtype, scheduler_changes(run.config.noise))
    enter_folder(folder, run.folder, by_result(output.name))
    device, prompts = str(run.accelerator.device), prompt_options(run.config)
    run.forget_optimizer()  # a second base has to fit where optimiser and gradients were
    with run.parked():
        found = verify_pipeline(
            folder, states, trained.predictions[PROBE_PROMPT], dtypes=_types(run), device=device, prompts=prompts
        )
    say(f"wrote and verified {folder}")
    return folder, found


def _types(run: Run) -> set[str]:
    """What decides how near a reloaded result has to come; mixed precision is for training alone."""
    return {run.config.output.dtype, run.config.model.dtype}


def _numel(tensor: Any) -> int:
    return tensor.numel()
