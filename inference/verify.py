"""Proof that an adapter file holds what was trained: it is loaded into a fresh base and compared."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.artifact import AdapterArtifact, base_weights, largest_difference
from ..adapters.peft_adapters import read_peft
from ..configs.errors import AfterTrainingError, UserError
from ..configs.schema import ModelSection
from ..models.encode import PROBE_PROMPT, Encode, encoder_of
from ..models.family import ONE_WINDOW, ModelFamily, Parts, PromptOptions
from ..models.noise.process import Noised
from .adapter_file import AdapterFile
from .engine import Engine
from .mixing import adapter_title, attach

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-3}  # relative to the largest number compared


@dataclass(frozen=True, slots=True)
class Verification:
    """What the comparison found; differences are relative to the largest number compared."""

    modules: int
    delta_difference: float
    prediction_difference: float
    tolerance: float


def verify_file(
    file: Path,
    artifact: AdapterArtifact,
    model: ModelSection,
    trained_prediction: Tensor,
    *,
    dtypes: Collection[str] = ("fp32",),
    device: str = "cpu",
    prompts: PromptOptions = ONE_WINDOW,
) -> Verification:
    """Compares every delta-W and one prediction of the file, as the engine loads it, with what was trained.

    `dtypes` are all types that take part (of the file, the base, the forward pass): the coarsest decides how much
    rounding is allowed. `prompts` are the options of the trained prediction. AfterTrainingError if a module is missing
    or a difference is more than that.
    """
    try:
        engine = Engine.load(
            model.base, revision=model.revision, dtype=model.dtype, device=device, merged=model.adapters
        )
        (attached,) = attach(engine, [AdapterFile(file)])
        base = base_weights(engine.parts)
        loaded = {
            key: weights
            for part in sorted({part for part, _ in artifact.modules})
            for key, weights in read_peft(part, engine.parts[part], adapter_title(0)).items()
        }
        again = AdapterArtifact(loaded, embeddings=attached.embeddings)
        difference, _ = largest_difference(artifact, again, base)
    except UserError as error:
        raise AfterTrainingError([f"{file}: does not verify: {problem}" for problem in error.problems]) from error
    deltas = [weights.delta(base(key)).abs().max().item() for key, weights in artifact.modules.items()]
    words = [rows.abs().max().item() for own in artifact.embeddings.values() for rows in own.values()]
    largest = max([*deltas, *words])
    encode = encoder_of(engine.family, engine.parts, prompts)
    prediction = probe(engine.family, engine.parts, encode, probe_prompt(artifact))
    verification = Verification(
        modules=len(loaded),
        delta_difference=difference / max(largest, 1e-12),
        prediction_difference=((prediction - trained_prediction).abs().max() / trained_prediction.abs().max()).item(),
        tolerance=max(TOLERANCE[dtype] for dtype in dtypes),
    )
    worst = max(verification.delta_difference, verification.prediction_difference)
    if not worst <= verification.tolerance:
        raise AfterTrainingError(f"{file}: does not verify, it differs from what was trained: {verification}")
    return verification


def probe_prompt(artifact: AdapterArtifact) -> str:
    """One with all of its new words."""
    words = dict.fromkeys(token for own in artifact.embeddings.values() for token in own)
    return " ".join([PROBE_PROMPT, *words])


@torch.no_grad()
def probe(family: ModelFamily, parts: Parts, encode: Encode | None = None, prompt: str = PROBE_PROMPT) -> Tensor:
    """One prediction, (1, C, h, w) in fp32, for a fixed prompt, noise and timestep; dropout is off.

    `encode` gives the prompt's embeddings where the text encoders are not loaded.
    """
    carriers = [parts[name] for name in (family.denoiser, *family.text_encoders) if name in parts]
    modes = [module.training for module in carriers]
    for module in carriers:
        module.eval()
    denoiser = parts[family.denoiser]
    shape = (1, *family.native_latents(parts))
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(denoiser.device, denoiser.dtype)
    timesteps = torch.tensor([500], device=denoiser.device)
    one = torch.ones(1, device=denoiser.device)
    noised = Noised(latents, timesteps, target=latents, weight=one, snr=one)
    conditioning = (encode or encoder_of(family, parts))([prompt])
    prediction = family.predict(parts, noised, conditioning, torch.full((1, 6), 64.0, device=denoiser.device))
    for module, training in zip(carriers, modes, strict=True):
        module.train(training)
    return prediction.float().cpu()
