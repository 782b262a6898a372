"""Audio files to waveforms: reading, resampling, cutting long recordings into windows."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SUFFIXES = frozenset(
    {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64"}
)
LOWEST_RATE, HIGHEST_RATE = 1_000, 768_000

# Frames decoded at a time: a header that promises hours must not allocate them.
_BLOCK = 1 << 18
# Sizes that writers to a pipe leave in a header they cannot go back to: unknown, not cut off.
_UNKNOWN_SIZE = 0x7FFFF000
_UNKNOWN_FRAMES = 1 << 62
# libsndfile's SF_ERR_MALFORMED_FILE: a known format, but broken.
_MALFORMED = 3
# The header of an MP3 that says how long it is. A decoder may lose a frame at either end.
_MP3_TAG = re.compile(rb"\0{9}(?:Xing|Info)")
_MP3_SLACK = 2 * 1152

# What libsndfile logs of a WAV, AU, AIFF or W64 file that is shorter than its header says; the
# frame count it gives is then silently the shortened one.
_SHORT = re.compile(r"^ *(?:data|Data Size|SSND|riff) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
# The greatest Ogg page: a header, the sizes of 255 segments, and 255 bytes in each.
_OGG_PAGE = 27 + 255 + 255 * 255


class AudioError(ValueError):
    """An audio file that cannot be used; the message names the file and says why."""


def load_audio(path_or_file: str | os.PathLike[str] | BinaryIO, sample_rate: int = 16000) -> Tensor:
    """Read an audio file as mono samples at one sample rate.

    Reads what libsndfile does: WAV, FLAC, Ogg Vorbis, Opus, MP3, AIFF, AU, CAF and others.
    Channels are averaged; other sample rates are resampled with soxr at high quality.

    A file that was cut off is refused where that can be seen: always in FLAC (its frames or its
    end are missing), Ogg (its last page is not marked as the end) and CAF; in WAV, AIFF, AU and
    W64 where the header gives a size (programs that write to a pipe leave it open); in MP3 where
    it has a Xing or Info header, as most do.

    Args:
        path_or_file: A path, or a binary file that can seek, at its beginning.
        sample_rate: Samples per second of the result, in Hz.

    Returns:
        float32 `[samples]` on the CPU; full scale of an integer format is 1.

    Raises:
        AudioError: No such file, a folder, an empty file, not audio, cut off or damaged, no
            samples, NaN or Inf among them, or a sample rate outside 1 kHz to 768 kHz.
        ValueError: `sample_rate` is outside that range.
    """
    if not LOWEST_RATE <= sample_rate <= HIGHEST_RATE:
        raise ValueError(
            f"sample_rate must be from {LOWEST_RATE} to {HIGHEST_RATE} Hz, got {sample_rate}"
        )
    if isinstance(path_or_file, str | os.PathLike):
        name = os.fspath(path_or_file)
        try:
            _check_file(Path(name))
            with open(name, "rb") as file:
                samples, rate = _decode(file, name)
        except OSError as error:
            raise AudioError(f"{name}: cannot be read: {error.strerror or error}") from error
    else:
        name = str(getattr(path_or_file, "name", "audio file"))
        samples, rate = _decode(path_or_file, name)
    if not len(samples):
        raise AudioError(f"{name}: has no samples")
    if not np.isfinite(samples).all():
        raise AudioError(f"{name}: has NaN or infinite samples")
    if rate != sample_rate:
        import soxr

        samples = soxr.resample(samples, rate, sample_rate, quality="HQ")
        if not len(samples):
            raise AudioError(f"{name}: is too short to resample from {rate} to {sample_rate} Hz")
    return torch.from_numpy(samples)


def windows(
    waveform: Tensor, length: int, hop: int | None = None, min_tail: float = 0.25
) -> tuple[Tensor, Tensor]:
    """Cut a long recording into windows of one length; the last one is padded with zeros.

    A shorter last window is left out where it is shorter than `min_tail` of a window, or where
    the window before it already reaches the end; a recording shorter than one window is always
    one window.

    Args:
        waveform: `[samples]`.
        length: Samples of a window.
        hop: Samples from one window's start to the next one's; a window by default.
        min_tail: The least part of a window, 0 to 1, that the last one must have of real samples.

    Returns:
        The windows `[n, length]`, and int64 `[n]`: how many samples of each are real, as
        `Fbank` takes them for `lengths`.

    Raises:
        ValueError: `waveform` has another rank or no samples, or a number is out of its range.
    """
    hop = length if hop is None else hop
    if waveform.dim() != 1 or not len(waveform):
        raise ValueError(
            f"waveform must be [samples] with at least one, got {list(waveform.shape)}"
        )
    if length < 1 or hop < 1:
        raise ValueError(f"length and hop must be at least 1 sample, got {length} and {hop}")
    if not 0 <= min_tail <= 1:
        raise ValueError(f"min_tail must be from 0 to 1, got {min_tail}")
    samples = len(waveform)
    full = max(0, 1 + (samples - length) // hop)
    rest = samples - full * hop
    reached = full > 0 and (full - 1) * hop + length >= samples
    tail = full == 0 or (not reached and rest > 0 and rest >= min_tail * length)
    count = full + tail
    padded = F.pad(waveform, (0, max(0, (count - 1) * hop + length - samples)))
    cut = padded.unfold(0, length, hop)[:count].contiguous()
    return cut, (samples - torch.arange(count) * hop).clamp(max=length)


def find_audio(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The audio files that paths stand for: a folder for all those under it, sorted.

    Files are taken whatever they are called; in folders, files with an audio suffix are, hidden
    ones (`.name`) aside. A path that does not exist and a folder without audio stay in the list
    as they are, so that `load_audio` says so for each.

    Args:
        paths: Files and folders.

    Returns:
        Paths in the order given, each once.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(path.rglob("*")) if path.is_dir() else []
        audio = [file for file in inside if _is_audio(file)]
        found.extend(audio or [path])
    return list(dict.fromkeys(found))


def _is_audio(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()


def _check_file(path: Path) -> None:
    if not path.exists():
        raise AudioError(f"{path}: no such file")
    if path.is_dir():
        raise AudioError(f"{path}: is a folder, not an audio file")
    if not path.is_file():
        raise AudioError(f"{path}: is not a regular file")
    if not path.stat().st_size:
        raise AudioError(f"{path}: is empty (0 bytes)")


def _decode(file: BinaryIO, name: str) -> tuple[np.ndarray, int]:
    """Mono float32 samples and their rate, or AudioError for what is not a whole audio file."""
    import soundfile

    sized_mp3 = _MP3_TAG.search(file.read(1 << 16)) is not None
    file.seek(0)
    try:
        sound = soundfile.SoundFile(file)
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: the name ends in .raw
        if getattr(error, "code", None) == _MALFORMED:
            raise AudioError(f"{name}: is cut off or damaged") from error
        raise AudioError(f"{name}: is not audio that libsndfile can read") from error
    with sound:
        rate, promised = sound.samplerate, sound.frames
        if not LOWEST_RATE <= rate <= HIGHEST_RATE:
            raise AudioError(
                f"{name}: its sample rate is {rate} Hz, not from {LOWEST_RATE} to {HIGHEST_RATE}"
            )
        if promised >= _UNKNOWN_FRAMES:
            raise AudioError(f"{name}: its header does not say how long it is; convert it again")
        blocks = [np.empty(0, np.float32)]
        broken: Exception | None = None
        try:
            while len(block := sound.read(_BLOCK, dtype="float32", always_2d=True)):
                blocks.append(block.mean(axis=1))
        except soundfile.LibsndfileError as error:
            broken = error
        short = any(
            int(fits) < int(size) < _UNKNOWN_SIZE for size, fits in _SHORT.findall(sound.extra_info)
        )
        if sound.format == "OGG":
            short = not _ogg_ends(file)
        elif sound.format == "MP3":
            # Without that header the length is a guess from the first bit rate.
            promised = promised - _MP3_SLACK if sized_mp3 else 0
    samples = np.concatenate(blocks)
    if broken or short or len(samples) < promised:
        seconds = len(samples) / rate
        raise AudioError(f"{name}: is cut off or damaged after {seconds:.2f} s") from broken
    return samples, rate


def _ogg_ends(file: BinaryIO) -> bool:
    """Whether the last page of an Ogg file is there in full and marked as the end (RFC 3533)."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _OGG_PAGE))
    page = file.read()
    page = page[max(0, page.rfind(b"OggS")) :]
    if len(page) < 27:
        return False
    flags, segments = page[5], page[26]
    return bool(flags & 4) and 27 + segments + sum(page[27 : 27 + segments]) <= len(page)
