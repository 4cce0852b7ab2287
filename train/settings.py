"""Which settings decide the weights that a run ends with: a checkpoint keeps them, and a resumed run has the same.

No torch.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configs.bounded import read_json
from ..configs.errors import UserError
from ..configs.problems import known_keys
from ..configs.processes import launched
from ..configs.schema import MOVED_OPTIONS
from .record import hashed, hidden, read_record
from .run_folder import STATE, checkpoints

if TYPE_CHECKING:
    from ..configs.schema import RunConfig

FREE_ON_RESUME = (
    *("checkpoint", "validation", "callbacks", "trackers", "output", "guard"),
    *("loop.steps", "loop.threads", "loop.micro_batch", "loop.gradient_checkpointing"),
    *("loop.fast", "loop.compile"),
    *("data.cache.dir", "data.cache.keep_vae", "data.workers"),
)
"""What a resumed run may change: the rest decides which weights it ends with."""
MOVABLE = re.compile(r"data\.sources\.\d+\.(path|dataset|shards)|model\.(base|revision)")
"""Where images and base lie may change too: what they are is compared by their hashes."""
FIRST_COUNTS = ("adapter.rank_pattern", "adapter.alpha_pattern")
"""Mappings whose order decides."""


def deciding(config: "RunConfig") -> dict[str, Any]:
    """Dotted key -> value of all that a resumed run may not change."""
    values = config.model_dump(mode="json")
    orders = {key: list(getattr(config.adapter, key.partition(".")[2])) for key in FIRST_COUNTS}
    return {key: value for key, value in {**flat(values), **orders}.items() if _decides(key)}


def changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each setting that is not what it was; what is newer than the checkpoint has to be its default."""
    return [
        f"{key} was {then.get(key)!r} in this run and cannot become {now.get(key)!r}"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key) and not (_is_order_of_others(key, then, now) or _is_newer(key, then, now))
    ]


def check_settings(folder: Path, saved: "RunConfig", config: "RunConfig") -> None:
    """UserError for what was changed since the newest checkpoint, in `config.yaml` (`saved`) or for this start."""
    then, now = saved_settings(folder), deciding(config)
    problems = changed(deciding(saved) if then is None else then, now)
    if then is None and checkpoints(folder):
        problems += _differing_from_results(folder, config)
    if problems:
        free = ", ".join((*FREE_ON_RESUME, "where base and images lie"))
        raise UserError(
            [*problems, f"a resumed run may change {free}; train anew with another output.dir for the rest"]
        )


def saved_settings(folder: Path) -> dict[str, Any] | None:
    """Those of the newest checkpoint that can be read; None if it is older than they are."""
    for checkpoint in reversed(checkpoints(folder)):
        try:
            found = read_json(checkpoint / STATE).get("settings")
        except UserError:
            continue
        return _moved(found) if isinstance(found, dict) else None
    return None


def _moved(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of an older checkpoint, by the keys that they have now."""
    kept = settings.get("loss.kind", "mse") != "mse"
    moved = {f"loss.{name}": f"loss.options.{name}" for name in MOVED_OPTIONS}
    return {moved.get(key, key): value for key, value in settings.items() if kept or key not in moved}


def flat(values: object, path: str = "") -> dict[str, Any]:
    """Dotted keys."""
    if isinstance(values, dict):
        pairs = values.items()
    elif isinstance(values, list):
        pairs = enumerate(values)
    else:
        return {path: values}
    return {key: value for k, below in pairs for key, value in flat(below, f"{path}.{k}" if path else str(k)).items()}


def _decides(key: str) -> bool:
    return not key.startswith(FREE_ON_RESUME) and MOVABLE.fullmatch(key) is None


def _is_order_of_others(key: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether it is the order of a mapping that has other entries now, of which there is a line each."""
    before, after = then.get(key) or [], now.get(key) or []
    is_order = key in FIRST_COUNTS and isinstance(before, list)  # of a damaged file it may be anything
    return is_order and sorted(map(str, before)) != sorted(map(str, after))


def _is_newer(key: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a setting came after the checkpoint, and stands at what was done before; or went since."""
    known = _known()
    path, section = re.sub(r"\.\d+(?=\.|$)", ".*", key), key.rpartition(".")[0]
    if key not in then:
        beside = any(other.startswith(f"{section}.") for other in then)
        return beside and path in known and known[path] == now[key]
    return key not in now and "." in path and section in known and path not in known


def _known() -> dict[str, Any]:
    """Every key of the schema and its default."""
    return {".".join(map(str, path)): field.get_default() for path, field in known_keys().items()}


def _differing_from_results(folder: Path, config: "RunConfig") -> Iterator[str]:
    """What the results of an older run say of its settings, where its checkpoints say nothing."""
    file, record = _record_of(folder)
    beside = f", as far as the record of {file.name} does not say otherwise" if file is not None else ""
    if launched()[0] == 0:
        print(f"{folder}: its checkpoints are older than their settings: config.yaml is taken as it is{beside}")
    if file is not None:
        then, now = flat(record), flat(hidden(config))
        for key in sorted(key for key in then | now if _decides(key) and not key.startswith("adapter.start_from")):
            before, after = then.get(key), now.get(key)
            if before != after and not _is_hash_of(before, after) and not _is_hash_of(after, before):
                yield f"{key} was {before!r} in this run and cannot become {after!r}"
        return
    words = _words_of_run(folder)
    for name in ("rank", "alpha"):
        before, after = [w for w in words if w.startswith(f"{name} ")], f"{name} {getattr(config.adapter, name):g}"
        if before and before != [after]:
            yield f"adapter.{name} was {before[0].split()[1]} in this run and cannot become {after.split()[1]}"


def _is_hash_of(one: Any, other: Any) -> bool:
    """Whether one stands for the other, a private text."""
    return isinstance(other, str) and one == hashed(other)


def _record_of(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """A file of the run that has a record of its config, and that config."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            return file, read_record(file).config
        except UserError:
            continue
    return None, {}


def _words_of_run(folder: Path) -> list[str]:
    try:
        words = read_json(folder / "run.json").get("adapter")
    except UserError:
        return []
    return [word for word in words if isinstance(word, str)] if isinstance(words, list) else []
