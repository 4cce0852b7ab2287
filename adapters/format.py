"""Adapter files: writing an artifact without ever harming the file that was there, and reading one of any format.

What the tensors of a file are called is the business of the modules in `formats/`; this one knows safetensors only.
"""

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, cast

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..configs.choices import find
from ..configs.choices import names as choices
from ..configs.errors import UserError
from ..configs.files import replace_file
from .artifact import AdapterArtifact, Key, Tensors, Weights, listed
from .origin import architecture_of, is_of
from .spellings import Spellings, spellings

Header = dict[str, str]
Scale = Callable[[Key, int], float]
"""What a module of some rank is multiplied with where the file has no alpha for it."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_METHODS = {"loha": "hada_", "lokr": "lokr_"}
_TOGETHER = {
    "lora": [{"down", "up"}],
    "loha": [{"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, {"hada_t1", "hada_t2"}],
    "lokr": [{"lokr_w1_a", "lokr_w1_b"}, {"lokr_w2_a", "lokr_w2_b"}],
}
"""Tensors that a module has all of, or none."""

_KOHYA_MINIMUM = ("v2", "base_model_version", "network_module", "network_dim", "network_alpha", "network_args")
_DERIVED = frozenset(
    [
        *("format", "lora_adapter_metadata", "loraloom.method", "loraloom.modules", "loraloom.token"),
        *("sshs_model_hash", "sshs_legacy_hash"),
        *("modelspec.sai_model_spec", "modelspec.architecture", "modelspec.implementation"),
        *(f"ss_{name}" for name in _KOHYA_MINIMUM),
    ]
)
"""Header entries that writers make from the weights: stale as soon as the weights are written in another way."""


@dataclass(frozen=True, slots=True)
class FormatNames:
    """What the formats need to know of a model family, as plain values."""

    module_paths: Mapping[str, Collection[str]]
    """Component -> canonical paths of the base's modules, with the shapes of their weights where a base is loaded
    (`artifact.base_modules`)."""
    kohya_prefixes: Mapping[str, str]
    """Component -> how its keys begin in a kohya file, such as `lora_unet`."""
    architecture: str
    """ModelSpec architecture of the base, such as `stable-diffusion-v1`."""
    kohya_version: str
    """kohya's `ss_base_model_version`, such as `sd_v1`."""
    embedding_keys: Mapping[str, str] = field(default_factory=dict)
    """Text encoder -> what web UIs call its vectors in the file of a word."""
    denoiser: str = "unet"
    """The component whose modules the original code calls otherwise."""
    original: Mapping[str, str] = field(default_factory=dict)
    """Path of a module of the denoiser -> its path in the original code (`models.layout.original_names`)."""
    kohya_original: bool = False
    """Whether kohya's files call the denoiser's modules as the original code does."""

    @property
    def sizes_known(self) -> bool:
        """Whether the shapes of the base's weights are at hand."""
        return all(isinstance(paths, Mapping) for paths in self.module_paths.values())

    def spellings(self) -> Spellings:
        """Every name of a module that some file may have."""
        return spellings(self.module_paths, self.kohya_prefixes, self.original, self.denoiser)


class Format(Protocol):
    """What each module in `formats/` has."""

    SUFFIX: str
    FOLDS: bool
    HOLDS: Collection[str]

    def matches(self, keys: Iterable[str]) -> bool: ...
    def to_tensors(self, artifact: AdapterArtifact, names: FormatNames) -> tuple[Tensors, Header]: ...
    def from_tensors(self, tensors: Tensors, header: Header, names: FormatNames) -> AdapterArtifact: ...


def file_name(name: str, format_name: str) -> str:
    """The file of an adapter in a format: `<name>.safetensors`, `<name>.kohya.safetensors`, ..."""
    return f"{name}{_format(format_name).SUFFIX}.safetensors"


def write(
    artifact: AdapterArtifact, file: str | Path, format_name: str, names: FormatNames, dtype: str = "fp32"
) -> None:
    """Writes the adapter; the same adapter always gives the same bytes, and a file is replaced whole or not at all.

    Raises UserError for weights that are not finite or too large for `dtype` (fp32, bf16, fp16), for modules that the
    base does not have, and for a folder that does not exist, and for an unknown format.
    """
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; there are: {', '.join(DTYPES)}")
    strangers = [key for key in artifact.modules if key[1] not in names.module_paths.get(key[0], ())]
    if strangers:
        raise UserError(f"the base has no such modules: {listed(strangers)}")
    form = _format(format_name)
    _check_holds(form, format_name, artifact)
    tensors, header = form.to_tensors((artifact.folded() if form.FOLDS else artifact).cast(DTYPES[dtype]), names)
    file = Path(file)
    if not file.parent.is_dir():
        raise UserError(f"cannot write {file}: there is no folder {file.parent}")
    replace_file(file, serialised(tensors, header))


def read(file: str | Path, names: FormatNames) -> AdapterArtifact:
    """The adapter in a file, in float32; the format is recognised from the tensor names.

    Raises UserError, with the file's name in every line, for anything that is not a sound adapter for this base.
    """
    try:
        tensors, header = _load(Path(file))
        form = _format(_detect(tensors))
        other = _of_another_base(tensors, header, names)
        try:
            artifact = _fitted(form.from_tensors(tensors, header, names), names)
        except UserError as error:
            raise other or error from None
        if other is not None and not names.sizes_known:
            raise other
        return artifact
    except UserError as error:
        raise UserError([f"{file}: {problem}" for problem in error.problems]) from None


def _of_another_base(tensors: Tensors, header: Header, names: FormatNames) -> UserError | None:
    """One line with both sides, where a file is for another architecture."""
    found = architecture_of({name: tuple(tensor.shape) for name, tensor in tensors.items()}, header)
    if found is None or is_of(found, names.architecture):
        return None
    return UserError(f"is an adapter for {found}, and this base is {names.architecture}")


def _fitted(artifact: AdapterArtifact, names: FormatNames) -> AdapterArtifact:
    """With 1 x 1 convolutions as linear layers where the base has such, and the other way round.

    UserError for layers of other sizes. Nothing is checked where those of the base are not known.
    """
    fitted, odd = dict(artifact.modules), []
    for (component, path), weights in artifact.modules.items():
        shapes = names.module_paths.get(component, ())
        wanted = shapes.get(path) if isinstance(shapes, Mapping) else None
        found = weights.shape
        if wanted is None or found is None or found == wanted:
            continue
        if found[:2] == wanted[:2] and {*found[2:], *wanted[2:]} == {1}:
            tensors = {
                n: weights.tensors[n].reshape(*weights.tensors[n].shape[:2], *wanted[2:]) for n in ("down", "up")
            }
            fitted[component, path] = replace(weights, tensors=weights.tensors | tensors)
        else:
            odd.append(((component, path), found, wanted))
    if odd:
        key, found, wanted = odd[0]
        raise UserError(
            f"{len(odd)} of its {len(artifact.modules)} modules have another size than in this base: "
            f"{listed([key])} is {found} in the file and {wanted} in the base"
        )
    return replace(artifact, modules=fitted)


def header_of(artifact: AdapterArtifact, names: FormatNames) -> Header:
    """The header entries of every format: ModelSpec 1.0.1, our method, and what the artifact carries along."""
    kind = "lora" if artifact.modules else "textual-inversion"
    return {
        "modelspec.title": "LoRA" if artifact.modules else "textual inversion",
        **carried(artifact.metadata),
        "format": "pt",
        "loraloom.method": artifact.method,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{names.architecture}/{kind}",
        "modelspec.implementation": "diffusers",
    }


def _check_holds(form: Format, name: str, artifact: AdapterArtifact) -> None:
    """UserError that names what a format cannot hold."""
    kinds = {weights.kind for weights in artifact.modules.values()} | ({"tokens"} if artifact.embeddings else set())
    if lacking := kinds - set(form.HOLDS):
        where = [key for key, weights in artifact.modules.items() if weights.kind in lacking]
        places = f" ({listed(where, 2)})" if where else ""
        raise UserError(
            f"the format {name} cannot hold {' and '.join(sorted(lacking))}{places}; "
            "`output.formats: [loraloom]` holds every method"
        )


def carried(header: Mapping[str, str]) -> Header:
    """The entries of a header that stay true when the adapter is written again."""
    return {name: value for name, value in header.items() if name not in _DERIVED}


def artifact_of(tensors: Tensors, header: Header, names: FormatNames, scale_of: Scale) -> AdapterArtifact:
    """The artifact in a file's tensors, however they are spelled (`adapters.spellings`).

    Raises UserError for a name that is none of this base's (with the nearest that is) and for half a module.
    """
    modules = _by_module(tensors, names)
    return AdapterArtifact({key: _weights(key, parts, scale_of) for key, parts in modules.items()}, carried(header))


def file_rank(tensors: Mapping[str, Tensor]) -> int:
    """The r of alpha / r, as readers find it in the shapes."""
    for name in ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
        if name in tensors:
            return tensors[name].shape[0]
    return 1


def _weights(key: Key, parts: Tensors, scale_of: Scale) -> Weights:
    """The method is told by the names of the tensors."""
    found = {name: tensor.float() for name, tensor in parts.items() if name != "alpha"}
    method = next(
        (method for method, start in _METHODS.items() if any(name.startswith(start) for name in found)), "lora"
    )
    for group in _TOGETHER[method]:
        if group & found.keys() and not group <= found.keys():
            missing = ", ".join(sorted(group - found.keys()))
            raise UserError(f"{missing} is missing from {listed([key])}")
    if method == "lora" and "down" not in found:
        raise UserError(f"down or up is missing from {listed([key])}")
    scale = _scale(key, parts, scale_of)
    return Weights(method, _checked(key, _without_core(found)), scale)


def _scale(key: Key, parts: Tensors, scale_of: Scale) -> float:
    """LyCORIS pays no regard to the alpha of a LoKr whose factors are both whole."""
    rank = file_rank(parts)
    if "lokr_w1" in parts and "lokr_w2" in parts:
        return 1.0
    if "alpha" not in parts:
        return scale_of(key, rank)
    if parts["alpha"].numel() != 1:
        raise UserError(f"alpha of {' '.join(key)} has {parts['alpha'].numel()} values instead of one")
    return float(parts["alpha"]) / rank


def _without_core(tensors: Tensors) -> Tensors:
    """A convolution as up (o, r), core (r, s, k, k) and down (s, i) is one as up and core x down."""
    if "mid" not in tensors:
        return tensors
    down = torch.einsum("rskl,si->rikl", tensors["mid"].double(), tensors["down"].double().flatten(1)).float()
    up = tensors["up"].reshape(*tensors["up"].shape[:2], 1, 1)
    return {name: tensor for name, tensor in tensors.items() if name != "mid"} | {"down": down, "up": up}


def _checked(key: Key, tensors: Tensors) -> Tensors:
    """UserError for a magnitude of the inputs, which another DoRA has (`wd_on_out=False` of LyCORIS)."""
    magnitude, up = tensors.get("magnitude"), tensors.get("up")
    if magnitude is not None and up is not None:
        outputs = up.shape[0]
        if magnitude.numel() != outputs or (magnitude.ndim > 1 and outputs not in magnitude.shape[:2]):
            raise UserError(f"the magnitude of {listed([key])} is not one number for each of its {outputs} outputs")
        if magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.ndim == up.ndim == 2:
            raise UserError(f"the magnitude of {listed([key])} is of its inputs (wd_on_out=False), not of its outputs")
    return tensors


def _by_module(tensors: Tensors, names: FormatNames) -> dict[Key, dict[str, Tensor]]:
    known, unknown = names.spellings(), []
    modules: dict[Key, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if (found := known.parse(name)) is None:
            unknown.append(name)
            continue
        key, part = found
        parts = modules.setdefault(key, {})
        if part in parts:
            raise UserError(f"{name}: this module is in the file twice, under two spellings")
        parts[part] = tensor
    if unknown:
        most = 3
        problems = [known.explain(name) for name in unknown[:most]]
        raise UserError(problems + [f"{len(unknown) - most} more keys are unknown"] * (len(unknown) > most))
    return modules


def serialised(tensors: Tensors, header: Mapping[str, str]) -> bytes:
    """A safetensors file. The library itself writes the header's entries in another order each time."""
    assert all(isinstance(value, str) for value in header.values()), "safetensors knows no other header values"
    plain = safetensors.torch.save(tensors)
    size = int.from_bytes(plain[:8], "little")
    entries = {"__metadata__": dict(sorted(header.items())), **json.loads(plain[8 : 8 + size])}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text + plain[8 + size :]


def _load(file: Path) -> tuple[Tensors, Header]:
    if not file.is_file():
        raise UserError("there is no such file")
    try:
        with safe_open(file, framework="pt") as content:
            return {name: content.get_tensor(name) for name in content.keys()}, content.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(
            f"not a whole safetensors file ({error}); pickles (.bin, .pt, .ckpt) are not read, they can run code"
        ) from None


def _detect(keys: Collection[str]) -> str:
    known = choices("adapters.formats")
    for name in known:
        if _format(name).matches(keys):
            return name
    found = f"its first key is {next(iter(keys))}" if keys else "it is empty"
    raise UserError(f"holds no LoRA in a known format ({', '.join(known)}): {found}")


def _format(name: str) -> Format:
    return cast(Format, find("adapters.formats", name))
