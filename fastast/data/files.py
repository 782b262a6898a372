"""The files of a data set, in folders, zip and tar archives, all read by name."""

from __future__ import annotations

import gzip
import io
import os
import posixpath
import shutil
import tarfile
import tempfile
import threading
import weakref
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from fastast.audio import SUFFIXES, AudioError

__all__ = [
    "CLASS_LABELS",
    "Files",
    "is_archive",
    "is_audio",
    "open_files",
    "open_roots",
    "with_zips",
]

ZIP_SUFFIXES = (".zip",)
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
# AudioSet's list of classes, which other data sets use too: index, mid, display_name.
CLASS_LABELS = "class_labels_indices.csv"


def is_archive(path: Path) -> bool:
    """Whether a path is called like an archive that `open_files` reads."""
    return path.name.lower().endswith(ZIP_SUFFIXES + TAR_SUFFIXES)


def is_audio(name: str) -> bool:
    """Whether a name has an audio suffix and is not hidden (``._a.wav`` in archives of macOS)."""
    base = posixpath.basename(name)
    return posixpath.splitext(base)[1].lower() in SUFFIXES and not base.startswith(".")


class _Member(io.BytesIO):
    """A file of an archive in memory, with its name for messages."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name


class Files:
    """Files by name: relative, with forward slashes."""

    def names(self) -> list[str]:
        """All files, sorted; hidden folders are left out."""
        raise NotImplementedError

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        raise NotImplementedError

    def folders(self) -> list[str]:
        """The folders at the top, sorted, hidden ones aside."""
        return sorted({name.split("/", 1)[0] for name in self.names() if "/" in name})

    def tables(self) -> list[str]:
        """The csv files at the top, sorted; `class_labels_indices.csv` is none of them."""
        return [n for n in self.names() if "/" not in n and _is_table(n)]

    def has_folder(self, folder: str) -> bool:
        """Whether there is a folder of this name at the top."""
        return any(name.startswith(f"{folder}/") for name in self.names())

    def below(self, folder: str) -> Files:
        """The files below one folder, named from there."""
        return _Below(self, folder)

    def open(self, name: str) -> str | io.BytesIO:
        """A path, or the file's content, for `fastast.audio.load_audio`.

        Raises:
            AudioError: No such file, or the archive is damaged there.
        """
        raise NotImplementedError

    def stamp(self, name: str) -> tuple[int, ...]:
        """Numbers that change when the file does, found without reading it; empty: no such file."""
        raise NotImplementedError

    def text(self, name: str) -> str:
        """A small text file.

        Raises:
            ValueError: It is not there or not UTF-8.
        """
        try:
            file = self.open(name)
            content = Path(file).read_bytes() if isinstance(file, str) else file.getvalue()
            return content.decode("utf-8-sig")
        except (AudioError, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{name} cannot be read: {error}") from None


class _Folder(Files):
    """The files under a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        found: list[str] = []
        for folder, folders, files in os.walk(self.path, followlinks=True):
            folders[:] = [name for name in folders if not _is_hidden(name)]
            below = os.path.relpath(folder, self.path).replace(os.sep, "/")
            found.extend(name if below == "." else f"{below}/{name}" for name in files)
        return sorted(found)

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def folders(self) -> list[str]:
        with os.scandir(self.path) as inside:
            return sorted(e.name for e in inside if e.is_dir() and not _is_hidden(e.name))

    def tables(self) -> list[str]:
        with os.scandir(self.path) as inside:
            return sorted(e.name for e in inside if _is_table(e.name) and e.is_file())

    def has_folder(self, folder: str) -> bool:
        return (self.path / folder).is_dir()

    def below(self, folder: str) -> Files:
        return _Folder(self.path / folder)

    def open(self, name: str) -> str | io.BytesIO:
        return str(self.path / name)

    def stamp(self, name: str) -> tuple[int, ...]:
        try:
            status = (self.path / name).stat()
        except OSError:
            return ()
        return status.st_size, status.st_mtime_ns


class _Zip(Files):
    """The files of a zip archive."""

    def __init__(self, path: Path) -> None:
        try:
            self.archive = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is neither a folder nor a zip: {error}") from None
        self.members = {
            info.filename: info
            for info in self.archive.infolist()
            if not info.is_dir() and not _in_hidden(info.filename)
        }

    def names(self) -> list[str]:
        return sorted(self.members)

    def has(self, name: str) -> bool:
        return name in self.members

    def open(self, name: str) -> str | io.BytesIO:
        try:
            return _Member(self.archive.read(self.members[name]), name)
        except KeyError:
            raise AudioError(f"{name}: no such file in the archive") from None
        # RuntimeError: encrypted; NotImplementedError: an unknown compression.
        except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise AudioError(f"{name}: cannot be read from its archive: {error}") from None

    def stamp(self, name: str) -> tuple[int, ...]:
        info = self.members.get(name)
        return () if info is None else (info.file_size, info.CRC)


class _Tar(Files):
    """The files of a tar archive, perhaps compressed with gzip.

    A compressed archive can only be read from its beginning, so it is unpacked once, into a
    temporary file (in `TMPDIR`) that goes when the process ends.
    """

    def __init__(self, path: Path) -> None:
        self.lock = threading.Lock()
        self.members: dict[str, tuple[int, int, int]] = {}
        try:
            self.file: BinaryIO = path.open("rb")
            if self.file.read(2) == b"\x1f\x8b":
                self.file.seek(0)
                with self.file as packed, gzip.open(packed) as stream:
                    self.file = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as self is)
                    shutil.copyfileobj(stream, self.file, 1 << 20)
            self.file.seek(0)
            with tarfile.open(fileobj=self.file, mode="r:") as archive:
                for member in archive:
                    name = posixpath.normpath(member.name)
                    if member.isreg() and not member.issparse() and not _in_hidden(name):
                        place = member.offset_data, member.size, int(member.mtime)
                        self.members[name] = place
        except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
            raise ValueError(f"archive {path} cannot be read: {error}") from None
        weakref.finalize(self, self.file.close)

    def names(self) -> list[str]:
        return sorted(self.members)

    def has(self, name: str) -> bool:
        return name in self.members

    def open(self, name: str) -> str | io.BytesIO:
        if name not in self.members:
            raise AudioError(f"{name}: no such file in the archive")
        offset, size, _ = self.members[name]
        with self.lock:
            self.file.seek(offset)
            content = self.file.read(size)
        if len(content) < size:
            raise AudioError(f"{name}: its archive is cut off")
        return _Member(content, name)

    def stamp(self, name: str) -> tuple[int, ...]:
        return self.members[name][1:] if name in self.members else ()


class _Below(Files):
    """The files below one folder of other files."""

    def __init__(self, files: Files, folder: str) -> None:
        self.files, self.prefix = files, f"{folder}/"

    def names(self) -> list[str]:
        names = self.files.names()
        return [n.removeprefix(self.prefix) for n in names if n.startswith(self.prefix)]

    def has(self, name: str) -> bool:
        return self.files.has(self.prefix + name)

    def open(self, name: str) -> str | io.BytesIO:
        return self.files.open(self.prefix + name)

    def stamp(self, name: str) -> tuple[int, ...]:
        return self.files.stamp(self.prefix + name)


class _Roots(Files):
    """Several folders and archives: a name means the first that has it."""

    def __init__(self, roots: Sequence[Files]) -> None:
        self.roots = tuple(roots)

    def names(self) -> list[str]:
        return sorted({name for root in self.roots for name in root.names()})

    def has(self, name: str) -> bool:
        return any(root.has(name) for root in self.roots)

    def open(self, name: str) -> str | io.BytesIO:
        for root in self.roots:
            if root.has(name):
                return root.open(name)
        raise AudioError(f"{name}: no such file in the data set's folders and archives")

    def stamp(self, name: str) -> tuple[int, ...]:
        return next((root.stamp(name) for root in self.roots if root.has(name)), ())


def open_files(path: Path) -> Files:
    """The files of a folder or of an archive.

    Raises:
        ValueError: It is neither, or a damaged archive.
    """
    if path.is_dir():
        return _Folder(path)
    return _Tar(path) if path.name.lower().endswith(TAR_SUFFIXES) else _Zip(path)


def open_roots(paths: Sequence[Path]) -> Files:
    """The files of several folders and archives; raises as `open_files`."""
    return _Roots([open_files(path) for path in paths])


def with_zips(files: Files) -> Files:
    """Files, and after them those in the zip archives at the top of their folder."""
    zips = sorted(files.path.glob("*.zip")) if isinstance(files, _Folder) else []
    return _Roots([files, *map(_Zip, zips)])


def _is_table(name: str) -> bool:
    return name.endswith(".csv") and not name.startswith(".") and name != CLASS_LABELS


def _is_hidden(folder: str) -> bool:
    return folder.startswith(".") or folder == "__MACOSX"


def _in_hidden(name: str) -> bool:
    return any(_is_hidden(part) for part in name.split("/")[:-1])
