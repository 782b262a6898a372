"""Data sets recognised by their official trees."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from .audioset import is_audioset, list_audioset
from .clips import Clip, Listing
from .files import Files, is_audio
from .speech_commands import is_speech_commands, list_speech_commands
from .table import Options, list_table, read_table

__all__ = ["LAYOUTS", "Layout"]

ESC50_TABLE = "meta/esc50.csv"
# {digit}_{speaker}_{index}
FSDD_NAME = re.compile(r"recordings/(\d)_[^/]+_(\d+)\.\w+")
FSDD_TEST_INDICES = 5


@dataclass(frozen=True)
class Layout:
    """A data set that is known by its structure.

    Attributes:
        name: For messages.
        recognise: Whether files are this data set.
        list: Lists its clips; the second argument is where else they may be.
        subsets: The subsets it has.
        rows: It has a csv whose rows `where` can choose from.
    """

    name: str
    recognise: Callable[[Files], bool]
    list: Callable[[Files, Files | None, Options], Listing]
    subsets: tuple[str, ...] = ()
    rows: bool = False

    def check(self, options: Options) -> None:
        """Raise ValueError for an option that this data set does not have."""
        if options.subset and options.subset not in self.subsets:
            raise ValueError(
                f"subset {options.subset!r} is not one of {self.name}: "
                f"it has {', '.join(self.subsets) or 'none'}"
            )
        if options.where and not self.rows:
            raise ValueError(f"where {options.where!r}: {self.name} has no csv of columns")


def _list_esc50(files: Files, roots: Files | None, options: Options) -> Listing:
    table = read_table(files.text(ESC50_TABLE), ESC50_TABLE)
    return list_table(table, roots or files.below("audio"), options)


def _is_fsdd(files: Files) -> bool:
    if not files.has_folder("recordings"):
        return False
    names = [name for name in files.below("recordings").names() if is_audio(name)]
    return bool(names) and all(FSDD_NAME.fullmatch(f"recordings/{name}") for name in names)


def _list_fsdd(files: Files, roots: Files | None, options: Options) -> Listing:
    clips = []
    for name in files.names():
        match = FSDD_NAME.fullmatch(name)
        if match and is_audio(name):
            split = "test" if int(match[2]) < FSDD_TEST_INDICES else "train"
            clips.append(Clip(name, (int(match[1]),), split, files))
    return Listing(tuple(clips), tuple("0123456789"))


LAYOUTS = (
    Layout(
        "ESC-50", lambda files: files.has(ESC50_TABLE), _list_esc50, subsets=("esc10",), rows=True
    ),
    Layout("Speech Commands", is_speech_commands, list_speech_commands, subsets=("kws12",)),
    Layout("FSDD", _is_fsdd, _list_fsdd),
    Layout("AudioSet", is_audioset, list_audioset),
)
