"""The record of a run in the header of its files, from which `loraloom reproduce` makes the run again. No torch.

Every text of the config is private unless PUBLIC has its place, so that a setting that is added later stays untold
until somebody decides. `sha256:` and 16 hex characters stand for a private text: who has the text can check it, and
who guesses it can check the guess.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configs.arguments import file_and_weight
from ..configs.bounded import open_regular, parse_json
from ..configs.errors import UserError
from ..configs.shapes import misfit
from ..models.base import EMBEDDED, hub_id
from ..models.single_file import read_header
from .run_folder import installed
from .shapes import RECORD

if TYPE_CHECKING:
    from ..configs.schema import RunConfig
    from .run import Run

PREFIX = "loraloom."
ENTRIES = ("config", "base", "data", "versions", "seed")

PUBLIC = (
    *("model.family", "model.revision", "model.dtype"),
    *("adapter.method", "adapter.parts.*", "adapter.options.*"),
    *("noise.*", "loss.*", "optimizer.*", "loop.*", "guard.*", "trackers.*"),
    *("data.crop", "data.animated", "data.long_captions", "data.on_bad_image", "data.cache.*"),
    *(f"*.sources.*.{key}" for key in ("target", "mask", "empty_captions", "split", "revision")),
    "*.captions.lines",
    *("*.sources.*.image_column", "*.sources.*.caption_column", "*.separator"),
    *("output.name", "output.formats.*", "output.dtype", "output.weights", "output.metadata"),
)
"""Places of texts that say how it was trained, and not on what or where; `*` stands for anything."""
WORDS = ("*.caption", "*.captions.*", "*.prior", "adapter.tokens.*", "validation.prompts.*")
"""Places of texts that `output.metadata: full` tells."""
ORDERED = ("adapter.parts", "adapter.rank_pattern", "adapter.alpha_pattern")
"""Mappings whose order decides something: which pattern is the first, and in which order gradients are summed."""
LEFT_OUT = (("output", "dir"), ("output", "push_to"), ("data", "cache", "dir"))
"""Where things go decides nothing: the same run in another folder has the same record."""
HASH = re.compile(r"sha256:[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Record:
    """What a header holds of a run."""

    config: dict[str, Any]
    base: dict[str, Any]  # "weights": part -> hash; "hub" and "revision"; "start_from": SHA-256 of that file
    data: dict[str, Any]  # as `Dataset.fingerprint`, the names of sources hashed
    versions: dict[str, str]
    seed: int


def record_entries(run: "Run") -> dict[str, str]:
    """The header entries, the same for the same run."""
    config = run.config
    sources = [source | {"name": hashed(source["name"])} for source in run.data["sources"]]
    record = {
        "config": hidden(config),
        "base": _base(config, run.data),
        "data": {"sources": sources, "micro_batch": run.data["micro_batch"]},
        "versions": installed(),
        "seed": config.loop.seed,
    }
    return {f"{PREFIX}{name}": json.dumps(value, separators=(",", ":")) for name, value in in_order(record).items()}


def read_record(file: Path) -> Record:
    """The record in an adapter file, or in a folder of PEFT's; only headers are read.

    UserError if there is none, or one that is damaged.
    """
    header = _header(file)
    lacking = [name for name in ENTRIES if f"{PREFIX}{name}" not in header]
    if len(lacking) == len(ENTRIES):
        raise UserError(f"{file}: its header has no record of a run: it was not made by a loraloom that writes one")
    if lacking:
        raise UserError(f"{file}: the record in its header is damaged (it lacks {', '.join(lacking)})")
    try:
        values = {name: parse_json(header[f"{PREFIX}{name}"], name) for name in ENTRIES}
    except UserError as error:
        raise UserError(f"{file}: the record in its header is damaged ({error})") from error
    found = misfit(values, RECORD)
    if not found and len(values["config"]["data"]["sources"]) != len(values["data"]["sources"]):
        found = "it has another number of sources in its config"
    if found:
        raise UserError(f"{file}: the record in its header is damaged ({found})")
    return Record(**values)


def hashed(text: str) -> str:
    """What stands for a private text."""
    return f"sha256:{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def is_hashed(value: Any) -> bool:
    """Whether a value stands for a private text."""
    return isinstance(value, str) and HASH.fullmatch(value) is not None


def hidden(config: "RunConfig") -> dict[str, Any]:
    """The values of a config, private texts hashed; adapters that are merged into the base keep their weights."""
    values = config.model_dump(mode="json", exclude_none=True)
    for *sections, key in LEFT_OUT:
        section = values
        for name in sections:
            section = section[name]
        section.pop(key, None)
    told = (*PUBLIC, *WORDS) if config.output.metadata == "full" else PUBLIC

    def hide(place: str, text: str) -> str:
        if not text or any(fnmatchcase(place, pattern) for pattern in told):
            return text
        if place == "model.base" and (text in EMBEDDED or hub_id(text, config.model.revision)):
            return text
        if place.startswith("model.adapters."):
            file, weight = file_and_weight(text)
            return f"{hashed(file)}:{weight}"
        return hashed(text)

    return changed_texts(values, hide)


def in_order(values: Any, place: str = "") -> Any:
    """The same values with mappings in the order of their keys, so that equal runs have equal records; but ORDERED."""
    if isinstance(values, list):
        return [in_order(value, place) for value in values]
    if not isinstance(values, dict):
        return values
    keys = list(values) if place.removeprefix("config.") in ORDERED else sorted(values)
    return {key: in_order(values[key], f"{place}.{key}".lstrip(".")) for key in keys}


def changed_texts(values: Any, change: Callable[[str, str], Any], place: str = "") -> Any:
    """The same values with what `change` makes of each text and its place, such as `data.sources.0.path`."""
    if isinstance(values, dict):
        return {key: changed_texts(value, change, f"{place}.{key}".lstrip(".")) for key, value in values.items()}
    if isinstance(values, list):
        return [changed_texts(value, change, f"{place}.{number}") for number, value in enumerate(values)]
    return change(place, values) if isinstance(values, str) else values


def texts_of(values: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Each text with its place."""
    if isinstance(values, dict | list):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from texts_of(value, f"{place}.{key}".lstrip("."))
    elif isinstance(values, str):
        yield place, values


def file_hash(file: str | None) -> str | None:
    """SHA-256 of a file; None where there is none (any more)."""
    try:
        if file is None:
            return None
        with open_regular(file) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except (OSError, UserError):
        return None


def _base(config: "RunConfig", data: Mapping[str, Any]) -> dict[str, Any]:
    hub = hub_id(config.model.base, config.model.revision)
    found = {
        "hub": hub,
        "revision": hub and config.model.revision,
        "weights": dict(data["base"]),
        "start_from": data.get("start_from"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _header(file: Path) -> Mapping[str, str]:
    """Of a file, or of the first file with a record in a folder and those within."""
    files = sorted([*file.glob("*.safetensors"), *file.glob("*/*.safetensors")]) if file.is_dir() else [file]
    try:
        headers = [read_header(each)[1] for each in files]
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return next((header for header in headers if f"{PREFIX}config" in header), {})
