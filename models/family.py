"""What a model family has to offer: the contract that the trainer and the inference engine are written against."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .to_device import to_device

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as DType

    from ..configs.schema import NoiseSection
    from .base import PipelineFiles
    from .noise.process import Noised, NoiseProcess

Parts = dict[str, Any]
"""The components of a pipeline, under the names that diffusers' pipeline class gives them."""


@dataclass(frozen=True, slots=True)
class PromptOptions:
    """What decides the embeddings of a caption beside the text encoders."""

    windows: int = 1  # of the text encoder that a caption may fill; the rest is cut
    clip_skip: int = 0  # layers at the encoder's end that are left out, counted as diffusers does
    weighted: bool = False  # whether words have weights, in compel's syntax


ONE_WINDOW = PromptOptions()


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What the words of a caption tell the denoiser."""

    prompt_embeds: "Tensor"  # (B, tokens, width)
    pooled_prompt_embeds: "Tensor | None" = None  # (B, width), of families that have it

    def row(self, index: int) -> "dict[str, Tensor]":
        """The tensors of one sample, without the batch."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor[index] for name, tensor in tensors.items() if tensor is not None}

    def zeros(self) -> "Conditioning":
        """Of the same shapes."""
        pooled = self.pooled_prompt_embeds
        return Conditioning(_zeros(self.prompt_embeds), None if pooled is None else _zeros(pooled))

    @classmethod
    def stack(cls, rows: "Sequence[Mapping[str, Tensor]]", device: Any = None) -> "Conditioning":
        """A batch of the tensors of single samples."""
        import torch

        return cls(**{name: to_device(torch.stack([row[name] for row in rows]), device) for name in rows[0]})


def _zeros(tensor: "Tensor") -> "Tensor":
    return tensor.new_zeros(tensor.shape)


class ModelFamily(Protocol):
    """One file in `families/`, with an instance named FAMILY. Knows its parts and how they fit together."""

    name: str
    pipelines: "Mapping[str, str | type]"  # task -> class, or its name in diffusers; `text_to_image` at least
    denoiser: str  # part
    text_encoders: Sequence[str]  # parts
    image_encoders: Sequence[str]  # parts that decide what latents an image has
    prompt_encoders: Sequence[str]  # parts that decide what embeddings a caption has
    tokenizers: Mapping[str, str]  # text encoder -> its tokenizer, of those that can learn new words
    embedding_keys: Mapping[str, str]  # text encoder -> what web UIs call its vectors in the file of a word
    targets: Mapping[str, Mapping[str, Sequence[str]]]  # part -> preset -> endings of module names
    repeated_blocks: Sequence[str]  # class names of the denoiser's blocks that are many and alike
    size_multiple: int  # height and width must be multiples of this many pixels
    token_window: int
    kohya_version: str  # kohya's `ss_base_model_version`
    kohya_prefixes: Mapping[str, str]  # part -> first word of a module's key
    kohya_original: bool  # whether kohya's keys call the denoiser's modules as the original code does

    def detect(self, files: "PipelineFiles") -> bool:
        """Whether a pipeline folder belongs to the family."""
        ...

    def problems(self, files: "PipelineFiles") -> list[str]:
        """Why a base of the family cannot be trained: it is for inpainting, a refiner, ..."""
        ...

    def architecture(self, parts: Parts) -> str:
        """ModelSpec's name of the base, the stem of `<architecture>/lora`."""
        ...

    def load(self, folder: Path, dtype: "DType", only: Collection[str] | None = None) -> Parts:
        """All parts, or only some, on the CPU, frozen, in evaluation mode and in `dtype`, whatever the files have."""
        ...

    def noise(self, parts: Parts, section: "NoiseSection") -> "NoiseProcess":
        """The training noise of this base, from its own scheduler's config."""
        ...

    def encode_images(self, parts: Parts, pixels: "Tensor") -> "Tensor":
        """(B, 3, H, W) in [-1, 1] to (B, 2, C, h, w): mean and standard deviation of their latents, scaled, in fp32."""
        ...

    def latent_shape(self, parts: Parts, width: int, height: int) -> tuple[int, int, int]:
        """(C, h, w) of a picture's latents."""
        ...

    def native_latents(self, parts: Parts) -> tuple[int, int, int]:
        """(C, h, w) of latents that suit the denoiser."""
        ...

    def latent_rgb(self, parts: Parts) -> "Tensor":
        """(C + 1, 3): a linear map from scaled latents, and 1, to RGB in [-1, 1]. UserError where none is known."""
        ...

    def count_tokens(self, parts: Parts, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption, without begin and end, before anything is cut."""
        ...

    def encode_prompts(
        self, parts: Parts, captions: Sequence[str], options: PromptOptions = ONE_WINDOW
    ) -> Conditioning:
        """Embeddings of captions, with gradient where a text encoder trains."""
        ...

    def zeroes_empty_negative(self, parts: Parts) -> bool:
        """Whether pictures without a negative prompt are guided away from zeros, not from the embeddings of no words.

        So diffusers has it of some bases.
        """
        ...

    def unread(self, parts: Parts, part: str, clip_skip: int = 0) -> Collection[str]:
        """Names of modules of a part on whose weights no prediction depends, such as a text encoder's last layers."""
        ...

    def pipeline_prompts(self, positive: Conditioning, negative: Conditioning) -> dict[str, Any]:
        """The arguments that diffusers' pipeline takes instead of words."""
        ...

    def predict(self, parts: Parts, noised: "Noised", conditioning: Conditioning, geometry: "Tensor") -> "Tensor":
        """The denoiser's output, of the target's shape.

        `geometry` (B, 6) holds height and width of the original image, top and left of its cut, height and width of
        the target, in pixels: the size conditions of SDXL (Podell et al. 2023, section 2.2).
        """
        ...
