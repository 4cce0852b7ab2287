"""What the base of a run is: hashes of its weights and of the adapters that are merged into it. Imports no torch."""

import hashlib
import json
from pathlib import Path

from ..configs.bounded import parse_json
from ..configs.errors import UserError
from ..configs.machine import cache_folder
from ..configs.schema import RunConfig
from ..data.keys import weights_hash
from ..models.base import find_base, merged_key

UNUSED = ("safety_checker", "feature_extractor")
"""Folders of a base that training does not look at."""


def base_settings(config: RunConfig) -> str | None:
    """SHA-256 of what decides beside the weights: configs of scheduler and models, and the vocabulary.

    None for a base of the hub that is not here yet; its commit says it all.
    """
    folder = find_base(config.model.base, config.model.revision)
    if folder is None:
        return None
    found = hashlib.sha256()
    for file in sorted([*folder.glob("*/*.json"), *folder.glob("*/merges.txt")]):
        if file.parent.name not in UNUSED and not file.name.endswith(".index.json"):
            found.update(f"{file.relative_to(folder)}\n".encode() + _without_notes(file))
    return found.hexdigest()


def _without_notes(file: Path) -> bytes:
    """Its bytes; of a config without what libraries note there, such as their version."""
    content = file.read_bytes()
    if not file.name.endswith("config.json"):
        return content
    try:
        values = parse_json(content, str(file))
        return json.dumps({k: v for k, v in values.items() if k[:1] != "_"}, sort_keys=True).encode()
    except (UserError, AttributeError):  # whoever loads it says so
        return content


def base_key(config: RunConfig) -> dict[str, str]:
    """Part -> hash, which says more than a path: what lies there may be trained further. A hub's commit says it all."""
    model, cache = config.model, cache_folder(config.data.cache.dir)
    merged = {f"adapter {number}": f"{digest}:{weight:g}" for number, (digest, weight) in enumerate(merged_key(model))}
    folder = find_base(model.base, model.revision)
    if folder is None:
        return {"hub": f"{model.base}@{model.revision}"} | merged
    parts = sorted(part for part in folder.iterdir() if any(part.glob("*.safetensors")))
    return {part.name: weights_hash(part, cache) for part in parts} | merged
