"""The arithmetic of the loss, against formulas worked out by hand and the examples of diffusers."""

import pytest
import torch
import torch.nn.functional as F

from loraloom.configs.loader import load_config
from loraloom.configs.schema import LossSection
from loraloom.data.draws import Draws
from loraloom.train.build import build_trainer
from loraloom.train.loss import error_of, masked_mean
from loraloom.train.settings import _moved

PREDICTED, TARGET = torch.tensor([[[[3.0]]], [[[0.1]]]]), torch.tensor([[[[0.0]]], [[[0.0]]]])
SNR = torch.tensor([1.0, 0.25])  # sigma 1 and 2


def errors(kind="mse", **options) -> list[float]:
    return error_of(LossSection(kind=kind, options=options))(PREDICTED, TARGET, SNR).flatten().tolist()


def test_squared_error():
    assert errors() == pytest.approx([9.0, 0.01])


def test_robust_errors_are_those_of_the_diffusers_examples():
    """`conditional_loss` of its text-to-image examples: 2 c (sqrt(e^2 + c^2) - c), and 2 (...) for smooth-L1."""
    for kind, factor in (("huber", 2 * 0.1), ("smooth_l1", 2.0)):
        expected = [factor * ((e**2 + 0.1**2) ** 0.5 - 0.1) for e in (3.0, 0.1)]
        assert errors(kind=kind, delta=0.1) == pytest.approx(expected)


def test_delta_falls_with_the_noise():
    """As sd-scripts schedules it: (1 - c) / (1 + sigma)^2 + c."""
    deltas = [0.9 / 4 + 0.1, 0.9 / 9 + 0.1]
    expected = [2 * d * ((e**2 + d**2) ** 0.5 - d) for e, d in zip((3.0, 0.1), deltas, strict=True)]
    assert errors(kind="huber", delta=0.1, delta_schedule="snr") == pytest.approx(expected)


def test_options_that_stood_in_the_section_are_read_from_there():
    """Version 0.1.0 had `delta` and `delta_schedule` beside `kind`, and wrote them for every kind."""
    old = LossSection.model_validate({"kind": "huber", "delta": 0.3, "delta_schedule": "snr", "unmasked_weight": 0.5})
    assert old == LossSection(kind="huber", options={"delta": 0.3, "delta_schedule": "snr"}, unmasked_weight=0.5)
    assert LossSection.model_validate({"kind": "mse", "delta": 0.1, "delta_schedule": "constant"}) == LossSection()
    with pytest.raises(ValueError, match="dictionary"):
        LossSection.model_validate({"kind": "huber", "delta": 0.3, "options": 5})
    then = {"loss.kind": "huber", "loss.delta": 0.3, "loop.seed": 0}
    assert _moved(then) == {"loss.kind": "huber", "loss.options.delta": 0.3, "loop.seed": 0}
    assert _moved({"loss.kind": "mse", "loss.delta": 0.1}) == {"loss.kind": "mse"}


def test_a_masked_mean_is_over_what_the_mask_shows():
    values = torch.arange(8.0).reshape(1, 2, 2, 2)  # two channels of 0 1 2 3 and 4 5 6 7
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    assert masked_mean(values, mask).tolist() == [2.0]  # of 0 and 4
    assert masked_mean(values, mask, 1.0).tolist() == [3.5]
    by_hand = (0 + 4 + 0.25 * (1 + 2 + 3 + 5 + 6 + 7)) / (2 * (1 + 3 * 0.25))
    assert masked_mean(values, mask, 0.25).item() == pytest.approx(by_hand)
    fine = torch.zeros(1, 1, 4, 4)
    fine[..., :2, :2] = 1  # of pixels, pooled to the latents' size
    assert masked_mean(values, fine).tolist() == [2.0]
    assert masked_mean(values, torch.zeros_like(mask)).tolist() == [0.0]


def first_batch(config_file, *overrides):
    trainer = build_trainer(load_config(config_file, overrides), overwrite=True)
    batch = next(trainer.batches)
    return trainer, batch


def test_prior_preservation_is_half_of_the_diffusers_example(write_config, photos):
    """That is mean(instance) + lambda * mean(prior); ours is the mean over all samples, with one of each."""
    sources = [
        {"path": str(photos), "caption": "a sks creature", "share": 0.5},
        {"path": str(photos), "caption": "a creature", "share": 0.5, "loss_weight": 0.3, "name": "prior"},
    ]
    loop = {"steps": 1, "batch_size": 4}
    trainer, batch = first_batch(write_config(data={"sources": sources}, loop=loop))
    assert sorted(batch.sources) == ["photos0", "photos0", "prior", "prior"] or batch.sources.count("prior") == 2
    objective, parts = trainer.objective, trainer.run.parts
    losses = objective(parts, batch, torch.device("cpu"))
    inputs = objective.inputs(parts, batch, torch.device("cpu"))
    noised = inputs.noised
    predicted = trainer.run.family.predict(parts, noised, inputs.conditioning, torch.zeros(4, 6))
    prior = torch.tensor([source == "prior" for source in batch.sources])
    instance_loss = F.mse_loss(predicted[~prior], noised.target[~prior], reduction="mean")
    prior_loss = F.mse_loss(predicted[prior], noised.target[prior], reduction="mean")
    example = instance_loss + 0.3 * prior_loss
    torch.testing.assert_close(2 * losses.total, example)


def test_masks_are_left_out_as_often_as_asked(write_config, tmp_path):
    from PIL import Image

    folder = tmp_path / "masked"
    folder.mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "a.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    mask.save(folder / "a.mask.png")
    data = {"sources": [{"path": str(folder), "caption": "x", "mask": "file"}]}
    config = write_config(data=data, loop={"steps": 1, "batch_size": 8})
    found = {}
    for chance in (0.0, 0.4, 1.0):
        trainer, batch = first_batch(config, f"loss.unmasked_probability={chance}")
        masks = trainer.objective._masks(batch, Draws(0, batch.positions))
        assert masks is not None
        found[chance] = [mask.mean().item() for mask in masks]
    assert set(found[0.0]) == {0.5}
    assert set(found[1.0]) == {1.0}
    drawn = Draws(0, range(8)).uniform("unmasked") < 0.4
    assert found[0.4] == [1.0 if out else 0.5 for out in drawn]


def test_a_source_can_keep_what_the_base_says(write_config, photos):
    sources = [{"path": str(photos), "caption": "a creature", "target": "base"}]
    config = write_config(data={"sources": sources}, loop={"steps": 3})
    trainer = build_trainer(load_config(config), overwrite=True)
    trainer.callbacks = []
    before = {part: [p.clone() for p in each] for part, each in trainer.run.adapters.parameters().items()}
    losses = [trainer.train_step()[0].loss for _ in range(2)]
    assert losses[0] == 0.0  # the adapter says what the base says at first
    after = trainer.run.adapters.parameters()
    decayed = 1 - 1e-2 * 0.01  # nothing but the weight decay of AdamW
    for part, parameters in before.items():
        for old, new in zip(parameters, after[part], strict=True):
            torch.testing.assert_close(new, old * decayed**2)
