"""The log-mel front end of EfficientAT and PaSST, which listen at 32 kHz, for 16 kHz audio."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastast.features import PREEMPHASIS, FrontEnd, kind_of, mel_filters

__all__ = ["Mel32k"]

RATE = 16000
FFT_LENGTH, WINDOW_LENGTH, HOP_LENGTH = 1024, 800, 320  # in samples at 32 kHz
LOW_HZ, HIGH_HZ = 0.0, 15000.0
OFFSET = 1e-5  # added to the energy: digital silence is log(1e-5) = -11.5
# Close to soxr's low-pass at its high quality: flat to 7.3 kHz, below -120 dB from 8 kHz on. The
# networks listen above 8 kHz too: a half-band filter, which lets images through there, moves
# mn04's embeddings of ESC-50 by 6 % of their length (this one by 0.5 % at most, of fold 1).
CUTOFF = 0.957  # at -6 dB, as a part of 8 kHz
HALF_TAPS = 96  # input samples on each side
KAISER_BETA = 12.0


class Mel32k(FrontEnd):
    """Log-mel features of 16 kHz audio as EfficientAT and PaSST make them of 32 kHz audio.

    The waveform is upsampled to 32 kHz by a Kaiser-windowed sinc (nothing is above 8 kHz then,
    and the upper filters see silence), pre-emphasised, `y[t] = x[t + 1] - 0.97 x[t]`, and cut
    into frames of 1024 samples every 320, centred, with reflection at both ends. A frame takes a
    symmetric Hann window of 800 samples, the power spectrum and Kaldi's mel filters from 0 to
    15 kHz; features are `log(energy + 1e-5)`, normalised to `(x - mean) / (2 * std)`, which with
    the values of both papers is `(x + 4.5) / 5`.

    A frame is 10 ms as `fastast.Fbank`'s: frame `i` is centred on sample `160 i` here and on
    `160 i + 200` there, so that a mask over frames is over the same sound to within 12.5 ms.

    Padding is silence, `log(1e-5)`: these networks were trained on clips padded with zeros. It is
    not 0, which `Fbank` has in its place and which `normalize` would map to 0.9, a loud frame
    (that is what SpecAug writes, here as in the original).

    Computed in float32 (float64 for a float64 waveform), under autocast too; on a CUDA device
    the interpolation and the product with the filters are done in float64, so that TF32 does not
    round them. Differentiable.

    Args:
        target_length: Number of frames given back, 10 ms each.
        mean: Subtracted in normalisation.
        std: Normalisation divides by twice this.
        n_mels: Number of mel filters.

    Attributes:
        sample_rate: Of the waveform it takes: 16000.
        window_length: 400 samples of that waveform.
        hop_length: 160 samples of that waveform.
        low_hz: Where the first mel filter begins.
        high_hz: Where the last one ends.

    Raises:
        ValueError: An argument is out of its range.
    """

    mel: Tensor
    window: Tensor
    taps: Tensor

    def __init__(
        self, target_length: int = 1000, mean: float = -4.5, std: float = 2.5, n_mels: int = 128
    ) -> None:
        super().__init__()
        for name, value, least in (("target_length", target_length, 1), ("n_mels", n_mels, 4)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not math.isfinite(mean):
            raise ValueError(f"mean must be finite, got {mean}")
        if not (math.isfinite(std) and std > 0):
            raise ValueError(f"std must be positive and finite, got {std}")
        self.target_length, self.n_mels = target_length, n_mels
        self.mean, self.std = mean, std
        self.sample_rate = RATE
        self.window_length, self.hop_length = WINDOW_LENGTH // 2, HOP_LENGTH // 2
        self.low_hz, self.high_hz = LOW_HZ, HIGH_HZ
        self.padding = math.log(OFFSET)
        for name, constant in self._exact().items():
            self.register_buffer(name, constant, persistent=False)

    def _exact(self) -> dict[str, Tensor]:
        """The constants, on the CPU: filters as Kaldi computes them, the others in float64."""
        taps = torch.arange(-2 * HALF_TAPS - 1, 2 * HALF_TAPS + 1, dtype=torch.float64) / 2
        kaiser = torch.special.i0(KAISER_BETA * (1 - (taps / HALF_TAPS) ** 2).clamp_min(0).sqrt())
        taps = torch.sinc(CUTOFF * taps) * kaiser
        taps[0] = 0  # beyond the window: there for two rows of the same length
        margin = (FFT_LENGTH - WINDOW_LENGTH) // 2
        window = torch.hann_window(WINDOW_LENGTH, periodic=False, dtype=torch.float64)
        return {
            "mel": mel_filters(2 * RATE, self.n_mels, FFT_LENGTH, LOW_HZ, HIGH_HZ),
            "window": F.pad(window, (margin, margin)),
            # [2, 1, taps]: for a sample in its place, and for the one half a step after it.
            "taps": (2 * taps / taps.sum()).unflatten(0, (-1, 2)).flip(1).t()[:, None].contiguous(),
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Mel32k:
        """Follow `.to(device)` but not `.half()`: rounded constants give wrong features."""
        super()._apply(fn, recurse)
        for name, constant in self._exact().items():
            setattr(self, name, constant.to(getattr(self, name).device))
        return self

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"target_length={self.target_length}, mean={self.mean}, std={self.std}"

    def frames(self, samples: int) -> int:
        """Number of frames of `samples` samples at 16 kHz, before padding or cutting."""
        return 0 if samples < self.window_length else 1 + (2 * samples - 1) // HOP_LENGTH

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Normalised features: `normalize(log_mel(waveform, lengths))`."""
        return self.normalize(self.log_mel(waveform, lengths))

    def normalize(self, log_mel: Tensor) -> Tensor:
        """`(log_mel - mean) / (2 * std)`; any shape."""
        return (log_mel - self.mean) / (2 * self.std)

    def log_mel(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Log-mel energies, padded with silence or cut to `target_length`, not yet normalised.

        Args:
            waveform: Floating-point samples at 16 kHz, `[B, samples]`, on any device.
            lengths: Integers `[B]`: the number of samples of every clip, where clips of different
                lengths are padded to one. Each clip then gives what it would give alone: it is
                reflected at its own end, and frames centred after it are padding. Values are
                checked if `lengths` is on the CPU; a clip shorter than a window is all padding.

        Returns:
            Natural logarithms `[B, target_length, n_mels]`, float64 for a float64 waveform, else
            float32; `log(1e-5)` where there is padding.

        Raises:
            TypeError: `waveform` is not a floating-point tensor or `lengths` not an integer one.
            ValueError: Wrong rank or shape, fewer samples than one window of 25 ms, or a length
                greater than the waveform's.
        """
        self._check(waveform, lengths)
        clips = waveform if waveform.dtype == torch.float64 else waveform.float()
        count = min(self.frames(clips.shape[1]), self.target_length)
        with torch.autocast(clips.device.type, enabled=False):
            if lengths is None:
                samples = torch.full((len(clips), 1), clips.shape[1], device=clips.device)
            else:
                samples = lengths.to(clips.device)[:, None]
                inside = torch.arange(clips.shape[1], device=clips.device) < samples
                clips = torch.where(inside, clips, 0)
            double = self._upsample(clips)
            emphasised = double[:, 1:] - PREEMPHASIS * double[:, :-1]
            windows = self._reflected(emphasised, 2 * samples - 1, count)
            windows = windows.unfold(1, FFT_LENGTH, HOP_LENGTH)[:, :count]
            spectrum = torch.fft.rfft(windows * self.window.to(clips.dtype)).abs().square()
            exact = torch.float64 if clips.is_cuda else clips.dtype
            energies = spectrum.to(exact) @ self.mel.to(exact)
            log_mel = (energies + OFFSET).log().to(clips.dtype)
        starts = torch.arange(count, device=clips.device) * self.hop_length
        heard = (starts < samples) & (samples >= self.window_length)
        log_mel = torch.where(heard[..., None], log_mel, math.log(OFFSET))
        return F.pad(log_mel, (0, 0, 0, self.target_length - count), value=math.log(OFFSET))

    def _upsample(self, clips: Tensor) -> Tensor:
        """`[B, S]` at 16 kHz to `[B, 2 S]` at 32 kHz; outside, the waveform is zero."""
        exact = torch.float64 if clips.is_cuda else clips.dtype
        both = F.conv1d(clips.to(exact)[:, None], self.taps.to(exact), padding=HALF_TAPS)
        return both.transpose(1, 2).flatten(1).to(clips.dtype)

    @staticmethod
    def _reflected(signal: Tensor, lengths: Tensor, count: int) -> Tensor:
        """`[B, n]`, reflected at 0 and at the end of each, enough for `count` centred frames."""
        last = lengths - 1
        wanted = FFT_LENGTH + (count - 1) * HOP_LENGTH
        places = torch.arange(wanted, device=signal.device) - FFT_LENGTH // 2
        places = last - (last - places.abs()).abs()
        return signal.gather(1, places.clamp(0, signal.shape[1] - 1))

    def _check(self, waveform: Tensor, lengths: Tensor | None) -> None:
        if not isinstance(waveform, Tensor) or not waveform.is_floating_point():
            raise TypeError(f"waveform must be a floating-point tensor, got {kind_of(waveform)}")
        if waveform.dim() != 2:
            raise ValueError(f"waveform must be [batch, samples], got {list(waveform.shape)}")
        if waveform.shape[1] < self.window_length:
            raise ValueError(
                f"waveform has {waveform.shape[1]} samples, fewer than one window: at least "
                f"{self.window_length} (25 ms at {RATE} Hz) are needed"
            )
        if lengths is None:
            return
        if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"lengths must be an int64 or int32 tensor, got {kind_of(lengths)}")
        if lengths.shape != waveform.shape[:1]:
            raise ValueError(f"lengths must be [batch={len(waveform)}], got {list(lengths.shape)}")
        if lengths.device.type == "cpu" and len(lengths) and lengths.max() > waveform.shape[1]:
            raise ValueError(
                f"lengths must be at most the waveform's {waveform.shape[1]} samples, "
                f"got {int(lengths.max())}"
            )
