"""python -m loraloom.benchmarks.mixing: what adapters cost while sampling, beside them, fused, and after they are gone.

Time of one image beside the base's, in turn; memory as the sum of all tensors' storages, each counted once.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from ..adapters.artifact import AdapterArtifact, Weights, base_modules
from ..adapters.format import write
from ..configs.command import run_command
from ..inference.adapter_file import format_names
from ..inference.engine import Engine, Request

SETTINGS: Mapping[str, tuple[int, bool]] = {
    "one adapter": (1, False),
    "five adapters": (5, False),
    "five adapters, fused": (5, True),
}


def main(arguments: Sequence[str]) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m loraloom.benchmarks.mixing", description=__doc__)
    parser.add_argument("--base", default="pocket", help="as of `loraloom sample` (pocket)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(list(arguments))
    engine = Engine.load(options.base, device=options.device)
    request = Request(["a red star on a blue background"], [0], steps=options.steps, micro_batch=1)
    with tempfile.TemporaryDirectory() as folder:
        files = [adapter(engine, Path(folder) / f"{k}.safetensors", options.rank, k) for k in range(5)]
        print(f"{options.base}, {options.steps} steps, one picture at a time, rank {options.rank}, {options.device},")
        print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; median of {options.rounds} rounds\n")
        print("| adapters | time / base | storages, MiB |")
        print("|---|---:|---:|")
        row(engine, "none", ratio(engine, request, options.rounds, lambda: None, lambda: None))
        for name, (count, fused) in SETTINGS.items():
            begin = partial(load, engine, files[:count], fused)
            found = ratio(engine, request, options.rounds, begin, engine.adapters.unload)
            begin()
            row(engine, name, found)
            engine.adapters.unload()
        row(engine, "after unload", ratio(engine, request, options.rounds, lambda: None, lambda: None))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cuda = f", CUDA {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB" if torch.cuda.is_available() else ""
    print(f"\npeak of the process: {peak:.0f} MiB{cuda}")
    return 0


def row(engine: Engine, name: str, found: float) -> None:
    """Of the table, as soon as it is known."""
    print(f"| {name} | {found:.2f} | {mib(engine):.1f} |", flush=True)


def adapter(engine: Engine, file: Path, rank: int, seed: int) -> Path:
    """A LoRA with random numbers on the attention of the denoiser and the text encoders."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for part in (engine.family.denoiser, *engine.family.text_encoders):
        endings = tuple(f".{each}" for each in engine.family.targets[part]["attention"])
        for path, (out, into, *kernel) in base_modules(part, engine.parts[part]).items():
            if path.endswith(endings):
                down = torch.randn(rank, into, *kernel, generator=generator) * 0.01
                up = torch.randn(out, rank, *(1 for _ in kernel), generator=generator) * 0.01
                modules[part, path] = Weights("lora", {"down": down, "up": up})
    write(AdapterArtifact(modules), file, "loraloom", format_names(engine.family, engine.parts))
    return file


def load(engine: Engine, files: Sequence[Path], fused: bool) -> None:
    for number, file in enumerate(files):
        engine.adapters.load_adapter(file, f"a{number}", 0.5)
    if fused:
        engine.adapters.fuse()


def ratio(engine: Engine, request: Request, rounds: int, begin: Callable[[], None], end: Callable[[], None]) -> float:
    """The median over rounds of (time with) / (time without), measured one right after the other."""
    engine.generate(request)
    found = []
    for _ in range(rounds):
        without = seconds(engine, request)
        begin()
        engine.generate(request)
        found.append(seconds(engine, request) / without)
        end()
    return statistics.median(found)


def seconds(engine: Engine, request: Request) -> float:
    started = time.perf_counter()
    engine.generate(request)
    return time.perf_counter() - started


def mib(engine: Engine) -> float:
    """All tensors of the models, each memory counted once."""
    models = [model for model in engine.parts.values() if isinstance(model, torch.nn.Module)]
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(sizes.values()) / 2**20


if __name__ == "__main__":
    sys.exit(run_command(main))
