"""`Fbank` against torchaudio's Kaldi filterbank, and its batching, padding and errors."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastast_kernels as fk
from fastast.audio import load_audio
from fastast.features import FLOOR, Fbank, mel_filters
from fastast_kernels.backends import COMPILED

needs_kernels = pytest.mark.skipif(not COMPILED, reason="the compiled extension was not built")
MEAN, STD = -4.2677393, 4.5689974
TOLERANCE = 1e-4


def kaldi_fbank(wave: Tensor, sample_rate: int = 16000, n_mels: int = 128) -> Tensor:
    kaldi = pytest.importorskip(
        "torchaudio.compliance.kaldi", reason="torchaudio is the filterbank to be equal to"
    )
    return kaldi.fbank(
        (wave - wave.mean())[None],
        htk_compat=True,
        sample_frequency=sample_rate,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=n_mels,
        dither=0.0,
        frame_shift=10,
    )


def noise(*shape: int, seed: int = 0, scale: float = 0.1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def signals(samples: int, sample_rate: int) -> dict[str, Tensor]:
    time = torch.arange(samples) / sample_rate
    click = torch.zeros(samples)
    click[samples // 2] = 1.0
    voice = sum(torch.sin(2 * math.pi * 120 * k * time) / k for k in range(1, 20))
    envelope = (0.5 + 0.5 * torch.sin(2 * math.pi * 3 * time)) ** 2
    return {
        "noise": noise(samples),
        "tone": torch.sin(2 * math.pi * 1000 * time),
        "low-tone": 0.5 * torch.sin(2 * math.pi * 60 * time),
        "chirp": torch.sin(2 * math.pi * (50 + 0.2 * sample_rate * time) * time),
        "speech-like": 0.2 * voice * envelope + noise(samples, seed=1, scale=1e-3),
        "quiet": noise(samples, seed=2, scale=1e-4),
        "offset": noise(samples, seed=3, scale=1e-3) + 0.5,
        "16-bit": (noise(samples, seed=4) * 32768).round() / 32768,
        "click": click,
        "silence": torch.zeros(samples),
    }


@pytest.mark.parametrize(
    ("sample_rate", "samples"),
    [(16000, 16000), (16000, 400), (16000, 7321), (8000, 9001), (32000, 20000), (22050, 12345)],
)
def test_equal_to_torchaudio(sample_rate: int, samples: int) -> None:
    fbank = Fbank(sample_rate, target_length=Fbank(sample_rate).frames(samples))
    clips = signals(samples, sample_rate)
    batch = fbank.log_mel(torch.stack(list(clips.values())))
    assert batch.dtype == torch.float32
    for features, (name, wave) in zip(batch, clips.items(), strict=True):
        expected = kaldi_fbank(wave, sample_rate)
        assert features.shape == expected.shape
        above = expected > math.log(FLOOR)
        assert above.any() == (name != "silence")
        error = (features - expected).abs()
        assert error.max() < TOLERANCE, f"{name}: {error.max()}"
        # Not one of the two is on the floor while the other is well above it.
        assert ((features > math.log(FLOOR) + TOLERANCE) <= above).all(), name


def test_the_differentiable_path_and_padded_lengths_are_equal_to_torchaudio_too() -> None:
    wave = signals(9000, 16000)["speech-like"]
    fbank = Fbank(target_length=80)
    expected = F.pad(kaldi_fbank(wave), (0, 0, 0, 80 - fbank.frames(9000)))
    recorded = fbank.log_mel(wave.clone().requires_grad_())
    assert recorded.requires_grad
    torch.testing.assert_close(recorded, expected, atol=TOLERANCE, rtol=0)


def test_float64_is_computed_in_float64() -> None:
    wave = signals(8000, 16000)["tone"].double()
    features = Fbank(target_length=48).log_mel(wave)
    assert features.dtype == torch.float64
    torch.testing.assert_close(features, kaldi_fbank(wave), atol=1e-9, rtol=0)


@pytest.mark.parametrize("n_mels", [4, 23, 64, 80, 129])
def test_number_of_filters(n_mels: int) -> None:
    wave = noise(4000)
    fbank = Fbank(n_mels=n_mels, target_length=23)
    torch.testing.assert_close(
        fbank.log_mel(wave), kaldi_fbank(wave, n_mels=n_mels), atol=TOLERANCE, rtol=0
    )


@pytest.mark.parametrize("sample_rate", [8000, 16000, 44100])
def test_filters_are_kaldis(sample_rate: int) -> None:
    kaldi = pytest.importorskip(
        "torchaudio.compliance.kaldi", reason="torchaudio is the filterbank to be equal to"
    )
    expected, _ = kaldi.get_mel_banks(128, 512, float(sample_rate), 20.0, 0.0, 100.0, -500.0, 1.0)
    filters = mel_filters(sample_rate, 128, 512)
    assert torch.equal(filters[:-1].T, expected)
    assert not filters[-1].any()


def test_padding_is_zero_before_normalisation_and_features_are_normalised() -> None:
    wave = noise(2, 8000)
    fbank = Fbank(target_length=100)
    frames = fbank.frames(8000)
    assert frames == 48
    log_mel, features = fbank.log_mel(wave), fbank(wave)
    assert (log_mel[:, frames:] == 0).all()
    torch.testing.assert_close(features, (log_mel - MEAN) / (2 * STD))
    assert torch.equal(features, fbank.normalize(log_mel))
    assert features[0, -1, 0].item() == pytest.approx(0.46703, abs=1e-5)


def test_long_clips_are_cut_and_their_mean_is_over_the_whole_clip() -> None:
    wave = noise(16000) + torch.linspace(0, 1, 16000)
    assert torch.equal(
        Fbank(target_length=10).log_mel(wave), Fbank(target_length=98).log_mel(wave)[:10]
    )


def test_normalize_leaves_its_input_alone() -> None:
    fbank = Fbank()
    log_mel = noise(3, 7, 128)
    before = log_mel.clone()
    fbank.normalize(log_mel)
    assert torch.equal(log_mel, before)


def test_without_normalisation() -> None:
    fbank = Fbank(target_length=30, mean=None, std=None)
    wave = noise(1, 5000)
    assert torch.equal(fbank(wave), fbank.log_mel(wave))


def test_one_clip_has_no_batch_dimension() -> None:
    wave = noise(3, 5000)
    fbank = Fbank(target_length=40)
    assert fbank(wave[0]).shape == (40, 128)
    assert torch.equal(fbank(wave[0]), fbank(wave[:1])[0])
    assert torch.equal(fbank(wave[0]), fbank(wave)[0])


def test_empty_batch() -> None:
    assert Fbank()(torch.zeros(0, 16000)).shape == (0, 1024, 128)


@pytest.mark.parametrize("differentiable", [False, True])
def test_lengths_give_what_each_clip_gives_alone(differentiable: bool) -> None:
    lengths = [9000, 400, 559, 560, 5123]
    clips = [noise(length, seed=length) + 0.3 for length in lengths]
    batch = torch.stack([F.pad(clip, (0, 9000 - len(clip))) for clip in clips])
    batch.requires_grad_(differentiable)
    fbank = Fbank(target_length=60)
    for compute in (fbank, fbank.log_mel):
        alone = torch.stack([compute(clip) for clip in clips])
        together = compute(batch, torch.tensor(lengths))
        if differentiable:
            torch.testing.assert_close(together, alone, atol=1e-2, rtol=0)
            assert (together - alone).abs().mean() < 1e-6
        else:
            assert torch.equal(together, alone)
        torch.testing.assert_close(
            compute(batch, torch.tensor(lengths, dtype=torch.int32)), together
        )


@pytest.mark.parametrize("differentiable", [False, True])
def test_what_lies_behind_a_clip_does_not_matter(differentiable: bool) -> None:
    batch = noise(2, 6000)
    lengths = torch.tensor([6000, 3000])
    fbank = Fbank(target_length=50)
    expected = fbank(batch.clone().requires_grad_(differentiable), lengths)
    batch[1, 3000:] = math.nan
    assert torch.equal(fbank(batch.requires_grad_(differentiable), lengths), expected)


def test_nan_spoils_its_own_clip_only() -> None:
    batch = noise(2, 6000)
    expected = Fbank(target_length=40)(batch)
    batch[1, 100] = math.nan
    features = Fbank(target_length=40)(batch)
    assert torch.equal(features[0], expected[0])
    assert features[1].isnan().any()


def test_gradients() -> None:
    fbank = Fbank(8000, n_mels=8, target_length=4)
    wave = noise(2, 360).double().requires_grad_()
    assert torch.autograd.gradcheck(fbank, (wave,))
    lengths = torch.tensor([360, 280])
    assert torch.autograd.gradcheck(lambda x: fbank(x, lengths), (wave,))
    fbank(wave, lengths).sum().backward()
    assert wave.grad is not None
    assert wave.grad[1, :280].any() and not wave.grad[1, 280:].any()


def test_no_graph_without_gradients() -> None:
    fbank = Fbank(target_length=10)
    assert not fbank(noise(2, 2000)).requires_grad
    with torch.no_grad():
        assert not fbank(noise(2, 2000).requires_grad_()).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_waveforms_modules_and_autocast_compute_in_float32(
    dtype: torch.dtype,
) -> None:
    wave = noise(2, 4000)
    fbank = Fbank(target_length=23)
    expected = fbank(wave)
    cast = copy.deepcopy(fbank).to(dtype)
    assert cast.mel.dtype == torch.float32
    assert torch.equal(cast(wave), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fbank(wave), expected)
        recorded = fbank(wave.clone().requires_grad_())
    torch.testing.assert_close(recorded, expected, atol=TOLERANCE, rtol=0)
    rounded = fbank(wave.to(dtype))
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, fbank(wave.to(dtype).float()))


def test_filters_survive_the_meta_device_and_are_not_in_checkpoints() -> None:
    with torch.device("meta"):
        fbank = Fbank(target_length=23)
    wave = noise(4000)
    assert torch.equal(fbank.to("meta").to_empty(device="cpu")(wave), Fbank(target_length=23)(wave))
    assert not fbank.state_dict()


def test_strided_input() -> None:
    wave = noise(4000, 2).T
    assert not wave.is_contiguous()
    fbank = Fbank(target_length=23)
    torch.testing.assert_close(fbank(wave), fbank(wave.contiguous()))


def test_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    fbank = Fbank(target_length=30)
    compiled = torch.compile(fbank, fullgraph=True, backend="aot_eager")
    wave, lengths = noise(2, 4000), torch.tensor([4000, 3000])
    torch.testing.assert_close(compiled(wave), fbank(wave), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(compiled(wave, lengths), fbank(wave, lengths), atol=1e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    fbank = Fbank(target_length=30)
    wave = noise(2, 4000)
    compiled = torch.compile(fbank, fullgraph=True)
    # Other roundings in the frames, which small energies show.
    torch.testing.assert_close(compiled(wave), fbank(wave), atol=1e-2, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    wave, lengths = noise(3, 16000), torch.tensor([16000, 9000, 400])
    fbank = Fbank(target_length=100)
    on_gpu = copy.deepcopy(fbank).cuda()
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        features = on_gpu(wave.cuda(), lengths.cuda())
    finally:
        torch.set_float32_matmul_precision(allowed)
    assert features.device.type == "cuda" and features.dtype == torch.float32
    torch.testing.assert_close(features.cpu(), fbank(wave, lengths), atol=1e-2, rtol=0)
    assert (features.cpu() - fbank(wave, lengths)).abs().mean() < 1e-6


@pytest.mark.parametrize("sample_rate", [8000, 16000, 22050])
def test_number_of_frames(sample_rate: int) -> None:
    fbank = Fbank(sample_rate)
    window, hop = int(sample_rate * 0.025), int(sample_rate * 0.01)
    assert fbank.frames(0) == fbank.frames(window - 1) == 0
    assert fbank.frames(window) == fbank.frames(window + hop - 1) == 1
    assert fbank.frames(window + hop) == 2
    samples = 3 * sample_rate + 7
    assert fbank.frames(samples) == len(kaldi_fbank(noise(samples), sample_rate))


@pytest.mark.parametrize("samples", [0, 1, 160, 399])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_too_short_a_clip(samples: int, batch: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"has {samples} samples.* at least 400 samples \(25 ms"):
        Fbank()(torch.zeros(*batch, samples))


@pytest.mark.parametrize(
    ("wave", "error", "message"),
    [
        (torch.zeros(1, 1, 16000), ValueError, r"\[samples\] or \[batch, samples\].*\[1, 1, 16000"),
        (torch.zeros(()), ValueError, r"\[samples\] or \[batch, samples\]"),
        (torch.zeros(16000, dtype=torch.int16), TypeError, "floating-point tensor.*torch.int16"),
        (torch.zeros(16000, dtype=torch.complex64), TypeError, "floating-point tensor.*complex64"),
        ([0.0] * 16000, TypeError, "floating-point tensor.*list"),
    ],
)
def test_wrong_waveforms(wave: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"waveform must be .*{message}"):
        Fbank()(wave)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (torch.tensor([800, 399]), ValueError, r"lengths\[1\] is 399 samples.*400 samples \(25 ms"),
        (torch.tensor([800, 0]), ValueError, r"lengths\[1\] is 0 samples"),
        (torch.tensor([801, 800]), ValueError, r"lengths\[0\] is 801, but waveform has 800"),
        (torch.tensor([800]), ValueError, r"lengths must be \[batch\].*\[1\] for \[2, 800\]"),
        (torch.tensor([800.0, 800.0]), TypeError, "int64 or int32 tensor, got torch.float32"),
        ([800, 800], TypeError, "int64 or int32 tensor, got list"),
        (torch.empty(2, dtype=torch.int64, device="meta"), ValueError, "on the CPU.*got meta"),
    ],
)
def test_wrong_lengths(lengths: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Fbank()(torch.zeros(2, 800), lengths)


def test_lengths_need_a_batch() -> None:
    with pytest.raises(ValueError, match=r"lengths must be \[batch\]"):
        Fbank()(torch.zeros(800), torch.tensor([800]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sample_rate": 0}, ValueError, "sample_rate must be at least 1000, got 0"),
        ({"sample_rate": 16000.0}, TypeError, "sample_rate must be an int"),
        ({"n_mels": 3}, ValueError, "n_mels must be at least 4, got 3"),
        ({"target_length": 0}, ValueError, "target_length must be at least 1"),
        ({"target_length": True}, TypeError, "target_length must be an int"),
        ({"std": 0.0}, ValueError, "std must be positive"),
        ({"mean": math.nan}, ValueError, "mean must be finite"),
        ({"mean": None}, ValueError, "both"),
    ],
)
def test_wrong_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Fbank(**arguments)


# The kernels of csrc/fbank.h. What is above runs on them, where they were built, too.

ONE_FRAME, ONE_VECTOR, A_LITTLE_MORE = 400, 400 + 15 * 160, 400 + 16 * 160


@needs_kernels
@pytest.mark.parametrize("samples", [ONE_FRAME, 559, 560, ONE_VECTOR, A_LITTLE_MORE, 16000, 160000])
def test_cpp_is_equal_to_torchaudio_at_every_length(samples: int) -> None:
    fbank = Fbank(target_length=Fbank().frames(samples))
    for name in ("noise", "tone", "speech-like", "silence"):
        wave = signals(samples, 16000)[name]
        with fk.use_backend("cpp"):
            features = fbank.log_mel(wave)
        error = (features - kaldi_fbank(wave)).abs().max()
        assert error < 1e-5, f"{name}: {error}"


@needs_kernels
@pytest.mark.parametrize(("sample_rate", "n_mels"), [(16000, 128), (16000, 23), (1000, 5)])
def test_cpp_frames_are_torchs_to_the_bit_and_energies_to_the_last_place(
    sample_rate: int, n_mels: int
) -> None:
    fbank = Fbank(sample_rate, n_mels)
    wave = signals(sample_rate, sample_rate)["chirp"] + 0.01
    windows = wave.unfold(0, fbank.window_length, fbank.hop_length)
    mean = windows.mean(-1)
    frames = torch.full((len(windows), fbank.fft_length), math.nan)
    torch.ops.fastast.fbank_frames(windows, mean, fbank._window, frames)
    centred = windows - mean[:, None]
    emphasised = centred - 0.97 * torch.cat([centred[:, :1], centred[:, :-1]], 1)
    expected = F.pad(emphasised * fbank._window, (0, fbank.fft_length - fbank.window_length))
    assert torch.equal(frames, expected)

    spectrum = torch.fft.rfft(frames)
    energies = torch.full((len(windows), n_mels), math.nan)
    torch.ops.fastast.log_mel(spectrum, fbank._weights, fbank._spans, FLOOR, energies)
    power = torch.view_as_real(spectrum.to(torch.complex128)).square().sum(-1)
    exact = (power @ fbank.mel.double()).clamp_min(FLOOR).log()
    torch.testing.assert_close(energies.double(), exact, rtol=1.2e-7, atol=5e-7)


@needs_kernels
def test_cpp_logarithm_over_its_whole_range() -> None:
    energies = torch.logspace(-7.5, 38, 40000).reshape(-1, 4)
    energies[0, 0], energies[0, 1] = math.inf, math.nan
    spectrum = torch.zeros(len(energies), 17, dtype=torch.complex64)
    spectrum[:, 3:7] = energies.sqrt()
    spans = torch.tensor([[3, 1, 0], [4, 1, 0], [5, 1, 0], [6, 1, 0]], dtype=torch.int32)
    out = torch.empty(len(energies), 4)
    torch.ops.fastast.log_mel(spectrum, torch.ones(1), spans, FLOOR, out)
    exact = spectrum[:, 3:7].abs().square().clamp_min(FLOOR).double().log()
    torch.testing.assert_close(out.double(), exact, rtol=1.2e-7, atol=1e-7, equal_nan=True)
    assert out[0, 0] == math.inf and out[0, 1].isnan()
    assert out[0, 2].item() == pytest.approx(math.log(FLOOR), abs=1e-6)


@needs_kernels
def test_cpp_is_the_same_on_any_number_of_threads_and_in_any_batch() -> None:
    batch = noise(5, 32000)  # torch sums longer clips differently on more threads
    fbank, threads = Fbank(target_length=200), torch.get_num_threads()
    with fk.use_backend("cpp"):
        expected = fbank(batch)
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert torch.equal(fbank(batch), expected)
                assert torch.equal(fbank(batch[3]), expected[3])
        finally:
            torch.set_num_threads(threads)


@needs_kernels
def test_cpp_nan_spoils_the_frames_that_see_it() -> None:
    wave = noise(16000)
    fbank = Fbank(target_length=98)
    windows = wave.unfold(0, 400, 160).clone()
    windows[40, 7] = math.nan
    frames, energies = torch.empty(98, 512), torch.empty(98, 128)
    torch.ops.fastast.fbank_frames(windows, windows.mean(-1), fbank._window, frames)
    torch.ops.fastast.log_mel(torch.fft.rfft(frames), fbank._weights, fbank._spans, FLOOR, energies)
    nan = energies.isnan()
    assert nan[40].all() and nan.sum() == 128
    # In a clip it spoils the mean, which every frame sees.
    wave[5000] = math.nan
    with fk.use_backend("cpp"):
        assert fbank.log_mel(wave).isnan().all()


@needs_kernels
def test_cpp_strided_waveforms_and_windows() -> None:
    wave = noise(4000, 2).T
    fbank = Fbank(target_length=23)
    with fk.use_backend("cpp"):
        assert torch.equal(fbank(wave), fbank(wave.contiguous()))
    windows = noise(400, 20).T
    mean, out = windows.mean(-1), torch.empty(2, 20, 512)
    torch.ops.fastast.fbank_frames(windows, mean, fbank._window, out[0])
    torch.ops.fastast.fbank_frames(windows.contiguous(), mean, fbank._window, out[1])
    assert torch.equal(out[0], out[1])


@needs_kernels
def test_cpp_is_what_float32_clips_on_the_cpu_take(monkeypatch: pytest.MonkeyPatch) -> None:
    fbank, wave = Fbank(target_length=20), noise(2, 4000)
    taken = []
    kernels = fbank._log_mel_in_kernels
    monkeypatch.setattr(
        fbank, "_log_mel_in_kernels", lambda *a, **k: taken.append(a) or kernels(*a, **k)
    )
    with fk.use_backend("cpp"):
        fbank(wave)
        assert len(taken) == 2
        fbank(wave.double())
        fbank(wave.clone().requires_grad_())
    with fk.use_backend("reference"):
        reference = fbank(wave)
    assert len(taken) == 2
    torch.testing.assert_close(fbank(wave), reference, atol=1e-5, rtol=0)


@needs_kernels
def test_cpp_is_equal_to_torchaudio_on_recordings() -> None:
    clips = sorted((Path(__file__).parents[1] / "assets" / "clips").glob("*.opus"))
    assert clips, "no recordings in assets"
    for path in clips:
        wave = load_audio(path)
        fbank = Fbank(target_length=Fbank().frames(len(wave)))
        with fk.use_backend("cpp"):
            error = (fbank.log_mel(wave) - kaldi_fbank(wave)).abs().max()
        assert error < 1e-5, f"{path.name}: {error}"


@needs_kernels
def test_cpp_wrong_arguments_of_the_kernels() -> None:
    windows, mean, window = torch.zeros(3, 20), torch.zeros(3), torch.zeros(20)
    out = torch.zeros(3, 32)
    frames, log_mel = torch.ops.fastast.fbank_frames, torch.ops.fastast.log_mel
    for arguments, message in (
        ((windows.double(), mean, window, out), "x must be fp32"),
        ((windows, mean[:2], window, out), "a row for every frame"),
        ((windows, mean, window[:19], out), "as wide as x"),
        ((windows[:, :16], mean, window[:16], out), "more than 16 samples"),
        ((windows, mean, window, out[:, :19].contiguous()), "no narrower"),
        ((windows, mean, window, out[:, ::2]), "out must be dense"),
    ):
        with pytest.raises(RuntimeError, match=message):
            frames(*arguments)
    spectrum, weights = torch.zeros(3, 17, dtype=torch.complex64), torch.ones(4)
    spans, out = torch.tensor([[2, 3, 1]], dtype=torch.int32), torch.zeros(3, 1)
    for arguments, message in (
        ((spectrum[:, :15].contiguous(), weights, spans), "16 bins or more"),
        ((spectrum.real.contiguous(), weights, spans), "complex64"),
        ((spectrum, weights.double(), spans), "weights must be dense fp32"),
        ((spectrum, weights, spans.long()), "int32"),
        ((spectrum, weights, spans + torch.tensor([13, 0, 0]).int()), "spans must lie"),
        ((spectrum, weights, spans + torch.tensor([0, 0, 1]).int()), "spans must lie"),
        ((spectrum, weights, -spans), "spans must lie"),
        ((spectrum[:2], weights, spans), "a row for every frame"),
    ):
        with pytest.raises(RuntimeError, match=message):
            log_mel(*arguments, FLOOR, out)


@needs_kernels
@pytest.mark.parametrize("op", ["fbank_frames", "log_mel"])
def test_cpp_opcheck(op: str) -> None:
    fbank = Fbank(1000, 5)
    windows = noise(1000).unfold(0, 25, 10)
    arguments: tuple[object, ...] = (windows, windows.mean(-1), fbank._window, torch.zeros(98, 32))
    if op == "log_mel":
        spectrum = torch.fft.rfft(noise(98, 32))
        arguments = spectrum, fbank._weights, fbank._spans, FLOOR, torch.zeros(98, 5)
    result = torch.library.opcheck(getattr(torch.ops.fastast, op), arguments)
    assert set(result.values()) == {"SUCCESS"}, result


def test_repr_names_the_arguments() -> None:
    assert "sample_rate=8000, n_mels=64, target_length=128" in repr(Fbank(8000, 64, 128))
