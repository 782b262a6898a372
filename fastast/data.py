"""Labelled audio for training and evaluation: a csv with its audio, or folders of classes.

A data set is *listed* (which clips, which class, which split), then *loaded* (decoded, mono, at one
sample rate, kept in memory). Batches are gathered from memory by index, so the order of the data is
a pure function of a seed and a step, which is what makes a resumed training exact.
"""

from __future__ import annotations

import csv
import io
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastast.audio import AudioError, find_audio, load_audio

__all__ = ["AudioDataset", "Batch", "Clip", "Listing", "list_clips"]

PATH_COLUMNS = ("filename", "path", "file", "audio", "wav")
TARGET_COLUMNS = ("target", "label", "category", "class")
NAME_COLUMNS = ("category", "label", "class", "class_name")
SPLIT_COLUMNS = ("split", "fold", "set", "subset")
HASH_TEST_PERCENT = 10


class Batch(NamedTuple):
    """Clips of one length: `waveform` fp32 `[B, S]`, of which `lengths` int64 `[B]` are valid.

    `target` is int64 `[B]` for one class a clip, fp32 `[B, classes]` for several.
    """

    waveform: Tensor
    lengths: Tensor
    target: Tensor


@dataclass(frozen=True)
class Clip:
    """One labelled recording: its name in the data set, its classes, and how to open it."""

    name: str
    target: tuple[int, ...]
    split: str
    open: Callable[[], str | io.BytesIO] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Listing:
    """The clips of a data set, of all splits, and the names of its classes."""

    clips: tuple[Clip, ...]
    labels: tuple[str, ...]
    multi_label: bool = False

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, sorted."""
        return tuple(sorted({clip.split for clip in self.clips}))

    def select(self, split: str) -> tuple[Clip, ...]:
        """Clips of one split, or with a leading ``!`` of all others (``"!1"``: all folds but 1)."""
        name = split.removeprefix("!")
        if name not in self.splits:
            raise ValueError(f"split {name!r} is not in the data: it has {', '.join(self.splits)}")
        inside = not split.startswith("!")
        return tuple(clip for clip in self.clips if (clip.split == name) == inside)


class _Member(io.BytesIO):
    """A file of an archive in memory, with its name for messages."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name


class _Roots:
    """Opens a clip by name from the first root, a folder or a zip archive, that holds it."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self.folders = [root for root in roots if root.is_dir()]
        self.members: dict[str, zipfile.ZipFile] = {}
        for root in roots:
            if root.is_dir():
                continue
            try:
                archive = zipfile.ZipFile(root)
            except (OSError, zipfile.BadZipFile) as error:
                raise ValueError(f"root {root} is neither a folder nor a zip: {error}") from None
            for name in archive.namelist():
                self.members.setdefault(name, archive)

    def opener(self, name: str) -> Callable[[], str | io.BytesIO]:
        def open_clip() -> str | io.BytesIO:
            archive = self.members.get(name)
            if archive is not None:
                try:
                    return _Member(archive.read(name), name)
                except (OSError, zipfile.BadZipFile, zlib.error) as error:
                    raise AudioError(f"{name}: cannot be read from its archive: {error}") from None
            for folder in self.folders:
                if (folder / name).is_file():
                    return str(folder / name)
            raise AudioError(f"{name}: no such file in the data set's folders and archives")

        return open_clip


def _column(asked: str, candidates: Iterable[str], columns: Sequence[str], what: str) -> str:
    if asked:
        if asked not in columns:
            raise ValueError(f"{what} {asked!r} is not in the csv: it has {', '.join(columns)}")
        return asked
    for name in candidates:
        if name in columns:
            return name
    raise ValueError(
        f"{what}: none of the csv's columns ({', '.join(columns)}) looks like it; name it"
    )


def _list_csv(
    table: Path, roots: Sequence[Path], path_column: str, target_column: str, split_column: str
) -> Listing:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"csv {table} cannot be read: {error}") from None
    if not rows:
        raise ValueError(f"csv {table} has no rows")
    columns = [name for name in rows[0] if name is not None]
    path = _column(path_column, PATH_COLUMNS, columns, "path_column")
    target = _column(target_column, TARGET_COLUMNS, columns, "target_column")
    split = _column(split_column, SPLIT_COLUMNS, columns, "split_column")
    for line, row in enumerate(rows, start=2):
        if any(row[column] in (None, "") for column in (path, target, split)):
            raise ValueError(f"csv {table}, row {line}: {path}, {target} or {split} is empty")

    cells = [[value.strip() for value in row[target].split(";") if value.strip()] for row in rows]
    values = {value for cell in cells for value in cell}
    if all(value.isdecimal() for value in values):
        index = {value: int(value) for value in values}
        names = [str(i) for i in range(max(index.values()) + 1)]
        for column in NAME_COLUMNS:
            if column != target and column in columns:
                for row, cell in zip(rows, cells, strict=True):
                    if len(cell) == 1:
                        names[index[cell[0]]] = row[column]
                break
    else:
        names = sorted(values)
        index = {name: i for i, name in enumerate(names)}

    opener = _Roots(roots).opener
    clips = tuple(
        Clip(row[path], tuple(index[v] for v in cell), row[split].strip(), opener(row[path]))
        for row, cell in zip(rows, cells, strict=True)
    )
    return Listing(clips, tuple(names), multi_label=any(len(cell) != 1 for cell in cells))


def _list_class_folders(root: Path) -> Listing:
    def classes(folder: Path) -> list[Path]:
        return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))

    splits = {p.name: p for p in classes(root)}
    if not {"train", "test"} <= set(splits):
        splits = {"": root}
    names = sorted({c.name for folder in splits.values() for c in classes(folder)})
    clips = []
    for split, folder in splits.items():
        for class_folder in classes(folder):
            for path in find_audio([class_folder]):
                if path == class_folder:  # nothing in it
                    continue
                name = path.relative_to(root).as_posix()
                # The name alone decides, so that adding clips never moves an old one.
                tested = zlib.crc32(name.encode()) % 100 < HASH_TEST_PERCENT
                clips.append(
                    Clip(
                        name,
                        (names.index(class_folder.name),),
                        split or ("test" if tested else "train"),
                        lambda path=path: str(path),  # type: ignore[misc]
                    )
                )
    if not clips:
        raise ValueError(f"data {root} holds neither a csv nor folders of classes with audio files")
    return Listing(tuple(clips), tuple(names))


def list_clips(
    data: str | os.PathLike[str],
    roots: Sequence[str | os.PathLike[str]] = (),
    path_column: str = "",
    target_column: str = "",
    split_column: str = "",
) -> Listing:
    """List the clips of a data set without reading any audio.

    Args:
        data: A csv; a folder with exactly one csv (its audio beside it or in zip archives beside
            it); or a folder with one sub-folder a class, perhaps below `train` and `test`. Without
            those two, one clip in ten is a test clip, chosen by a hash of its name.
        roots: Folders and zip archives that hold the csv's files; by default the csv's own folder
            and every zip in it.
        path_column: Column with the file name; by default the first of `filename`, `path`, ...
        target_column: Column with the class, a number or a name, several of them separated by `;`.
        split_column: Column with the split or fold.

    Raises:
        ValueError: The data set is not there, or not of one of these forms.
    """
    data = Path(data)
    if not data.exists():
        raise ValueError(f"data {data} does not exist")
    table: Path | None = data
    if data.is_dir():
        tables = sorted(data.glob("*.csv"))
        if len(tables) > 1:
            found = ", ".join(path.name for path in tables)
            raise ValueError(f"data {data} holds several csv files ({found}): name the one to use")
        table = tables[0] if tables else None
    if table is None:
        return _list_class_folders(data)
    folders = [Path(root) for root in roots] or [table.parent, *sorted(table.parent.glob("*.zip"))]
    return _list_csv(table, folders, path_column, target_column, split_column)


def _progress(items: Iterator[object], total: int, label: str) -> Iterator[object]:
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


class AudioDataset:
    """Decoded clips in memory, with their classes.

    Args:
        waveforms: One 1-d float array a clip, mono, at `sample_rate`.
        targets: The classes of each clip.
        labels: Names of the classes.
        names: Names of the clips.
        sample_rate: In Hz.
        multi_label: Targets are multi-hot rows instead of class indices.
        bad: Clips that could not be read, each with the reason.
    """

    def __init__(
        self,
        waveforms: Sequence[np.ndarray],
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
        self.waveforms = list(waveforms)
        self.labels = tuple(labels)
        self.names = tuple(names)
        self.sample_rate = sample_rate
        self.multi_label = multi_label
        self.bad = tuple(bad)
        self.lengths = torch.tensor([len(w) for w in self.waveforms], dtype=torch.int64)
        if multi_label:
            self.targets = torch.zeros(len(targets), len(self.labels))
            for row, classes in zip(self.targets, targets, strict=True):
                row[list(classes)] = 1.0
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
    ) -> AudioDataset:
        """Decode one split of a listing into memory.

        Args:
            listing: What `list_clips` gave.
            split: Name of the split; ``"!1"`` means every split but ``"1"``.
            sample_rate: Everything is resampled to it, in Hz.
            cache_dtype: `"float32"`, or `"float16"` for half the memory (11 bits of each sample).
            limit: Load only so many clips, evenly spread over the split; 0 means all.
            progress: Show a progress bar.

        Raises:
            ValueError: No such split, or none of its clips can be read. Single clips that cannot
                be read are left out with one warning that names them.
        """
        if cache_dtype not in ("float32", "float16"):
            raise ValueError(f"cache_dtype must be 'float32' or 'float16', not {cache_dtype!r}")
        clips = listing.select(split)
        if limit and limit < len(clips):
            clips = tuple(clips[i * len(clips) // limit] for i in range(limit))

        def read(clip: Clip) -> np.ndarray | str:
            try:
                waveform = load_audio(clip.open(), sample_rate)
                if len(waveform) < sample_rate // 40:  # not one frame of the filterbank
                    milliseconds = 1000 * len(waveform) / sample_rate
                    return f"{clip.name}: is {milliseconds:.0f} ms long, at least 25 are needed"
                return np.asarray(waveform, dtype=cache_dtype)
            except AudioError as error:
                reason = str(error)
                return reason if clip.name in reason else f"{clip.name}: {reason}"

        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            results: Iterator[object] = iter(pool.map(read, clips))
            if progress:
                results = _progress(results, len(clips), f"reading {split}")
            loaded = list(zip(clips, results, strict=True))
        bad = [result for _, result in loaded if isinstance(result, str)]
        good = [(clip, wave) for clip, wave in loaded if isinstance(wave, np.ndarray)]
        if not good:
            raise ValueError(
                f"none of the {len(clips)} clips of split {split!r} can be read: {bad[0]}"
            )
        if bad:
            warnings.warn(
                f"{len(bad)} of {len(clips)} clips of split {split!r} left out: {'; '.join(bad)}",
                stacklevel=2,
            )
        return cls(
            [wave for _, wave in good],
            [clip.target for clip, _ in good],
            listing.labels,
            [clip.name for clip, _ in good],
            sample_rate,
            listing.multi_label,
            bad,
        )

    def __len__(self) -> int:
        return len(self.waveforms)

    @property
    def fingerprint(self) -> int:
        """A checksum of the clips' names, lengths and classes."""
        text = repr((self.names, self.lengths.tolist(), self.targets.tolist(), self.labels))
        return zlib.crc32(text.encode())

    def batch(
        self,
        indices: Sequence[int] | Tensor,
        samples: int,
        generator: torch.Generator | None = None,
    ) -> Batch:
        """Gather clips, cut or zero-padded at the end to `samples`.

        Args:
            indices: Which clips.
            samples: Length of the result.
            generator: Cuts longer clips at a random place instead of keeping their beginning.
        """
        chosen = [int(i) for i in indices]
        waveform = torch.zeros(len(chosen), samples)
        lengths = self.lengths[chosen].clamp(max=samples)
        places = torch.zeros(len(chosen))
        if generator is not None:
            places = torch.rand(len(chosen), generator=generator)
        for row, i, place in zip(waveform, chosen, places.tolist(), strict=True):
            clip = self.waveforms[i]
            start = int(place * (max(len(clip) - samples, 0) + 1))
            piece = clip[start : start + samples]
            row[: len(piece)] = torch.from_numpy(np.asarray(piece, dtype=np.float32))
        return Batch(waveform, lengths, self.targets[chosen])

    def batches(self, batch_size: int, samples: int) -> Iterator[Batch]:
        """All clips in order, for evaluation."""
        for start in range(0, len(self), batch_size):
            yield self.batch(range(start, min(start + batch_size, len(self))), samples)
