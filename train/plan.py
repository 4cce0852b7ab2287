"""loraloom plan CONFIG: everything that a run would do, and nothing trained."""

import argparse
import contextlib
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..adapters.format import file_name
from ..configs.errors import run_command
from ..configs.loader import load_config, marked_yaml
from ..configs.schema import FolderSource, RunConfig
from ..data.sources import folder_samples
from ..models.base import EMBEDDED
from .preflight import preflight


def main(arguments: Sequence[str]) -> int:
    """Prints the plan; exit code 2 with all problems if the run could not start."""
    parser = argparse.ArgumentParser(prog="loraloom plan", description="Show what a run would do, train nothing.")
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings such as adapter.rank=16")
    options = parser.parse_args(list(arguments))
    config = load_config(options.config, options.overrides)
    preflight(config)
    print("\n".join(describe(config)))
    return 0


def describe(config: RunConfig) -> Iterator[str]:
    """The lines of the plan."""
    yield "Config (values that the file does not set are marked)\n"
    yield marked_yaml(config)
    yield "Data"
    yield from _describe_data(config)
    yield "\nTrained"
    yield from _describe_adapter(config)
    yield "\nSteps"
    yield from _describe_steps(config)
    yield "\nFiles"
    yield from _describe_files(config)


def _describe_data(config: RunConfig) -> Iterator[str]:
    counts = [
        len(folder_samples(source)) if isinstance(source, FolderSource) else source.count
        for source in config.data.sources
    ]
    samples = config.loop.steps * config.loop.batch_size
    for source, count in zip(config.data.sources, counts, strict=True):
        share = source.share if source.share is not None else count / sum(counts)
        if isinstance(source, FolderSource):
            what = f"{count} images of {source.path}, {source.caption!r}"
        else:
            what = f"{count} class images {source.prior!r}, made with the base before training"
        passes = samples * share / count
        yield f"  {what}: {share:.0%} of the samples, each seen {passes:.1f} times, loss weight {source.loss_weight:g}"


def _describe_adapter(config: RunConfig) -> Iterator[str]:
    adapter = config.adapter
    yield f"  {adapter.method}, rank {adapter.rank}, alpha {adapter.alpha:g}, on the frozen base {config.model.base!r}"
    if config.model.base not in EMBEDDED and not Path(config.model.base).is_dir():
        yield "  (the base is on the hub: modules and parameters are known once it is downloaded)"
        return
    with contextlib.redirect_stderr(io.StringIO()):
        from ..inference.engine import load_parts
        from .build import check_resolution, make_adapters

        family, parts = load_parts(config.model.base, family=config.model.family, dtype=config.model.dtype)
        check_resolution(config, family)
        adapters = make_adapters(config, family, parts)
    yield f"  family {family.name}"
    for part, parameters in adapters.parameters().items():
        rate = config.optimizer.part_learning_rates.get(part, config.optimizer.learning_rate)
        trained = sum(parameter.numel() for parameter in parameters)
        frozen = sum(parameter.numel() for parameter in parts[part].parameters() if not parameter.requires_grad)
        modules = f"{len(parameters) // 2} modules ({adapter.parts[part]})"
        yield f"  {part}: {modules}, {trained:,} new weights on {frozen:,} frozen ones, learning rate {rate:g}"


def _describe_steps(config: RunConfig) -> Iterator[str]:
    loop = config.loop
    yield f"  {loop.steps} optimiser steps of {loop.batch_size} samples = {loop.steps * loop.batch_size:,} samples"
    checkpoint = config.checkpoint
    yield f"  a checkpoint every {checkpoint.every} steps and at the end, the newest {checkpoint.keep} kept"
    if images := len(config.validation.prompts) * config.validation.num_images:
        yield f"  {images} validation images every {config.validation.every} steps and at the end"
    else:
        yield "  no validation images (validation.prompts is empty)"


def _describe_files(config: RunConfig) -> Iterator[str]:
    folder, output = Path(config.output.dir), config.output
    for name in output.formats:
        yield f"  {folder / file_name(output.name, name)}"
    for name in ("report.html", "config.yaml", "run.json", "checkpoints/", "samples/", "logs/"):
        yield f"  {folder / name}"


if __name__ == "__main__":
    sys.exit(run_command(main))
