"""Where a word of the prompt looks in the picture: cross-attention, recorded while the picture is sampled.

    with AttentionRecorder(engine) as recorder:
        images = engine.generate(request)
    recorder.overlay(images[0], "star", image_index=0).save("star.png")

The maps are those of DAAM (Tang et al. 2022): the softmax of Q K^T / sqrt(d) over the tokens, averaged over heads,
layers and steps.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..configs.choices import did_you_mean
from ..configs.errors import UserError
from ..models.clip import expanded
from .engine import Engine, MicroBatch

MAX_POSITIONS = 32 * 32
"""Layers with more positions are not recorded: they are slow to record, and tell textures apart rather than things."""


class AttentionRecorder:
    """Records the cross-attention of all pictures that `engine.generate` makes in the block.

    Each layer's own processor still makes its output, so that the pictures are the same to the bit; queries and keys
    are computed once more. Recorded is the half of a batch that has the words, not the one for the negative prompt.
    Layers in which a place is small are left out (MAX_POSITIONS). The recording stays readable after the block, when
    the processors of before are in their places again. A region's own prompt (`regional`) is not told from the
    request's.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._pictures: list[_Picture] = []

    def __enter__(self) -> "AttentionRecorder":
        self._engine.around.append(self._recorded)
        return self

    def __exit__(self, *error: object) -> None:
        self._engine.around.remove(self._recorded)

    @contextmanager
    def _recorded(self, micro_batch: MicroBatch) -> Iterator[None]:
        """The pictures of one call of the pipeline."""
        denoiser = self._engine.parts[self._engine.family.denoiser]
        size = self._picture_size(micro_batch)
        factor = self._engine.pipeline.vae_scale_factor
        sums = _Sums(len(micro_batch.prompts), (size[1] // factor, size[0] // factor))
        held = dict(denoiser.attn_processors)
        denoiser.set_attn_processor({name: _Recording(each, sums) for name, each in held.items()})
        try:
            yield
        finally:
            denoiser.set_attn_processor(held)
        self._pictures += [_Picture(micro_batch.prompts[k], size, sums, k) for k in micro_batch.kept]

    def _picture_size(self, micro_batch: MicroBatch) -> tuple[int, int]:
        """(width, height) in pixels."""
        _, height, width = self._engine.family.native_latents(self._engine.parts)
        factor = self._engine.pipeline.vae_scale_factor
        return micro_batch.request.sides or (width * factor, height * factor)

    # ------------------------------------------------------------------------ asking

    def attention(self, image_index: int) -> Tensor:
        """(h, w, tokens) in the size of the finest recorded layer, fp32: at each place the tokens' shares of one.

        Pictures are counted from 0 over everything that was generated in the block. UserError where there is none.
        """
        if not 0 <= image_index < len(self._pictures):
            raise UserError(f"no picture {image_index} was recorded; there are {len(self._pictures)}, counted from 0")
        picture = self._pictures[image_index]
        return picture.sums.mean(picture.row)

    def heat_map(self, image_index: int, word: str) -> np.ndarray:
        """(height, width) of the picture, fp32 in [0, 1], where 1 is the place that looks at the word most.

        `word` is a word of the prompt or several in a row. The mean of its tokens, wherever it stands in the prompt.
        UserError for one that is not there, with the words that are.
        """
        attention = self.attention(image_index)
        places = self._places(image_index, word, attention.shape[-1])
        found = attention[..., places].mean(dim=-1)
        width, height = self._pictures[image_index].size
        found = _resized(found[None], (height, width))[0]
        return (found / found.max()).numpy()

    def overlay(self, image: Image.Image, word: str, image_index: int = 0) -> Image.Image:
        """The picture in grey, darkened, with the word's heat map in colour: blue looks little at it, red most."""
        heat = Image.fromarray(_coloured(self.heat_map(image_index, word))).resize(image.size)
        return Image.blend(image.convert("L").convert("RGB"), heat, 0.5)

    def _places(self, image_index: int, word: str, num_tokens: int) -> list[int]:
        """Where the tokens of a word lie among those that the denoiser sees, behind the one that begins the text."""
        prompt = self._pictures[image_index].prompt
        tokenizer = self._engine.parts[next(iter(self._engine.family.tokenizers.values()))]
        words, wanted = split_words(tokenizer, prompt), [ids for _, ids in split_words(tokenizer, word)]
        begin = np.cumsum([1, *(len(ids) for _, ids in words)])
        starts = [k for k in range(len(words)) if wanted and [ids for _, ids in words[k : k + len(wanted)]] == wanted]
        if not starts:
            texts = list(dict.fromkeys(text for text, _ in words))
            raise UserError(f"{word!r} is not in the prompt{did_you_mean(word, texts)}; its words: {', '.join(texts)}")
        places = [place for k in starts for place in range(begin[k], begin[k + len(wanted)]) if place < num_tokens - 1]
        if not places:
            raise UserError(f"{word!r} stands behind the {num_tokens - 2} tokens that were read; give more windows")
        return places


def split_words(tokenizer: Any, text: str) -> list[tuple[str, list[int]]]:
    """The words of a text as CLIP's tokenizer cuts it, each with its tokens."""
    (ids,) = tokenizer(expanded(tokenizer, [text]), add_special_tokens=False, verbose=False).input_ids
    words: list[list[int]] = [[]]
    for token, spelled in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        words[-1].append(token)
        if spelled.endswith("</w>") or spelled in tokenizer.added_tokens_encoder:
            words.append([])
    return [(tokenizer.decode(own).strip(), own) for own in words if own]


# ---------------------------------------------------------------------------- recording


@dataclass(slots=True)
class _Sums:
    """Attention of a micro-batch, summed up over what has run so far: never more than one map for each resolution."""

    num_prompts: int
    latents: tuple[int, int]  # (h, w)
    maps: dict[int, Tensor] = field(default_factory=dict)  # positions -> (prompts, positions, tokens)
    count: int = 0  # of layers and steps

    def add(self, probabilities: Tensor) -> None:
        """(prompts, positions, tokens) of one layer in one step."""
        positions = probabilities.shape[1]
        if positions in self.maps:
            self.maps[positions] += probabilities
        else:
            self.maps[positions] = probabilities.float()
        self.count += 1

    def mean(self, row: int) -> Tensor:
        """(h, w, tokens): every layer in every step counts the same; the coarse ones are interpolated."""
        if not self.maps:
            raise UserError(f"no layer of the denoiser was recorded: all have more than {MAX_POSITIONS} places")
        finest = self._grid(max(self.maps))
        total = torch.zeros(())
        for positions, sums in self.maps.items():
            total = total + _resized(sums[row].cpu().T.unflatten(1, self._grid(positions)), finest)
        return (total / self.count).permute(1, 2, 0)

    def _grid(self, positions: int) -> tuple[int, int]:
        """(h, w) of a layer: the denoiser halves the latents, rounding up, again and again."""
        height, width = self.latents
        while height * width > positions:
            height, width = -(-height // 2), -(-width // 2)
        return height, width


@dataclass(frozen=True, slots=True)
class _Picture:
    """What is known of a recorded picture; its micro-batch shares the sums."""

    prompt: str
    size: tuple[int, int]  # (width, height) in pixels
    sums: _Sums
    row: int


class _Recording:
    """Stands before a layer's own processor."""

    def __init__(self, processor: Any, sums: _Sums):
        self._processor, self._sums = processor, sums

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None and hidden_states.shape[1] <= MAX_POSITIONS:
            worded = slice(-self._sums.num_prompts, None)  # the last ones of the batch, with or without guidance
            self._sums.add(attention_probabilities(attn, hidden_states[worded], encoder_hidden_states[worded]))
        return self._processor(attn, hidden_states, encoder_hidden_states, attention_mask)


def attention_probabilities(attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)), (B, positions, tokens), the mean over the heads of one of diffusers' layers.

    Of (B, positions, width) and (B, tokens, width), without a mask of tokens: Stable Diffusion has none.
    """
    query = attn.head_to_batch_dim(attn.to_q(hidden_states))
    key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
    return attn.get_attention_scores(query, key).unflatten(0, (-1, attn.heads)).mean(dim=1)


# ---------------------------------------------------------------------------- maps


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, h, w) to (C, *size), bilinear: what adds up to one over C does so afterwards."""
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]


def _coloured(heat: np.ndarray) -> np.ndarray:
    """(h, w) in [0, 1] to (h, w, 3) uint8: blue, cyan, yellow, red."""
    stops = np.array([(0, 0, 96), (0, 160, 255), (255, 255, 0), (255, 0, 0)], float)
    places = np.linspace(0, 1, len(stops))
    return np.stack([np.interp(heat, places, stops[:, channel]) for channel in range(3)], -1).astype(np.uint8)
