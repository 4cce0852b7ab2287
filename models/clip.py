"""CLIP text encoders as diffusion models read them: captions to windows of tokens, and one of the hidden layers."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..configs.errors import UserError
from ..configs.new_words import is_plain_word


def window_tokens(tokenizer: Any, captions: Sequence[str], windows: int) -> Tensor:
    """(B, windows, 77): each window is begin, up to 75 tokens, end, padding; what fills more windows is cut."""
    room = tokenizer.model_max_length - 2
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = []
    for words in tokenizer(expanded(tokenizer, captions), add_special_tokens=False, verbose=False).input_ids:
        pieces = [words[room * k : room * (k + 1)] for k in range(windows)]
        rows.append([[begin, *piece, end, *[pad] * (room - len(piece))] for piece in pieces])
    return torch.tensor(rows)


def expanded(tokenizer: Any, captions: Sequence[str]) -> list[str]:
    """Captions in which a word of several vectors, `<sks>`, stands as `<sks> <sks>_1 ...`, as diffusers has it."""
    added = tokenizer.added_tokens_encoder
    several: dict[str, str] = {}
    for token in added:
        pieces = [token]
        while (further := f"{token}_{len(pieces)}") in added:
            pieces.append(further)
        if len(pieces) > 1:
            several[token] = " ".join(pieces)
    if not several:
        return list(captions)
    pattern = re.compile("|".join(map(_alone, sorted(several, key=len, reverse=True))))
    return [pattern.sub(lambda found: several[found[0]], caption) for caption in captions]


def _alone(token: str) -> str:
    """An expression for a word: not for a part of another one, unless it has brackets of its own."""
    before, after = (r"(?<!\w)", r"(?!\w)") if is_plain_word(token) else ("", r"(?!_\d)")
    return before + re.escape(token) + after


def join_windows(hidden: Tensor) -> Tensor:
    """(B, windows, 77, width) to (B, 75 * windows + 2, width): begin of the first, end of the last, as kohya does."""
    first, last = hidden[:, 0, :1], hidden[:, -1, -1:]
    return torch.cat([first, hidden[:, :, 1:-1].flatten(1, 2), last], dim=1)


def encode_tokens(
    encoder: Any, tokens: Tensor, skip: int, *, norm: bool, attention_mask: Tensor | None = None
) -> tuple[Tensor, Any]:
    """(B, windows, 77, width) and the encoder's whole output for (B, windows, 77) tokens.

    `skip` is the number of layers at the end that are left out, as diffusers counts `clip_skip`; `norm` says whether
    the final layer norm follows. An attention mask (B * windows, 77) hides tokens where it is 0.
    """
    tokens = tokens.to(next(encoder.parameters()).device)
    further = {} if attention_mask is None else {"attention_mask": attention_mask.to(tokens.device)}
    output = encoder(tokens.flatten(0, 1), output_hidden_states=skip > 0 or not norm, **further)
    if skip == 0 and norm:
        hidden = output.last_hidden_state
    else:
        if skip >= len(output.hidden_states):
            raise UserError(f"clip_skip leaves out {skip} layers, the text encoder has {len(output.hidden_states) - 1}")
        # [0] are the embeddings, [-1] is what the last layer makes, before the norm
        if skip >= (states := len(output.hidden_states)):
            raise UserError(f"clip_skip: {skip} layers of a text encoder are left out, and it has {states - 1}")
        hidden = output.hidden_states[-1 - skip]
        if norm:
            last = _final_norm(encoder)  # outside of accelerate's wrapper, whose answers are fp32
            hidden = last(hidden.to(last.weight.dtype))
    return hidden.unflatten(0, tokens.shape[:2]), output


def _final_norm(encoder: Any) -> Any:
    model = getattr(encoder, "module", encoder)  # without DDP around it
    return getattr(model, "text_model", model).final_layer_norm
