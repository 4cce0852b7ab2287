"""Batches of embeddings."""

import torch

from loraloom.models.stacks import Stacks


def test_the_same_rows_are_the_same_tensors_and_two_batches_are_kept():
    stacks = Stacks()
    a, b, c = ({"prompt_embeds": torch.full((2, 3), float(number))} for number in range(3))
    first = stacks.of([a, b], "cpu")
    assert first.prompt_embeds.tolist() == torch.stack([a["prompt_embeds"], b["prompt_embeds"]]).tolist()
    assert first.pooled_prompt_embeds is None
    assert stacks.of([a, b], "cpu") is first
    second = stacks.of([b, a], "cpu")
    assert torch.equal(second.prompt_embeds, first.prompt_embeds.flip(0))
    assert stacks.of([a, b], "cpu") is first
    assert stacks.of([c, c], "cpu") is not second
    assert stacks.of([b, a], "cpu") is second
    assert stacks.of([a, b], "cpu") is not first  # the oldest went


def test_rows_that_are_alike_but_others_are_looked_at():
    stacks, row = Stacks(), {"prompt_embeds": torch.zeros(2, 3)}
    first = stacks.of([row], "cpu")
    assert stacks.of([{"prompt_embeds": torch.ones(2, 3)}], "cpu").prompt_embeds.sum() == 6
    assert stacks.of([dict(row)], "cpu") is not first
