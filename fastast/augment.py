"""Training-time augmentation of a batch, on any device, reproducible from one `torch.Generator`.

Every random number is drawn on the CPU generator that is passed in, so the same seed gives the same
augmentation on every device. Waveform functions take zero-padded clips `[B, S]` with their
`lengths` `[B]`; feature functions take `[B, T, F]` filterbanks.

Features are un-normalised log-mel energies (`Fbank.log_mel`), as in AST: what is masked, and what
comes before a shifted clip, becomes 0 in those units, which is also AST's padding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastast.data import Batch

__all__ = [
    "Augment",
    "add_noise",
    "change_speed",
    "mixup",
    "one_hot",
    "random_gain",
    "spec_augment",
    "time_shift",
]


def _uniform(
    low: float, high: float, count: int, like: Tensor, generator: torch.Generator
) -> Tensor:
    draw = torch.rand(count, generator=generator) * (high - low) + low
    return draw.to(like.device)


def _integers(high: Tensor, generator: torch.Generator) -> Tensor:
    """One integer a row, uniform in `[0, high]`, ends included."""
    draw = torch.rand(high.shape, generator=generator, dtype=torch.float64).to(high.device)
    return torch.minimum((draw * (high + 1)).long(), high)


def _valid(lengths: Tensor, samples: int) -> Tensor:
    """True `[B, S]` where a sample belongs to the clip and not to its padding."""
    lengths = lengths.unsqueeze(1)
    return torch.arange(samples, device=lengths.device) < lengths


def change_speed(
    waveform: Tensor, lengths: Tensor, low: float, high: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Play each clip at a speed drawn uniformly in `[low, high]`, pitch included.

    Linear interpolation: enough for a change of some percent of audio whose energy lies well below
    the Nyquist frequency, and differentiable. What no longer fits in the batch is cut.

    Returns:
        The waveform `[B, S]` and the new lengths `[B]`.
    """
    batch, samples = waveform.shape
    speed = _uniform(low, high, batch, waveform, generator).double()
    new_lengths = (lengths.to(waveform.device) / speed).floor().long().clamp(1, samples)
    position = torch.arange(samples, device=waveform.device) * speed.unsqueeze(1)
    left = position.long().clamp(max=samples - 1)
    right = (left + 1).clamp(max=samples - 1)
    fraction = (position - left).clamp(0, 1).to(waveform.dtype)
    out = torch.lerp(waveform.gather(1, left), waveform.gather(1, right), fraction)
    out = out * _valid(new_lengths, samples)
    return out, torch.where(lengths.to(waveform.device) > 0, new_lengths, 0)


def random_gain(waveform: Tensor, decibels: float, generator: torch.Generator) -> Tensor:
    """Scale each clip by a gain drawn uniformly in `[-decibels, decibels]`."""
    gain = _uniform(-decibels, decibels, len(waveform), waveform, generator)
    return waveform * (10 ** (gain / 20)).unsqueeze(1).to(waveform.dtype)


def add_noise(
    waveform: Tensor,
    lengths: Tensor,
    probability: float,
    snr_decibels: tuple[float, float],
    generator: torch.Generator,
) -> Tensor:
    """Add white noise to some clips, at a signal-to-noise ratio drawn uniformly in the given range.

    Noise is relative to the power of the clip's valid part, and the padding stays zero.
    """
    lengths = lengths.to(waveform.device)
    snr = _uniform(*snr_decibels, len(waveform), waveform, generator)
    chosen = _uniform(0, 1, len(waveform), waveform, generator) < probability
    power = waveform.square().sum(1) / lengths.clamp(min=1)
    deviation = torch.sqrt(power / 10 ** (snr / 10)) * chosen
    noise = torch.randn(waveform.shape, generator=generator).to(waveform)
    return waveform + noise * deviation.unsqueeze(1) * _valid(lengths, waveform.shape[1])


def one_hot(target: Tensor, classes: int) -> Tensor:
    """Class indices `[B]` as fp32 rows `[B, classes]`; targets that are rows already pass."""
    if target.is_floating_point():
        return target
    return torch.nn.functional.one_hot(target, classes).float()


def mixup(
    waveform: Tensor,
    lengths: Tensor,
    target: Tensor,
    probability: float,
    generator: torch.Generator,
    alpha: float = 10.0,
) -> tuple[Tensor, Tensor]:
    """Mix clips with others of the batch, waveforms and labels with the same weight (AST's mixup).

    Each clip is chosen with `probability`; its partner is uniform over the batch; the weight is
    from Beta(alpha, alpha). Both lose their mean first, and the partner is cut or padded to the
    clip's own length.

    Args:
        waveform: `[B, S]`.
        lengths: Valid samples, `[B]`.
        target: fp32 `[B, classes]`.
        probability: Chance of a clip to be mixed.
        generator: Where the draws come from.
        alpha: Both parameters of the Beta distribution.
    """
    batch, samples = waveform.shape
    seed = int(torch.randint(2**62, (1,), generator=generator))
    weight = torch.from_numpy(np.random.default_rng(seed).beta(alpha, alpha, batch)).float()
    weight = torch.where(torch.rand(batch, generator=generator) < probability, weight, 1.0)
    weight = weight.to(waveform.device).unsqueeze(1)
    partner = torch.randint(batch, (batch,), generator=generator).to(waveform.device)

    lengths = lengths.to(waveform.device)
    valid = _valid(lengths, samples)
    mean = waveform.sum(1, keepdim=True) / lengths.clamp(min=1).unsqueeze(1)
    centred = (waveform - mean) * valid
    mixed = (weight * centred + (1 - weight) * centred[partner]) * valid
    # A clip that is not mixed stays bit for bit what it was.
    mixed = torch.where(weight < 1, mixed, waveform)
    return mixed, weight * target + (1 - weight) * target[partner]


def time_shift(features: Tensor, frames: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    """Move each clip later by up to `limit` frames, never so far that it leaves the window.

    Args:
        features: `[B, T, F]`.
        frames: Valid frames of each clip, `[B]`; a clip that fills the window does not move.
        limit: Largest shift in frames.
        generator: Where the draws come from.
    """
    batch, length, bins = features.shape
    room = (length - frames).clamp(0, limit)
    shift = _integers(room.cpu(), generator).to(features.device)
    source = torch.arange(length, device=features.device) - shift.unsqueeze(1)
    index = source.clamp(min=0).unsqueeze(2).expand(batch, length, bins)
    return features.gather(1, index).masked_fill((source < 0).unsqueeze(2), 0.0)


def spec_augment(
    features: Tensor,
    frequency_width: int,
    time_width: int,
    generator: torch.Generator,
) -> Tensor:
    """SpecAugment: one band of mel bins and one run of frames of every clip become 0.

    A mask's width is uniform in `[0, width]`, its place uniform over the spectrogram.

    Args:
        features: `[B, T, F]`.
        frequency_width: Widest mask in mel bins.
        time_width: Widest mask in frames.
        generator: Where the draws come from.

    Raises:
        ValueError: A width is negative or wider than the spectrogram.
    """
    batch, length, bins = features.shape
    masked = torch.zeros(batch, length, bins, dtype=torch.bool, device=features.device)
    for name, width, size, shape in (
        ("frequency_width", frequency_width, bins, (batch, 1, bins)),
        ("time_width", time_width, length, (batch, length, 1)),
    ):
        if not 0 <= width <= size:
            raise ValueError(f"{name} must be in [0, {size}], not {width}")
        widths = _integers(torch.full((batch,), width), generator)
        starts = _integers(size - widths, generator)
        at = torch.arange(size)
        mask = (at >= starts.unsqueeze(1)) & (at < (starts + widths).unsqueeze(1))
        masked |= mask.view(shape).to(features.device)
    return features.masked_fill(masked, 0.0)


@dataclass(frozen=True)
class Augment:
    """The augmentations of a training run; every default is "off".

    Attributes:
        speed: Speed changes by up to this share, each way (0.1: 0.9 to 1.1).
        gain: Gain in dB, each way.
        noise: Chance of a clip to get white noise, 10 to 40 dB below it.
        mixup: Chance of a clip to be mixed with another.
        shift: Largest shift in frames inside the window.
        frequency_mask: Widest SpecAug mask in mel bins.
        time_mask: Widest SpecAug mask in frames.
    """

    speed: float = 0.0
    gain: float = 0.0
    noise: float = 0.0
    mixup: float = 0.0
    shift: int = 0
    frequency_mask: int = 0
    time_mask: int = 0

    def __post_init__(self) -> None:
        for name in ("noise", "mixup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a probability, not {getattr(self, name)}")
        if not 0 <= self.speed < 1:
            raise ValueError(f"speed must be in [0, 1), not {self.speed}")
        for name in ("gain", "shift", "frequency_mask", "time_mask"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must not be negative, it is {value}")

    def waveform(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Augment the audio of a batch whose targets are fp32 rows."""
        waveform, lengths, target = batch
        if self.speed:
            low, high = 1 - self.speed, 1 + self.speed
            waveform, lengths = change_speed(waveform, lengths, low, high, generator)
        if self.gain:
            waveform = random_gain(waveform, self.gain, generator)
        if self.mixup:
            waveform, target = mixup(waveform, lengths, target, self.mixup, generator)
        if self.noise:
            waveform = add_noise(waveform, lengths, self.noise, (10.0, 40.0), generator)
        return Batch(waveform, lengths, target)

    def features(self, features: Tensor, frames: Tensor, generator: torch.Generator) -> Tensor:
        """Augment the filterbank of a batch; `frames` `[B]` are the valid ones of each clip."""
        if self.shift:
            features = time_shift(features, frames, self.shift, generator)
        if self.frequency_mask or self.time_mask:
            features = spec_augment(features, self.frequency_mask, self.time_mask, generator)
        return features
