from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import fastast
from fastast.augment import (
    Augment,
    Draws,
    add_noise,
    apply_gain,
    change_speed,
    mask,
    mixup,
    one_hot,
    same_bands,
    time_shift,
)
from fastast.data import Batch


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(augment: Augment, count: int, seed: int = 0) -> Draws:
    return augment.draw(count, seeded(seed))


def spectrogram(frames: int, bins: int) -> SimpleNamespace:
    return SimpleNamespace(target_length=frames, n_mels=bins)


def test_masks_are_one_band_and_one_run() -> None:
    augment = Augment(frequency_mask=10, time_mask=20)
    bands, runs = augment.masks(draws(augment, 400), spectrogram(60, 40))
    out = mask(torch.ones(400, 60, 40), bands, runs)
    assert set(out.unique().tolist()) == {0.0, 1.0}
    bins = (out == 0).all(1)  # masked in every frame
    frames = (out == 0).all(2)
    assert torch.equal(out == 0, bins.unsqueeze(1) | frames.unsqueeze(2))
    for masked, widest in ((bins, 10), (frames, 20)):
        widths = masked.sum(1)
        assert widths.min() == 0
        assert widths.max() == widest
        edges = masked.int().diff(dim=1).abs().sum(1) + masked[:, 0] + masked[:, -1]
        assert ((edges == 2) | (widths == 0)).all()  # one run
        assert masked[:, 0].any()
        assert masked[:, -1].any()  # masks reach both ends
        assert widths.float().mean().item() == pytest.approx(widest / 2, rel=0.1)


def test_masks_wider_than_the_spectrogram() -> None:
    wide = Augment(frequency_mask=5)
    with pytest.raises(ValueError, match=r"frequency_mask must be in \[0, 4\], not 5"):
        wide.masks(draws(wide, 2), spectrogram(6, 4))
    long = Augment(time_mask=7)
    with pytest.raises(ValueError, match=r"time_mask must be in \[0, 6\], not 7"):
        long.masks(draws(long, 2), spectrogram(6, 4))


def test_masks_are_what_padding_is() -> None:
    features = torch.ones(1, 5, 4)
    out = mask(features, torch.tensor([[1, 2]]), torch.tensor([[4, 5]]), fill=-7.0)
    assert (out[0, :, 1] == -7).all() and (out[0, 4] == -7).all()
    assert (out == -7).sum() == 5 + 4 - 1
    front_end = Plain(torch.ones(50, 9, 3))
    front_end.padding = -3.0
    augment = Augment(frequency_mask=3, time_mask=9)
    lengths = torch.full((50,), 20)
    seen = augment.features(torch.zeros(50, 20), lengths, draws(augment, 50), front_end)
    assert set(seen.unique().tolist()) == {-1.5, 0.5}  # normalised


def test_same_bands_cover_the_same_frequencies() -> None:
    def mel(hertz: float) -> float:
        return 1127 * math.log1p(hertz / 700)

    here = SimpleNamespace(n_mels=128, low_hz=20.0, high_hz=8000.0)
    there = SimpleNamespace(n_mels=128, low_hz=0.0, high_hz=15000.0)
    bands = torch.tensor([[0, 0], [10, 30], [100, 128], [0, 128]])
    found = same_bands(bands, here, there)
    assert same_bands(bands, here, here) is bands

    def hertz(edge: int, of: SimpleNamespace) -> float:
        step = (mel(of.high_hz) - mel(of.low_hz)) / (of.n_mels + 1)
        return 700 * (math.exp((mel(of.low_hz) + (edge + 0.5) * step) / 1127) - 1)

    assert found[0, 0] == found[0, 1]  # nothing stays nothing
    bin_width = 1.03  # a bin of the other bank is 3.2 % of a frequency far up
    for (a, b), (c, d) in zip(bands[1:].tolist(), found[1:].tolist(), strict=True):
        assert hertz(c, there) / hertz(a, here) == pytest.approx(1, rel=0.2 if a < 20 else 0.03)
        assert 1 / bin_width < hertz(d, there) / hertz(b, here) < bin_width
    assert found[3, 1] < 110  # above 8 kHz nothing of the student's is masked
    back = same_bands(found[1:3], there, here)
    assert (back - bands[1:3]).abs().max() <= 1


def test_time_shift() -> None:
    features = torch.arange(1.0, 6.0)[None, :, None].repeat(3, 1, 2)
    out = time_shift(features, torch.tensor([0, 2, 4]), fill=-7.0)
    assert torch.equal(out[0], features[0])
    assert out[1, :, 0].tolist() == [-7, -7, 1, 2, 3]
    assert out[2, :, 1].tolist() == [-7, -7, -7, -7, 1]


class Plain:
    """A front end whose log-mel energies are given."""

    sample_rate, window_length, hop_length = 16000, 4, 2
    n_mels, low_hz, high_hz, padding = 3, 20.0, 8000.0, 0.0

    def __init__(self, log_mel: torch.Tensor) -> None:
        self.given, self.target_length = log_mel, log_mel.shape[1]

    def log_mel(self, waveform: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return self.given

    def normalize(self, log_mel: torch.Tensor) -> torch.Tensor:
        return log_mel / 2


def test_shift_moves_clips_inside_the_window() -> None:
    features = torch.zeros(300, 20, 3)
    features[:, :8] = torch.arange(1, 9)[:, None].float()
    features[0] = torch.arange(1, 21)[:, None].float()
    lengths = torch.full((300,), 4 + 7 * 2)  # eight frames
    lengths[0] = 4 + 19 * 2
    for limit, furthest in ((100, 12), (4, 4)):
        augment = Augment(shift=limit)
        front_end = Plain(features)
        out = augment.features(torch.zeros(300, 42), lengths, draws(augment, 300), front_end) * 2
        assert torch.equal(out[0], features[0])  # a full window does not move
        shifts = (out[1:, :, 0] == 1).int().argmax(1)
        assert shifts.min() == 0
        assert shifts.max() == furthest
        for clip, shift in zip(out[1:], shifts.tolist(), strict=True):
            assert torch.equal(clip[shift : shift + 8, 1], torch.arange(1, 9).float())
            assert clip.sum() == 3 * 36


def test_roll_and_feature_noise_come_after_normalising() -> None:
    ramp = torch.arange(9.0)[None, :, None].repeat(200, 1, 3)
    lengths = torch.full((200,), 20)
    augment = Augment(roll=2)
    out = augment.features(torch.zeros(200, 20), lengths, draws(augment, 200), Plain(ramp))
    by = out[:, :, 0].argmin(1)
    assert set(by.tolist()) == {0, 1, 2, 7, 8}  # up to two frames, either way
    for clip, shift in zip(out, by.tolist(), strict=True):
        assert torch.equal(clip, (ramp[0] / 2).roll(shift, 0))

    noisy = Augment(feature_noise=0.1)
    seen = draws(noisy, 200)
    noise = noisy.features(torch.zeros(200, 20), lengths, seen, Plain(ramp)) - ramp / 2
    assert noise.min() >= 0
    levels = 0.1 * seen.level
    assert (noise.amax((1, 2)) <= levels + 1e-6).all()
    assert (noise.amax((1, 2)) >= 0.5 * levels).all()
    alone = (
        noisy.features(torch.zeros(1, 20), lengths[:1], seen[[7]], Plain(ramp[:1])) - ramp[:1] / 2
    )
    assert torch.equal(alone[0], noise[7])  # its own noise, whatever batch it is in


def test_mixup_mixes_waveforms_and_labels_alike() -> None:
    torch.manual_seed(0)
    waveform = torch.randn(16, 50)
    lengths = torch.full((16,), 50)
    lengths[3] = 20
    waveform[3, 20:] = 0
    batch = Batch(waveform, lengths, torch.eye(16))
    mixed_up = draws(Augment(mixup=1.0), 16)
    partner = Batch(*(t[mixed_up.partner] for t in batch))
    mixed, same, labels = mixup(batch, partner, mixed_up.weight)
    assert torch.equal(same, lengths)
    centred = waveform - waveform.sum(1, keepdim=True) / lengths[:, None]
    centred[3, 20:] = 0
    expected = labels @ centred  # one class a clip: the labels are the mixing weights
    expected[3, 20:] = 0
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(labels.sum(1), torch.ones(16))


def test_mixup_draws() -> None:
    many = draws(Augment(mixup=1.0), 2000)
    assert many.weight.mean().item() == pytest.approx(0.5, abs=0.02)
    assert many.weight.std().item() == pytest.approx((1 / 84) ** 0.5, abs=0.01)  # Beta(10, 10)
    assert many.partner.min() >= 0 and many.partner.max() < 2000
    some = draws(Augment(mixup=0.25), 2000)
    assert 0.7 < (some.weight == 1).float().mean() < 0.8
    assert (draws(Augment(), 50).weight == 1).all()


def test_mixup_leaves_the_others_alone() -> None:
    torch.manual_seed(0)
    batch = Batch(torch.randn(400, 9), torch.full((400,), 9), torch.eye(400))
    augment = Augment(mixup=0.25)
    mine = draws(augment, 400)
    partner = Batch(*(t[mine.partner] for t in batch))
    mixed, _, labels = augment.waveform(batch, mine, partner)
    untouched = mine.weight == 1
    assert torch.equal(mixed[untouched], batch.waveform[untouched])
    assert torch.equal(labels[untouched], batch.target[untouched])
    assert not (mixed[~untouched] == batch.waveform[~untouched]).all(1).any()
    with pytest.raises(ValueError, match="partner must be given where mixup is on"):
        augment.waveform(batch, mine)


def test_change_speed() -> None:
    ramp = torch.arange(100.0).repeat(200, 1)
    lengths = torch.full((200,), 60)
    ramp[:, 60:] = 0
    speed = torch.linspace(0.8, 1.25, 200)
    out, new = change_speed(ramp, lengths, speed)
    assert torch.equal(new, (60 / speed.double()).floor().long())
    for clip, length, factor in zip(out, new.tolist(), speed.tolist(), strict=True):
        steps = clip[: length - 2].diff()
        torch.testing.assert_close(steps, torch.full_like(steps, factor), atol=1e-3, rtol=0)
        assert (clip[length:] == 0).all()
    same, kept = change_speed(ramp, lengths, torch.ones(200))
    assert torch.equal(same, ramp)
    assert torch.equal(kept, lengths)


def test_gain_and_noise() -> None:
    torch.manual_seed(0)
    waveform = torch.randn(300, 1000)
    lengths = torch.full((300,), 800)
    waveform[:, 800:] = 0
    drawn = draws(Augment(gain=6.0, noise=0.5), 300)
    assert -6 <= drawn.gain.min() < -5
    assert 5 < drawn.gain.max() <= 6
    louder = apply_gain(waveform, drawn.gain).norm(dim=1) / waveform.norm(dim=1)
    torch.testing.assert_close((20 * louder.log10()).double(), drawn.gain, atol=1e-3, rtol=0)

    noise = add_noise(waveform, lengths, drawn.snr, drawn.seed) - waveform
    assert (noise[:, 800:] == 0).all()
    with_noise = drawn.snr.isfinite()
    assert 0.4 < with_noise.float().mean() < 0.6
    assert torch.equal(noise.norm(dim=1) > 0, with_noise)
    assert drawn.snr.min() >= 10 and drawn.snr[with_noise].max() <= 40
    snr = 20 * (waveform.norm(dim=1) / noise.norm(dim=1))[with_noise].log10()
    torch.testing.assert_close(snr.double(), drawn.snr[with_noise], atol=1.5, rtol=0)


def test_one_hot() -> None:
    assert one_hot(torch.tensor([1, 0]), 3).tolist() == [[0, 1, 0], [1, 0, 0]]
    rows = torch.rand(2, 3)
    assert one_hot(rows, 3) is rows


EVERYTHING = Augment(0.1, 6.0, 1.0, 1.0, 10, 4, 4, 3, 0.1)


def augmented(seed: int, rows: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and targets of some rows of a batch of eight clips, with everything on."""
    torch.manual_seed(0)
    whole = Batch(torch.randn(8, 6000), torch.arange(8) * 500 + 2000, torch.eye(8))
    drawn = draws(EVERYTHING, 8, seed)
    partner = Batch(*(t[drawn.partner] for t in whole))
    mine = drawn[rows]
    waveform, lengths, target = EVERYTHING.waveform(
        Batch(*(t[rows] for t in whole)), mine, Batch(*(t[rows] for t in partner))
    )
    fbank = fastast.Fbank(target_length=40)
    return EVERYTHING.features(waveform, lengths, mine, fbank), target


def test_same_seed_same_augmentation() -> None:
    assert torch.equal(augmented(5)[0], augmented(5)[0])
    assert not torch.equal(augmented(5)[0], augmented(6)[0])
    state = torch.get_rng_state()
    draws(EVERYTHING, 8)
    assert torch.equal(torch.get_rng_state(), state)  # nothing draws from the global generator


def test_processes_share_a_batch() -> None:
    """Every other row alone gives what the whole batch gives in those rows."""
    features, target = augmented(3)
    for first in (0, 1):
        mine, its_target = augmented(3, slice(first, None, 2))
        torch.testing.assert_close(mine, features[first::2], rtol=0, atol=1e-6)
        assert torch.equal(its_target, target[first::2])


def test_another_front_end_gets_the_same() -> None:
    """What is masked for the student is masked for a teacher with other bins, and shifted alike."""
    student, teacher = fastast.Fbank(target_length=60), fastast.Fbank(target_length=70, n_mels=64)
    for bank in (student, teacher):
        bank.low_hz, bank.high_hz = 20.0, 8000.0
    augment = Augment(shift=20, frequency_mask=60, time_mask=30)
    torch.manual_seed(0)
    waveform, lengths, drawn = torch.randn(40, 8000), torch.full((40,), 6000), draws(augment, 40)
    for bank in (student, teacher):
        bank.mean = bank.std = None
    mine = augment.features(waveform, lengths, drawn, student)
    its = augment.features(waveform, lengths, drawn, teacher, student)
    assert its.shape == (40, 70, 64)
    silent_mine, silent_its = (f == 0 for f in (mine, its))
    assert torch.equal(silent_mine.all(2), silent_its.all(2)[:, :60])  # the same frames
    bands = silent_mine.all(1).sum(1) / 128 - silent_its.all(1).sum(1) / 64
    assert bands.abs().max() <= 1.01 / 64  # as much of the spectrum, to a bin


def test_off() -> None:
    off = Augment()
    assert off.off and not EVERYTHING.off
    batch = Batch(torch.randn(4, 900), torch.tensor([900, 500, 900, 700]), torch.eye(4))
    nothing = draws(off, 4)
    assert (nothing.place == 0).all()
    assert off.waveform(batch, nothing) == batch
    fbank = fastast.Fbank(target_length=8)
    features = off.features(batch.waveform, batch.lengths, nothing, fbank)
    assert torch.equal(features, fbank(batch.waveform, batch.lengths))


@pytest.mark.parametrize(
    "options",
    [
        {"mixup": 1.5},
        {"noise": -0.1},
        {"speed": 1.0},
        {"gain": -1.0},
        {"shift": -1},
        {"roll": -1},
        {"feature_noise": -0.1},
    ],
)
def test_bad_options(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Augment(**options)  # type: ignore[arg-type]
