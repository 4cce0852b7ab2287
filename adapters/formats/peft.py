"""PEFT's own: a folder with `adapter_config.json` and `adapter_model.safetensors` in a folder for each component.

`PeftModel.from_pretrained(pipeline.unet, "x.peft/unet")` reads one. Scales are folded into the weights, so that the
config says alpha = r; it has only settings that older versions of PEFT know too. Modules are called as in the libraries
that are installed here: transformers 5.6 took `text_model.` out of CLIPTextModel, and an older one wants it back.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ...configs.errors import UserError
from ..artifact import DORA_IN_TEXT, AdapterArtifact, Key, Tensors, Weights, listed
from ..format import FormatNames, header_of
from ..parsed import artifact_of, file_rank
from ..stored import Folder, Header
from .diffusers import peft_scale

SUFFIX = ".peft"
FOLDS = True
FOLDER = True
HOLDS = frozenset({"lora", "dora", DORA_IN_TEXT, "loha", "lokr"})

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."
_LORA = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


def matches(keys: Iterable[str]) -> bool:
    return any(key.endswith(f"/{CONFIG}") or key == CONFIG for key in keys)


def to_folder(artifact: AdapterArtifact, names: FormatNames) -> Folder:
    """Path -> JSON, or tensors with their header."""
    contents: Folder = {}
    for component in sorted({component for component, _ in artifact.modules}):
        own = {path: weights for (part, path), weights in artifact.modules.items() if part == component}
        called = {path: names.library_path(component, path) for path in own}
        methods = {weights.kind for weights in own.values()}
        if len(methods) > 1:
            raise UserError(f"PEFT has one method for all of {component}, and here are {' and '.join(sorted(methods))}")
        config = _config(component, {called[path]: weights for path, weights in own.items()})
        contents[f"{component}/{CONFIG}"] = config
        tensors = {
            f"{_PREFIX}{called[path]}.{_LORA.get(kind, kind)}": _shaped(kind, tensor, weights)
            for path, weights in own.items()
            for kind, tensor in weights.tensors.items()
        }
        contents[f"{component}/{WEIGHTS}"] = tensors, header_of(artifact, names)
    return contents


def from_folder(contents: Folder, names: FormatNames) -> AdapterArtifact:
    """A folder of folders, or one component alone, which is the denoiser unless its modules say something else."""
    tensors: Tensors = {}
    configs: dict[str, Mapping[str, Any]] = {}
    header: Header = {}
    for path, content in contents.items():
        component = path.rpartition("/")[0]
        if path.endswith(CONFIG):
            assert isinstance(content, dict)
            configs[component] = content
        elif isinstance(content, tuple):
            tensors |= {f"{component}.{name}".removeprefix("."): tensor for name, tensor in content[0].items()}
            header = header or content[1]

    def scale_of(key: Key, rank: int | None) -> float:
        return peft_scale(configs.get(key[0], configs.get("", {})), key[1], rank)

    return artifact_of(tensors, header, names, scale_of)


def _shaped(kind: str, tensor: Any, weights: Weights) -> Any:
    """A convolution's magnitude as PEFT has it."""
    return tensor.reshape(1, -1, 1, 1) if kind == "magnitude" and weights.tensors["down"].ndim == 4 else tensor


def _config(component: str, weights: Mapping[str, Weights]) -> dict[str, Any]:
    """Of the component's modules by their names."""
    method = next(iter(weights.values())).method
    special = {"lora": _of_lora, "loha": _of_loha, "lokr": _of_lokr}[method](component, weights)
    ranks = special.pop("ranks")
    rank = max(ranks.values(), key=list(ranks.values()).count)
    alpha = "lora_alpha" if method == "lora" else "alpha"
    odd = {f"^{re.escape(name)}": own for name, own in ranks.items() if own != rank}
    return {
        "peft_type": method.upper(),
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        alpha: rank,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "target_modules": sorted(weights),
        **special,
    }


def _of_lora(component: str, weights: Mapping[str, Weights]) -> dict[str, Any]:
    dora = any("magnitude" in each.tensors for each in weights.values())
    ranks = {name: each.rank for name, each in weights.items()}
    return {"ranks": ranks, "use_dora": dora, "use_rslora": False, "bias": "none"}


def _of_loha(component: str, weights: Mapping[str, Weights]) -> dict[str, Any]:
    cores = _cores(component, weights, "hada_t1", "hada_w1_b")
    return {"ranks": {name: file_rank(each.tensors) for name, each in weights.items()}, "use_effective_conv2d": cores}


def _of_lokr(component: str, weights: Mapping[str, Weights]) -> dict[str, Any]:
    """PEFT computes the shapes of the factors from a rank and one number, which have to be found."""
    from peft.tuners.lokr.layer import factorization

    sides = {name: (_sides(each.tensors, 1), _sides(each.tensors, 2)) for name, each in weights.items()}
    both = any("lokr_w1_a" in each.tensors for each in weights.values())
    for factor in (-1, *range(2, 1 + max(min(one[0] * two[0], one[1] * two[1]) for one, two in sides.values()))):
        if all(
            factorization(one[0] * two[0], factor) == (one[0], two[0])
            and any(factorization(one[1] * n, factor) == (one[1], n) for n in _inputs(two[1]))
            for one, two in sides.values()
        ):
            break
    else:
        raise UserError(f"PEFT makes no LoKr whose factors have the sizes of {component} here; write kohya or loraloom")
    ranks = {name: _rank_of_lokr(name, weights[name].tensors, *sides[name], both) for name in weights}
    cores = _cores(component, weights, "lokr_t2", "lokr_w2_a")
    return {"ranks": ranks, "decompose_both": both, "decompose_factor": factor, "use_effective_conv2d": cores}


def _sides(tensors: Tensors, number: int) -> tuple[int, int]:
    """Outputs and inputs of a factor."""
    start = f"lokr_w{number}"
    if start in tensors:
        return tensors[start].shape[0], tensors[start].shape[1]
    a, b = tensors[f"{start}_a"], tensors[f"{start}_b"]
    if number == 2 and "lokr_t2" in tensors:
        return a.shape[1], b.shape[1]
    return a.shape[0], b.shape[1]


def _inputs(columns: int) -> list[int]:
    """Of a second factor, which may be flattened over a kernel of three pixels each way."""
    return [columns, *[columns // 9] * (columns % 9 == 0)]


def _rank_of_lokr(name: str, tensors: Tensors, one: tuple[int, int], two: tuple[int, int], both: bool) -> int:
    """One with which PEFT takes apart the same factors; UserError if there is none."""
    apart = [number for number in (1, 2) if f"lokr_w{number}" not in tensors]
    whole = -(-max(*one, *two) // 2)
    rank = file_rank(tensors) if 2 in apart else tensors["lokr_w1_b"].shape[0] if apart else whole
    expected = ([1] if both and rank < max(one) / 2 else []) + ([2] if rank < max(two) / 2 else [])
    if expected != apart:
        raise UserError(f"PEFT makes no LoKr of rank {rank} that is taken apart as {name} is; write kohya or loraloom")
    return rank


def _cores(component: str, weights: Mapping[str, Weights], core: str, factor: str) -> bool:
    """Whether convolutions have cores; PEFT has them in all, or in none."""
    convolutions = {name: each.tensors for name, each in weights.items() if factor in each.tensors}
    having = [name for name, tensors in convolutions.items() if core in tensors]
    if having and (lacking := [name for name in convolutions if name not in having and _is_kernel(weights[name])]):
        raise UserError(f"some convolutions of {component} have a core, {listed([(component, lacking[0])])} has none")
    return bool(having)


def _is_kernel(weights: Weights) -> bool:
    """Whether its change is known to be that of a convolution of more than one pixel."""
    return any(tensor.ndim == 4 and tensor.shape[2:].numel() > 1 for tensor in weights.tensors.values())
