"""Adapter files: writing an artifact without ever harming the file that was there, and reading one of any format.

What the tensors of a file are called is the business of the modules in `formats/`; this one knows safetensors only.
"""

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from ..configs.choices import find
from ..configs.choices import names as choices
from ..configs.dtypes import DTYPES, torch_dtype
from ..configs.errors import UserError
from ..configs.ownership import enter_folder, write_folder, writing
from . import stored
from .artifact import MAGNITUDES, AdapterArtifact, Tensors, Weights, listed
from .origin import architecture_of, is_of
from .spellings import Spellings, spellings, what_else
from .stored import Folder, Header, Payload, load_file, load_folder, write_stream

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


_LENGTHS = (".dora_scale", ".lora_magnitude_vector", *(f":{name}" for name in MAGNITUDES))
"""Ends of names that formats give to DoRA's lengths."""


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

    word_widths: Mapping[str, int] = field(default_factory=dict)
    """Text encoder -> numbers in the vector of a word, where a base is loaded."""
    flat: Collection[str] = ()
    """Text encoders whose modules the libraries installed here call without `text_model.`."""

    def library_path(self, component: str, path: str) -> str:
        """What the libraries installed here call a module."""
        return path.removeprefix("text_model.") if component in self.flat else path

    @property
    def sizes_known(self) -> bool:
        """Whether the shapes of the base's weights are at hand."""
        return all(isinstance(paths, Mapping) for paths in self.module_paths.values())

    def spellings(self) -> Spellings:
        """Every name of a module that some file may have."""
        return spellings(self.module_paths, self.kohya_prefixes, self.original, self.denoiser, self.clips)

    @property
    def clips(self) -> Mapping[str, Collection[str]]:
        """What ComfyUI and OneTrainer call the text encoders; of one alone, by any family's name."""
        if len(self.embedding_keys) == 1:
            return dict.fromkeys(self.embedding_keys, ("clip_l", "clip_h"))
        return {part: (key,) for part, key in self.embedding_keys.items()}


class Format(Protocol):
    """What each module in `formats/` has."""

    SUFFIX: str
    FOLDS: bool
    HOLDS: Collection[str]

    def matches(self, keys: Iterable[str]) -> bool: ...


class FileFormat(Format, Protocol):
    """One whose adapters are a file each."""

    def to_tensors(self, artifact: AdapterArtifact, names: FormatNames) -> tuple[Tensors, Header]: ...
    def from_tensors(self, tensors: Tensors, header: Header, names: FormatNames) -> AdapterArtifact: ...


class FolderFormat(Format, Protocol):
    """One whose adapters are a folder each."""

    FOLDER: bool

    def to_folder(self, artifact: AdapterArtifact, names: FormatNames) -> Folder: ...
    def from_folder(self, contents: Folder, names: FormatNames) -> AdapterArtifact: ...


def file_name(name: str, format_name: str) -> str:
    """The file or folder of an adapter in a format: `<name>.safetensors`, `<name>.kohya.safetensors`, `<name>.peft`."""
    form = _format(format_name)
    return f"{name}{form.SUFFIX}{'' if _writes_folder(form) else '.safetensors'}"


def is_folder(format_name: str) -> bool:
    """Whether an adapter in a format is a folder. UserError for an unknown format."""
    return _writes_folder(_format(format_name))


def write(
    artifact: AdapterArtifact,
    file: str | Path,
    format_name: str,
    names: FormatNames,
    dtype: str = "fp32",
    owner: Path | None = None,
    by: str = "",
) -> None:
    """Writes the adapter; the same adapter always gives the same bytes, and a file is replaced whole or not at all.

    Only a file, or folder, that loraloom wrote is replaced; `owner` and `by` as for `ownership.writing`.

    Raises UserError for a foreign one, for weights that are not finite or too large for `dtype` (fp32, bf16, fp16), for
    modules that the base does not have, for a folder that does not exist, and for an unknown format.
    """
    file = Path(file)
    if not file.parent.is_dir():
        raise UserError(f"cannot write {file}: there is no folder {file.parent}")
    form, contents = _format(format_name), _contents(artifact, format_name, names, dtype)
    if _writes_folder(form):
        write_folder(file, {path: _writer(content, torch_dtype(dtype)) for path, content in contents.items()})
        if owner is not None:
            enter_folder(file, owner, by)
        return
    tensors, header = cast(tuple[Tensors, Header], contents[""])
    payload, seal = _payload(tensors, torch_dtype(dtype)), getattr(form, "seal", None)
    with writing(file, owner, by) as new:
        write_stream(new, payload.entries, payload.tensor, header if seal is None else seal(header, payload))


def check_writable(artifact: AdapterArtifact, format_name: str, names: FormatNames, dtype: str = "fp32") -> None:
    """UserError for what `write` would refuse; nothing is written."""
    _contents(artifact, format_name, names, dtype)


def _contents(artifact: AdapterArtifact, format_name: str, names: FormatNames, dtype: str) -> Folder:
    """What a format's folder holds; of a file, under no name, its tensors and header."""
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; there are: {', '.join(DTYPES)}")
    strangers = [key for key in artifact.modules if key[1] not in names.module_paths.get(key[0], ())]
    if strangers:
        raise UserError(f"the base has no such modules: {listed(strangers)}")
    form = _format(format_name)
    _check_holds(form, format_name, artifact)
    folded = artifact.folded() if form.FOLDS else artifact
    folded.check_fits(torch_dtype(dtype))
    if _writes_folder(form):
        return cast(FolderFormat, form).to_folder(folded, names)
    return {"": cast(FileFormat, form).to_tensors(folded, names)}


def _payload(tensors: Tensors, dtype: torch.dtype) -> Payload:
    """Lengths of DoRA stay in float32: rounded, they are off by more than they have moved."""
    return Payload(tensors, dtype, frozenset(name for name in tensors if name.endswith(_LENGTHS)))


def _writer(content: tuple[Tensors, Header] | dict[str, Any], dtype: torch.dtype) -> Callable[[Path], object]:
    """What writes a file of a folder."""
    if isinstance(content, dict):
        return lambda file: file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    tensors, header = content
    payload = _payload(tensors, dtype)
    return lambda file: write_stream(file, payload.entries, payload.tensor, header)


def read(file: str | Path, names: FormatNames, *, as_stored: bool = False) -> AdapterArtifact:
    """The adapter in a file, in float32; the format is recognised from the tensor names.

    `as_stored` leaves tensors in the file's own type and mapped memory, for those who only pass them on.

    Raises UserError, with the file's name in every line, for anything that is not a sound adapter for this base.
    """
    try:
        path = stored.file_in(Path(file))
        contents: Folder = load_folder(path) if path.is_dir() else {"": load_file(path)}
        tensors, header = _flattened(contents)
        other = _of_another_base(tensors, header, names)
        try:
            artifact = _fitted(_read(contents, names), names)
        except UserError as error:
            raise other or error from None
        if other is not None and not names.sizes_known:
            raise other
        return artifact if as_stored else artifact.cast(torch.float32)
    except UserError as error:
        raise UserError([f"{file}: {problem}" for problem in error.problems]) from None


def recognised(path: Path) -> str:
    """The format of a file or folder, from the names in it; UserError where it has none that is known."""
    path = stored.file_in(path)
    keys = [file.name for file in path.glob("**/*.json")] if path.is_dir() else stored.look(path)[0]
    return _detect(keys, folder=path.is_dir())


def _read(contents: Folder, names: FormatNames) -> AdapterArtifact:
    if "" not in contents:
        return cast(FolderFormat, _format(_detect(contents, folder=True))).from_folder(contents, names)
    tensors, header = _flattened(contents)
    return cast(FileFormat, _format(_detect(tensors, folder=False))).from_tensors(tensors, header, names)


def _flattened(contents: Folder) -> tuple[Tensors, Header]:
    """All tensors, and all entries of headers."""
    files = [content for content in contents.values() if isinstance(content, tuple)]
    tensors = {name: tensor for own, _ in files for name, tensor in own.items()}
    return tensors, {name: value for _, own in files for name, value in own.items()}


def _of_another_base(tensors: Tensors, header: Header, names: FormatNames) -> UserError | None:
    """One line with both sides, where a file is for another architecture."""
    found = architecture_of({name: tuple(tensor.shape) for name, tensor in tensors.items()}, header)
    if found is None or is_of(found, names.architecture):
        return None
    return UserError(f"is an adapter for {found}, and this base is {names.architecture}")


def _fitted(artifact: AdapterArtifact, names: FormatNames) -> AdapterArtifact:
    """With 1 x 1 convolutions as linear layers where the base has such, and the other way round.

    UserError for layers and words of other sizes. Nothing is checked where those of the base are not known.
    """
    check_widths(artifact, names.word_widths)
    fitted, odd = dict(artifact.modules), []
    for (component, path), weights in artifact.modules.items():
        shapes = names.module_paths.get(component, ())
        wanted = shapes.get(path) if isinstance(shapes, Mapping) else None
        found = weights.shape
        if wanted is None or found == wanted:
            continue
        if found is None:
            if not _is_of_size(weights, wanted):
                odd.append(((component, path), weights.size, wanted))
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
    return replace(artifact, modules=fitted) if fitted != artifact.modules else artifact


def check_widths(artifact: AdapterArtifact, widths: Mapping[str, int]) -> None:
    """UserError for words whose vectors are not as wide as those of the text encoders; others are not asked."""
    for part, words in artifact.embeddings.items():
        for word, rows in words.items():
            if rows.shape[1] != widths.get(part, rows.shape[1]):
                called = f"the word {word!r}" if word else "the word"
                raise UserError(f"{called} has vectors of {rows.shape[1]} numbers, this {part} has {widths[part]}")


def _is_of_size(weights: Weights, wanted: tuple[int, ...]) -> bool:
    """Whether the factors of another method than LoRA make a weight of this shape."""
    out, columns = weights.size or (0, 0)
    kernels = {tuple(tensor.shape[2:]) for tensor in weights.tensors.values() if tensor.ndim == 4}
    if out not in (None, wanted[0]) or columns != math.prod(wanted[1:]) or kernels - {wanted[2:] or (1, 1)}:
        return False
    flattened = [*(weights.tensors[name] for name in ("lokr_w2", "lokr_w2_b") if name in weights.tensors)]
    return bool(kernels) or all(tensor.shape[1] % math.prod(wanted[2:]) == 0 for tensor in flattened)


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


def _writes_folder(form: Format) -> bool:
    return getattr(form, "FOLDER", False)


def _detect(keys: Collection[str], folder: bool) -> str:
    known = choices("adapters.formats")
    for name in known:
        form = _format(name)
        if _writes_folder(form) == folder and form.matches(keys):
            return name
    if (what := what_else(keys)) is not None:
        raise UserError(what)
    found = f"its first key is {next(iter(keys))}" if keys else "it is empty"
    raise UserError(f"holds no LoRA in a known format ({', '.join(known)}): {found}")


def _format(name: str) -> Format:
    return cast(Format, find("adapters.formats", name))
