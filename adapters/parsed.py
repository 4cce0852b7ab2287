"""From the tensors of a file, however they are spelled, to an artifact; half a module, and what is unknown, is said."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..configs.errors import UserError
from .artifact import MAGNITUDES, AdapterArtifact, Key, Tensors, Weights, listed
from .format import FormatNames, carried
from .spellings import WORDS
from .stored import Header

Scale = Callable[[Key, int | None], float]
"""What a module of some rank is multiplied with where the file has no alpha for it. Two whole factors tell no rank."""


_METHODS = {"loha": "hada_", "lokr": "lokr_"}
_TOGETHER = {
    "lora": [{"down", "up"}],
    "loha": [{"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, {"hada_t1", "hada_t2"}],
    "lokr": [{"lokr_w1_a", "lokr_w1_b"}, {"lokr_w2_a", "lokr_w2_b"}],
}
"""Tensors that a module has all of, or none."""
_LARGEST_KERNEL = 7
"""Of a convolution: a core multiplies what is in the file by the pixels of its kernel, and by no more."""


def artifact_of(tensors: Tensors, header: Header, names: FormatNames, scale_of: Scale) -> AdapterArtifact:
    """The artifact in a file's tensors, however they are spelled (`adapters.spellings`).

    Raises UserError for a name that is none of this base's (with the nearest that is) and for half a module.
    """
    words, layers = bundled(tensors)
    modules = {key: _weights(key, parts, scale_of) for key, parts in _by_module(layers, names).items()}
    return AdapterArtifact(modules, carried(header), words_of(words, names) if words else {})


def bundled(tensors: Tensors) -> tuple[dict[str, Tensors], Tensors]:
    """Word -> its vectors by encoder, of those that OneTrainer bundles with a LoRA; and all other tensors."""
    words: dict[str, Tensors] = {}
    for name in tensors:
        if name.startswith(WORDS):
            word, _, key = name.removeprefix(WORDS).rpartition(".")
            if not word:
                raise UserError(f"{name}: is not called as bundled words are, {WORDS}<word>.<text encoder>")
            words.setdefault(word, {})[key] = tensors[name]
    return words, {name: tensor for name, tensor in tensors.items() if not name.startswith(WORDS)}


def words_of(words: Mapping[str, Mapping[str, Tensor]], names: FormatNames) -> dict[str, dict[str, Tensor]]:
    """Text encoder -> word -> (vectors, width), of the tensors of each word. UserError for another base's encoders."""
    parts = {key: part for part, key in names.embedding_keys.items()}
    if len(parts) == 1:  # some tools call it as the first of several
        parts |= dict.fromkeys(("emb_params", "clip_l"), *parts.values())
    found: dict[str, dict[str, Tensor]] = {part: {} for part in names.embedding_keys}
    for word, tensors in words.items():
        if {parts.get(key) for key in tensors} != found.keys() or len(tensors) != len(found):
            has, wanted = ", ".join(sorted(tensors)), ", ".join(sorted(names.embedding_keys.values()))
            raise UserError(f"holds words for other text encoders ({has}), this base has {wanted}")
        for key, tensor in tensors.items():
            found[parts[key]][word] = _rows(key, tensor)
    return found


def _rows(name: str, tensor: Tensor) -> Tensor:
    """(vectors, width) in float32, of one vector too."""
    rows = tensor[None] if tensor.ndim == 1 else tensor
    if rows.ndim != 2 or not rows.numel() or not rows.is_floating_point():
        what = f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
        raise UserError(f"{name} is {what}; the vectors of a word are (vectors, width) numbers")
    return computable(rows).float()


def file_rank(tensors: Mapping[str, Tensor]) -> int:
    """The r of alpha / r, as readers find it in the shapes."""
    for name in ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
        if name in tensors:
            return tensors[name].shape[0]
    return 1


def _weights(key: Key, parts: Tensors, scale_of: Scale) -> Weights:
    """The method is told by the names of the tensors."""
    found = {name: computable(tensor) for name, tensor in parts.items() if name != "alpha"}
    method = next(
        (method for method, start in _METHODS.items() if any(name.startswith(start) for name in found)), "lora"
    )
    for group in _TOGETHER[method]:
        if group & found.keys() and not group <= found.keys():
            missing = ", ".join(sorted(group - found.keys()))
            raise UserError(f"{missing} is missing from {listed([key])}")
    found = _with_magnitude(key, _shaped(method, found))
    if method == "lora" and "down" not in found:
        raise UserError(f"down or up is missing from {listed([key])}")
    if method != "lora" and found.keys() & {*MAGNITUDES}:
        raise UserError(f"{listed([key])} is a DoRA of {method}, which is not read here")
    if empty := [name for name, tensor in found.items() if not tensor.numel() or not tensor.ndim]:
        raise UserError(f"{empty[0]} of {listed([key])} is empty")
    if odd := [name for name, tensor in found.items() if not tensor.is_floating_point()]:
        raise UserError(f"{odd[0]} of {listed([key])} is {found[odd[0]].dtype}, which is not read here")
    scale = _scale(key, parts, scale_of)
    return Weights(method, _without_core(key, found), scale)


def _shaped(method: str, tensors: Tensors) -> Tensors:
    """Factors of convolutions as `Weights` has them: OneTrainer keeps those of LoHa as kernels, LyCORIS' DyLoRA has
    no kernel in `up`."""
    if method == "loha" and not tensors.keys() & {"hada_t1", "hada_t2"}:
        return {n: t.flatten(1) if n.startswith("hada_") and t.ndim == 4 else t for n, t in tensors.items()}
    down, up = tensors.get("down"), tensors.get("up")
    if method == "lora" and "mid" not in tensors and down is not None and up is not None:
        if (down.ndim, up.ndim) == (4, 2):
            return tensors | {"up": up[:, :, None, None]}
        if (down.ndim, up.ndim) == (2, 4) and up.shape[2:].numel() == 1:
            return tensors | {"down": down[:, :, None, None]}
    return tensors


def computable(tensor: Tensor) -> Tensor:
    """Numbers of 8 bits, which torch only stores, as float32."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def _scale(key: Key, parts: Tensors, scale_of: Scale) -> float:
    """LyCORIS pays no regard to the alpha of a LoKr whose factors are both whole; PEFT, whose files have none, does."""
    whole = "lokr_w1" in parts and "lokr_w2" in parts
    if "alpha" not in parts:
        return scale_of(key, None if whole else file_rank(parts))
    if parts["alpha"].numel() != 1:
        raise UserError(f"alpha of {' '.join(key)} has {parts['alpha'].numel()} values instead of one")
    return 1.0 if whole else float(parts["alpha"]) / file_rank(parts)


def _without_core(key: Key, tensors: Tensors) -> Tensors:
    """A convolution as up (o, r), core (r, s, k, k) and down (s, i) is one as up and core x down."""
    if "mid" not in tensors:
        return tensors
    mid, rank = tensors["mid"], tensors["down"].shape[0]
    small = mid.ndim == 4 and max(mid.shape[2:]) <= _LARGEST_KERNEL
    if not small or mid.shape[:2] != (rank, rank) or tensors["up"].shape[1:].numel() != rank:
        raise UserError(f"the core of {listed([key])} has shape {tuple(mid.shape)}, at rank {rank}")
    down = torch.einsum("rskl,si->rikl", tensors["mid"].double(), tensors["down"].double().flatten(1)).float()
    up = tensors["up"].reshape(*tensors["up"].shape[:2], 1, 1)
    return {name: tensor for name, tensor in tensors.items() if name != "mid"} | {"down": down, "up": up}


def _with_magnitude(key: Key, tensors: Tensors) -> Tensors:
    """The lengths of a DoRA told apart: of the outputs, or of the inputs (`wd_on_out=False` of LyCORIS, OneTrainer's
    default). LyCORIS' `dora_scale` is (out, 1[, 1, 1]) or (1, in[, 1, 1]), PEFT's vectors are of outputs in any shape.

    UserError for numbers that are neither.
    """
    spelled = tensors.keys() & {"dora_scale", "magnitude"}
    if not spelled:
        return tensors
    if len(spelled) > 1:
        raise UserError(f"{listed([key])} has its magnitude twice, under two names")
    (name,) = spelled
    rest, magnitude = {each: tensor for each, tensor in tensors.items() if each != name}, tensors[name]
    if not {"down", "up"} <= tensors.keys():
        return rest | {"magnitude": magnitude}  # what is missing is said elsewhere
    count, outputs, inputs = magnitude.numel(), tensors["up"].shape[0], tensors["down"].shape[1]
    along = max(magnitude.shape, default=0) == count  # all its numbers along one side
    of_rows = along and count == outputs and magnitude.shape[0] == count
    of_columns = along and magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] == count
    if of_rows or (of_columns and count == outputs and (name == "magnitude" or count != inputs)):
        return rest | {"magnitude": magnitude}
    if of_columns and count == inputs and name == "dora_scale":
        return rest | {"input_magnitude": magnitude}
    raise UserError(
        f"the magnitude of {listed([key])} is {tuple(magnitude.shape)}: neither one number for each of its {outputs} "
        f"outputs nor one for each of its {inputs} inputs"
    )


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
