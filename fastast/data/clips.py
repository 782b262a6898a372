"""What a data set consists of, before any audio is read."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

from .files import Files

__all__ = ["Clip", "Listing"]


@dataclass(frozen=True)
class Clip:
    """One labelled recording.

    Attributes:
        name: Its name in the data set.
        target: Its classes, by number.
        split: The split that it belongs to.
        files: Where its audio is.
        path: The audio file's name in `files`; empty: the clip's own name.
        piece: Start and end in the file, in seconds; None: all of it.
    """

    name: str
    target: tuple[int, ...]
    split: str
    files: Files = field(repr=False, compare=False)
    path: str = ""
    piece: tuple[float, float] | None = None

    def open(self) -> str | io.BytesIO:
        """The audio file, for `fastast.audio.load_audio`; raises its `AudioError`."""
        return self.files.open(self.path or self.name)

    def stamp(self) -> tuple[int, ...]:
        """Numbers that change when the audio file does, found without reading it."""
        return self.files.stamp(self.path or self.name)


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

    def split_names(self, train: str = "", test: str = "") -> tuple[str, str]:
        """The splits to train on and to test on: those named, or what the data suggests.

        ``"test"`` if there is one, else the first; ``"train"`` if there is one, else all others.
        """
        test = test or ("test" if "test" in self.splits else self.splits[0])
        return train or ("train" if "train" in self.splits else f"!{test}"), test

    def select(self, split: str) -> tuple[Clip, ...]:
        """Clips of one split, or with a leading ``!`` of all others (``"!1"``: all folds but 1)."""
        name, splits = split.removeprefix("!"), self.splits
        if name not in splits:
            raise ValueError(f"split {name!r} is not in the data: it has {', '.join(splits)}")
        inside = not split.startswith("!")
        return tuple(clip for clip in self.clips if (clip.split == name) == inside)
