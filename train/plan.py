"""loraloom plan CONFIG: everything that a run would do, and nothing trained."""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.targets import layer_parts, words_of
from ..configs.arguments import Parser, add_config, positive
from ..configs.command import run_command
from ..configs.errors import UserError
from ..configs.imports import importing
from ..configs.loader import given_yaml, load_config, marked_yaml
from ..configs.plain import plain
from ..configs.schema import PartSection, RunConfig
from ..configs.words import agreeing, counted
from ..models.base import find_base
from .pages.words import aligned, duration

if TYPE_CHECKING:
    from ..data.dataset import Images
    from ..models.load import Base
    from .measure import Measured
    from .outlook import Changed, Outlook
    from .precompute import CacheOutlook


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a run would do."""

    config: RunConfig
    data: "Outlook"
    caches: "list[CacheOutlook]"
    long_captions: list[str]  # one line each
    adapter: list[str]  # lines about what is trained
    measured: "Measured | None" = None

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        caches = [{key: value for key, value in asdict(cache).items() if key != "missing"} for cache in self.caches]
        adapter = [line.strip() for line in self.adapter]
        config = self.config.model_dump()
        return {
            "config": config,
            "data": asdict(self.data),
            "caches": caches,
            "long_captions": self.long_captions,
            "adapter": adapter,
            "measured": self.measured and asdict(self.measured),
        }


def main(arguments: Sequence[str]) -> int:
    """Prints the plan; exit code 2 with all problems if the run could not start."""
    parser = Parser(
        prog="loraloom plan",
        description="Show what a run would do, train nothing.",
        epilog="Images whose sizes stand in the metadata (columns width and height) are not opened; training does.",
    )
    add_config(parser)
    parser.add_argument("--processes", metavar="N", type=positive, default=1, help="that the run will have (1)")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="train a few steps in a folder that is thrown away, and "
        "make one validation image: time, memory, and how long the run will take",
    )
    parser.add_argument("--all", action="store_true", help="show the values that the config does not set, too")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_intermixed_args(list(arguments))
    config = load_config(options.config, options.overrides)
    from .footprint import check_way
    from .preflight import preflight

    check_way(config)
    images = preflight(config, trust_sizes=not options.measure)
    plan = make_plan(config, images, options.processes)
    if options.measure:
        plan = replace(plan, measured=_measure(config, images))
    print(json.dumps(plan.as_json(), indent=1) if options.json else "\n".join(describe(plan, options.all)))
    return 0


def _measure(config: RunConfig, images: "Sequence[Images | None]") -> "Measured":
    if find_base(config.model.base, config.model.revision) is None:
        raise UserError(f"--measure: the base {config.model.base} is still on the hub; `loraloom cache` downloads it")
    from .measure import measure

    return measure(config, images)


def make_plan(config: RunConfig, images: "Sequence[Images | None]", processes: int = 1) -> Plan:
    """The plan of a config whose images were looked at."""
    import pyarrow

    from .gather import warn
    from .outlook import dataset_ahead, look_ahead, missed_shares

    dataset, base = dataset_ahead(config, images)
    outlook = look_ahead(config, dataset, processes)
    for line in missed_shares(outlook):
        warn(line)
    if base is None:
        later = "(the base is on the hub: modules, captions and caches are counted once it is downloaded)"
        return Plan(config, outlook, [], [], [later])
    with importing():
        from .captions import find_long_captions, find_unseen_captions
        from .precompute import count_latents, count_prompts, weigh

    caches = [count(config, base.family, base.folder, dataset) for count in (count_latents, count_prompts)]
    long = find_long_captions(config, base.family, base.load, dataset)
    for line in find_unseen_captions(config, dataset):
        warn(line)
    del images, dataset  # a million rows make room for the model
    pyarrow.default_memory_pool().release_unused()
    adapter = list(_describe_adapter(config, base))
    return Plan(config, outlook, [weigh(found, config, base.family, base.load) for found in caches], long, adapter)


def describe(plan: Plan, whole: bool = True) -> Iterator[str]:
    """The lines of the plan: with the `whole` config, or with what is set of it."""
    config = plan.config
    if whole:
        yield "Config (values that the file does not set are marked)\n"
        yield marked_yaml(config)
    else:
        yield "Config (what is set; --all shows every other value too)\n"
        yield given_yaml(config)
    yield "Data"
    yield from _describe_data(plan)
    yield "\nTrained"
    yield from plan.adapter
    yield "\nSteps"
    yield from _describe_steps(config, plan.data)
    yield "\nFiles"
    yield from _describe_files(config)
    if plan.measured is not None:
        yield "\nMeasured"
        yield from describe_measured(plan.measured)


def describe_measured(found: "Measured") -> Iterator[str]:
    """Where the time of a step goes, the memory, and how long the run will take."""
    for name, seconds in found.seconds_of.items():
        yield f"  {name:<11}{seconds * 1e3:>10,.1f} ms {seconds / sum(found.seconds_of.values()):>5.0%}"
    gib = 2**30
    yield f"  a step     {found.step * 1e3:>10,.1f} ms on {found.device}; the first took {duration(found.first_step)}"
    with_image = "" if found.image is None else f", {found.memory_with_image / gib:.2f} GiB with a validation image"
    yield f"  memory     {found.memory / gib:>10,.2f} GiB{with_image}"
    listed = " + ".join(f"{what} {duration(seconds)}" for what, seconds in found.left.items() if seconds >= 0.05)
    yield f"  the run    {duration(found.total)} = {listed}"


def _describe_data(plan: Plan) -> Iterator[str]:
    yield from _table(
        ["source", "images", "samples", "share", "each seen", "loss weight", "steps"],
        [
            [
                source.name,
                f"{source.images:,}",
                f"{source.samples:,}",
                f"{source.share:.0%}",
                f"{source.passes:.1f} times",
                f"{source.loss_weight:g}",
                f"{source.first_step}..{source.end_step}",
            ]
            for source in plan.data.sources
        ],
    )
    for source in plan.data.sources:
        if source.counts:
            yield f"  {plain(source.name)}: " + ", ".join(
                agreeing(count, what) for what, count in source.counts.items()
            )
    yield ""
    yield from _table(
        ["bucket", "images", "samples"],
        [
            [
                f"{bucket.width} x {bucket.height}",
                ", ".join(f"{count:,} of {source}" for source, count in bucket.images.items()),
                f"{bucket.samples:,}",
            ]
            for bucket in plan.data.buckets
        ],
    )
    yield from _describe_changed("cut most", plan.data.most_cropped)
    yield from _describe_changed("enlarged most", plan.data.most_enlarged)
    for line in plan.long_captions:
        yield f"  long caption: {plain(line)}"
    for cache in plan.caches:
        yield f"  {cache.describe()}"


def _describe_changed(title: str, changed: "Sequence[Changed]") -> Iterator[str]:
    for image in changed:
        (width, height), (wide, high) = image.size, image.bucket
        what = f"{image.cropped:.0%} cut away, scaled by {image.scale:.2g}"
        yield f"  {title}: {plain(image.image)}, {width} x {height} to {wide} x {high}: {what}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Words to the left, numbers to the right."""
    yield from (f"  {line}" for line in aligned([head, *rows], "<" + ">" * (len(head) - 1)))


def _describe_adapter(config: RunConfig, base: "Base") -> Iterator[str]:
    with importing():
        from ..adapters.token_embeddings import TOKENS
        from .build import make_adapters
        from .fits import changes_base, trained_parts, words_of_method
        from .writable import check_formats

    adapter, family = config.adapter, base.family
    needed = trained_parts(config, family)
    words = (family.tokenizers[part] for part in needed if part in family.tokenizers)
    parts = base.load([*needed, *words, "scheduler"])
    adapters = make_adapters(config, family, parts)
    check_formats(config, family, parts, adapters)
    modules = Counter(part for part, _ in adapters.modules())
    selections, whole = layer_parts(config.adapter, family.denoiser), changes_base(config)
    where = "of the base" if whole else "on the frozen base"
    yield f"  {', '.join(words_of_method(config))}, {where} {config.model.base!r}"
    yield f"  family {family.name}"
    for name, parameters in adapters.parameters().items():
        own = config.optimizer.parts.get(name, PartSection()).learning_rate
        rate = config.optimizer.learning_rate if own is None else own
        count = sum(parameter.numel() for parameter in parameters)
        trained = f"{count:,} {'weights of the base' if whole and name != TOKENS else 'new weights'}"
        if name == TOKENS:
            words = ", ".join(f"{section.token} ({counted(section.vectors, 'vector')})" for section in adapter.tokens)
            yield f"  {name}: {words}, {trained}, learning rate {rate:g}"
        else:
            frozen = sum(parameter.numel() for parameter in parts[name].parameters() if not parameter.requires_grad)
            where = "+".join(words_of(selections[name]))
            layers = f"{modules[name]} modules ({where})"
            yield f"  {name}: {layers}, {trained} on {frozen:,} frozen ones, learning rate {rate:g}"


def _describe_steps(config: RunConfig, data: "Outlook") -> Iterator[str]:
    loop = config.loop
    steps, batch = counted(loop.steps, "optimiser step"), counted(loop.batch_size, "sample")
    yield f"  {steps} of {batch} = {counted(data.samples, 'sample')}"
    each = "every image once" if len(config.data.resolutions) == 1 else "every image once at each resolution"
    yield f"  {data.steps_per_epoch:,.1f} steps for an epoch ({each})"
    checkpoint = config.checkpoint
    yield f"  a checkpoint every {checkpoint.every} steps and at the end, the newest {checkpoint.keep} kept"
    if images := len(config.validation.prompts) * config.validation.num_images:
        yield f"  {images} validation images every {config.validation.every} steps and at the end"
    else:
        yield "  no validation images (validation.prompts is empty)"


def _describe_files(config: RunConfig) -> Iterator[str]:
    from ..adapters.format import file_name
    from ..adapters.readers import read_by
    from .fits import changes_base, formats_of, kind_of

    folder, output = Path(config.output.dir), config.output
    if changes_base(config):
        yield f"  {folder / output.name}/ (a diffusers pipeline)"
    for name in formats_of(config):
        yield f"  {folder / file_name(output.name, name)} (for {read_by(name, kind_of(config))})"
    for name in ("README.md", "report.html", "config.yaml", "run.json", "checkpoints/", "samples/", "logs/"):
        yield f"  {folder / name}"
    if output.push_to is not None:
        yield f"  then files, README.md and its pictures to the hub: {output.push_to}"


if __name__ == "__main__":
    sys.exit(run_command(main))
