"""What adapter files lose: every kind of adapter, written in every format, read again by us and by diffusers.

    python -m loraloom.benchmarks.formats

Models are tiny and random, with all blocks of Stable Diffusion 1.5 and SDXL. A cell has the largest error of a weight's
change after writing and reading, relative to the largest number in that change, and the largest error of what UNet and
text encoders say when a reader has loaded the file, both in float32.
"""

import copy
import functools
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging
from peft import PeftModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.utils import logging as transformers_logging

from ..adapters.artifact import AdapterArtifact, base_weights
from ..adapters.format import file_name, read, write
from ..adapters.peft_adapters import install
from ..adapters.targets import select
from ..configs.choices import find
from ..configs.errors import UserError
from ..configs.schema import AdapterSection
from ..inference.adapter_file import format_names
from ..models.family import Parts
from ..models.pocket.tokenizer import build_tokenizer
from ..models.single_file import shipped_configs

FORMATS = ("diffusers", "kohya", "peft")
FAMILIES = ("sd1", "sdxl")


@dataclass(frozen=True, slots=True)
class Variant:
    """A kind of adapter."""

    method: str = "lora"
    section: Mapping[str, Any] = field(default_factory=lambda: {"rank": 4, "alpha": 4})
    unet: Any = "attention"
    text: Any = "attention"  # None: the text encoders are left alone


PATTERNS = {"rank_pattern": {"to_q": 2, "q_proj": 8}, "alpha_pattern": {"to_v": 1, "k_proj": 16}}
VARIANTS = {
    "plain": Variant(),
    "alpha 8 at rank 4": Variant(section={"rank": 4, "alpha": 8}),
    "ranks and alphas by pattern": Variant(section={"rank": 4, "alpha": 6, **PATTERNS}),
    "rsLoRA": Variant(section={"rank": 4, "alpha": 6, "options": {"rslora": True}}),
    "conv, ff and proj": Variant(section={"rank": 4, "alpha": 2}, unet="attention+ff+conv", text="attention+ff"),
    "DoRA of the UNet": Variant(section={"rank": 4, "alpha": 8, "options": {"dora": True}}, text=None),
    "DoRA of all": Variant(section={"rank": 4, "alpha": 8, "options": {"dora": True}}),
    "LoHa": Variant("loha", {"rank": 4, "alpha": 2}, unet="attention+conv"),
    "LoKr": Variant("lokr", {"rank": 2, "alpha": 1}, unet="attention+conv"),
    "LoKr, factors whole": Variant("lokr", {"rank": 64, "alpha": 32}),
}


@dataclass(frozen=True, slots=True)
class Cell:
    """What became of one kind of adapter in one format."""

    lost: float | None = None  # by writing and reading, relative
    apart: float | None = None  # of what the models say: with the reader, or with ours where that one cannot
    reader: str = ""
    unread: str | None = None  # why the reader cannot read it
    refused: str | None = None  # why our writer does not write it

    def words(self) -> str:
        """For the table."""
        if self.refused is not None:
            return "refused: " + re.sub(r" \(.*\)", "", self.refused)  # without the names of modules
        found = f"{self.lost:.1e}; "
        if self.unread is not None:
            return f"{found}{self.reader} cannot: {self.unread}; ours {self.apart:.1e}"
        return f"{found}{self.reader} {self.apart:.1e}"


def main() -> None:
    """Prints a table for each family."""
    logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    for kind in FAMILIES:
        print(f"\n{kind}\n\n| adapter | " + " | ".join(FORMATS) + " |\n|---" + "|---" * len(FORMATS) + "|")
        for variant in VARIANTS:
            cells = [cell(kind, variant, form).words() for form in FORMATS]
            print(f"| {variant} | " + " | ".join(cells) + " |", flush=True)


def cell(kind: str, variant: str, form: str) -> Cell:
    """Written, read, and loaded into other copies of the base, by us too where another reader may be at a loss."""
    artifact, wanted = _trained(kind, variant)
    names = format_names(find("models.families", kind).FAMILY, _parts(untouched(kind)))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / file_name("x", form)
        try:
            write(artifact, file, form, names)
        except UserError as error:
            return Cell(refused=str(error))
        again = read(file, names)
        lost = _lost(artifact, again, _parts(untouched(kind)))
        reader, load = ("PEFT", _loaded_by_peft) if form == "peft" else ("diffusers", _loaded_by_diffusers)
        unread, theirs = None, 0.0
        try:
            theirs = _apart(wanted, load(file, kind))
            unread = f"off by {theirs:.1e}" if theirs > 1e-5 else None
        except Exception as error:  # whatever a reader does with a file that it does not know
            unread = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
        if unread is None and form != "peft":
            return Cell(lost, theirs, reader)
        ours = _apart(wanted, _loaded_by_us(again, kind))
        return Cell(lost, ours if unread else max(ours, theirs), reader, unread)


@functools.cache
def _trained(kind: str, variant: str) -> tuple[AdapterArtifact, dict[str, Tensor]]:
    """At random; and what the models say with it in them."""
    parts = _parts(tiny_pipeline(kind))
    artifact = _at_random(VARIANTS[variant], find("models.families", kind).FAMILY, parts)
    return artifact, says(parts)


def _at_random(variant: Variant, family: Any, parts: Parts) -> AdapterArtifact:
    chosen = {"unet": variant.unet} | {part: variant.text for part in family.text_encoders if variant.text}
    targets = {part: select(part, parts[part], words, family.targets[part]) for part, words in chosen.items()}
    section = AdapterSection(method=variant.method, **variant.section)
    adapters = find("adapters.methods", variant.method).inject(parts, section, targets, 0)
    torch.manual_seed(1)
    for parameter in (each for several in adapters.parameters().values() for each in several):
        if parameter.ndim > 1 and not parameter.detach().abs().min() > 0.5:  # magnitudes stay near those of the base
            nn.init.normal_(parameter, std=0.1)
        else:
            parameter.data *= 1.1
    return adapters.artifact()


def _lost(one: AdapterArtifact, other: AdapterArtifact, parts: Parts) -> float:
    """The largest difference of a change, relative to its own largest number."""
    base = base_weights(parts)
    assert one.modules.keys() == other.modules.keys()
    worst = 0.0
    for key, weights in one.modules.items():
        wanted, found = (each.delta(base(key)).flatten(1) for each in (weights, other.modules[key]))
        worst = max(worst, ((found - wanted).abs().max() / wanted.abs().max()).item())
    return worst


def _loaded_by_us(artifact: AdapterArtifact, kind: str) -> dict[str, Tensor]:
    parts = _parts(tiny_pipeline(kind))
    install(artifact, parts, "mine")
    return says(parts)


def _loaded_by_peft(folder: Path, kind: str) -> dict[str, Tensor]:
    parts = _parts(tiny_pipeline(kind))
    for own in sorted(each for each in folder.iterdir() if each.is_dir()):
        PeftModel.from_pretrained(parts[own.name], own)  # changes it in place
    return says(parts)


def _loaded_by_diffusers(file: Path, kind: str) -> dict[str, Tensor]:
    pipeline = tiny_pipeline(kind)
    pipeline.load_lora_weights(str(file))
    return says(_parts(pipeline))


def _apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return max((one[part] - other[part]).abs().max().item() for part in one)


@torch.no_grad()
def says(parts: Parts) -> dict[str, Tensor]:
    """What the UNet and the text encoders say to one fixed input."""
    generator = torch.Generator().manual_seed(1)
    unet = parts["unet"].eval()
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 7, unet.config.cross_attention_dim, generator=generator)
    more: dict[str, Any] = {}
    if unet.config.addition_embed_type:
        pooled = torch.randn(2, parts["text_encoder_2"].config.projection_dim, generator=generator)
        more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": torch.full((2, 6), 64.0)}}
    said = {"unet": unet(latents, torch.tensor([10, 700]), context, **more).sample}
    tokens = torch.randint(0, 400, (2, 77), generator=generator)
    for part in (part for part in parts if part.startswith("text_encoder")):
        said[part] = parts[part].eval()(tokens).last_hidden_state
    return said


def tiny_pipeline(kind: str) -> Any:
    """All blocks of the family's models, a few channels wide; each time new, with the same random weights."""
    return copy.deepcopy(untouched(kind))


@functools.cache
def untouched(kind: str) -> Any:
    """The one that the others are copies of, for those who only look."""
    torch.manual_seed(0)
    configs, tokenizer = shipped_configs(kind), build_tokenizer()
    width = {"sd1": 32, "sdxl": 32 + 48}[kind]
    own: dict[str, Any] = {"cross_attention_dim": width, "norm_num_groups": 8, "sample_size": 8}
    if kind == "sdxl":
        own |= {"attention_head_dim": (2, 4, 4), "addition_time_embed_dim": 8}
        own["projection_class_embeddings_input_dim"] = 40 + 6 * 8
    else:
        own["attention_head_dim"] = 2
    config = {**configs["unet/config.json"], **own}
    config["block_out_channels"] = (16, 32, 48, 48)[: len(config["block_out_channels"])]
    shared = {
        "unet": UNet2DConditionModel.from_config(config),
        "vae": AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False),
        "tokenizer": tokenizer,
        "text_encoder": CLIPTextModel(_clip(configs["text_encoder/config.json"], len(tokenizer), hidden_size=32)),
    }
    if kind == "sd1":
        absent: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
        pipeline: Any = StableDiffusionPipeline(**shared, **absent, requires_safety_checker=False)
    else:
        second = _clip(configs["text_encoder_2/config.json"], len(tokenizer), hidden_size=48, projection_dim=40)
        pipeline = StableDiffusionXLPipeline(
            **shared, text_encoder_2=CLIPTextModelWithProjection(second), tokenizer_2=tokenizer, add_watermarker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _clip(config: Mapping[str, Any], words: int, **own: Any) -> CLIPTextConfig:
    """Two layers of it."""
    sizes = {"vocab_size": words, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPTextConfig(**{**config, **sizes, **own})


def _parts(pipeline: Any) -> Parts:
    return {name: part for name, part in pipeline.components.items() if part is not None}


if __name__ == "__main__":
    main()
