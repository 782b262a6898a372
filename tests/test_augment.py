from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastast.augment import (
    Augment,
    add_noise,
    change_speed,
    mixup,
    one_hot,
    random_gain,
    spec_augment,
    time_shift,
)
from fastast.data import Batch


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_spec_augment_masks_one_band_and_one_run() -> None:
    features = torch.ones(400, 60, 40)
    out = spec_augment(features, 10, 20, seeded())
    assert set(out.unique().tolist()) == {0.0, 1.0}
    bins = (out == 0).all(1)  # masked in every frame
    frames = (out == 0).all(2)
    assert torch.equal(out == 0, bins.unsqueeze(1) | frames.unsqueeze(2))
    for mask, widest in ((bins, 10), (frames, 20)):
        widths = mask.sum(1)
        assert widths.min() == 0
        assert widths.max() == widest
        edges = mask.int().diff(dim=1).abs().sum(1) + mask[:, 0] + mask[:, -1]
        assert ((edges == 2) | (widths == 0)).all()  # one run
        assert mask[:, 0].any()
        assert mask[:, -1].any()  # masks reach both ends
        assert widths.float().mean().item() == pytest.approx(widest / 2, rel=0.1)


def test_spec_augment_bounds() -> None:
    features = torch.ones(2, 6, 4)
    assert torch.equal(spec_augment(features, 0, 0, seeded()), features)
    with pytest.raises(ValueError, match=r"frequency_width must be in \[0, 4\], not 5"):
        spec_augment(features, 5, 0, seeded())
    with pytest.raises(ValueError, match=r"time_width must be in \[0, 6\], not -1"):
        spec_augment(features, 0, -1, seeded())


def test_time_shift_moves_clips_inside_the_window() -> None:
    features = torch.zeros(300, 20, 3)
    frames = torch.full((300,), 8)
    features[:, :8] = torch.arange(1, 9)[:, None].float()
    frames[0], features[0] = 20, torch.arange(1, 21)[:, None].float()
    out = time_shift(features, frames, 100, seeded())
    assert torch.equal(out[0], features[0])  # a full window does not move
    shifts = (out[1:, :, 0] == 1).int().argmax(1)
    assert shifts.min() == 0
    assert shifts.max() == 12
    for clip, shift in zip(out[1:], shifts.tolist(), strict=True):
        assert torch.equal(clip[shift : shift + 8, 1], torch.arange(1, 9).float())
        assert clip.sum() == 3 * 36
    limited = time_shift(features, frames, 4, seeded())
    assert (limited[1:, :, 0] == 1).int().argmax(1).max() == 4


def test_mixup_mixes_waveforms_and_labels_alike() -> None:
    torch.manual_seed(0)
    waveform = torch.randn(16, 50)
    lengths = torch.full((16,), 50)
    lengths[3] = 20
    waveform[3, 20:] = 0
    target = torch.eye(16)
    mixed, labels = mixup(waveform, lengths, target, 1.0, seeded())
    centred = waveform - waveform.sum(1, keepdim=True) / lengths[:, None]
    centred[3, 20:] = 0
    expected = labels @ centred  # one class a clip: the labels are the mixing weights
    expected[3, 20:] = 0
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(labels.sum(1), torch.ones(16))
    _, many = mixup(torch.randn(2000, 2), torch.full((2000,), 2), torch.eye(2000), 1.0, seeded())
    own = many.diagonal()
    assert own[own < 1].mean().item() == pytest.approx(0.5, abs=0.02)
    assert own[own < 1].std().item() == pytest.approx((1 / 84) ** 0.5, abs=0.01)  # Beta(10, 10)


def test_mixup_leaves_the_others_alone() -> None:
    torch.manual_seed(0)
    waveform, lengths, target = torch.randn(400, 9), torch.full((400,), 9), torch.eye(400)
    mixed, labels = mixup(waveform, lengths, target, 0.25, seeded())
    untouched = labels.diagonal() == 1
    assert 0.65 < untouched.float().mean() < 0.85
    assert torch.equal(mixed[untouched], waveform[untouched])
    none, same = mixup(waveform, lengths, target, 0.0, seeded())
    assert torch.equal(none, waveform)
    assert torch.equal(same, target)


def test_change_speed() -> None:
    ramp = torch.arange(100.0).repeat(200, 1)
    lengths = torch.full((200,), 60)
    ramp[:, 60:] = 0
    out, new = change_speed(ramp, lengths, 0.8, 1.25, seeded())
    assert new.min() >= 60 / 1.25 - 1
    assert new.max() <= 60 / 0.8
    for clip, length in zip(out, new.tolist(), strict=True):
        inner = clip[: length - 2]
        steps = inner.diff()
        torch.testing.assert_close(steps, steps[0].expand_as(steps), atol=1e-3, rtol=0)
        assert 0.8 <= steps[0] <= 1.25
        assert (clip[length:] == 0).all()
    same, kept = change_speed(ramp, lengths, 1.0, 1.0, seeded())
    assert torch.equal(same, ramp)
    assert torch.equal(kept, lengths)


def test_gain_and_noise() -> None:
    torch.manual_seed(0)
    waveform = torch.randn(300, 1000)
    lengths = torch.full((300,), 800)
    waveform[:, 800:] = 0
    gain = random_gain(waveform, 6.0, seeded()).norm(dim=1) / waveform.norm(dim=1)
    decibels = 20 * gain.log10()
    assert -6 <= decibels.min() < -5
    assert 5 < decibels.max() <= 6.001

    noisy = add_noise(waveform, lengths, 0.5, (10.0, 20.0), seeded())
    noise = noisy - waveform
    assert (noise[:, 800:] == 0).all()
    with_noise = noise.norm(dim=1) > 0
    assert 0.4 < with_noise.float().mean() < 0.6
    snr = 20 * (waveform.norm(dim=1) / noise.norm(dim=1))[with_noise].log10()
    assert 9 < snr.min() < 11
    assert 19 < snr.max() < 21


def test_one_hot() -> None:
    assert one_hot(torch.tensor([1, 0]), 3).tolist() == [[0, 1, 0], [1, 0, 0]]
    rows = torch.rand(2, 3)
    assert one_hot(rows, 3) is rows


@pytest.mark.parametrize(
    "apply",
    [
        lambda g: change_speed(torch.ones(4, 9).cumsum(1), torch.full((4,), 9), 0.5, 2.0, g)[0],
        lambda g: random_gain(torch.ones(4, 9), 6.0, g),
        lambda g: add_noise(torch.ones(4, 9), torch.full((4,), 9), 1.0, (0.0, 9.0), g),
        lambda g: mixup(torch.eye(9), torch.full((9,), 9), torch.eye(9), 0.5, g)[0],
        lambda g: time_shift(torch.ones(4, 99, 2), torch.full((4,), 9), 90, g),
        lambda g: spec_augment(torch.ones(4, 99, 90), 40, 40, g),
    ],
    ids=["speed", "gain", "noise", "mixup", "shift", "specaug"],
)
def test_same_seed_same_augmentation(apply: Callable[[torch.Generator], torch.Tensor]) -> None:
    state = torch.get_rng_state()
    assert torch.equal(apply(seeded(5)), apply(seeded(5)))
    assert not torch.equal(apply(seeded(5)), apply(seeded(6)))
    assert torch.equal(torch.get_rng_state(), state)  # nothing draws from the global generator


def test_composition() -> None:
    torch.manual_seed(0)
    batch = Batch(torch.randn(4, 900), torch.tensor([900, 500, 900, 700]), torch.eye(4))
    off = Augment()
    assert off.waveform(batch, seeded()) == batch
    features = torch.randn(4, 20, 16)
    assert off.features(features, torch.full((4,), 20), seeded()) is features
    on = Augment(0.1, 6.0, 1.0, 1.0, 10, 4, 4)
    first, second = (on.waveform(batch, seeded(1)) for _ in range(2))
    for a, b, plain in zip(first, second, batch, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, plain)
    out = on.features(features, torch.full((4,), 9), seeded())
    assert not torch.equal(out, features)


@pytest.mark.parametrize(
    "options", [{"mixup": 1.5}, {"noise": -0.1}, {"speed": 1.0}, {"gain": -1.0}, {"shift": -1}]
)
def test_bad_options(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Augment(**options)  # type: ignore[arg-type]
