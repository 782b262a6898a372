"""Training-time augmentation of a batch, on any device, the same for every network that sees it.

What is random is drawn first, for the whole batch of a step and on the CPU (`Augment.draw`); what
is done with it is a pure function. So the same seed gives the same augmentation on every device,
on one process or on eight that share the batch (each takes its rows of the draws), and a teacher
with another front end than the student's gets what the student gets: consistent teaching, as CMKD
(arXiv 2203.06760) has it.

Waveform functions take zero-padded clips `[B, S]` with their `lengths` `[B]`; feature functions
take `[B, T, F]` filterbanks of log-mel energies that are not normalised (`Fbank.log_mel`), as in
AST: what is masked becomes what padding is in them, 0 in AST's. Each front end has its own: for a
network that was never trained with masks silence is silence, and 0 the loudest sound there is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastast.data import Batch
from fastast.features import FrontEnd

__all__ = [
    "Augment",
    "Draws",
    "add_noise",
    "apply_gain",
    "change_speed",
    "mask",
    "mixup",
    "one_hot",
    "same_bands",
    "time_shift",
]

MEL_BREAK = 700.0  # Hz, of the mel scale that Kaldi uses: 1127 ln(1 + f / 700)
SNR_DECIBELS = (10.0, 40.0)
MIXUP_ALPHA = 10.0


def _valid(lengths: Tensor, samples: int) -> Tensor:
    """True `[B, S]` where a sample belongs to the clip and not to its padding."""
    lengths = lengths.unsqueeze(1)
    return torch.arange(samples, device=lengths.device) < lengths


def _integers(draw: Tensor, high: Tensor | int) -> Tensor:
    """Uniform numbers in [0, 1) as integers in `[0, high]`, ends included."""
    high = torch.as_tensor(high, device=draw.device)
    return torch.minimum((draw * (high + 1)).long(), high.long())


def _seeded(seed: Tensor) -> torch.Generator:
    return torch.Generator().manual_seed(int(seed))


# ---------------------------------------------------------------------------------------- waveforms


def change_speed(waveform: Tensor, lengths: Tensor, speed: Tensor) -> tuple[Tensor, Tensor]:
    """Play each clip at its own speed, pitch included.

    Linear interpolation: enough for a change of some percent of audio whose energy lies well below
    the Nyquist frequency, and differentiable. What no longer fits in the batch is cut.

    Args:
        waveform: `[B, S]`.
        lengths: Valid samples, `[B]`.
        speed: Factors `[B]`; 1 leaves a clip as it is.

    Returns:
        The waveform `[B, S]` and the new lengths `[B]`.
    """
    samples = waveform.shape[1]
    lengths = lengths.to(waveform.device)
    speed = speed.to(waveform.device, torch.float64)
    new_lengths = (lengths / speed).floor().long().clamp(1, samples)
    position = torch.arange(samples, device=waveform.device) * speed.unsqueeze(1)
    left = position.long().clamp(max=samples - 1)
    right = (left + 1).clamp(max=samples - 1)
    fraction = (position - left).clamp(0, 1).to(waveform.dtype)
    out = torch.lerp(waveform.gather(1, left), waveform.gather(1, right), fraction)
    out = out * _valid(new_lengths, samples)
    return out, torch.where(lengths > 0, new_lengths, 0)


def apply_gain(waveform: Tensor, decibels: Tensor) -> Tensor:
    """Scale each clip `[B, S]` by its gain in dB, `[B]`."""
    return waveform * (10 ** (decibels / 20)).unsqueeze(1).to(waveform)


def add_noise(waveform: Tensor, lengths: Tensor, snr: Tensor, seeds: Tensor) -> Tensor:
    """Add white noise at a signal-to-noise ratio of `snr` dB `[B]`; infinity adds none.

    Noise is relative to the power of the clip's valid part, and the padding stays zero. A clip's
    noise comes from its own seed, whatever batch the clip is in.
    """
    lengths = lengths.to(waveform.device)
    out = waveform.clone()
    for i in snr.isfinite().nonzero().flatten().tolist():
        length = int(lengths[i])
        deviation = waveform[i, :length].square().mean().sqrt() * 10 ** (-float(snr[i]) / 20)
        noise = torch.randn(length, generator=_seeded(seeds[i]))
        out[i, :length] += noise.to(waveform) * deviation
    return out


def one_hot(target: Tensor, classes: int) -> Tensor:
    """Class indices `[B]` as fp32 rows `[B, classes]`; targets that are rows already pass."""
    if target.is_floating_point():
        return target
    return torch.nn.functional.one_hot(target, classes).float()


def mixup(batch: Batch, partner: Batch, weight: Tensor) -> Batch:
    """Mix clips with others, waveforms and labels with the same weight (AST's mixup).

    Both lose their mean first, and the partner is cut or padded to the clip's own length.

    Args:
        batch: Clips, targets fp32 `[B, classes]`.
        partner: What each is mixed with, likewise.
        weight: Share of the clip itself, `[B]`; with 1 it stays bit for bit what it was.
    """
    waveform, lengths, target = batch
    lengths = lengths.to(waveform.device)
    share = weight.to(waveform).unsqueeze(1)
    valid = _valid(lengths, waveform.shape[1])

    def centred(clips: Tensor, lengths: Tensor) -> Tensor:
        lengths = lengths.to(clips.device)
        mean = clips.sum(1, keepdim=True) / lengths.clamp(min=1).unsqueeze(1)
        return (clips - mean) * _valid(lengths, clips.shape[1])

    own, other = centred(waveform, lengths), centred(partner.waveform, partner.lengths)
    mixed = torch.where(share < 1, (share * own + (1 - share) * other) * valid, waveform)
    share = share.to(target)
    return Batch(mixed, lengths, share * target + (1 - share) * partner.target)


# ----------------------------------------------------------------------------------------- features


def time_shift(features: Tensor, shift: Tensor, fill: float = 0.0) -> Tensor:
    """Move each clip `[T, F]` of `[B, T, F]` later by `shift` `[B]` frames; `fill` comes before."""
    batch, length, bins = features.shape
    source = torch.arange(length, device=features.device) - shift.to(features.device).unsqueeze(1)
    index = source.clamp(min=0).unsqueeze(2).expand(batch, length, bins)
    return features.gather(1, index).masked_fill((source < 0).unsqueeze(2), fill)


def mask(features: Tensor, bands: Tensor, runs: Tensor, fill: float = 0.0) -> Tensor:
    """SpecAugment: one band of mel bins and one run of frames of every clip become `fill`.

    Args:
        features: `[B, T, F]`.
        bands: First bin and the one after the last, int `[B, 2]`; equal ones mask nothing.
        runs: First frame and the one after the last, int `[B, 2]`.
        fill: Their value.
    """
    _, length, bins = features.shape

    def inside(ends: Tensor, count: int) -> Tensor:
        at = torch.arange(count, device=features.device)
        ends = ends.to(features.device)
        return (at >= ends[:, :1]) & (at < ends[:, 1:])

    masked = inside(bands, bins).unsqueeze(1) | inside(runs, length).unsqueeze(2)
    return features.masked_fill(masked, fill)


def same_bands(bands: Tensor, reference: FrontEnd, front_end: FrontEnd) -> Tensor:
    """The bins of one front end that cover the frequencies of another's.

    Args:
        bands: First bin and the one after the last of `reference`, int `[B, 2]`.
        reference: Front end with `n_mels`, `low_hz` and `high_hz`; bins are evenly spaced in mel.
        front_end: Likewise.
    """
    if reference is front_end:
        return bands

    def scale(of: FrontEnd) -> tuple[float, float]:
        low, high = (math.log1p(hertz / MEL_BREAK) for hertz in (of.low_hz, of.high_hz))
        return low, (high - low) / (of.n_mels + 1)

    (low, step), (low_there, step_there) = scale(reference), scale(front_end)
    # Bin i is centred at i + 1 steps; an edge lies half a step below it.
    edges = low + (bands + 0.5) * step
    there = ((edges - low_there) / step_there - 0.5).round().long()
    return there.clamp(0, front_end.n_mels)


# ------------------------------------------------------------------------------------- the whole


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch, one row a clip, on the CPU.

    Those in [0, 1) become frames and bins when it is known of how many.

    Attributes:
        place: Where a clip that is longer than the window is cut, [0, 1), `[B]`.
        speed: Factors `[B]`.
        gain: Decibels `[B]`.
        snr: Decibels `[B]`, infinite for no noise.
        seed: Of each clip's noise, int64 `[B]`.
        weight: Of the clip itself in mixup, `[B]`; 1 is not mixed.
        partner: Which clip of the batch it is mixed with, int64 `[B]`.
        shift: [0, 1) `[B]`.
        band: Width and place of the masked mel bins, [0, 1) `[B, 2]`.
        run: Width and place of the masked frames, [0, 1) `[B, 2]`.
        roll: [0, 1) `[B]`.
        level: Of the noise on normalised features, [0, 1) `[B]`.
    """

    place: Tensor
    speed: Tensor
    gain: Tensor
    snr: Tensor
    seed: Tensor
    weight: Tensor
    partner: Tensor
    shift: Tensor
    band: Tensor
    run: Tensor
    roll: Tensor
    level: Tensor

    def __getitem__(self, rows: Any) -> Draws:
        return Draws(*(getattr(self, field.name)[rows] for field in fields(self)))

    def __len__(self) -> int:
        return len(self.place)


@dataclass(frozen=True)
class Augment:
    """The augmentations of a training run; every default is "off".

    Attributes:
        speed: Speed changes by up to this share, each way (0.1: 0.9 to 1.1).
        gain: Gain in dB, each way.
        noise: Chance of a clip to get white noise, 10 to 40 dB below it.
        mixup: Chance of a clip to be mixed with another, with a weight from Beta(10, 10).
        shift: Largest shift in frames inside the window.
        frequency_mask: Widest SpecAug mask in mel bins.
        time_mask: Widest SpecAug mask in frames.
        roll: Largest circular shift of the features in frames, each way.
        feature_noise: Largest uniform noise on the normalised features.
    """

    speed: float = 0.0
    gain: float = 0.0
    noise: float = 0.0
    mixup: float = 0.0
    shift: int = 0
    frequency_mask: int = 0
    time_mask: int = 0
    roll: int = 0
    feature_noise: float = 0.0

    def __post_init__(self) -> None:
        for name in ("noise", "mixup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a probability, not {getattr(self, name)}")
        if not 0 <= self.speed < 1:
            raise ValueError(f"speed must be in [0, 1), not {self.speed}")
        for name in ("gain", "shift", "frequency_mask", "time_mask", "roll", "feature_noise"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must not be negative, it is {value}")

    @property
    def off(self) -> bool:
        """Nothing is augmented: a clip is the same every time."""
        return self == Augment()

    def draw(self, count: int, generator: torch.Generator) -> Draws:
        """What is random about a batch of `count` clips."""

        def uniform(*shape: int) -> Tensor:
            return torch.rand(count, *shape, generator=generator, dtype=torch.float64)

        def between(low: float, high: float) -> Tensor:
            return low + (high - low) * uniform()

        snr = between(*SNR_DECIBELS)
        seed = torch.randint(2**62, (count,), generator=generator)
        # torch has no Beta distribution that takes a generator.
        numpy = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        weight = torch.from_numpy(numpy.beta(MIXUP_ALPHA, MIXUP_ALPHA, count))
        return Draws(
            place=uniform() if not self.off else torch.zeros(count, dtype=torch.float64),
            speed=between(1 - self.speed, 1 + self.speed),
            gain=between(-self.gain, self.gain),
            snr=torch.where(uniform() < self.noise, snr, math.inf),
            seed=seed,
            weight=torch.where(uniform() < self.mixup, weight, 1.0),
            partner=torch.randint(count, (count,), generator=generator),
            shift=uniform(),
            band=uniform(2),
            run=uniform(2),
            roll=uniform(),
            level=uniform(),
        )

    def waveform(self, batch: Batch, draws: Draws, partner: Batch | None = None) -> Batch:
        """Augment the audio of a batch.

        Args:
            batch: Clips, targets fp32 rows.
            draws: A row a clip.
            partner: The clips `draws.partner`, needed with mixup.
        """
        if self.mixup:
            if partner is None:
                raise ValueError("partner must be given where mixup is on")
            batch = mixup(batch, partner, draws.weight)
        waveform, lengths, target = batch
        if self.speed:
            waveform, lengths = change_speed(waveform, lengths, draws.speed)
        if self.gain:
            waveform = apply_gain(waveform, draws.gain)
        if self.noise:
            waveform = add_noise(waveform, lengths, draws.snr, draws.seed)
        return Batch(waveform, lengths, target)

    def masks(self, draws: Draws, front_end: FrontEnd) -> tuple[Tensor, Tensor]:
        """The masked bins and frames of each clip, int `[B, 2]` each, of a front end.

        A mask's width is uniform in `[0, widest]`, its place uniform over the spectrogram.
        """
        ends = []
        for name, draw, size in (
            ("frequency_mask", draws.band, front_end.n_mels),
            ("time_mask", draws.run, front_end.target_length),
        ):
            if getattr(self, name) > size:
                raise ValueError(f"{name} must be in [0, {size}], not {getattr(self, name)}")
            width = _integers(draw[:, 0], getattr(self, name))
            start = _integers(draw[:, 1], size - width)
            ends.append(torch.stack([start, start + width], 1))
        return ends[0], ends[1]

    def features(
        self,
        waveform: Tensor,
        lengths: Tensor,
        draws: Draws,
        front_end: FrontEnd,
        reference: FrontEnd | None = None,
    ) -> Tensor:
        """Augmented, normalised features `[B, T, F]` of a batch's audio, for one network.

        Args:
            waveform: `[B, S]`, after `Augment.waveform`.
            lengths: Valid samples, `[B]`.
            draws: A row a clip.
            front_end: The network's own: `log_mel`, `normalize`, `hop_length`, `n_mels`, ...
            reference: The front end whose bins and frames the options count, that of the student;
                by default `front_end`. Another front end has the same frequencies and times masked.
        """
        reference = front_end if reference is None else reference
        lengths = lengths.clamp(min=front_end.window_length)
        features = front_end.log_mel(waveform, lengths)
        if self.shift:
            frames = (lengths - reference.window_length) // reference.hop_length + 1
            room = (reference.target_length - frames).clamp(0, self.shift)
            shift = _integers(draws.shift.to(room.device), room)
            features = time_shift(features, shift, front_end.padding)
        if self.frequency_mask or self.time_mask:
            bands, runs = self.masks(draws, reference)
            bands = same_bands(bands, reference, front_end)
            features = mask(features, bands, runs, front_end.padding)
        features = front_end.normalize(features)
        if self.feature_noise:
            noise = torch.stack(
                [
                    torch.rand(features.shape[1:], generator=_seeded(s)) * (self.feature_noise * u)
                    for s, u in zip(draws.seed, draws.level, strict=True)
                ]
            )
            features = features + noise.to(features)
        if self.roll:
            by = _integers(draws.roll, 2 * self.roll) - self.roll
            length, device = features.shape[1], features.device
            at = (torch.arange(length, device=device) - by.to(device).unsqueeze(1)) % length
            features = features.gather(1, at.unsqueeze(2).expand_as(features))
        return features
