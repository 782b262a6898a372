"""The 32 kHz front end, against torchaudio's filters, soxr's resampler and torch.stft."""

from __future__ import annotations

import math

import numpy as np
import pytest
import soxr
import torch

from fastast import Fbank
from fastast.data import AudioDataset
from fastast.features import mel_filters
from fastast.teachers.mel32k import Mel32k

SILENCE = math.log(1e-5)


def noise(samples: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(samples, generator=generator, dtype=dtype)


def upsampled(x: np.ndarray) -> np.ndarray:
    """Every output sample by the definition of a Kaiser-windowed sinc, one by one."""
    half, cutoff = 96, 0.957
    out = np.zeros(2 * len(x))
    for n in range(len(out)):
        near = np.arange(max(-(-(n - 2 * half) // 2), 0), min((n + 2 * half) // 2 + 1, len(x)))
        distance = n / 2 - near
        kaiser = np.i0(12 * np.sqrt(1 - (distance / half) ** 2)) / np.i0(12.0)
        out[n] = np.sum(x[near] * cutoff * np.sinc(cutoff * distance) * kaiser)
    return out


def original(x: np.ndarray, frames: int) -> torch.Tensor:
    """EfficientAT's steps on one clip, with torch's own STFT."""
    double = torch.from_numpy(upsampled(x))
    double = double[1:] - 0.97 * double[:-1]
    window = torch.hann_window(800, periodic=False, dtype=torch.float64)
    stft = torch.stft(double, 1024, 320, 800, window, center=True, return_complex=True)
    filters = mel_filters(32000, 128, 1024, 0.0, 15000.0).double()
    log_mel = ((stft.abs() ** 2).t() @ filters + 1e-5).log()
    return log_mel[:frames]


def test_filters_are_kaldis() -> None:
    kaldi = pytest.importorskip(
        "torchaudio.compliance.kaldi", reason="torchaudio (dev dependency) is not installed"
    )
    banks, _ = kaldi.get_mel_banks(128, 1024, 32000, 0.0, 15000.0, 100.0, -500.0, 1.0)
    expected = torch.nn.functional.pad(banks, (0, 1)).t()
    torch.testing.assert_close(Mel32k().mel, expected, rtol=0, atol=1e-7)
    banks, _ = kaldi.get_mel_banks(128, 512, 16000, 20.0, 0.0, 100.0, -500.0, 1.0)
    torch.testing.assert_close(Fbank().mel[:-1], banks.t(), rtol=0, atol=1e-7)


def test_the_contract_of_a_front_end() -> None:
    mel = Mel32k(target_length=50)
    assert (mel.sample_rate, mel.window_length, mel.hop_length) == (16000, 400, 160)
    assert (mel.n_mels, mel.low_hz, mel.high_hz, mel.target_length) == (128, 0.0, 15000.0, 50)
    assert not list(mel.parameters())
    assert not mel.state_dict()
    ast = Fbank(sample_rate=8000)
    assert (ast.low_hz, ast.high_hz) == (20.0, 4000.0)
    x = torch.tensor([[-4.5, 0.5, SILENCE]])
    torch.testing.assert_close(mel.normalize(x), (x + 4.5) / 5)
    torch.testing.assert_close(Mel32k(mean=-4.0, std=1.0).normalize(x), (x + 4.0) / 2)


def test_frames_are_those_of_the_original() -> None:
    x = noise(1999)
    frames = Mel32k().frames(1999)
    assert frames == 13  # 3997 samples after pre-emphasis, a frame every 320, both ends
    got = Mel32k(target_length=16).log_mel(x[None])
    expected = original(x.numpy(), frames)
    assert expected.shape[0] == frames
    torch.testing.assert_close(got[0, :frames], expected, rtol=0, atol=1e-6)
    assert (got[0, frames:] == SILENCE).all()
    single = Mel32k(target_length=16)(x[None].float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), (got + 4.5) / 5, rtol=0, atol=1e-4)


def test_five_seconds_are_500_frames() -> None:
    assert Mel32k().frames(80000) == 500
    assert Mel32k().frames(399) == 0


def test_upsampling_is_soxrs() -> None:
    x = noise(4000)
    got = Mel32k()._upsample(x[None])[0]
    expected = soxr.resample(x.numpy(), 16000, 32000, quality="HQ")
    middle = slice(400, -400)
    error = got.numpy()[middle] - expected[middle]
    assert np.sqrt(np.mean(error**2)) < 2e-3 * np.sqrt(np.mean(expected[middle] ** 2))


def test_upsampling_leaves_no_images() -> None:
    x = noise(4096) * torch.hann_window(4096, dtype=torch.float64)
    spectrum = torch.fft.rfft(Mel32k()._upsample(x[None])[0]).abs()
    band = 4096 / 16000  # bins a hertz
    passed, images = spectrum[: int(7000 * band)], spectrum[int(8050 * band) :]
    assert images.max() < 1e-5 * passed.mean()
    torch.testing.assert_close(
        passed, 2 * torch.fft.rfft(x).abs()[: len(passed)], rtol=1e-4, atol=1e-5
    )


def test_a_clip_in_a_batch_is_as_alone() -> None:
    mel = Mel32k(target_length=20)
    lengths = [2400, 1000, 1601, 3000, 400]
    batch = torch.full((len(lengths), 3000), 5.0)  # padding that must not be heard
    for row, length, seed in zip(batch, lengths, range(9), strict=False):
        row[:length] = noise(length, seed).float()
    together = mel.log_mel(batch, torch.tensor(lengths))
    for row, wave, length in zip(together, batch, lengths, strict=True):
        alone = mel.log_mel(wave[None, :length])[0]
        torch.testing.assert_close(row, alone, rtol=0, atol=2e-4)
        frames = min(mel.frames(length), 20)
        assert (row[frames:] == np.float32(SILENCE)).all()
        assert (row[frames - 1] > SILENCE + 1).any()


def test_padding_is_what_digital_silence_gives() -> None:
    silence = Mel32k(target_length=12).log_mel(torch.zeros(1, 800))
    assert (silence == np.float32(SILENCE)).all()
    assert (
        Mel32k(target_length=4).log_mel(torch.zeros(2, 800), torch.tensor([800, 0])).shape[0] == 2
    )


def test_longer_clips_are_cut() -> None:
    x = noise(4000)[None]
    whole, cut = Mel32k(target_length=26).log_mel(x), Mel32k(target_length=10).log_mel(x)
    assert Mel32k().frames(4000) == 25
    torch.testing.assert_close(cut, whole[:, :10], rtol=0, atol=1e-9)


def test_constants_stay_exact_and_gradients_flow() -> None:
    x = noise(1600, dtype=torch.float32)[None]
    expected = Mel32k(target_length=8)(x)
    mel = Mel32k(target_length=8).half()
    assert mel.mel.dtype == torch.float32
    torch.testing.assert_close(mel(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(mel(x.half()), expected, rtol=0, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(mel(x), expected, rtol=0, atol=0)
    x.requires_grad_()
    mel(x, torch.tensor([1600])).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0


def test_works_on_batches_of_a_data_set() -> None:
    from fastast.evaluate import window

    data = AudioDataset([noise(n).float().numpy() for n in (800, 9000)], [(0,), (1,)], "ab", "xy")
    mel = Mel32k(target_length=20)
    (batch,) = data.batches(2, window(mel))  # type: ignore[arg-type]
    assert mel.frames(batch.waveform.shape[1]) >= 20
    features = mel(batch.waveform, batch.lengths)
    assert features.shape == (2, 20, 128)
    silence = (SILENCE + 4.5) / 5
    assert (features[0, 5:] - silence).abs().max() < 1e-6
    assert (features[1].amax(1) > silence + 0.1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_length": 0}, "target_length must be at least 1, got 0"),
        ({"n_mels": 3}, "n_mels must be at least 4"),
        ({"mean": math.inf}, "mean must be finite"),
        ({"std": 0.0}, "std must be positive"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mel32k(**arguments)


@pytest.mark.parametrize(
    ("waveform", "lengths", "error", "message"),
    [
        (np.zeros(800), None, TypeError, "waveform must be a floating-point tensor, got ndarray"),
        (torch.zeros(1, 800, dtype=torch.int16), None, TypeError, "got torch.int16"),
        (torch.zeros(800), None, ValueError, r"waveform must be \[batch, samples\]"),
        (torch.zeros(1, 399), None, ValueError, "399 samples, fewer than one window"),
        (torch.zeros(1, 800), [800], TypeError, "lengths must be an int64"),
        (torch.zeros(1, 800), torch.tensor([1.0]), TypeError, "lengths must be an int64"),
        (torch.zeros(1, 800), torch.tensor([800, 800]), ValueError, r"lengths must be \[batch=1\]"),
        (torch.zeros(1, 800), torch.tensor([801]), ValueError, "at most the waveform's 800"),
    ],
)
def test_bad_waveforms(waveform: object, lengths: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Mel32k().log_mel(waveform, lengths)  # type: ignore[arg-type]
