"""Decoding clips: one, all in order, or those that are asked for, ahead of time."""

from __future__ import annotations

import io
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fastast.audio import AudioError, load_audio

from .clips import Clip

__all__ = ["Decoded", "OnDemand", "Waveforms", "decode", "decode_all", "header", "progress_bar"]

SHORTEST_SECONDS = 1 / 40  # one frame of the filterbank
# Decoded clips that wait to be asked for: an hour in float32 at 16 kHz.
MOST_WAITING_BYTES = 256 << 20


def workers() -> int:
    """Threads that decode; libsndfile and soxr run without the interpreter's lock."""
    return min(8, os.cpu_count() or 1)


def decode(clip: Clip, sample_rate: int, dtype: str) -> np.ndarray:
    """The samples of a clip, 1-d of `dtype`, mono, at `sample_rate`.

    Raises:
        AudioError: It cannot be used; the message names the clip and says why.
    """
    try:
        if clip.piece is None:
            waveform = load_audio(clip.open(), sample_rate).numpy()
        else:
            whole = _whole(clip.files, clip.path or clip.name, sample_rate)
            start, end = (round(seconds * sample_rate) for seconds in clip.piece)
            waveform = whole[start:end]
        if len(waveform) < sample_rate * SHORTEST_SECONDS:
            milliseconds = 1000 * len(waveform) / sample_rate
            raise AudioError(f"is {milliseconds:.0f} ms long, at least 25 are needed")
        return np.asarray(waveform, dtype=dtype)
    except AudioError as error:
        reason = str(error)
        if clip.name in reason:
            raise
        raise AudioError(f"{clip.name}: {reason}") from error


@lru_cache(maxsize=8)
def _whole(files: object, path: str, sample_rate: int) -> np.ndarray:
    """A recording of which many clips are pieces: kept, or each would decode all of it again."""
    return load_audio(files.open(path), sample_rate).numpy()  # type: ignore[attr-defined]


def _try(clip: Clip, sample_rate: int, dtype: str) -> np.ndarray | str:
    try:
        return decode(clip, sample_rate, dtype)
    except AudioError as error:
        return str(error)


def decode_all(clips: Sequence[Clip], sample_rate: int, dtype: str) -> Iterator[np.ndarray | str]:
    """The samples of clips, in order, or of a clip that cannot be used the reason; in threads."""
    ahead = 4 * workers()
    waiting: deque[Future[np.ndarray | str]] = deque()
    with ThreadPoolExecutor(workers()) as pool:
        for clip in clips:
            waiting.append(pool.submit(_try, clip, sample_rate, dtype))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def header(file: str | io.BytesIO, name: str) -> tuple[int, int]:
    """Samples a channel and sample rate, as the file's header says.

    Raises:
        AudioError: It has no header that libsndfile can read.
    """
    import soundfile

    try:
        info = soundfile.info(file)
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        raise AudioError(f"{name}: is not audio that libsndfile can read") from error
    return info.frames, info.samplerate


def progress_bar(items: Iterable[object], total: int, label: str) -> Iterator[object]:
    """Pass items on, with a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(
        items,
        description=label,
        total=total,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


class Waveforms:
    """The audio of clips by index: where an `AudioDataset` has it from."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> np.ndarray:
        """1-d float samples; raises `AudioError` where the clip turns out to be unreadable."""
        raise NotImplementedError

    @property
    def lengths(self) -> Tensor:
        """Samples of each clip, int64 `[n]`."""
        raise NotImplementedError

    def prefetch(self, indices: Iterable[int], first: bool = False) -> None:
        """Say which clips will be asked for next, in this order; `first`: before all others."""


class Decoded(Waveforms):
    """Arrays in memory."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self.arrays = list(arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.arrays[index]

    @property
    def lengths(self) -> Tensor:
        """Samples of each clip, int64 `[n]`."""
        return torch.tensor([len(array) for array in self.arrays], dtype=torch.int64)


class OnDemand(Waveforms):
    """Clips that are decoded when they are asked for, and forgotten.

    Clips that were announced with `prefetch` are decoded by threads in the meantime. They wait in
    at most `MOST_WAITING_BYTES` and one clip a thread; what exceeds that, is announced twice or
    never asked for costs time or memory within that bound, and changes no result.
    """

    def __init__(self, clips: Sequence[Clip], sample_rate: int, dtype: str) -> None:
        self.clips = tuple(clips)
        self.sample_rate, self.dtype = sample_rate, dtype
        self._pool = ThreadPoolExecutor(workers())
        self._lock = threading.Lock()
        self._announced: dict[int, None] = {}  # in order, not yet started
        self._started: dict[int, Future[np.ndarray | str]] = {}
        self._running = 0
        self._bytes = 0
        self._lengths: Tensor | None = None

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> np.ndarray:
        index = range(len(self.clips))[index]
        with self._lock:
            self._announced.pop(index, None)
            future = self._started.pop(index, None)
        if future is None:
            return decode(self.clips[index], self.sample_rate, self.dtype)
        result = future.result()
        with self._lock:
            self._bytes -= _size(result)
        self._start()
        if isinstance(result, str):
            raise AudioError(result)
        return result

    def prefetch(self, indices: Iterable[int], first: bool = False) -> None:
        """Decode these in the background as far as there is room."""
        with self._lock:
            new = {index: None for index in indices if index not in self._started}
            self._announced = new | self._announced if first else self._announced | new
        self._start()

    def _start(self) -> None:
        """Start announced clips, as many as there are threads and room for."""
        while True:
            with self._lock:
                full = self._bytes >= MOST_WAITING_BYTES or self._running >= workers()
                if full or not self._announced:
                    return
                index = next(iter(self._announced))
                del self._announced[index]
                self._running += 1
                self._started[index] = self._pool.submit(self._decode, index)

    def _decode(self, index: int) -> np.ndarray | str:
        try:
            result = _try(self.clips[index], self.sample_rate, self.dtype)
            with self._lock:
                self._bytes += _size(result)
        finally:
            with self._lock:
                self._running -= 1
        self._start()
        return result

    @property
    def lengths(self) -> Tensor:
        """Samples of each clip as its header says, int64 `[n]`; read when first asked for.

        Exact for WAV, FLAC and Ogg; of an MP3 it may be off by a frame or, without a Xing header,
        a guess. 0 for a clip that cannot be read.
        """
        if self._lengths is None:
            with ThreadPoolExecutor(workers()) as pool:
                lengths = list(pool.map(self._length, self.clips))
            self._lengths = torch.tensor(lengths, dtype=torch.int64)
        return self._lengths

    def _length(self, clip: Clip) -> int:
        if clip.piece is not None:
            start, end = (round(seconds * self.sample_rate) for seconds in clip.piece)
            return end - start
        try:
            frames, rate = header(clip.open(), clip.name)
        except AudioError:
            return 0
        return int(frames * self.sample_rate / rate + 0.5)  # as soxr rounds


def _size(result: np.ndarray | str) -> int:
    return 0 if isinstance(result, str) else result.nbytes
