"""Data sets that are a csv of file name, classes and split."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from .clips import Clip, Listing
from .files import CLASS_LABELS, Files

__all__ = ["KEYWORDS", "Classes", "Options", "Table", "list_table", "read_classes", "read_table"]

PATH_COLUMNS = ("filename", "path", "file", "audio", "wav")
TARGET_COLUMNS = ("target", "label", "category", "class", "labels")
NAME_COLUMNS = ("category", "label", "class", "class_name")
SPLIT_COLUMNS = ("split", "fold", "set", "subset")
# Numbers above are something else, such as a recording's id, and would make as many classes.
MOST_CLASSES = 100_000

# The classes of Speech Commands' keyword spotting task, in the usual order.
KEYWORDS = (
    *("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go"),
    *("_silence_", "_unknown_"),
)


@dataclass(frozen=True)
class Options:
    """What `list_clips` was asked for, besides where the data is."""

    path_column: str = ""
    target_column: str = ""
    split_column: str = ""
    where: str = ""
    subset: str = ""


@dataclass(frozen=True)
class Table:
    """A csv: its name for messages, its columns, its rows with their line numbers."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[int, dict[str, str]], ...]

    def where(self, condition: str) -> Table:
        """The rows that have a value: ``"column=value"``; all for an empty condition."""
        if not condition:
            return self
        column, equals, value = condition.partition("=")
        column, value = column.strip(), value.strip()
        if not equals or not column:
            raise ValueError(f"where must be 'column=value', not {condition!r}")
        if column not in self.columns:
            raise ValueError(f"where {column!r} is not in {self._has()}")
        rows = tuple((n, row) for n, row in self.rows if (row[column] or "").strip() == value)
        if not rows:
            raise ValueError(f"where {condition!r}: no row of csv {self.name} has this value")
        return replace(self, rows=rows)

    def column(self, asked: str, candidates: Iterable[str], what: str) -> str:
        """The column that was asked for, or else the first candidate that there is."""
        if asked:
            if asked not in self.columns:
                raise ValueError(f"{what} {asked!r} is not in {self._has()}")
            return asked
        for name in candidates:
            if name in self.columns:
                return name
        columns = ", ".join(self.columns)
        raise ValueError(f"{what}: none of the csv's columns ({columns}) looks like it; name it")

    def _has(self) -> str:
        return f"the csv {self.name}: it has {', '.join(self.columns)}"


@dataclass(frozen=True)
class Classes:
    """The classes that a data set says it has: their names, and the numbers of their other ids."""

    names: tuple[str, ...]
    ids: dict[str, int] = field(default_factory=dict)


def read_table(text: str, name: str) -> Table:
    """Read a csv with a header.

    Raises:
        ValueError: It is not a csv, or has no rows.
    """
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        rows = tuple((reader.line_num, row) for row in reader)
    except csv.Error as error:
        raise ValueError(f"csv {name} cannot be read: {error}") from None
    if not rows:
        raise ValueError(f"csv {name} has no rows")
    return Table(name, tuple(reader.fieldnames or ()), rows)


def read_classes(text: str, name: str) -> Classes:
    """Read AudioSet's `class_labels_indices.csv`: index, mid, display_name.

    Raises:
        ValueError: A column is missing, or the indices are not 0, 1, 2, ... in this order.
    """
    table = read_table(text, name)
    index, mid, display = (
        table.column(column, (), f"csv {name}") for column in ("index", "mid", "display_name")
    )
    for expected, (line, row) in enumerate(table.rows):
        if row[index] != str(expected):
            raise ValueError(f"csv {name}, row {line}: index must be {expected}, is {row[index]!r}")
    names = tuple(row[display] for _, row in table.rows)
    ids = {row[mid]: i for i, (_, row) in enumerate(table.rows)}
    return Classes(names, {**dict(zip(names, range(len(names)), strict=True)), **ids})


def list_table(
    table: Table, files: Files, options: Options, classes: Classes | None = None
) -> Listing:
    """List the clips of a csv.

    Args:
        table: The csv.
        files: Where its audio is.
        options: Columns, rows and subset.
        classes: The classes, where they are known from elsewhere.

    Raises:
        ValueError: A column or a cell is missing, or a label is no class.
    """
    table = table.where(options.where)
    if options.subset == "esc10":
        if "esc10" not in table.columns:
            raise ValueError(f"subset 'esc10': the csv {table.name} has no column esc10")
        table = table.where("esc10=True")
    path = table.column(options.path_column, PATH_COLUMNS, "path_column")
    target = table.column(options.target_column, TARGET_COLUMNS, "target_column")
    split = table.column(options.split_column, SPLIT_COLUMNS, "split_column")
    for line, row in table.rows:
        if any(not (row[column] or "").strip() for column in (path, target, split)):
            raise ValueError(f"csv {table.name}, row {line}: {path}, {target} or {split} is empty")

    cells = [_values(row[target]) for _, row in table.rows]
    names, targets = _number(table, target, cells, classes)
    if options.subset == "esc10":
        kept = sorted({number for numbers in targets for number in numbers})
        targets = [tuple(kept.index(number) for number in numbers) for numbers in targets]
        names = [names[number] for number in kept]
    if options.subset == "kws12" and sorted(names) != sorted(KEYWORDS):
        raise ValueError(f"subset 'kws12': the csv {table.name} has other classes than the twelve")
    clips = tuple(
        Clip(row[path].strip(), numbers, row[split].strip(), files)
        for (_, row), numbers in zip(table.rows, targets, strict=True)
    )
    return Listing(clips, tuple(names), multi_label=any(len(numbers) != 1 for numbers in targets))


def _values(cell: str) -> list[str]:
    return [value.strip() for value in cell.split(";") if value.strip()]


def _number(
    table: Table, target: str, cells: Sequence[Sequence[str]], classes: Classes | None
) -> tuple[list[str], list[tuple[int, ...]]]:
    """Names of all classes, and the numbers of each row's."""
    numeric = all(re.fullmatch(r"[+-]?\d{1,18}", value) for cell in cells for value in cell)
    if classes is None and not numeric:
        names = sorted({value for cell in cells for value in cell})
        index = {name: i for i, name in enumerate(names)}
        return names, [tuple(index[value] for value in cell) for cell in cells]

    targets = []
    for (line, _), cell in zip(table.rows, cells, strict=True):
        try:
            targets.append(tuple(_class_number(value, numeric, classes) for value in cell))
        except ValueError as error:
            raise ValueError(f"csv {table.name}, row {line}: label {error}") from None
    if classes is not None:
        return list(classes.names), targets

    names = [str(i) for i in range(max(number for numbers in targets for number in numbers) + 1)]
    named = next((c for c in NAME_COLUMNS if c != target and c in table.columns), None)
    if named is not None:
        for (_, row), numbers in zip(table.rows, targets, strict=True):
            if len(numbers) == 1:
                names[numbers[0]] = row[named]
    return names, targets


def _class_number(value: str, numeric: bool, classes: Classes | None) -> int:
    if not numeric:
        assert classes is not None
        if value not in classes.ids:
            raise ValueError(f"{value!r} is not in {CLASS_LABELS}")
        return classes.ids[value]
    number = int(value)
    if number < 0:
        raise ValueError(f"{number} is negative: classes are numbered from 0")
    if classes is not None and number >= len(classes.names):
        raise ValueError(f"{number} is not below {len(classes.names)}, the number of classes")
    if number >= MOST_CLASSES:
        raise ValueError(f"{number} is no class number: they must be below {MOST_CLASSES}")
    return number
