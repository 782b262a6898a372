"""Decoded clips in one file on disk, read as if they were in memory.

A cache is two files: `<name>.samples`, the clips' samples one after the other, and `<name>.jsonl`,
a line of what they are and then a line a clip (its name, its offset and length in samples, or why
it is left out). Until it is complete both are called `.part`. Lines are written after the samples
they tell of, in groups, so a build that was killed goes on with all that its lines tell of.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fastast.audio import AudioError

from .clips import Clip
from .decoding import Decoded, Waveforms, decode_all, progress_bar

__all__ = ["Mapped", "open_cache"]

FORMAT = 1
COMMIT_CLIPS = 256


class Mapped(Waveforms):
    """Clips in a memory-mapped file of samples.

    Args:
        path: The file of samples, of `dtype`.
        dtype: `"float32"` or `"float16"`.
        names: The clips' names, for messages.
        offsets: Where each begins, in samples.
        lengths: How many samples each has.
    """

    def __init__(
        self,
        path: Path,
        dtype: str,
        names: Sequence[str],
        offsets: Sequence[int],
        lengths: Sequence[int],
    ) -> None:
        self.names = tuple(names)
        self._offsets = np.array(offsets, dtype=np.int64)
        self._lengths = np.array(lengths, dtype=np.int64)
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._samples = np.frombuffer(self._map, dtype)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> np.ndarray:
        start, length = int(self._offsets[index]), int(self._lengths[index])
        end = start + length
        # Reading a page that is no longer in the file would end the process with a bus error.
        if end * self._samples.itemsize > min(self._map.size(), self._samples.nbytes):
            raise AudioError(f"{self.names[index]}: its part of the cache is missing")
        return self._samples[start:end]

    @property
    def lengths(self) -> Tensor:
        """Samples of each clip, int64 `[n]`."""
        return torch.from_numpy(self._lengths.copy())


@dataclass(frozen=True)
class _Cache:
    """The files of one cache, and what they hold."""

    folder: Path
    name: str
    clips: Sequence[Clip]
    sample_rate: int
    dtype: str

    def path(self, suffix: str) -> Path:
        return self.folder / f"{self.name}.{suffix}"

    @property
    def head(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "sample_rate": self.sample_rate,
            "dtype": self.dtype,
            "clips": len(self.clips),
        }

    def read(self, index: Path, samples: Path) -> tuple[list[dict[str, Any]], int]:
        """The lines whose clips are there in full, and how long their part of the index is."""
        entries: list[dict[str, Any]] = []
        size, good, end = os.path.getsize(samples), 0, 0
        with index.open("rb") as file:
            for number, line in enumerate(file):
                try:
                    entry = json.loads(line)
                except ValueError:  # cut off in the middle of the line
                    break
                if not (isinstance(entry, dict) and line.endswith(b"\n")):
                    break
                if number:
                    wanted = number <= len(self.clips) and self.clips[number - 1].name
                    if entry.get("name") != wanted or entry.get("offset", end) != end:
                        break
                    length = entry.get("length", 0)
                    if (end + length) * self.itemsize > size:
                        break
                    end += length
                    entries.append(entry)
                elif entry != self.head:
                    break
                good += len(line)
        return entries, good

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize

    def build(self, label: str) -> list[dict[str, Any]]:
        """Decode what is not there yet; returns the lines of all clips."""
        parts = index_part, samples_part = self.path("jsonl.part"), self.path("samples.part")
        for part in parts:
            part.touch()
        entries, good = self.read(index_part, samples_part)
        end = sum(entry.get("length", 0) for entry in entries)
        waiting = [] if good else [self.head]
        rest = self.clips[len(entries) :]
        decoded: Iterator[Any] = decode_all(rest, self.sample_rate, self.dtype)
        if label:
            decoded = progress_bar(decoded, len(rest), label)
        with (
            index_part.open("r+b", buffering=0) as index,
            samples_part.open("r+b", buffering=0) as samples,
        ):
            index.truncate(good)
            index.seek(good)
            samples.truncate(end * self.itemsize)
            samples.seek(end * self.itemsize)
            try:
                for clip, result in zip(rest, decoded, strict=True):
                    entry: dict[str, Any] = {"name": clip.name}
                    if isinstance(result, str):
                        entry["bad"] = result
                    else:
                        _write(samples, result.tobytes())
                        entry.update(offset=end, length=len(result))
                        end += len(result)
                    entries.append(entry)
                    waiting.append(entry)
                    if len(waiting) >= COMMIT_CLIPS:
                        _commit(samples, index, waiting)
                _commit(samples, index, waiting)
            except OSError as error:
                done = len(entries) - len(waiting)
                raise OSError(
                    error.errno,
                    f"the cache {self.folder} cannot be written: {error.strerror}. About {done} of "
                    f"{len(self.clips)} clips are in it; the next run continues there. Free some "
                    "space, name another folder with cache_dir, or use cache_dtype float16",
                ) from error
        # The index last: where it is, the cache is complete.
        os.replace(samples_part, self.path("samples"))
        os.replace(index_part, self.path("jsonl"))
        return entries


def open_cache(
    clips: Sequence[Clip], split: str, sample_rate: int, dtype: str, folder: Path, label: str = ""
) -> tuple[Waveforms, dict[int, str]]:
    """The clips' samples on disk; decoded into `folder` first, unless they are there already.

    Caches have names that change with the clips' names, files and the format, so many can share a
    folder. Several processes may open the same one: one builds, the others wait.

    Args:
        clips: The clips of one split.
        split: Name of the split, for the cache's name.
        sample_rate: In Hz.
        dtype: `"float32"` or `"float16"`.
        folder: Folder of caches; made if it is not there.
        label: Of a progress bar; empty: none.

    Returns:
        The samples of the clips that can be read, and why others cannot, by their position.

    Raises:
        OSError: The folder cannot be written, or is full. What is in it stays usable.
    """
    name = f"{re.sub(r'[^A-Za-z0-9-]', '_', split)}-{_key(clips, sample_rate, dtype)}"
    cache = _Cache(folder, name, clips, sample_rate, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    index, samples = cache.path("jsonl"), cache.path("samples")
    with _locked(cache.path("lock")):
        entries: list[dict[str, Any]] = []
        if index.exists() and samples.exists():
            entries, _ = cache.read(index, samples)
        if len(entries) < len(clips):
            # Of a cache that is damaged, or was killed between its two renames.
            for path in (index, samples):
                if path.exists():
                    os.replace(path, path.with_name(path.name + ".part"))
            entries = cache.build(label)
    bad = {i: entry["bad"] for i, entry in enumerate(entries) if "bad" in entry}
    good = [entry for entry in entries if "bad" not in entry]
    if not good:
        return Decoded([]), bad
    names, offsets, lengths = ([e[key] for e in good] for key in ("name", "offset", "length"))
    return Mapped(samples, dtype, names, offsets, lengths), bad


def _key(clips: Sequence[Clip], sample_rate: int, dtype: str) -> str:
    digest = hashlib.sha256(repr((FORMAT, sample_rate, dtype)).encode())
    for clip in clips:
        digest.update(repr((clip.name, clip.path, clip.piece, clip.stamp())).encode())
    return digest.hexdigest()[:16]


def _write(file: BinaryIO, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]  # an unbuffered file may take a part


def _commit(samples: BinaryIO, index: BinaryIO, entries: list[dict[str, Any]]) -> None:
    """Write the lines of clips whose samples are written, and forget them."""
    os.fsync(samples.fileno())
    _write(index, "".join(json.dumps(entry) + "\n" for entry in entries).encode())
    entries.clear()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Only one process at a time; a lock ends with the process that holds it."""
    with path.open("wb") as file:
        try:
            import fcntl
        except ImportError:  # not on Windows: there, build a cache with one process
            yield
        else:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
