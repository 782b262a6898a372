"""Launch parameters: a small table by architecture, dtype and dimension, never by length.

The table is ``launch_parameters.json`` beside this file, or the file that the environment variable
``FASTAST_LAUNCH_PARAMETERS`` names; ``fastast tune`` measures on a GPU and writes one. An op has a
list of entries: the first that is wide enough (``bits`` of the dtype, ``dim``; absent: any) is
taken. Where an entry's tile comes in several lengths, the one that wastes least of the GPU is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

Entry: TypeAlias = "dict[str, Any]"
Table: TypeAlias = "dict[str, dict[str, list[Entry]]]"

SHIPPED = Path(__file__).with_name("launch_parameters.json")
ARCHITECTURES = ("sm_80", "sm_90")
CONDITIONS = ("bits", "dim")  # which calls an entry is for; the rest of it are launch parameters

# Of parts without their own entries: consumer parts of 8.x and 12.x have less shared memory than
# 9.0, and sm_80's entries fit them; 10.x has as much.
_LARGE_SHARED_MEMORY = (9, 10)

# What to do otherwise than the table says of this device: compile for another, or try an entry.
_target: str | None = None
_tile: int | None = None
_tried: dict[str, Entry] = {}


@contextmanager
def target(architecture: str, tile: int | None = None) -> Iterator[None]:
    """Take the parameters of another architecture inside the block, on any device.

    Args:
        architecture: ``"sm_80"`` or ``"sm_90"``.
        tile: take the tile of this number where there are several, or the last.
    """
    global _target, _tile
    before = _target, _tile
    _target, _tile = architecture, tile
    try:
        yield
    finally:
        _target, _tile = before


@contextmanager
def trying(op: str, candidate: Entry) -> Iterator[None]:
    """Take ``candidate`` for ``op`` inside the block, whatever the table says."""
    _tried[op] = candidate
    try:
        yield
    finally:
        del _tried[op]


def read(path: str | os.PathLike[str]) -> Table:
    """A table from a file.

    Raises:
        ValueError: the file is no such table; the message names it.
    """
    try:
        table = json.loads(Path(path).read_text())
        for architecture in ARCHITECTURES:
            for op, entries in table[architecture].items():
                if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
                    raise ValueError(f"{op} of {architecture} must be a list of objects")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is no table of launch parameters: {error!r}") from error
    return table


def write(path: str | os.PathLike[str], table: Table) -> None:
    """Write a table, an entry a line; one that is killed leaves the old file or the new one."""
    architectures = []
    for architecture, ops in table.items():
        lists = []
        for op, entries in ops.items():
            lines = ",\n".join(f"      {json.dumps(entry)}" for entry in entries)
            lists.append(f'    "{op}": [\n{lines}\n    ]')
        architectures.append(f'  "{architecture}": {{\n' + ",\n".join(lists) + "\n  }")
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    part.write_text("{\n" + ",\n".join(architectures) + "\n}\n", encoding="utf-8")
    os.replace(part, path)


@cache
def table() -> Table:
    """The table in use, read once."""
    shipped = read(SHIPPED)
    own = os.environ.get("FASTAST_LAUNCH_PARAMETERS")
    if not own:
        return shipped
    tuned = read(own)  # of some ops, perhaps
    return {a: {**shipped[a], **tuned[a]} for a in ARCHITECTURES}


@cache
def of_device(index: int) -> tuple[str, int]:
    """The architecture whose entries a GPU takes, and its number of multiprocessors."""
    properties = torch.cuda.get_device_properties(index)
    large = properties.major in _LARGE_SHARED_MEMORY
    return "sm_90" if large else "sm_80", properties.multi_processor_count


def _hardware(on: Tensor) -> tuple[str, int]:
    """The architecture whose entries are taken, and the number of multiprocessors."""
    if on.is_cuda and _target is None:
        return of_device(on.device.index)
    return _target or ARCHITECTURES[0], 132


def position(op: str, architecture: str, bits: int, dim: int) -> int | None:
    """The number of the first entry of ``op`` that is wide enough, if one is."""
    for i, candidate in enumerate(table()[architecture][op]):
        if bits <= candidate.get("bits", bits) and dim <= candidate.get("dim", dim):
            return i
    return None


@cache
def entry(op: str, architecture: str, bits: int, dim: int) -> Entry:
    """The launch parameters of ``op`` for a dtype of ``bits`` and a dimension."""
    i = position(op, architecture, bits, dim)
    if i is None:
        raise ValueError(f"{op} has no launch parameters for {bits}-bit values of dimension {dim}")
    found = table()[architecture][op][i]
    return {name: value for name, value in found.items() if name not in CONDITIONS}


def parameters(op: str, on: Tensor, dim: int) -> Entry:
    """Launch parameters of ``op`` for a tensor like ``on`` and a row or head of ``dim`` values."""
    if op in _tried:
        return _tried[op]
    return entry(op, _hardware(on)[0], on.dtype.itemsize * 8, dim)


def tiled(op: str, on: Tensor, dim: int, groups: int, length: int, block: str) -> tuple[Entry, int]:
    """Launch parameters of ``op`` with one length of its tile, and how many tiles that makes.

    Args:
        op: its name in the table, where ``block`` may be a list.
        on: a tensor on the device and of the dtype in question.
        dim: values in a row or head.
        groups: independent sequences, each cut into tiles by itself.
        length: of one sequence.
        block: name of the tile's length.
    """
    found = parameters(op, on, dim)
    processors = _hardware(on)[1]
    lengths = found[block] if isinstance(found[block], list) else [found[block]]

    def tiles(tile: int) -> int:
        return groups * -(-length // tile)

    def cost(tile: int) -> float:
        # Rounds of all processors, times what a tile costs: its rows, and what it reads whatever
        # its rows are, taken as 16 rows' worth. An estimate, not a measurement.
        return -(-tiles(tile) // processors) * (tile + 16)

    best = min(lengths, key=cost) if _tile is None else lengths[min(_tile, len(lengths) - 1)]
    return {**found, block: best}, tiles(best)
