"""loraloom adapter verify: a file loaded into its base as for sampling, beside the same change made by hand."""

import argparse
from pathlib import Path

from ...adapters.artifact import AdapterArtifact, base_weights
from ...adapters.format import read
from ...configs.errors import AfterTrainingError
from ...configs.words import counted
from ...models.device import chosen_device, device_words
from ..adapter_input import base_of
from ..engine import Engine
from ..layers import Layers
from ..verify import SLACK, TOLERANCE, apart, attached, furthest, probe, probe_prompt, rounding


def run(options: argparse.Namespace) -> int:
    file = Path(options.file)
    base, revision = (options.base, None) if options.base else base_of(file)
    wanted = read(file, Layers(base, revision).names)
    device = chosen_device(options.device)
    engine = Engine.load(base, revision=revision, dtype="fp32", device=device)
    alone = probe(engine.family, engine.parts)
    again = attached(engine.adapters, file, wanted)
    named = {part: [*own] for part, own in again.embeddings.items()}  # a file may leave its word's name out
    words = {part: dict(zip(named[part], own.values(), strict=True)) for part, own in wanted.embeddings.items()}
    difference, worst = furthest(AdapterArtifact(wanted.modules, embeddings=words), again, base_weights(engine.parts))
    prediction = probe(engine.family, engine.parts, prompt=probe_prompt(again))
    moved = apart(prediction, alone)
    held = [counted(len(again.modules), "module"), counted(sum(map(len, words.values())), "word")]
    print(f"{file}: {' and '.join(held)} in {base}, {device_words(device, 'fp32')}")
    print(f"  largest error of a change      {difference:.1e} of its norm{f' ({worst})' if difference else ''}")
    if wanted.modules and not words:
        merged = Engine.load(base, revision=revision, dtype="fp32", device=device, merged=[str(file)])
        by_hand = probe(merged.family, merged.parts)
        off = apart(prediction, by_hand)
        print(f"  prediction beside a merged one {off:.1e}")
        if off > TOLERANCE["fp32"]:
            last_bits = rounding(engine.adapters, None, probe_prompt(again), prediction)
            print(f"  what its last bits move it by  {last_bits:.1e}, as the change is large")
            off = 0.0 if off <= SLACK * last_bits else off
        difference = max(difference, off)
    print(f"  effect on a prediction         {moved:.1e}{'' if moved else ' (the adapter changes nothing)'}")
    if not difference <= TOLERANCE["fp32"]:
        raise AfterTrainingError(f"{file}: does not verify, see above")
    print("ok")
    return 0
