"""Writes the trained adapter in every wanted format, verifies the files, and keeps run.json."""

import importlib.metadata
import json
import os
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from ...adapters import format as adapter_format
from ...adapters.adapter import ADAPTER_NAME
from ...adapters.artifact import AdapterArtifact, from_peft
from ...configs.errors import AfterTrainingError
from ...inference.mixing import format_names
from ...inference.verify import probe, verify_file
from ..callback import Callback
from ..run import Run

LIBRARIES = ("loraloom", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors")


class Export(Callback):
    """The end of a run that was not stopped."""

    def on_start(self, run: Run) -> None:
        counts = {part: sum(map(_numel, parameters)) for part, parameters in run.adapters.parameters().items()}
        run.facts["trainable_parameters"] = sum(counts.values())
        run.facts["modules"] = {
            part: len(from_peft(part, module, ADAPTER_NAME)) for part, module in run.adapters.carriers.items()
        }
        write_run_file(run, state="running")

    def on_end(self, run: Run) -> None:
        if run.stop:
            write_run_file(run, state="stopped", exit_code=5, message=f"stopped by {run.stop}")
        elif run.is_main:
            self._export(run)
        run.accelerator.wait_for_everyone()

    def _export(self, run: Run) -> None:
        artifact = make_artifact(run)
        names = format_names(run.family, run.parts | run.adapters.carriers)
        output, results = run.config.output, {}
        files = {kind: run.folder / adapter_format.file_name(output.name, kind) for kind in output.formats}
        for kind, file in files.items():
            adapter_format.write(artifact, file, kind, names, output.dtype)
        run.facts["files"] = [file.name for file in files.values()]
        trained = probe(run.family, run.parts | run.adapters.carriers)
        try:
            for kind, file in files.items():
                results[kind] = asdict(verify_file(file, artifact, run.config.model, output.dtype, trained))
                tqdm.write(f"wrote and verified {file}")
        except AfterTrainingError as error:
            write_run_file(run, state="failed", exit_code=error.exit_code, message=str(error))
            raise
        run.facts["verify"] = results
        write_run_file(run, state="done", exit_code=0)


def make_artifact(run: Run) -> AdapterArtifact:
    """The adapter as it is now."""
    modules = {
        key: weights
        for part, module in run.adapters.carriers.items()
        for key, weights in from_peft(part, module, ADAPTER_NAME).items()
    }
    return AdapterArtifact(modules, method=run.config.adapter.method, metadata=_header(run))


def _header(run: Run) -> dict[str, str]:
    resolution = run.config.data.resolution
    return {"modelspec.title": run.config.output.name, "modelspec.resolution": f"{resolution}x{resolution}"}


def write_run_file(run: Run, **facts: Any) -> None:
    """run.json: where the run stands; written on the main process, atomically."""
    if not run.is_main:
        return
    run.facts.update(facts)
    content = {
        "state": None,
        "exit_code": None,
        "step": run.step,
        "steps": run.config.loop.steps,
        "train_seconds": round(run.seconds, 2),
        "threads": run.config.loop.threads,
        "processes": run.accelerator.num_processes,
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        **run.facts,
    }
    partial = run.folder / "run.json.tmp"
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, run.folder / "run.json")


def _numel(tensor: Any) -> int:
    return tensor.numel()
