"""Speech Commands V2 as it is distributed, with all 35 words or the 12 classes of the usual task.

The twelve classes are ten words, `_silence_` and `_unknown_`. As is usual, the last two have each
one clip for every ten of the ten words, in every split, which is as many as an average word has:

- unknown: of the other words' clips, those whose names have the lowest hashes.
- silence: pieces of one second of the files in `_background_noise_`. The first 80 % of each file
  are for `train`, the next 10 % for `val`, the last 10 % for `test`, so no sound is in two splits.
  Pieces of one split are evenly spaced, and overlap where there are more than seconds.
"""

from __future__ import annotations

import math
import zlib

from .clips import Clip, Listing
from .decoding import header
from .files import Files, is_audio
from .table import KEYWORDS, Options

__all__ = ["is_speech_commands", "list_speech_commands"]

LISTS = {"val": "validation_list.txt", "test": "testing_list.txt"}
NOISE = "_background_noise_"
NOISE_PARTS = {"train": (0.0, 0.8), "val": (0.8, 0.9), "test": (0.9, 1.0)}
WORDS, SILENCE, UNKNOWN = KEYWORDS[:10], 10, 11
SECONDS = 1.0


def is_speech_commands(files: Files) -> bool:
    """Whether files are the official tree."""
    return all(files.has(name) for name in LISTS.values())


def list_speech_commands(files: Files, roots: Files | None, options: Options) -> Listing:
    """List the clips of the official splits.

    Raises:
        ValueError: There are no clips, or for `kws12` not enough background noise.
    """
    names = [name for name in files.names() if is_audio(name) and name.count("/") == 1]
    words = [name for name in names if not name.startswith("_")]
    if not words:
        raise ValueError(f"data has {LISTS['test']}, as Speech Commands, but no folders of words")
    # Without suffixes, so that clips may be stored in another format than the lists say.
    split_of = {
        _stem(line): split
        for split, file in LISTS.items()
        for line in files.text(file).splitlines()
    }
    splits = [(name, split_of.get(_stem(name), "train")) for name in words]
    if options.subset == "kws12":
        noise = [name for name in names if name.startswith(f"{NOISE}/")]
        return _keywords(files, splits, noise)
    labels = sorted({_word(name) for name in words})
    number = {label: i for i, label in enumerate(labels)}
    clips = (Clip(name, (number[_word(name)],), split, files) for name, split in splits)
    return Listing(tuple(clips), tuple(labels))


def _keywords(files: Files, splits: list[tuple[str, str]], noise: list[str]) -> Listing:
    clips = []
    for split in ("train", "val", "test"):
        names = [name for name, its_split in splits if its_split == split]
        known = [name for name in names if _word(name) in WORDS]
        others = sorted((zlib.crc32(n.encode()), n) for n in names if _word(n) not in WORDS)
        share = math.ceil(len(known) / len(WORDS))
        clips += [Clip(name, (WORDS.index(_word(name)),), split, files) for name in known]
        clips += [Clip(name, (UNKNOWN,), split, files) for _, name in sorted(others[:share])]
        clips += _silence(files, noise, split, share)
    return Listing(tuple(clips), KEYWORDS)


def _silence(files: Files, noise: list[str], split: str, count: int) -> list[Clip]:
    """Pieces of the split's part of each noise file, evenly spaced, the files in turn."""
    first, last = NOISE_PARTS[split]
    parts = []
    for name in noise:
        frames, rate = header(files.open(name), name)
        start, end = first * frames / rate, last * frames / rate
        if end - start >= SECONDS:
            parts.append((name, start, end - SECONDS))
    if count and not parts:
        raise ValueError(
            f"subset 'kws12' needs a file of at least {SECONDS / 0.1:.0f} s in {NOISE}, for silence"
        )
    clips = []
    for i, (name, start, end) in enumerate(parts):
        pieces = len(range(i, count, len(parts)))
        for k in range(pieces):
            at = start + (end - start) * k / max(pieces - 1, 1)
            piece = (at, at + SECONDS)
            clips.append(Clip(f"{name}@{at:.4f}s", (SILENCE,), split, files, name, piece))
    return clips


def _word(name: str) -> str:
    return name.split("/", 1)[0]


def _stem(name: str) -> str:
    return name.strip().rpartition(".")[0]
