"""Where a base model is on disk: the embedded one, a folder, or a snapshot of a hub repository. Imports no torch."""

import hashlib
import re
from pathlib import Path
from typing import Any

from ..configs.arguments import file_and_weight
from ..configs.bounded import open_regular
from ..configs.choices import find, names
from ..configs.errors import UserError
from ..configs.paths import looked_in
from ..configs.schema import ModelSection
from . import pocket
from .part_files import CONFIGS, read_config, read_index
from .single_file import is_single_file, problems_of_file, unpacked

EMBEDDED = {"pocket": pocket.FOLDER}
INDEX = "model_index.json"
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*(?<!\.git)(?<![.-])", re.ASCII)
LONGEST_ID = 96  # characters, as the hub counts them


def check_base(base: str) -> list[str]:
    """Problems of a base that can be seen without network and without loading it."""
    if is_single_file(base):
        return problems_of_file(base)
    if (EMBEDDED.get(base, Path(base)) / INDEX).is_file():
        return []
    if base in EMBEDDED:
        return [f"base {base!r}: its weights are missing from this installation ({EMBEDDED[base]})"]
    if Path(base).is_dir():
        return [f"base {base!r}: the folder holds no {INDEX}, so it is no diffusers pipeline"]
    if not _is_hub_id(base):
        commit = "; the commit of a hub id is given apart, as its revision" if "@" in base else ""
        return [
            f"base {base!r}: there is no such folder{looked_in(base)}; give {', '.join(EMBEDDED)}, a pipeline folder, "
            f"a .safetensors checkpoint, or a hub id (OWNER/NAME){commit}"
        ]
    return []


def locate_base(base: str, revision: str | None = None) -> Path:
    """The pipeline folder of a base; a hub id is downloaded once (safetensors and configs only)."""
    if problems := check_base(base):
        raise UserError(problems)
    if base in EMBEDDED:
        return EMBEDDED[base]
    if is_single_file(base):
        return unpacked(Path(base))
    return Path(base) if Path(base).is_dir() else _download(base, revision)


def find_base(base: str, revision: str | None = None) -> Path | None:
    """The pipeline folder of a base if it is on this machine; None for a hub id that is still to be downloaded."""
    if problems := check_base(base):
        raise UserError(problems)
    if _is_here(base):
        return locate_base(base)
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(base, INDEX, revision=revision)
    return Path(index).parent if isinstance(index, str) else None


def pin_revision(base: str, revision: str | None) -> str | None:
    """The commit hash of a hub id, whose snapshot folder is named after it; other bases have none."""
    return revision if _is_here(base) else locate_base(base, revision).name


def hub_id(base: str, revision: str | None) -> str | None:
    """The hub repository of a base in the config of a run, where a hub id has its commit; None for what lies here."""
    return base if revision and base not in EMBEDDED and _is_hub_id(base) and not Path(base).is_dir() else None


def merged_key(model: ModelSection) -> tuple[tuple[str, float], ...]:
    """What the adapters in the base are: the hash of each file, and its weight."""
    named = [file_and_weight(text) for text in model.adapters]
    return tuple((_sha256(file), weight) for file, weight in named)


def _sha256(file: str) -> str:
    with open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class PipelineFiles:
    """What a pipeline folder says of itself: its index, and the configs of its parts."""

    def __init__(self, folder: Path):
        self.folder, self.index = folder, read_index(folder / INDEX)

    @property
    def kind(self) -> str:
        """Name of the pipeline class in diffusers."""
        return str(self.index.get("_class_name"))

    def has(self, part: str) -> bool:
        """Whether the pipeline has this part; an index says [null, null] for one that it does without.

        Beside parts it has settings of the pipeline, such as `"force_zeros_for_empty_prompt": true`.
        """
        named = self.index.get(part)
        return isinstance(named, list) and bool(named and named[0])

    def config(self, part: str) -> dict[str, Any]:
        """The config of a part; {} where there is none."""
        for name in CONFIGS:
            if (self.folder / part / name).exists():
                return read_config(self.folder / part / name, part)
        return {}


def detect_family(folder: Path) -> str:
    """The name of the family whose pipeline the folder holds."""
    files = PipelineFiles(folder)
    for name in names("models.families"):
        if find("models.families", name).FAMILY.detect(files):
            return name
    kinds = ", ".join(names("models.families"))
    raise UserError(f"{folder}: a {files.kind} belongs to no family that is supported yet ({kinds})")


def _is_here(base: str) -> bool:
    return base in EMBEDDED or Path(base).is_dir() or is_single_file(base)


def _is_hub_id(base: str) -> bool:
    return bool(_HUB_ID.fullmatch(base)) and not any(odd in base for odd in ("--", "..")) and len(base) <= LONGEST_ID


def _download(base: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted, unwanted = ["*.json", "*.txt", "*.model", "*/*.safetensors"], ["safety_checker/*", "*.fp16.*", "*non_ema*"]
    try:
        return Path(snapshot_download(base, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"base {base!r}: no such folder here, and the hub did not give it: {reason}") from error
