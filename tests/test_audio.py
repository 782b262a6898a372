"""Reading audio files, good and bad, and cutting recordings into windows."""

from __future__ import annotations

import io
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from fastast.audio import AudioError, find_audio, load_audio, windows

RATE = 16000


def tone(seconds: float = 1.0, rate: int = RATE, frequency: float = 440.0) -> np.ndarray:
    time = np.arange(int(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * frequency * time)).astype(np.float32)


def write(path: Path, samples: np.ndarray, rate: int = RATE, **options: str) -> Path:
    soundfile.write(path, samples, rate, **options)
    return path


def cut(path: Path, part: float) -> Path:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    return path


def noise(seconds: float) -> np.ndarray:
    generator = np.random.default_rng(0)
    return (0.2 * generator.standard_normal(int(seconds * RATE))).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("a.wav", {"subtype": "FLOAT"}, 0.0),
        ("a.wav", {"subtype": "PCM_16"}, 1e-4),
        ("a.wav", {"subtype": "PCM_U8"}, 2e-2),
        ("A.WAV", {}, 1e-4),
        ("a.flac", {}, 1e-4),
        ("a.ogg", {}, 3e-2),
        ("a.opus", {"format": "OGG", "subtype": "OPUS"}, 6e-2),
        ("a.mp3", {}, 6e-2),
        ("a.aiff", {}, 1e-4),
        ("a.au", {}, 1e-4),
        ("a.caf", {}, 1e-4),
        ("a.w64", {}, 1e-4),
        ("no-suffix", {"format": "WAV"}, 1e-4),
    ],
)
def test_formats(tmp_path: Path, name: str, options: dict[str, str], error: float) -> None:
    path = write(tmp_path / name, tone(1.001), **options)
    for source in (path, str(path), io.BytesIO(path.read_bytes())):
        wave = load_audio(source)
        assert wave.dtype == torch.float32 and wave.shape == (len(tone(1.001)),)
        # The ends of a lossy file are the codec's own.
        assert np.abs(wave.numpy() - tone(1.001))[800:-800].max() <= error


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = tone(frequency=300), tone(frequency=700)
    path = write(tmp_path / "a.wav", np.stack([left, right], 1), subtype="FLOAT")
    np.testing.assert_allclose(load_audio(path).numpy(), (left + right) / 2, atol=1e-7)


def test_longer_than_a_decoding_block(tmp_path: Path) -> None:
    samples = noise(40)
    path = write(tmp_path / "a.wav", samples, subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(path).numpy(), samples)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_resampling(tmp_path: Path, rate: int) -> None:
    path = write(tmp_path / "a.wav", tone(rate=rate), rate, subtype="FLOAT")
    wave = load_audio(path, RATE)
    assert wave.shape == (RATE,) and wave.dtype == torch.float32
    assert np.abs(wave.numpy() - tone())[400:-400].max() < 1e-3
    assert load_audio(path, rate).shape == (rate,)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"nothing\.wav: no such file"):
        load_audio(tmp_path / "nothing.wav")


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=f"{tmp_path.name}: is a folder"):
        load_audio(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(AudioError, match=r"pipe\.wav: is not a regular file"):
        load_audio(tmp_path / "pipe.wav")


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.wav").touch()
    with pytest.raises(AudioError, match=r"empty\.wav: is empty \(0 bytes\)"):
        load_audio(tmp_path / "empty.wav")


@pytest.mark.parametrize("name", ["text.wav", "text.flac", "text.ogg", "text.mp3", "text.raw"])
@pytest.mark.parametrize("content", [b"no audio here\n" * 100, bytes(range(256)) * 20, b"x"])
def test_not_audio(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AudioError, match=rf"{name}: is not audio"):
        load_audio(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.wav", {}),
        ("a.wav", {"subtype": "FLOAT"}),
        ("a.flac", {}),
        ("a.ogg", {}),
        ("a.opus", {"format": "OGG", "subtype": "OPUS"}),
        ("a.mp3", {}),
        ("a.aiff", {}),
        ("a.au", {}),
        ("a.w64", {}),
    ],
)
@pytest.mark.parametrize("part", [0.02, 0.1, 0.5, 0.95])
def test_cut_off(tmp_path: Path, name: str, options: dict[str, str], part: float) -> None:
    path = write(tmp_path / name, noise(8), **options)
    assert len(load_audio(path)) == 8 * RATE
    with pytest.raises(AudioError, match=rf"{name}: is (cut off or damaged|not audio)"):
        load_audio(cut(path, part))


def test_cut_off_says_how_much_there_is(tmp_path: Path) -> None:
    path = cut(write(tmp_path / "a.wav", tone(2)), 0.5)
    with pytest.raises(AudioError, match=r"a\.wav: is cut off or damaged after 1\.00 s"):
        load_audio(path)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_ogg_cut_off_at_any_byte_of_its_last_pages(tmp_path: Path, subtype: str) -> None:
    path = write(tmp_path / "a.ogg", noise(2), subtype=subtype)
    whole = path.read_bytes()
    last = whole.rindex(b"OggS")
    for end in (last, last + 2, last + 4, last + 26, last + 27, last + 40, len(whole) - 1):
        with pytest.raises(AudioError, match="is cut off or damaged"):
            load_audio(io.BytesIO(whole[:end]))
    assert len(load_audio(io.BytesIO(whole + b"a tag behind the end"))) == 2 * RATE


# libsndfile's log calls these unended: their last packet ends exactly with the samples.
@pytest.mark.parametrize("milliseconds", [36, 56, 256, 416, 100, 333])
@pytest.mark.parametrize("rate", [8000, 16000])
def test_short_ogg_of_one_page_is_whole(tmp_path: Path, milliseconds: int, rate: int) -> None:
    samples = noise(1)[: rate * milliseconds // 1000]
    path = write(tmp_path / "a.ogg", samples, rate, subtype="OPUS")
    assert len(load_audio(path, rate)) == len(samples)


@pytest.mark.parametrize("name", ["a.flac", "a.ogg", "a.mp3"])
def test_damaged_inside(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, noise(4))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = np.random.default_rng(1).bytes(4000)
    path.write_bytes(content)
    with pytest.raises(AudioError, match=rf"{name}: is cut off or damaged"):
        load_audio(path)


def wav_with(path: Path, offset: int, value: int) -> Path:
    content = bytearray(write(path, tone()).read_bytes())
    content[offset : offset + 4] = struct.pack("<I", value)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("size", [0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFF000 + 4])
def test_wav_written_to_a_pipe_has_no_size_and_is_read(tmp_path: Path, size: int) -> None:
    path = wav_with(tmp_path / "a.wav", 40, size)
    assert len(load_audio(path)) == RATE


def test_bytes_after_the_samples_are_no_matter(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", tone())
    path.write_bytes(path.read_bytes() + b"LIST\x04\0\0\0INFO")
    assert len(load_audio(path)) == RATE


def test_flac_without_a_length(tmp_path: Path) -> None:
    path = write(tmp_path / "a.flac", tone())
    content = bytearray(path.read_bytes())
    stream_info = int.from_bytes(content[18:26], "big")
    content[18:26] = (stream_info >> 36 << 36).to_bytes(8, "big")
    path.write_bytes(content)
    with pytest.raises(AudioError, match=r"a\.flac: its header does not say how long"):
        load_audio(path)


def test_mp3_without_a_length_is_read(tmp_path: Path) -> None:
    quiet_then_loud = np.concatenate([np.zeros(RATE, np.float32), noise(4)])
    path = write(tmp_path / "a.mp3", quiet_then_loud, bitrate_mode="VARIABLE")
    content = path.read_bytes()
    assert b"Xing" in content[:200]
    path.write_bytes(content[content.index(content[:2], 4) :])
    assert len(load_audio(path)) == pytest.approx(5 * RATE, abs=3000)


@pytest.mark.parametrize("name", ["a.wav", "a.ogg"])
def test_no_samples(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, tone()[:0])
    with pytest.raises(AudioError, match=rf"{name}: has no samples"):
        load_audio(path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinite_samples(tmp_path: Path, value: float) -> None:
    samples = np.stack([tone(), tone()], 1)
    samples[77, 1] = value
    path = write(tmp_path / "a.wav", samples, 8000, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"a\.wav: has NaN or infinite samples"):
        load_audio(path)


@pytest.mark.parametrize("rate", [0, 1, 999, 768_001, 0x7FFFFFFF, 0xFFFFFFFF])
def test_nonsensical_sample_rate_of_a_file(tmp_path: Path, rate: int) -> None:
    path = wav_with(tmp_path / "a.wav", 24, rate)
    with pytest.raises(AudioError, match=r"a\.wav: (its sample rate is|is not audio)"):
        load_audio(path)


@pytest.mark.parametrize("rate", [0, -16000, 10**9])
def test_nonsensical_sample_rate_wanted(tmp_path: Path, rate: int) -> None:
    with pytest.raises(ValueError, match=rf"sample_rate must be from .* got {rate}"):
        load_audio(write(tmp_path / "a.wav", tone()), rate)


def test_short_clip_is_loaded(tmp_path: Path) -> None:
    assert len(load_audio(write(tmp_path / "a.wav", tone(0.01)))) == 160
    one = write(tmp_path / "one.wav", tone()[1:2], 48000)
    with pytest.raises(AudioError, match=r"one\.wav: is too short to resample"):
        load_audio(one, 8000)


def test_errors_of_files_in_memory_have_a_name() -> None:
    with pytest.raises(AudioError, match=r"^audio file: is not audio"):
        load_audio(io.BytesIO(b"no audio here" * 100))
    assert issubclass(AudioError, ValueError)


@pytest.mark.parametrize(
    ("samples", "hop", "min_tail", "expected"),
    [
        (1, None, 0.25, [(0, 1)]),
        (9, None, 0.25, [(0, 9)]),
        (10, None, 0.25, [(0, 10)]),
        (12, None, 0.25, [(0, 10)]),
        (13, None, 0.25, [(0, 10), (10, 3)]),
        (11, None, 0.0, [(0, 10), (10, 1)]),
        (19, None, 1.0, [(0, 10)]),
        (30, None, 0.25, [(0, 10), (10, 10), (20, 10)]),
        (20, 5, 0.25, [(0, 10), (5, 10), (10, 10)]),
        (21, 5, 0.25, [(0, 10), (5, 10), (10, 10), (15, 6)]),
        (21, 5, 0.75, [(0, 10), (5, 10), (10, 10)]),
        (24, 20, 0.25, [(0, 10), (20, 4)]),
        (15, 20, 0.25, [(0, 10)]),
        (4, 2, 0.25, [(0, 4)]),
    ],
)
def test_windows(
    samples: int, hop: int | None, min_tail: float, expected: list[tuple[int, int]]
) -> None:
    wave = torch.arange(1.0, samples + 1)
    cuts, lengths = windows(wave, 10, hop, min_tail)
    assert cuts.shape == (len(expected), 10) and cuts.is_contiguous()
    assert lengths.dtype == torch.int64 and lengths.tolist() == [length for _, length in expected]
    for cut_out, (start, length) in zip(cuts, expected, strict=True):
        assert torch.equal(cut_out[:length], wave[start : start + length])
        assert not cut_out[length:].any()


@pytest.mark.parametrize(
    ("samples", "length", "hop", "min_tail", "message"),
    [
        (0, 10, None, 0.25, "at least one"),
        (5, 0, None, 0.25, "length and hop"),
        (5, 10, 0, 0.25, "length and hop"),
        (5, 10, None, 1.5, "min_tail must be from 0 to 1"),
    ],
)
def test_wrong_windows(
    samples: int, length: int, hop: int | None, min_tail: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        windows(torch.zeros(samples), length, hop, min_tail)


def test_windows_of_a_batch() -> None:
    with pytest.raises(ValueError, match=r"waveform must be \[samples\].*\[1, 5\]"):
        windows(torch.zeros(1, 5), 10)


def test_find_audio(tmp_path: Path) -> None:
    inside = tmp_path / "folder"
    for name in ("b.flac", "a.WAV", "sub/c.mp3", "sub/notes.txt", "._a.wav", "d.ogg/e.opus"):
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        (inside / name).touch()
    other = tmp_path / "other.bin"
    other.touch()
    (tmp_path / "none").mkdir()
    missing = tmp_path / "missing.wav"
    found = find_audio([str(other), inside, missing, inside / "b.flac", tmp_path / "none"])
    names = ("a.WAV", "b.flac", "d.ogg/e.opus", "sub/c.mp3")
    assert found == [other, *(inside / name for name in names), missing, tmp_path / "none"]
    assert find_audio([]) == []
