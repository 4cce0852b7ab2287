"""What the base of a run is: hashes of its weights and of the adapters that are merged into it. Imports no torch."""

from ..configs.machine import cache_folder
from ..configs.schema import RunConfig
from ..data.keys import weights_hash
from ..models.base import find_base, merged_key


def base_key(config: RunConfig) -> dict[str, str]:
    """Part -> hash, which says more than a path: what lies there may be trained further. A hub's commit says it all."""
    model, cache = config.model, cache_folder(config.data.cache.dir)
    merged = {f"adapter {number}": f"{digest}:{weight:g}" for number, (digest, weight) in enumerate(merged_key(model))}
    folder = find_base(model.base, model.revision)
    if folder is None:
        return {"hub": f"{model.base}@{model.revision}"} | merged
    parts = sorted(part for part in folder.iterdir() if any(part.glob("*.safetensors")))
    return {part.name: weights_hash(part, cache) for part in parts} | merged
