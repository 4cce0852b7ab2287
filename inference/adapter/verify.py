"""loraloom adapter verify: a file loaded into its base as for sampling, beside the same change made by hand."""

import argparse
from pathlib import Path

from ...adapters.artifact import AdapterArtifact, base_weights, largest_difference
from ...adapters.format import read
from ...adapters.peft_adapters import read_peft
from ...configs.errors import AfterTrainingError
from ..adapter_file import AdapterFile
from ..engine import Engine
from ..layers import Layers
from ..mixing import adapter_title, attach
from ..verify import TOLERANCE, probe, probe_prompt

HELP = "prove that a file does in its base what it says"
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
    (attached,) = attach(engine, [AdapterFile(file)])
    loaded = {
        key: weights
        for part in sorted({part for part, _ in wanted.modules})
        for key, weights in read_peft(part, engine.parts[part], adapter_title(0)).items()
    }
    base = base_weights(engine.parts)
    again = AdapterArtifact(loaded, embeddings=attached.embeddings)
    words = {
        part: dict(zip(attached.embeddings[part], own.values(), strict=True)) for part, own in wanted.embeddings.items()
    }
    difference, _ = largest_difference(AdapterArtifact(wanted.modules, embeddings=words), again, base)
    largest = max([weights.delta(base(key)).abs().max().item() for key, weights in wanted.modules.items()], default=1.0)
    prediction = probe(engine.family, engine.parts, prompt=probe_prompt(attached))
    effect = ((prediction - alone).abs().max() / alone.abs().max()).item()
    print(f"{file}: {len(loaded)} modules and {sum(map(len, wanted.embeddings.values()))} words in {options.base}")
    print(f"  largest error of a change      {difference / largest:.1e} of {largest:.3g}")
    if wanted.modules and not wanted.embeddings:
        merged = Engine.load(options.base, device=options.device, merged=[str(file)])
        by_hand = probe(merged.family, merged.parts)
        apart = ((prediction - by_hand).abs().max() / by_hand.abs().max()).item()
        print(f"  prediction beside a merged one {apart:.1e}")
        difference = max(difference / largest, apart)
    print(
        f"  effect on a prediction         {effect:.1e}"
        + ("  (none: the adapter changes nothing)" if effect == 0 else "")
    )
    if not difference <= TOLERANCE["fp32"]:
        raise AfterTrainingError(f"{file}: does not verify, see above")
    return 0
