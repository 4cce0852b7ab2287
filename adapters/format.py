"""Adapter files: writing an artifact without ever harming the file that was there, and reading one of any format.

What the tensors of a file are called is the business of the modules in `formats/`; this one knows safetensors only.
"""

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..configs.choices import did_you_mean, find
from ..configs.choices import names as choices
from ..configs.errors import UserError
from ..configs.files import replace_file
from .artifact import AdapterArtifact, Key, Tensors, Weights, listed

Header = dict[str, str]
KeyTable = dict[str, tuple[Key, str]]
"""Tensor name in a file -> (module, name of the tensor in `Weights`, or "alpha")."""

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
    """Component -> canonical paths of the base's modules (`artifact.base_modules`)."""
    kohya_prefixes: Mapping[str, str]
    """Component -> how its keys begin in a kohya file, such as `lora_unet`."""
    architecture: str
    """ModelSpec architecture of the base, such as `stable-diffusion-v1`."""
    kohya_version: str
    """kohya's `ss_base_model_version`, such as `sd_v1`."""
    embedding_keys: Mapping[str, str] = field(default_factory=dict)
    """Text encoder -> what web UIs call its vectors in the file of a word."""


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
        return _format(_detect(tensors)).from_tensors(tensors, header, names)
    except UserError as error:
        raise UserError([f"{file}: {problem}" for problem in error.problems]) from None


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


def artifact_of(
    tensors: Tensors, header: Header, table: KeyTable, scale_of: Callable[[Key, Tensors], float]
) -> AdapterArtifact:
    """The artifact in a file's tensors: `table` says whose they are, `scale_of(module, its tensors)` its scale.

    Raises UserError for a key that is not in `table` (with the nearest that is) and for half a module.
    """
    modules = _by_module(tensors, table)
    weights = {key: _weights(key, parts, scale_of(key, parts)) for key, parts in modules.items()}
    return AdapterArtifact(weights, carried(header))


def _weights(key: Key, parts: Tensors, scale: float) -> Weights:
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
    return Weights(method, found, scale)


def _by_module(tensors: Tensors, table: KeyTable) -> dict[Key, dict[str, Tensor]]:
    unknown = [name for name in tensors if name not in table]
    if unknown:
        raise UserError(_unknown_keys(unknown, table))
    modules: dict[Key, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        key, part = table[name]
        parts = modules.setdefault(key, {})
        if part in parts:
            raise UserError(f"{name}: this module is in the file twice, under two spellings")
        parts[part] = tensor
    return modules


def _unknown_keys(unknown: list[str], table: KeyTable, most: int = 3) -> list[str]:
    problems = [f"{name} is no key of a plain LoRA for this base{_nearest(name, table)}" for name in unknown[:most]]
    return problems + ([f"{len(unknown) - most} more keys are unknown"] if len(unknown) > most else [])


def _nearest(name: str, table: KeyTable) -> str:
    """Looks among the keys with the same ending, if there are any: a table has thousands of long keys."""
    ending = name.rsplit(".", 2)[1:]
    return did_you_mean(name, [known for known in table if known.rsplit(".", 2)[1:] == ending] or table)


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
