"""loraloom cache CONFIG [key=value …]: latents and prompt embeddings computed, and nothing trained."""

import sys
from collections.abc import Sequence

from ..configs.arguments import Parser, add_config
from ..configs.command import run_command
from ..configs.imports import importing
from ..configs.loader import load_config
from ..configs.plain import plain
from ..configs.processes import joined
from ..configs.schema import RunConfig
from ..configs.words import counted
from .start import start_processes


def main(arguments: Sequence[str]) -> int:
    """Fills the caches of a config."""
    parser = Parser(
        prog="loraloom cache", description="Compute latents and prompt embeddings of a config ahead of its training."
    )
    add_config(parser, example="data.variants=8")
    options = parser.parse_intermixed_args(list(arguments))
    with joined(start_processes):
        return _fill(load_config(options.config, options.overrides))


def _fill(config: RunConfig) -> int:
    from .preflight import preflight

    images = preflight(config)
    with importing():
        from .build import make_accelerator, prepare
        from .precompute import why_no_latents, why_no_prompts

    accelerator = make_accelerator(config)
    ready = prepare(config, accelerator, images)
    wanted, family, dataset = ready.wanted, ready.base.family, ready.dataset
    for name, store, keys, reason in (
        ("latents", wanted.latents, wanted.cuts, why_no_latents(config)),
        ("prompt embeddings", wanted.prompts, wanted.captions, why_no_prompts(config, family, dataset)),
    ):
        if store is None:
            accelerator.print(f"{name} are not cached: {plain(reason)}")
        else:
            size = f"{store.size_bytes / 2**20:.1f} MiB with others"
            accelerator.print(f"{name}: {counted(len(keys), 'entry')} in {store.folder} ({size})")
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
