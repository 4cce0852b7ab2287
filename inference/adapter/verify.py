"""loraloom adapter verify: a file loaded into its base as for sampling, beside the same change made by hand."""

import argparse
from pathlib import Path

from ...adapters.artifact import AdapterArtifact, base_weights
from ...adapters.format import read
from ...configs.arguments import path_text
from ...configs.dtypes import AUTO
from ...configs.errors import AfterTrainingError
from ...configs.words import counted
from ...models.device import chosen_device, device_words
from ..engine import Engine
from ..layers import Layers
from ..verify import TOLERANCE, attached, furthest, probe, probe_prompt

EXAMPLES = ["loraloom adapter verify my-dog.safetensors --base pocket"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=path_text, metavar="FILE", help="adapter file, or folder of PEFT's")
    parser.add_argument(
        "--base", type=path_text, required=True, help="pocket, a pipeline folder, a .safetensors checkpoint or a hub id"
    )
    parser.add_argument("--device", default=AUTO, help="cpu, cuda, mps or xpu (auto: the best one there is), in fp32")


def run(options: argparse.Namespace) -> int:
    file = Path(options.file)
    wanted = read(file, Layers(options.base).names)
    device = chosen_device(options.device)
    engine = Engine.load(options.base, dtype="fp32", device=device)
    alone = probe(engine.family, engine.parts)
    again = attached(engine.adapters, file, wanted)
    named = {part: [*own] for part, own in again.embeddings.items()}  # a file may leave its word's name out
    words = {part: dict(zip(named[part], own.values(), strict=True)) for part, own in wanted.embeddings.items()}
    difference, worst = furthest(AdapterArtifact(wanted.modules, embeddings=words), again, base_weights(engine.parts))
    prediction = probe(engine.family, engine.parts, prompt=probe_prompt(again))
    effect = ((prediction - alone).abs().max() / alone.abs().max()).item()
    held = [counted(len(again.modules), "module"), counted(sum(map(len, words.values())), "word")]
    print(f"{file}: {' and '.join(held)} in {options.base}, {device_words(device, 'fp32')}")
    print(f"  largest error of a change      {difference:.1e} of its norm{f' ({worst})' if difference else ''}")
    if wanted.modules and not words:
        merged = Engine.load(options.base, dtype="fp32", device=device, merged=[str(file)])
        by_hand = probe(merged.family, merged.parts)
        apart = ((prediction - by_hand).abs().max() / by_hand.abs().max()).item()
        print(f"  prediction beside a merged one {apart:.1e}")
        difference = max(difference, apart)
    print(f"  effect on a prediction         {effect:.1e}{'' if effect else ' (the adapter changes nothing)'}")
    if not difference <= TOLERANCE["fp32"]:
        raise AfterTrainingError(f"{file}: does not verify, see above")
    return 0
