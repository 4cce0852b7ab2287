"""loraloom adapter verify: a file loaded into its base as for sampling, beside the same change made by hand."""

import argparse
from pathlib import Path

from ...adapters.artifact import AdapterArtifact, base_weights
from ...adapters.format import read
from ...configs.errors import AfterTrainingError
from ..engine import Engine
from ..layers import Layers
from ..verify import TOLERANCE, attached, furthest, probe, probe_prompt

EXAMPLES = ["loraloom adapter verify my-dog.safetensors --base pocket"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="adapter file, or folder of PEFT's")
    parser.add_argument(
        "--base", required=True, help="pocket, a pipeline folder, a .safetensors checkpoint or a hub id"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps (cpu)")


def run(options: argparse.Namespace) -> int:
    file = Path(options.file)
    wanted = read(file, Layers(options.base).names)
    engine = Engine.load(options.base, device=options.device)
    alone = probe(engine.family, engine.parts)
    again = attached(engine.adapters, file, wanted)
    named = {part: [*own] for part, own in again.embeddings.items()}  # a file may leave its word's name out
    words = {part: dict(zip(named[part], own.values(), strict=True)) for part, own in wanted.embeddings.items()}
    difference, worst = furthest(AdapterArtifact(wanted.modules, embeddings=words), again, base_weights(engine.parts))
    prediction = probe(engine.family, engine.parts, prompt=probe_prompt(again))
    effect = ((prediction - alone).abs().max() / alone.abs().max()).item()
    print(f"{file}: {len(again.modules)} modules and {sum(map(len, words.values()))} words in {options.base}")
    print(f"  largest error of a change      {difference:.1e} of its norm{f' ({worst})' if difference else ''}")
    if wanted.modules and not words:
        merged = Engine.load(options.base, device=options.device, merged=[str(file)])
        by_hand = probe(merged.family, merged.parts)
        apart = ((prediction - by_hand).abs().max() / by_hand.abs().max()).item()
        print(f"  prediction beside a merged one {apart:.1e}")
        difference = max(difference, apart)
    print(f"  effect on a prediction         {effect:.1e}{'' if effect else ' (the adapter changes nothing)'}")
    if not difference <= TOLERANCE["fp32"]:
        raise AfterTrainingError(f"{file}: does not verify, see above")
    return 0
