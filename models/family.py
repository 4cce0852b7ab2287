"""What a model family has to offer: the contract that the trainer and the inference engine are written against."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as DType

    from ..configs.schema import NoiseSection
    from .noise.process import Noised, NoiseProcess

Parts = dict[str, Any]
"""The components of a pipeline, under the names that diffusers' pipeline class gives them."""


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What the denoiser is told beside the noisy latents."""

    prompt_embeds: "Tensor"  # (B, tokens, width)


class ModelFamily(Protocol):
    """One file in `families/`, with an instance named FAMILY. Knows its parts and how they fit together."""

    name: str
    pipeline: str  # class name in diffusers
    denoiser: str  # part
    text_encoders: Sequence[str]  # parts
    targets: Mapping[str, Mapping[str, Sequence[str]]]  # part -> preset -> endings of module names
    size_multiple: int  # height and width must be multiples of this many pixels
    token_window: int
    architecture: str  # ModelSpec's name, the stem of `<architecture>/lora`
    kohya_version: str  # kohya's `ss_base_model_version`
    kohya_prefixes: Mapping[str, str]  # part -> first word of a module's key

    def detect(self, index: Mapping[str, Any]) -> bool:
        """Whether a pipeline folder with this model_index.json belongs to the family."""
        ...

    def load(self, folder: Path, dtype: "DType") -> Parts:
        """All parts on the CPU, frozen, in evaluation mode and in `dtype`, whatever type the files have."""
        ...

    def noise(self, parts: Parts, section: "NoiseSection") -> "NoiseProcess":
        """The training noise of this base, from its own scheduler's config."""
        ...

    def encode_images(self, parts: Parts, pixels: "Tensor", noise: "Tensor") -> "Tensor":
        """(B, 3, H, W) in [-1, 1] to scaled latents; `noise` (B, C, h, w) draws from the VAE's posterior."""
        ...

    def latent_shape(self, parts: Parts, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of a square picture."""
        ...

    def count_tokens(self, parts: Parts, caption: str) -> int:
        """Tokens of a caption with begin and end, before anything is cut at `token_window`."""
        ...

    def encode_prompts(self, parts: Parts, captions: Sequence[str]) -> Conditioning:
        """Embeddings of captions, with gradient where a text encoder trains."""
        ...

    def predict(self, parts: Parts, noised: "Noised", conditioning: Conditioning) -> "Tensor":
        """The denoiser's output, of the target's shape."""
        ...
