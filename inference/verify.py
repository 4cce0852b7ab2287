"""Proof that an adapter file holds what was trained: it is loaded into a fresh base and compared."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..adapters import algebra
from ..adapters.artifact import AdapterArtifact, Base, base_weights, listed
from ..adapters.peft_adapters import own_weights, read_peft, tuner_layers, without_adapters
from ..configs.errors import AfterTrainingError, UserError
from ..configs.schema import ModelSection
from ..models.encode import PROBE_PROMPT, Encode, encoder_of
from ..models.family import ONE_WINDOW, ModelFamily, Parts, PromptOptions
from ..models.noise.process import Noised
from .engine import Engine
from .mixing import Mixing, adapter_title

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-3}
"""Of a change relative to its norm (see `furthest`), of a prediction relative to its largest number."""

SLACK = 30.0
"""How many times the rounding of an adapter's own numbers two ways to one prediction may be apart."""

MOST_LATENTS = 8
"""Height and width of what the denoiser is asked for."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What the comparison found; differences are relative, as TOLERANCE says."""

    modules: int
    delta_difference: float
    prediction_difference: float
    tolerance: float


@dataclass(frozen=True, slots=True)
class Fresh:
    """A base that knows nothing of an adapter, for one file to be verified on."""

    mixing: Mixing
    encode: Encode

    @classmethod
    def load(cls, model: ModelSection, device: str = "cpu", prompts: PromptOptions = ONE_WINDOW) -> "Fresh":
        """From its files. `prompts` are the options of the trained prediction. AfterTrainingError if it cannot be."""
        options = {"revision": model.revision, "dtype": model.dtype, "device": device, "merged": model.adapters}
        try:
            engine = Engine.load(model.base, **options)
        except UserError as error:
            problems = [f"the base cannot be loaded again, to verify: {problem}" for problem in error.problems]
            raise AfterTrainingError(problems) from error
        return cls(engine.adapters, encoder_of(engine.family, engine.parts, prompts))

    @classmethod
    def beside(cls, family: ModelFamily, parts: Parts, encode: Encode, prompts: PromptOptions = ONE_WINDOW) -> "Fresh":
        """On the weights of a base in memory that carries the adapter; nothing is loaded, and no words can be.

        `encode` is for a base without its text encoders.
        """
        twins = {name: without_adapters(part) if isinstance(part, nn.Module) else part for name, part in parts.items()}
        if all(part in twins for part in family.prompt_encoders):
            encode = encoder_of(family, twins, prompts)
        return cls(Mixing(family, twins, twins.__setitem__), encode)


def verify_file(
    file: Path,
    artifact: AdapterArtifact,
    fresh: Fresh,
    trained_prediction: Tensor,
    dtypes: Collection[str] = ("fp32",),
    written: str | None = None,
) -> Verification:
    """Compares every delta-W and one prediction of the file, as it was read, with what was trained.

    `dtypes` are all types that take part (of the file, of the base): the coarsest decides how much rounding is allowed
    in the prediction; in the changes it is that of the file, `written`, where it is given. AfterTrainingError if a
    module is missing or a difference is more than that.
    """
    mixing = fresh.mixing
    mixing.exact = True  # a base of half precision would round the adapter as well, and its layers enlarge that
    try:
        again = attached(mixing, file, artifact)
        relative, worst = furthest(artifact, again, base_weights(mixing.parts))
    except UserError as error:
        raise AfterTrainingError([f"{file}: does not verify: {problem}" for problem in error.problems]) from error
    if not relative <= max(TOLERANCE[dtype] for dtype in ([written] if written else dtypes)):
        raise AfterTrainingError(f"{file}: does not verify: {worst} is off by {relative:.2g} of its norm")
    prompt = probe_prompt(artifact)
    prediction = probe(mixing.family, mixing.parts, fresh.encode, prompt)

    def allowance() -> float:
        return SLACK * rounding(mixing, fresh.encode, prompt, prediction)

    return _judged(file, len(again.modules), relative, (prediction, trained_prediction), dtypes, allowance)


@torch.no_grad()
def rounding(mixing: Mixing, encode: Encode | None, prompt: str, prediction: Tensor) -> float:
    """How far a prediction moves, relative to its largest number, when the last bits of the adapter's numbers change.

    A change that is large beside the base enlarges them, and attention may turn them into any size: such a prediction
    is no proof of anything, and each module by itself is. The adapter attached is of no use afterwards.
    """
    generator = torch.Generator().manual_seed(0)
    for model in mixing.models().values():
        for _, layer in tuner_layers(model):
            for weight in own_weights(layer, adapter_title(0)):
                noise = torch.randn(weight.shape, generator=generator).to(weight)
                weight.data *= 1 + torch.finfo(torch.float32).eps * noise
    return apart(probe(mixing.family, mixing.parts, encode, prompt), prediction)


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest number of the second."""
    return ((one - other).abs().max() / other.abs().max()).item()


def attached(mixing: Mixing, file: Path, artifact: AdapterArtifact) -> AdapterArtifact:
    """Attaches a file, which should hold this artifact, and answers with what the layers hold then."""
    found = mixing.load_adapter(file, adapter_title(0))
    modules = {
        key: weights
        for part in sorted({part for part, _ in artifact.modules})
        for key, weights in read_peft(part, mixing.parts[part], adapter_title(0)).items()
    }
    return AdapterArtifact(modules, embeddings=found.embeddings)


def furthest(one: AdapterArtifact, other: AdapterArtifact, base: Base | None = None) -> tuple[float, str]:
    """The largest distance of a module's change, or of a word, relative to its norm; and whose it is.

    A norm counts as a thousandth of the largest at least: below that, half precision has no numbers left to compare.
    That of DoRA and OFT, whose change is a small difference of large weights, as a hundredth of the weight's.
    UserError where the two change other modules, or have other words.
    """
    if odd := one.modules.keys() ^ other.modules.keys():
        raise UserError(f"{len(odd)} modules are missing from one of the two: {listed(sorted(odd))}")
    distances = algebra.distances(one, other, base)
    floor = 1e-3 * max([each.norms[0] for each in distances.values()], default=0.0)
    found = {(0.0, "")}
    for key, each in distances.items():
        weight = base(key).norm().item() if base and one.modules[key].depends_on_base else 0.0
        apart = each.apart / max(each.norms[0], floor, 1e-2 * weight, 1e-12)
        found.add((math.inf if math.isnan(apart) else apart, " ".join(key)))
    for part in one.embeddings.keys() | other.embeddings.keys():
        mine, theirs = one.embeddings.get(part, {}), other.embeddings.get(part, {})
        if odd := mine.keys() ^ theirs.keys():
            raise UserError(f"the word {min(odd)!r} of {part} is missing from one of the two")
        for word, rows in mine.items():
            apart = ((theirs[word] - rows).norm() / rows.norm().clamp(min=1e-12)).item()
            found.add((math.inf if math.isnan(apart) else apart, f"{part} {word}"))
    return max(found)


def verify_pipeline(
    folder: Path,
    states: Mapping[str, Mapping[str, Tensor]],
    trained_prediction: Tensor,
    *,
    dtypes: Collection[str] = ("fp32",),
    device: str = "cpu",
    prompts: PromptOptions = ONE_WINDOW,
) -> Verification:
    """Compares every trained tensor and one prediction of a pipeline folder with what was trained, as `verify_file`."""
    try:
        engine = Engine.load(str(folder), dtype="fp32", device=device)
        difference = max(_difference(engine.parts[part], state) for part, state in states.items())
    except UserError as error:
        raise AfterTrainingError([f"{folder}: does not verify: {problem}" for problem in error.problems]) from error
    modules = {(part, name.rpartition(".")[0]) for part, state in states.items() for name in state}
    prediction = probe(engine.family, engine.parts, encoder_of(engine.family, engine.parts, prompts))
    return _judged(folder, len(modules), difference, (prediction, trained_prediction), dtypes)


def _difference(model: nn.Module, state: Mapping[str, Tensor]) -> float:
    """The largest one of a tensor, relative to its own largest number."""
    found = {name: model.get_parameter(name).detach() for name in state}
    pairs = [(found[name].float().cpu(), wanted.float().cpu()) for name, wanted in state.items()]
    return max(((one - other).abs().max() / other.abs().max().clamp(min=1e-12)).item() for one, other in pairs)


def _judged(
    path: Path,
    modules: int,
    difference: float,
    predictions: tuple[Tensor, Tensor],
    dtypes: Collection[str],
    allowance: Callable[[], float] = lambda: 0.0,
) -> Verification:
    """With the prediction beside that of training; AfterTrainingError where they are too far apart.

    `allowance` is what else a prediction may be off by, asked only where that matters.
    """
    tolerance, off = max(TOLERANCE[dtype] for dtype in dtypes), apart(*predictions)
    verification = Verification(modules, difference, off, tolerance)
    if difference <= tolerance < off <= allowance():
        return verification
    if not max(difference, off) <= tolerance:
        raise AfterTrainingError(f"{path}: does not verify, it differs from what was trained: {verification}")
    return verification


def probe_prompt(artifact: AdapterArtifact) -> str:
    """One with all of its new words."""
    words = dict.fromkeys(token for own in artifact.embeddings.values() for token in own)
    return " ".join([PROBE_PROMPT, *words])


@contextmanager
def whole_products() -> Iterator[None]:
    """Within, fp32 is multiplied as fp32: GPUs since Ampere round what convolutions take to TF32 unless they are told.

    Two sound files whose numbers differ in the last bit would differ by 6e-4 in a prediction.
    """
    cudnn, cuda = cast(Any, torch.backends.cudnn), cast(Any, torch.backends.cuda)
    switches, whole = [(cudnn, "allow_tf32"), (cuda.matmul, "allow_tf32")], cast(Any, False)
    if hasattr(cudnn, "conv"):  # since torch 2.9; the older switches refuse where these were used
        switches, whole = [(cudnn.conv, "fp32_precision"), (cuda.matmul, "fp32_precision")], "ieee"
    before = [getattr(owner, name) for owner, name in switches]
    try:
        for owner, name in switches:
            setattr(owner, name, whole)
        yield
    finally:
        for (owner, name), value in zip(switches, before, strict=True):
            setattr(owner, name, value)


@torch.no_grad()
@whole_products()
def probe(family: ModelFamily, parts: Parts, encode: Encode | None = None, prompt: str = PROBE_PROMPT) -> Tensor:
    """One prediction, (1, C, h, w) in fp32, for a fixed prompt, noise and timestep; dropout is off, and so is TF32.

    Few latents are enough to see every weight, and those of a whole picture would take seconds on a CPU. `encode`
    gives the prompt's embeddings where the text encoders are not loaded.
    """
    carriers = [parts[name] for name in (family.denoiser, *family.text_encoders) if name in parts]
    modes = [module.training for module in carriers]
    for module in carriers:
        module.eval()
    denoiser = parts[family.denoiser]
    channels, *sides = family.native_latents(parts)
    shape = (1, channels, *(min(side, MOST_LATENTS) for side in sides))
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(denoiser.device, denoiser.dtype)
    timesteps = torch.tensor([500], device=denoiser.device)
    one = torch.ones(1, device=denoiser.device)
    noised = Noised(latents, timesteps, target=latents, weight=one, snr=one)
    conditioning = (encode or encoder_of(family, parts))([prompt])
    prediction = family.predict(parts, noised, conditioning, torch.full((1, 6), 64.0, device=denoiser.device))
    for module, training in zip(carriers, modes, strict=True):
        module.train(training)
    return prediction.float().cpu()
