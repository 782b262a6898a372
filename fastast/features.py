"""Waveform to log-mel filterbank: batched, on the waveform's device, equal to Kaldi's.

The published AST makes its input with `torchaudio.compliance.kaldi.fbank`, clip after clip.
`Fbank` computes the same numbers for a batch, more than twice as fast, without torchaudio.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastast_kernels.backends import COMPILED, forced

FRAME_LENGTH_MS = 25.0
FRAME_SHIFT_MS = 10.0
LOWEST_FREQUENCY = 20.0
PREEMPHASIS = 0.97
FLOOR = torch.finfo(torch.float32).eps

# Filters multiplied at a time: neighbours share their few FFT bins.
FILTERS_PER_BAND = 32
# Frames that the kernels work on at a time: half a megabyte, and as much of spectrum, stay in L2.
FRAMES_PER_BLOCK = 256


class FrontEnd(nn.Module):
    """What makes a network's features: waveform `[B, samples]` to `[B, target_length, n_mels]`.

    Attributes:
        sample_rate: Of the waveform it takes, in Hz.
        target_length: Frames given back.
        window_length: Samples of a frame.
        hop_length: Samples from one frame to the next.
        n_mels: Mel filters, evenly spaced on Kaldi's mel scale.
        low_hz: Where the first one begins.
        high_hz: Where the last one ends.
        padding: What `log_mel` has where a clip has ended, and SpecAug where it masks.
    """

    sample_rate: int
    target_length: int
    window_length: int
    hop_length: int
    n_mels: int
    low_hz: float
    high_hz: float
    padding: float = 0.0

    def log_mel(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Log-mel energies of clips of which `lengths` `[B]` samples are valid, not normalised."""
        raise NotImplementedError

    def normalize(self, log_mel: Tensor) -> Tensor:
        """The features of log-mel energies."""
        raise NotImplementedError

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Both at once."""
        return self.normalize(self.log_mel(waveform, lengths))


class Fbank(FrontEnd):
    """Log-mel filterbank with AST's parameters: `[B, samples]` to `[B, target_length, n_mels]`.

    Equal to `kaldi.fbank(wave - wave.mean(), htk_compat=True, sample_frequency=sample_rate,
    use_energy=False, window_type="hanning", num_mel_bins=n_mels, dither=0.0, frame_shift=10)` of
    every clip, zero-padded or cut to `target_length` frames and only then normalised to
    `(x - mean) / (2 * std)`, as the published AST does: padding is a log energy of zero, not a
    feature of zero.

    How it is computed. Each frame takes Kaldi's steps in Kaldi's order: its mean is removed, it
    is pre-emphasised, windowed, transformed. The steps are linear and could be one 400 x 514
    matrix, or fewer passes over the signal, but the logarithm of a small energy shows the
    rounding of every step: noise moves by more than 1e-3 when two of them are merged. In this
    order a CPU gives torchaudio's spectrum bit for bit; and the matrix product takes nine times
    as long as the FFT. The time is saved after it: real and imaginary parts are squared in place
    and added by the product with the filters, where each weight stands twice, instead of going
    through complex absolute values; and that product goes band by band over the bins that 32
    neighbouring filters cover, a quarter of the arithmetic. On a CPU, clips go one by one through
    buffers that stay in the cache, and of float32 what comes before the FFT and after it is done by
    two kernels (csrc/fbank.h) where they were built. The FFT is torch's in any case: the rounding
    of another one shows in the quiet bands beside a loud tone.

    Features are computed in float32 (in float64 for a float64 waveform), under autocast too and
    whatever dtype the module is cast to. On a CUDA device the product with the filters is done in
    float64, so that TF32 does not round it. (On a CPU that has AMX,
    `torch.set_float32_matmul_precision("medium")` lets PyTorch round it to bfloat16.)
    Differentiable, and traced whole by `torch.compile(fullgraph=True)`; both take the batch at
    once, with about 10 MB of temporaries for a 10-second clip, as a GPU does.

    Args:
        sample_rate: Samples per second of the waveform.
        n_mels: Number of mel filters, between 20 Hz and half the sample rate.
        target_length: Number of frames given back, 10 ms each.
        mean: Mean of the log-mel features of the training set; None with std for no
            normalisation.
        std: Their standard deviation; None with mean for no normalisation.

    Raises:
        TypeError: An argument is not a number of the right kind.
        ValueError: An argument is out of its range.
    """

    mel: Tensor

    def __init__(
        self,
        sample_rate: int = 16000,
        n_mels: int = 128,
        target_length: int = 1024,
        mean: float | None = -4.2677393,
        std: float | None = 4.5689974,
    ) -> None:
        super().__init__()
        self.sample_rate = _integer("sample_rate", sample_rate, 1000)
        self.n_mels = _integer("n_mels", n_mels, 4)
        self.target_length = _integer("target_length", target_length, 1)
        if (mean is None) != (std is None):
            raise ValueError(f"mean and std must both be numbers or both None: {mean} and {std}")
        if mean is not None and not math.isfinite(mean):
            raise ValueError(f"mean must be finite, got {mean}")
        if std is not None and not (math.isfinite(std) and std > 0):
            raise ValueError(f"std must be positive and finite, got {std}")
        self.mean, self.std = mean, std
        self.window_length = int(sample_rate * FRAME_LENGTH_MS * 0.001)
        self.hop_length = int(sample_rate * FRAME_SHIFT_MS * 0.001)
        self.fft_length = 1 << (self.window_length - 1).bit_length()
        self.low_hz, self.high_hz = LOWEST_FREQUENCY, sample_rate / 2
        filters = mel_filters(self.sample_rate, self.n_mels, self.fft_length)
        self._bands = _bands(filters)
        self._weights, self._spans = _spans(filters)
        self._window = torch.hann_window(
            self.window_length, periodic=False, dtype=torch.float32, device="cpu"
        )
        self.register_buffer("mel", filters, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fbank:
        """Follow `.to(device)` but not `.half()`: rounded filters give wrong features."""
        super()._apply(fn, recurse)
        filters = mel_filters(self.sample_rate, self.n_mels, self.fft_length)
        self.mel = filters.to(self.mel.device)
        return self

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return (
            f"sample_rate={self.sample_rate}, n_mels={self.n_mels}, "
            f"target_length={self.target_length}, mean={self.mean}, std={self.std}"
        )

    def frames(self, samples: int) -> int:
        """Number of windows that lie fully in `samples` samples, before padding or cutting."""
        if samples < self.window_length:
            return 0
        return 1 + (samples - self.window_length) // self.hop_length

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Normalised features: `normalize(log_mel(waveform, lengths))`.

        Args:
            waveform: Floating-point samples `[B, samples]` or `[samples]`; see `log_mel`.
            lengths: Integers `[B]`, the samples of every clip in a padded batch; see `log_mel`.

        Returns:
            `[B, target_length, n_mels]`, or `[target_length, n_mels]` for one clip.

        Raises:
            TypeError: As `log_mel`.
            ValueError: As `log_mel`.
        """
        return self._features(waveform, lengths, normalized=True)

    def log_mel(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Log-mel energies, padded with zeros or cut to `target_length`, not yet normalised.

        SpecAug belongs between this and `normalize`, where the published AST has it.

        Args:
            waveform: Floating-point samples `[B, samples]` or `[samples]`, on any device. NaN
                and Inf are not looked for, which would wait for the device: they spoil the
                features of their own clip.
            lengths: Integers `[B]`: the number of samples of every clip, where clips of different
                lengths are padded to one. Each clip then gives what it would give alone: its
                mean is over its own samples, and frames not fully in it are padding. Values are
                checked if `lengths` is on the CPU; a clip without a full window is all padding.

        Returns:
            Natural logarithms `[B, target_length, n_mels]`, or `[target_length, n_mels]` for one
            clip; float64 for a float64 waveform, else float32.

        Raises:
            TypeError: `waveform` is not a floating-point tensor or `lengths` not an integer one.
            ValueError: Wrong rank, shape or device, a clip shorter than one window of 25 ms, or a
                length greater than the waveform's.
        """
        return self._features(waveform, lengths, normalized=False)

    def normalize(self, log_mel: Tensor) -> Tensor:
        """`(log_mel - mean) / (2 * std)`, or a copy where mean and std are None; any shape."""
        return self._normalize_(log_mel.clone())

    def _normalize_(self, features: Tensor) -> Tensor:
        if self.mean is None or self.std is None:
            return features
        return features.sub_(self.mean).div_(2 * self.std)

    def _features(self, waveform: Tensor, lengths: Tensor | None, normalized: bool) -> Tensor:
        self._check(waveform, lengths)
        clips = waveform if waveform.dim() == 2 else waveform[None]
        if clips.dtype != torch.float64:
            clips = clips.float()
        recorded = torch.is_grad_enabled() and clips.requires_grad
        with torch.autocast(clips.device.type, enabled=False):
            if clips.device.type != "cpu" or recorded or torch.compiler.is_compiling():
                features = self._all_at_once(clips, lengths, normalized)
            else:
                features = self._one_by_one(clips, lengths, normalized)
        return features if waveform.dim() == 2 else features[0]

    def _all_at_once(self, clips: Tensor, lengths: Tensor | None, normalized: bool) -> Tensor:
        count = min(self.frames(clips.shape[1]), self.target_length)
        if lengths is None:
            mean = clips.mean(-1, keepdim=True)
        else:
            lengths = lengths.to(clips.device)[:, None]
            inside = torch.arange(clips.shape[1], device=clips.device) < lengths
            mean = torch.where(inside, clips, 0).sum(-1, keepdim=True) / lengths.clamp_min(1)
        windows = (clips - mean).unfold(-1, self.window_length, self.hop_length)[:, :count]
        buffer = windows.new_zeros(*windows.shape[:-1], self.fft_length)
        features = self._log_mel(windows, buffer, self._constants(clips))
        if lengths is not None:
            ends = torch.arange(count, device=clips.device) * self.hop_length + self.window_length
            features = torch.where((ends <= lengths)[..., None], features, 0)
        features = F.pad(features, (0, 0, 0, self.target_length - count))
        return self._normalize_(features) if normalized else features

    def _one_by_one(self, clips: Tensor, lengths: Tensor | None, normalized: bool) -> Tensor:
        samples = [clips.shape[1]] * len(clips) if lengths is None else lengths.tolist()
        counts = [min(self.frames(length), self.target_length) for length in samples]
        features = clips.new_empty(len(clips), self.target_length, self.n_mels)
        if COMPILED and clips.dtype == torch.float32 and forced() in (None, "cpp"):
            block = min(max(counts, default=0), FRAMES_PER_BLOCK)
            buffer = clips.new_empty(block, self.fft_length)
            compute: Callable[..., Tensor] = self._log_mel_in_kernels
        else:
            buffer = clips.new_zeros(max(counts, default=0), self.fft_length)
            compute = partial(self._log_mel, constants=self._constants(clips))
        for clip, length, count, rows in zip(clips, samples, counts, features, strict=True):
            clip = clip[:length]
            needed = clip[: (count - 1) * self.hop_length + self.window_length]
            windows = (needed - clip.mean()).unfold(0, self.window_length, self.hop_length)
            compute(windows, buffer[:count], out=rows[:count])
            rows[count:] = 0
            if normalized:
                self._normalize_(rows)
        return features

    def _constants(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """The window, and the filters with a row for each real and each imaginary part."""
        window = torch.hann_window(
            self.window_length, periodic=False, dtype=clips.dtype, device=clips.device
        )
        exact = torch.float64 if clips.device.type == "cuda" else clips.dtype
        return window, self.mel.to(clips.device, exact).repeat_interleave(2, 0)

    def _log_mel(
        self,
        windows: Tensor,
        buffer: Tensor,
        constants: tuple[Tensor, Tensor],
        out: Tensor | None = None,
    ) -> Tensor:
        """Windows `[..., count, window]` -> `[..., count, n_mels]`.

        The buffer `[..., count, fft]` is zero but for what an earlier call left in it. Its first
        column stays zero: there the window is zero, so a first sample needs no pre-emphasis.
        """
        window, mel = constants
        centred = windows - windows.mean(-1, keepdim=True)
        frames = buffer[..., 1 : self.window_length]
        frames.copy_(centred[..., 1:])
        frames.sub_(centred.mul_(PREEMPHASIS)[..., :-1]).mul_(window[1:])
        spectrum = torch.view_as_real(torch.fft.rfft(buffer)).flatten(-2).square_().to(mel.dtype)
        energies = [
            torch.matmul(
                spectrum[..., 2 * low : 2 * high],
                mel[2 * low : 2 * high, first:last],
                out=None if out is None else out[..., first:last],
            )
            for first, last, low, high in self._bands
        ]
        features = torch.cat(energies, -1).to(windows.dtype) if out is None else out
        return features.clamp_min_(FLOOR).log_()

    def _log_mel_in_kernels(self, windows: Tensor, buffer: Tensor, out: Tensor) -> Tensor:
        """As `_log_mel` of one clip in float32, in blocks that fit into the buffer."""
        kernels, means = torch.ops.fastast, windows.mean(-1)
        blocks = (t.split(len(buffer)) for t in (windows, means, out))
        for block, mean, rows in zip(*blocks, strict=True):
            frames = buffer[: len(block)]
            kernels.fbank_frames(block, mean, self._window, frames)
            kernels.log_mel(torch.fft.rfft(frames), self._weights, self._spans, FLOOR, rows)
        return out

    def _check(self, waveform: Tensor, lengths: Tensor | None) -> None:
        if not isinstance(waveform, Tensor) or not waveform.is_floating_point():
            raise TypeError(f"waveform must be a floating-point tensor, got {kind_of(waveform)}")
        if waveform.dim() not in (1, 2):
            raise ValueError(
                f"waveform must be [samples] or [batch, samples], got {list(waveform.shape)}"
            )
        samples = waveform.shape[-1]
        if samples < self.window_length:
            raise ValueError(f"waveform has {samples} samples, {self._minimum()}")
        if lengths is None:
            return
        if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"lengths must be an int64 or int32 tensor, got {kind_of(lengths)}")
        if waveform.dim() != 2 or lengths.shape != waveform.shape[:1]:
            raise ValueError(
                "lengths must be [batch] for a waveform [batch, samples], "
                f"got {list(lengths.shape)} for {list(waveform.shape)}"
            )
        if lengths.device.type not in ("cpu", waveform.device.type):
            raise ValueError(
                f"lengths must be on the CPU or with waveform on {waveform.device}, "
                f"got {lengths.device}"
            )
        if lengths.device.type != "cpu" or torch.compiler.is_compiling():
            return
        for clip, length in enumerate(lengths.tolist()):
            if length < self.window_length:
                raise ValueError(f"lengths[{clip}] is {length} samples, {self._minimum()}")
            if length > samples:
                raise ValueError(f"lengths[{clip}] is {length}, but waveform has {samples} samples")

    def _minimum(self) -> str:
        return (
            f"fewer than one window: at least {self.window_length} samples "
            f"({FRAME_LENGTH_MS:g} ms at {self.sample_rate} Hz) are needed"
        )


def mel_filters(
    sample_rate: int,
    n_mels: int,
    fft_length: int,
    low_hz: float = LOWEST_FREQUENCY,
    high_hz: float | None = None,
) -> Tensor:
    """Kaldi's mel filters: triangles on the scale `1127 ln(1 + f / 700)`.

    Computed as Kaldi does, in float32 on the CPU: a small weight is the difference of two large
    mel values, so that more exact filters would give other features.

    Args:
        sample_rate: Samples per second.
        n_mels: Number of filters.
        fft_length: Even number of samples in the FFT.
        low_hz: Where the first triangle begins.
        high_hz: Where the last one ends; None for half the sample rate.

    Returns:
        float32 `[fft_length // 2 + 1, n_mels]`; the last row, half the sample rate, is zero.
    """
    bins = torch.arange(fft_length // 2, device="cpu")
    mels = 1127.0 * (1.0 + sample_rate / fft_length * bins / 700.0).log()
    lowest, highest = (
        1127.0 * math.log(1.0 + frequency / 700.0)
        for frequency in (low_hz, sample_rate / 2 if high_hz is None else high_hz)
    )
    width = (highest - lowest) / (n_mels + 1)
    left, centre, right = (
        lowest + (torch.arange(n_mels, device="cpu") + shift) * width for shift in (0.0, 1.0, 2.0)
    )
    rising = (mels[:, None] - left) / (centre - left)
    falling = (right - mels[:, None]) / (right - centre)
    return F.pad(torch.minimum(rising, falling).clamp_min(0.0), (0, 0, 0, 1))


def _bands(filters: Tensor) -> list[tuple[int, int, int, int]]:
    """Groups of filters and the FFT bins they cover: (first, last, low, high), ends excluded."""
    bands = []
    for first in range(0, filters.shape[1], FILTERS_PER_BAND):
        group = filters[:, first : first + FILTERS_PER_BAND]
        covered = group.any(1).nonzero().flatten().tolist() or [0]
        bands.append((first, first + group.shape[1], covered[0], covered[-1] + 1))
    return bands


def _spans(filters: Tensor) -> tuple[Tensor, Tensor]:
    """The filters' weights without the zeros around them, as csrc/fbank.h wants them.

    Returns:
        Weights float32 `[total]`, filter after filter, and int32 `[n_mels, 3]`: the first bin of
        each, how many, and where its weights begin. A filter too narrow for any bin has one with
        a weight of zero, so that a frame with NaN is all NaN.
    """
    weights, spans, begin = [], [], 0
    for column in filters.T:
        covered = column.nonzero().flatten().tolist() or [0]
        weights.append(column[covered[0] : covered[-1] + 1])
        spans.append([covered[0], len(weights[-1]), begin])
        begin += len(weights[-1])
    return torch.cat(weights), torch.tensor(spans, dtype=torch.int32, device="cpu")


def _integer(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def kind_of(value: object) -> str:
    """What a value is, for an error: a tensor's dtype, else the name of its type."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
