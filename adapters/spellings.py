"""How files in the wild spell a module of the base and the tensors of an adapter in it: one table for all readers.

Collected from the readers of diffusers (its old attention processors too), PEFT, sd-scripts, LyCORIS and ComfyUI
(comfy/lora.py and comfy/weight_adapter). A name is a module's spelling and an ending, both from these tables; whatever
does not come apart so is no tensor that we know.
"""

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from ..configs.choices import did_you_mean
from ..configs.errors import UserError
from .artifact import Key

_DOWN = ("lora_A", "lora.down", "lora_linear_layer.down", "lora_down", "lora_A.default")
_UP = ("lora_B", "lora.up", "lora_linear_layer.up", "lora_up", "lora_B.default")
_SIDES = [f"w{number}_{side}" for number in "12" for side in "ab"]
_SAME = [*(f"hada_{name}" for name in (*_SIDES, "t1", "t2")), *(f"lokr_{name}" for name in (*_SIDES, "w1", "w2", "t2"))]

ENDINGS: dict[str, str] = {
    **{f".{name}.weight": "down" for name in _DOWN},
    **{f".{name}.weight": "up" for name in _UP},
    ".lora_A": "down",
    ".lora_B": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    **dict.fromkeys((f".lora_magnitude_vector{rest}" for rest in ("", ".weight", ".default.weight")), "magnitude"),
    ".magnitude": "magnitude",
    **{f".{name}": name for name in _SAME},
}
"""End of a tensor's name -> its name in `Weights`, or "alpha", "mid" (the core of a Tucker decomposition), or
"dora_scale" (lengths of outputs or of inputs)."""

UNDERSCORED = ("lora_unet_", "lora_te", "lora_transformer_", "lycoris_")
"""Beginnings of kohya's names."""

OTHERS = {
    ".oft_blocks": "OFT of LyCORIS",
    ".oft_diag": "OFT of LyCORIS",
    **{f".{side}{number}.weight": "GLoRA" for side in "ab" for number in "12"},
    ".on_input": "(IA)^3",
    ".diff": "whole weights (`full` of LyCORIS)",
    ".diff_b": "biases",
    ".w_norm": "norms",
    ".b_norm": "norms",
    ".reshape_weight": "a reshaped base",
    ".lokr_t1": "LoKr with a core in its first factor",
    ".oft_R.weight": "OFT of other tools",
    ".oft_R": "OFT of PEFT",
    ".boft_R": "BOFT",
    ".boft_s": "BOFT",
    ".rescale": "OFT of LyCORIS",
    ".scalar": "a scalar of LyCORIS that was not multiplied in",
    ".scale_weight": "weights of 8 bits with a scale beside them",
    ".vera_lambda_b": "VeRA",
    ".vera_lambda_d": "VeRA",
    ".ia3_l": "(IA)^3",
    ".lora_B.bias": "a LoRA with a bias of its own",
    ".lora_embedding_A": "a LoRA of an embedding",
    ".lora_embedding_B": "a LoRA of an embedding",
    ".set_weight": "whole weights",
}
"""What other tools train as well and no reader here knows."""

WORDS = "bundle_emb."
"""Beginning of the words that OneTrainer puts beside a LoRA: `bundle_emb.<word>.clip_l`."""
_CONTROL = ("lora_controlnet", "input_hint_block.")
"""Of a control-LoRA, a ControlNet as the LoRA of a UNet."""


def is_of_an_adapter(name: str) -> bool:
    """Whether a tensor's name is as those of adapters and models are, read here or not."""
    return name.endswith((*ENDINGS, *OTHERS, ".weight", ".bias")) or name.startswith((*_CONTROL, *UNDERSCORED))


def what_else(names: Collection[str]) -> str | None:
    """What a file is that holds no adapter that is read here, if it is known."""
    if any(name.startswith(_CONTROL) for name in names):
        return "is a control-LoRA, which is not read here: give the ControlNet itself, as --control"
    for name in names:
        if what := next((what for ending, what in OTHERS.items() if name.endswith(ending)), None):
            return f"holds {what} ({name}), which is not read here"
    return None


_SELF = re.compile(r"(?P<block>.*\.attn\d)\.(?P<layer>to_q|to_k|to_v|to_out)(\.0)?")
_CLIP_SELF = re.compile(r"(?P<block>.*\.self_attn)\.(?P<layer>q|k|v|out)_proj")


@dataclass(frozen=True)
class Spellings:
    """Every spelling of the modules of one base."""

    modules: Mapping[str, Key]

    @cached_property
    def _endings(self) -> list[str]:
        return sorted(ENDINGS, key=len, reverse=True)

    def parse(self, name: str) -> tuple[Key, str] | None:
        """A tensor's module, and its name in `Weights`; None for a name that no tensor of this base has."""
        for ending in self._endings:
            if name.endswith(ending) and (key := self.modules.get(name.removesuffix(ending))) is not None:
                return key, ENDINGS[ending]
        return None

    def explain(self, name: str) -> str:
        """Why a name could not be parsed, with the nearest that could."""
        for ending, what in OTHERS.items():
            if name.endswith(ending):
                return f"{name} belongs to {what}, which is not read here"
        ending = next((ending for ending in self._endings if name.endswith(ending)), None)
        if ending is None:
            start = next(
                (module for module in sorted(self.modules, key=len, reverse=True) if name.startswith(module)), ""
            )
            nearest = did_you_mean(name.removeprefix(start), ENDINGS)
            return f"{name} does not end as the tensors of an adapter do{nearest}"
        module = name.removesuffix(ending)
        alike = [other for other in self.modules if other[:5] == module[:5]]  # thousands of long names are compared
        return f"{name} is of no module of this base{did_you_mean(module, alike)}"


def spellings(
    modules: Mapping[str, Collection[str]],
    kohya_prefixes: Mapping[str, str],
    original: Mapping[str, str],
    denoiser: str,
    clips: Mapping[str, Collection[str]] | None = None,
) -> Spellings:
    """Those of a base with these modules (component -> canonical paths).

    `original` are the names of the denoiser's modules in the original code, `clips` what other tools call a text
    encoder, such as `clip_l`. UserError where one spelling is of two modules, which no known base has.
    """
    found: dict[str, Key] = {}
    texts = [component for component in modules if component != denoiser]
    for component, paths in modules.items():
        for path in paths:
            several = itertools.chain(
                _of_module(component, path, kohya_prefixes.get(component), denoiser, original.get(path)),
                _of_text(path, (clips or {}).get(component, ()), alone=texts == [component]),
            )
            for spelling in several:
                other = found.setdefault(spelling, (component, path))
                if other != (component, path):
                    raise UserError(f"{spelling} may be {' '.join(other)} or {component} {path} of this base")
    return Spellings(found)


def _of_module(component: str, path: str, prefix: str | None, denoiser: str, original: str | None) -> Iterator[str]:
    plain = path.removeprefix("text_model.")
    dotted = {path, plain, *_old(path)}
    yield from (f"{component}.{each}" for each in dotted)
    yield from (f"{component}.base_model.model.{each}" for each in (path, plain))
    if component == denoiser:
        yield from dotted
        yield from (f"base_model.model.{path}", f"lycoris_{underscored(path)}")
        if original is not None:
            yield from (f"{start}{original}" for start in ("diffusion_model.", "model.diffusion_model.", "unet.", ""))
            yield f"{prefix or 'lora_unet'}_{underscored(original)}"
    if prefix is not None:
        others = ("lora_te", "lora_te1") if prefix in ("lora_te", "lora_te1") else (prefix,)
        yield from (f"{each}_{underscored(one)}" for each in others for one in (path, plain))


def _of_text(path: str, names: Collection[str], *, alone: bool) -> Iterator[str]:
    """Of ComfyUI and OneTrainer (`clip_l.`, `text_encoders.clip_l.transformer.`), and of PEFT without a component."""
    plain = path.removeprefix("text_model.")
    for name in names:
        for start in (
            f"{name}.",
            f"{name}.transformer.",
            f"text_encoders.{name}.",
            f"text_encoders.{name}.transformer.",
        ):
            yield from (f"{start}{each}" for each in {path, plain})
        yield from (f"lora_{name}_{underscored(each)}" for each in {path, plain})
    if alone:
        yield from (f"base_model.model.{each}" for each in {path, plain})


def _old(path: str) -> Iterable[str]:
    """Names of diffusers before it used PEFT: an attention's processor had the LoRA."""
    if found := _SELF.fullmatch(path):
        return [f"{found['block']}.processor.{found['layer']}"]
    if found := _CLIP_SELF.fullmatch(path):
        return [f"{found['block']}.to_{found['layer']}"]
    return []


def underscored(path: str) -> str:
    """As kohya spells a path."""
    return path.replace(".", "_")
