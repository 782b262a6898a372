"""The audio of one split, by index."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastast.audio import AudioError

from .cache import open_cache
from .clips import Clip, Listing
from .decoding import Decoded, OnDemand, Waveforms, decode_all, progress_bar

__all__ = ["AudioDataset", "Batch"]

CACHES = ("memory", "disk", "none")
# Of clips left out, so many are named.
MOST_NAMED = 10


class Batch(NamedTuple):
    """Clips of one length: `waveform` fp32 `[B, S]`, of which `lengths` int64 `[B]` are valid.

    `target` is int64 `[B]` for one class a clip, fp32 `[B, classes]` for several.
    """

    waveform: Tensor
    lengths: Tensor
    target: Tensor


class AudioDataset:
    """Clips with their classes.

    Args:
        waveforms: One 1-d float array a clip, mono, at `sample_rate`.
        targets: The classes of each clip.
        labels: Names of the classes.
        names: Names of the clips.
        sample_rate: In Hz.
        multi_label: A clip may have any number of classes, not just one.
        bad: Clips that could not be read, each with the reason.

    Attributes:
        waveforms: The clips' samples by index.
        targets: int64 `[n]`, or with `multi_label` multi-hot rows, bool `[n, classes]`.
        bad: Clips that could not be read; `batch` adds those that it comes across.
    """

    def __init__(
        self,
        waveforms: Sequence[np.ndarray] | Waveforms,
        targets: Sequence[tuple[int, ...]],
        labels: Sequence[str],
        names: Sequence[str],
        sample_rate: int = 16000,
        multi_label: bool = False,
        bad: Sequence[str] = (),
    ) -> None:
        if not len(waveforms) == len(targets) == len(names):
            raise ValueError(
                f"waveforms, targets and names must be equally many, not {len(waveforms)}, "
                f"{len(targets)} and {len(names)}"
            )
        self.waveforms = waveforms if isinstance(waveforms, Waveforms) else Decoded(waveforms)
        self.labels = tuple(labels)
        self.names = tuple(names)
        self.sample_rate = sample_rate
        self.multi_label = multi_label
        self.bad = tuple(bad)
        self._unreadable: set[int] = set()
        if multi_label:
            # bool: for the two million clips of AudioSet 1 GB, and not 4.
            self.targets = torch.zeros(len(targets), len(self.labels), dtype=torch.bool)
            rows = [row for row, classes in enumerate(targets) for _ in classes]
            self.targets[rows, [number for classes in targets for number in classes]] = True
        else:
            self.targets = torch.tensor([t[0] for t in targets], dtype=torch.int64)

    @classmethod
    def load(
        cls,
        listing: Listing,
        split: str,
        sample_rate: int = 16000,
        cache_dtype: str = "float32",
        limit: int = 0,
        progress: bool = False,
        cache: str = "memory",
        cache_dir: str = "",
    ) -> AudioDataset:
        """Load one split of a listing.

        All three caches give the same samples. They differ in when clips are decoded, and in when
        one that cannot be read is noticed: `"memory"` and `"disk"` leave it out of the data set,
        `"none"` replaces it in the batch it is asked for in (see `batch`).

        Args:
            listing: What `list_clips` gave.
            split: Name of the split; ``"!1"`` means every split but ``"1"``.
            sample_rate: Everything is resampled to it, in Hz.
            cache_dtype: `"float32"`, or `"float16"` for half the memory (11 bits of each sample).
            limit: Load only so many clips, evenly spread over the split; 0 means all.
            progress: Show a progress bar.
            cache: `"memory"`: decoded now, kept in memory. `"disk"`: decoded once into a file in
                `cache_dir`, which later runs find again. `"none"`: decoded when asked for.
            cache_dir: Folder of `"disk"`'s files. Their names change with the clips' names, sizes
                and times, `sample_rate` and `cache_dtype`; delete them when you like.

        Raises:
            ValueError: No such split, none of its clips can be read, or an argument is not one of
                these. Single clips that cannot be read are left out with one warning.
            OSError: `cache_dir` cannot be written, or is full.
        """
        if cache_dtype not in ("float32", "float16"):
            raise ValueError(f"cache_dtype must be 'float32' or 'float16', not {cache_dtype!r}")
        if cache not in CACHES:
            raise ValueError(f"cache must be one of {', '.join(CACHES)}, not {cache!r}")
        if cache == "disk" and not cache_dir:
            raise ValueError("cache_dir must name a folder for cache 'disk'")
        clips = listing.select(split)
        if limit and limit < len(clips):
            clips = tuple(clips[i * len(clips) // limit] for i in range(limit))

        waveforms: Waveforms
        bad: dict[int, str] = {}
        label = f"reading {split}" if progress else ""
        if cache == "none":
            waveforms = OnDemand(clips, sample_rate, cache_dtype)
        elif cache == "disk":
            folder = Path(cache_dir)
            waveforms, bad = open_cache(clips, split, sample_rate, cache_dtype, folder, label)
        else:
            waveforms, bad = _decoded(clips, sample_rate, cache_dtype, label)
        if len(bad) == len(clips):
            raise ValueError(
                f"none of the {len(clips)} clips of split {split!r} can be read: {bad[0]}"
            )
        if bad:
            named = "; ".join(list(bad.values())[:MOST_NAMED])
            more = f"; and {len(bad) - MOST_NAMED} more" if len(bad) > MOST_NAMED else ""
            warnings.warn(
                f"{len(bad)} of {len(clips)} clips of split {split!r} left out: {named}{more}",
                stacklevel=2,
            )
        kept = [clip for i, clip in enumerate(clips) if i not in bad]
        return cls(
            waveforms,
            [clip.target for clip in kept],
            listing.labels,
            [clip.name for clip in kept],
            sample_rate,
            listing.multi_label,
            list(bad.values()),
        )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def lengths(self) -> Tensor:
        """Samples of each clip, int64 `[n]`.

        Exact, but for clips that are decoded when asked for (cache `"none"`): then what the
        headers of the files say, all read at the first call; exact for WAV, FLAC and Ogg, within a
        frame or a guess for MP3, and 0 for a clip that cannot be read.
        """
        return self.waveforms.lengths

    @property
    def fingerprint(self) -> int:
        """A checksum of the clips' names and classes, and of the classes' names."""
        targets = zlib.crc32(self.targets.numpy().tobytes())
        text = repr((self.names, targets, self.labels, self.multi_label))
        return zlib.crc32(text.encode("utf-8", "surrogateescape"))

    def prefetch(self, indices: Iterable[int] | Tensor) -> None:
        """Start decoding clips that coming batches will ask for, in this order.

        Changes no result, and does nothing where clips are decoded already. What is decoded ahead
        is bounded, so announcing too much does no harm.
        """
        self.waveforms.prefetch(int(i) for i in indices)

    def batch(
        self, indices: Sequence[int] | Tensor, samples: int, places: Tensor | None = None
    ) -> Batch:
        """Gather clips, cut or zero-padded at the end to `samples`.

        A clip that turns out to be unreadable is warned about once, added to `bad`, and replaced,
        its target too, by the next one that can be read (the first follows the last). This depends
        on the files alone, so a resumed training sees the same.

        Args:
            indices: Which clips, `[B]`.
            samples: Length of the result.
            places: Where longer clips are cut, `[B]` in [0, 1): 0 keeps the beginning, as None
                does for all; numbers just below 1 keep the end.

        Raises:
            ValueError: `samples` is not positive, `places` does not fit, or no clip can be read.
        """
        if samples < 1:
            raise ValueError(f"samples must be at least 1, not {samples}")
        asked = [int(i) for i in indices]
        if places is None:
            places = torch.zeros(len(asked))
        if places.shape != (len(asked),) or not bool(((places >= 0) & (places < 1)).all()):
            raise ValueError(f"places must be [{len(asked)}] numbers in [0, 1), not {places}")
        self.waveforms.prefetch(asked, first=True)
        out = np.zeros((len(asked), samples), np.float32)
        lengths, used = [], []
        for row, index, place in zip(out, asked, places.tolist(), strict=True):
            clip, index = self._readable(index)
            room = max(len(clip) - samples, 0)
            start = min(int(place * (room + 1)), room)
            piece = clip[start : start + samples]
            row[: len(piece)] = piece
            lengths.append(len(piece))
            used.append(index)
        target = self.targets[used]
        return Batch(
            torch.from_numpy(out),
            torch.tensor(lengths, dtype=torch.int64),
            target.float() if self.multi_label else target,
        )

    def batches(self, batch_size: int, samples: int) -> Iterator[Batch]:
        """All clips in order, for evaluation; the next batch is prefetched."""
        ranges = [range(i, min(i + batch_size, len(self))) for i in range(0, len(self), batch_size)]
        for indices, coming in zip(ranges, [*ranges[1:], range(0)], strict=True):
            batch = self.batch(indices, samples)
            self.prefetch(coming)
            yield batch

    def _readable(self, index: int) -> tuple[np.ndarray, int]:
        """The samples of a clip, or of the next one that can be read, and its index."""
        index = range(len(self))[index]
        for step in range(len(self)):
            i = (index + step) % len(self)
            if i in self._unreadable:
                continue
            try:
                return self.waveforms[i], i
            except AudioError as error:
                self._unreadable.add(i)
                self.bad = (*self.bad, str(error))
                warnings.warn(f"{error}; the next clip replaces it", stacklevel=3)
        raise ValueError(f"none of the {len(self)} clips can be read: {self.bad[-1]}")


def _decoded(
    clips: Sequence[Clip], sample_rate: int, dtype: str, label: str
) -> tuple[Waveforms, dict[int, str]]:
    """The clips' samples in memory, and why some cannot be read, by their position."""
    results: Iterator[Any] = decode_all(clips, sample_rate, dtype)
    if label:
        results = progress_bar(results, len(clips), label)
    loaded = list(results)
    bad = {i: result for i, result in enumerate(loaded) if isinstance(result, str)}
    return Decoded([result for result in loaded if not isinstance(result, str)]), bad
