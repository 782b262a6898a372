"""Listing a data set: which form it has, and what clips are in it."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path

from .audioset import is_segments, list_segments
from .clips import Clip, Listing
from .files import CLASS_LABELS, Files, is_archive, is_audio, open_files, open_roots, with_zips
from .layouts import LAYOUTS
from .table import Options, list_table, read_classes, read_table

__all__ = ["list_clips"]

SUBSETS = ("esc10", "kws12")
HASH_TEST_PERCENT = 10


def list_clips(
    data: str | os.PathLike[str],
    roots: Sequence[str | os.PathLike[str]] = (),
    path_column: str = "",
    target_column: str = "",
    split_column: str = "",
    where: str = "",
    subset: str = "",
) -> Listing:
    """List the clips of a data set without decoding any audio.

    `data` is a folder, or a zip, tar or tar.gz archive of one, or a csv. It may be, in this order:

    - the official tree of ESC-50 (splits `1` to `5`), Speech Commands V2 (35 classes; `train`,
      `val`, `test`), FSDD (indices 0 to 4 are `test`) or AudioSet (segment csvs beside
      `class_labels_indices.csv`, clips anywhere below or in `roots`; a csv's name is its split),
      also one folder down;
    - one csv, its audio beside it or in zip archives beside it, or a segment csv of AudioSet; a
      `class_labels_indices.csv` beside it says what classes there are;
    - one folder a class, perhaps below `train` and `test`. Without those two, one clip in ten is a
      test clip, chosen by a hash of its name.

    Args:
        data: The data set.
        roots: Folders and archives that hold the csv's files; by default the csv's own folder and
            every zip in it.
        path_column: Column with the file name; by default the first of `filename`, `path`, ...
        target_column: Column with the class, a number or a name, several of them separated by `;`.
        split_column: Column with the split or fold.
        where: ``"column=value"``: only the rows of the csv that have this value.
        subset: `"esc10"` (of ESC-50: the rows where the column `esc10` is True, ten classes) or
            `"kws12"` (of Speech Commands: ten words, silence, and unknown; see
            `fastast.data.speech_commands`).

    Raises:
        ValueError: The data set is not there, not of one of these forms, or an option does not
            fit it; a row of the csv lacks a value or has a label that is no class.
    """
    data = Path(data)
    options = Options(path_column, target_column, split_column, where, subset)
    if subset not in ("", *SUBSETS):
        raise ValueError(f"subset must be '' or one of {', '.join(SUBSETS)}, not {subset!r}")
    if not data.exists():
        raise ValueError(f"data {data} does not exist")
    given = open_roots([Path(root) for root in roots]) if roots else None
    if data.is_file() and not is_archive(data):
        return _list_csv(open_files(data.parent), data.name, given, options)

    files = open_files(data)
    for base in (files, *map(files.below, files.folders())):
        for layout in LAYOUTS:
            if layout.recognise(base):
                layout.check(options)
                return layout.list(base, given, options)
    folders = files.folders()
    if not files.tables() and len(folders) == 1 and files.below(folders[0]).folders():
        files = files.below(folders[0])  # a folder around the data set, as archives have it
    tables = files.tables()
    if len(tables) > 1:
        found = ", ".join(tables)
        raise ValueError(f"data {data} holds several csv files ({found}): name the one to use")
    if tables:
        return _list_csv(files, tables[0], given, options)
    for name in ("where", "subset"):
        if value := getattr(options, name):
            raise ValueError(f"{name} {value!r}: data {data} has no csv to take it from")
    return _list_class_folders(files, data)


def _list_csv(files: Files, name: str, roots: Files | None, options: Options) -> Listing:
    text = files.text(name)
    roots = roots or with_zips(files)
    if is_segments(text):
        return list_segments(files, [name], roots)
    classes = None
    if files.has(CLASS_LABELS):
        classes = read_classes(files.text(CLASS_LABELS), CLASS_LABELS)
    return list_table(read_table(text, name), roots, options, classes)


def _list_class_folders(files: Files, data: Path) -> Listing:
    found = [(name, name.split("/")) for name in files.names() if is_audio(name)]
    tops = set(files.folders())
    depth = 1 if {"train", "test"} <= tops else 0  # the class is the second folder, or the first
    found = [(name, parts) for name, parts in found if len(parts) > depth + 1]
    if not found:
        raise ValueError(f"data {data} holds neither a csv nor folders of classes with audio files")
    labels = sorted({parts[depth] for _, parts in found})
    number = {label: i for i, label in enumerate(labels)}

    def split(name: str, parts: Sequence[str]) -> str:
        if depth:
            return parts[0]
        # The name alone decides, so that adding clips never moves an old one.
        return "test" if zlib.crc32(name.encode()) % 100 < HASH_TEST_PERCENT else "train"

    clips = (Clip(n, (number[parts[depth]],), split(n, parts), files) for n, parts in found)
    return Listing(tuple(clips), tuple(labels))
