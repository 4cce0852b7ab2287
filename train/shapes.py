"""What run.json, config.yaml and the record in a file look like, as far as others rely on it. No schema, no torch."""

from ..configs.shapes import NUMBER, Shape, file_name

_RULES = {"trigger": str, "class_token": str, "template": str}
_SOURCES = [{"path": str, "dataset": str, "shards": str, "prior": str, "name": str, "caption": str, "captions": _RULES}]
_PART = {"learning_rate": NUMBER, "weight_decay": NUMBER, "stop_after": int}
CONFIG: Shape = {
    "model": {"base": str, "family": str, "revision": str, "dtype": str, "adapters": [str], "clip_skip": int},
    "data": {"resolution": (int, [int]), "sources": _SOURCES, "captions": _RULES, "token_windows": int, "cache": {}},
    "adapter": {
        "method": str,
        "rank": int,
        "alpha": NUMBER,
        "parts": {"*!": (str, [str])},
        "start_from": str,
        "tokens": [{"token!": str, "init": str, "vectors": int}],
        "rank_pattern": {"*!": int},
        "options": {},
    },
    "noise": {"zero_terminal_snr": bool},
    "optimizer": {"name": str, "learning_rate": NUMBER, "schedule": str, "parts": {"*!": _PART}, "options": {}},
    "loop": {"steps": int, "batch_size": int, "micro_batch": int, "precision": str, "seed": int, "threads": int},
    "validation": {
        "prompts": [(str, {"prompt!": str, "negative_prompt": str})],
        "num_images": int,
        "steps": int,
        "guidance": NUMBER,
        "seed": int,
        "sources": _SOURCES,
    },
    "trackers": [str],
    "output": {"dir": str, "name": str, "push_to": str, "metadata": str, "formats": [str], "dtype": str},
}
"""Of config.yaml."""
RUN_FILE: Shape = {
    **dict.fromkeys(("state", "message", "started", "family", "weights", "ended"), str),
    **dict.fromkeys(("step", "steps", "processes", "exit_code", "threads", "trainable_parameters"), int),
    "seconds_of": {"*!": NUMBER},
    "versions": {"*": str},
    "modules": {"*!": int},
    "train_seconds": NUMBER,
    "verify": {"*": (str, {"*": (str, bool, *NUMBER)})},
    "files": [file_name],
    "adapter": [(str, *NUMBER)],
    "best": {"step!": int, "held_out!": NUMBER},
}
"""Of run.json."""
SAMPLES: Shape = [{"file!": str, "prompt": str, "seed": int}]
"""Of samples.json."""
FINGERPRINTS: Shape = [{"name!": str, "images!": int, "sha256!": str}]
"""Of the sources of a run."""
STATE: Shape = {
    "step!": int,
    "seconds!": NUMBER,
    "skipped!": int,
    "best": [NUMBER],
    "data!": {"sources!": FINGERPRINTS, "micro_batch": int, "base": {"*": str}},
}
"""Of run_state.json in a checkpoint."""
_SECTIONS = {f"{name}!": CONFIG[name] for name in ("model", "loop", "output")}
RECORD: Shape = {
    "config!": {**CONFIG, **_SECTIONS, "data!": {**CONFIG["data"], "sources!": _SOURCES}},
    "base!": {"hub": str, "revision": str, "weights!": {"*": str}, "start_from": str},
    "data!": {"sources!": FINGERPRINTS, "micro_batch": int},
    "versions!": {"*": str},
    "seed!": int,
}
"""Of a record in the header of a file."""
