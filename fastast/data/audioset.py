"""AudioSet as it is distributed: csvs of segments, a list of classes, and clips that were found."""

from __future__ import annotations

import csv
import io
import re
import warnings
from collections.abc import Sequence
from pathlib import PurePosixPath

from .clips import Clip, Listing
from .files import CLASS_LABELS, Files, is_audio
from .table import Classes, Options, read_classes

__all__ = ["is_audioset", "is_segments", "list_audioset", "list_segments"]

# The id of a video, perhaps after a Y (as AudioSet's own tools write it), perhaps followed by the
# segment's start and end, in seconds or milliseconds.
FILE_STEM = re.compile(r"Y?([\w-]{11})(?:_\d+(?:\.\d+)?){0,2}", re.ASCII)


def is_segments(text: str) -> bool:
    """Whether a csv is one of AudioSet's lists of segments: comments that name YTID, no header."""
    comments = [line for line in text[:10_000].splitlines()[:10] if line.startswith("#")]
    return any("YTID" in line for line in comments)


def is_audioset(files: Files) -> bool:
    """Whether files are lists of segments and the list of their classes."""
    return files.has(CLASS_LABELS) and bool(_segment_tables(files))


def list_audioset(files: Files, roots: Files | None, options: Options) -> Listing:
    """List the clips of all segment csvs at the top; each is a split of its name."""
    return list_segments(files, _segment_tables(files), roots or files)


def list_segments(files: Files, tables: Sequence[str], roots: Files) -> Listing:
    """List the clips of segment csvs, of those whose audio is there.

    The classes are all that `class_labels_indices.csv` has, whether a clip has them or not. A
    warning says how many clips were found, unless all were.

    Args:
        files: Where the csvs and `class_labels_indices.csv` are.
        tables: Names of the csvs; a csv's name without its suffix is its clips' split.
        roots: Where the clips are, in any folder: `ID`, `YID`, `ID_START` or `ID_START_END`, with
            any audio suffix.

    Raises:
        ValueError: No list of classes, no clip found, or a row that cannot be read.
    """
    classes = read_classes(files.text(CLASS_LABELS), CLASS_LABELS)
    audio = _audio_by_id(roots)
    clips: list[Clip] = []
    counts = []
    for table in tables:
        segments = _read_segments(files.text(table), table, classes)
        found = [(audio[key], target) for key, target in segments if key in audio]
        split = PurePosixPath(table).stem
        clips += [Clip(name, target, split, roots) for name, target in found]
        counts.append((len(found), len(segments), table))
    text = ", ".join(
        f"{found:,} of {rows:,} clips found for {name}" for found, rows, name in counts
    )
    if not clips:
        raise ValueError(f"data has no audio of AudioSet: {text}")
    if any(found < rows for found, rows, _ in counts):
        warnings.warn(text, stacklevel=2)
    return Listing(tuple(clips), classes.names, multi_label=True)


def _segment_tables(files: Files) -> list[str]:
    return [name for name in files.tables() if is_segments(files.text(name))]


def _audio_by_id(roots: Files) -> dict[str, str]:
    audio: dict[str, str] = {}
    for name in filter(is_audio, roots.names()):
        match = FILE_STEM.fullmatch(PurePosixPath(name).stem)
        if match:
            audio.setdefault(match[1], name)
    return audio


def _read_segments(text: str, name: str, classes: Classes) -> list[tuple[str, tuple[int, ...]]]:
    """Video id and class numbers of each row."""
    segments = []
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True)
    for row in reader:
        if not row or row[0].startswith("#"):
            continue
        where = f"csv {name}, row {reader.line_num}"
        if len(row) != 4:
            raise ValueError(
                f"{where}: must be YTID, start_seconds, end_seconds, positive_labels; "
                f"it has {len(row)} columns"
            )
        labels = [label.strip() for label in row[3].split(",") if label.strip()]
        if not labels:
            raise ValueError(f"{where}: has no label")
        for label in labels:
            if label not in classes.ids:
                raise ValueError(f"{where}: label {label!r} is not in {CLASS_LABELS}")
        segments.append((row[0].strip(), tuple(classes.ids[label] for label in labels)))
    return segments
