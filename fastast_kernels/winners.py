"""Which of a GPU's two kernels of an op was faster: what benchmarks measured, and nothing else.

The table is ``winners.json`` beside this file: by compute capability, op and dtype the shapes that
were measured (batch, tokens, channels), each with ``"triton"`` or ``"cuda"``. ``bench/winners.py``
writes it. Of a shape in between, the nearest measured one decides; where an op was not measured in
a dtype, nothing does, and Triton's kernel runs.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import torch

from .backends import CUDA_OPS, CUDA_ROW_OPS

# Batch, tokens, channels, and who was faster. Tokens are those of a sample before merging, for an
# op and for its backward.
Entry: TypeAlias = "tuple[int, int, int, str]"
Ops: TypeAlias = "Mapping[str, Mapping[str, tuple[Entry, ...]]]"

SHIPPED = Path(__file__).with_name("winners.json")
VERSION = 1
# Ops that both have; a match and its metric are discrete, so they have no backward.
OPS = (*sorted(CUDA_OPS), *(f"{op}_backward" for op in sorted(CUDA_ROW_OPS)))
DTYPES = ("float32", "bfloat16", "float16")
CONTENDERS = ("triton", "cuda")
# Where a run's numbers come from. Those of two origins never stand in one entry.
ORIGIN = ("gpu", "commit", "torch", "triton")
ABOUT = (*ORIGIN, "date")


def _one_of(what: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} must be one of {', '.join(allowed)}, got {value!r}")


def _object(what: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be an object, got {value!r}")
    return value


def _check_entries(what: str, entries: object) -> None:
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{what} must be a list of [B, N, D, winner], got {entries!r}")
    seen = set()
    for entry in entries:
        if not isinstance(entry, list) or len(entry) != 4:
            raise ValueError(f"{what}: an entry must be [B, N, D, winner], got {entry!r}")
        *shape, name = entry
        if not all(type(n) is int and n > 0 for n in shape):
            raise ValueError(f"{what}: B, N and D must be positive whole numbers, got {shape}")
        _one_of(f"{what}: the winner at {shape}", name, CONTENDERS)
        if tuple(shape) in seen:
            raise ValueError(f"{what}: the shape {shape} is there twice")
        seen.add(tuple(shape))


def check(table: object) -> dict[str, Any]:
    """The same table, if it is one.

    Raises:
        ValueError: it is not; the message names the first thing that is wrong, and what it may be.
    """
    found = _object("the table", table)
    if found.get("version") != VERSION:
        raise ValueError(f"version must be {VERSION}, got {found.get('version')!r}")
    for capability, measured in _object("measured", found.get("measured")).items():
        if not re.fullmatch(r"[1-9]\d*\.\d", capability):
            raise ValueError(f"a compute capability must be like '9.0', got {capability!r}")
        _object(f"measured[{capability!r}]", measured)
        for key in ABOUT:
            if not isinstance(measured.get(key), str) or (key == "gpu" and not measured[key]):
                raise ValueError(
                    f"{key} of {capability} must be a string, got {measured.get(key)!r}"
                )
        for op, dtypes in _object(f"ops of {capability}", measured.get("ops")).items():
            _one_of(f"an op of {capability}", op, OPS)
            for dtype, entries in _object(f"{op} of {capability}", dtypes).items():
                _one_of(f"a dtype of {op} of {capability}", dtype, DTYPES)
                _check_entries(f"{op} in {dtype} of {capability}", entries)
    return found


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The table in a file.

    Raises:
        ValueError: the file holds no such table; the message names it and what is wrong.
    """
    try:
        return check(json.loads(Path(path).read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path} is no table of winners: {error}") from error


def write(path: str | os.PathLike[str], table: Mapping[str, Any]) -> None:
    """Write a table, a shape a line; one that is killed leaves the old file or the new one.

    Raises:
        ValueError: it is not a table; the old file stays.
    """
    text = json.dumps(check(table), indent=2)
    text = re.sub(r'\[\s+(\d+),\s+(\d+),\s+(\d+),\s+("\w+")\s+\]', r"[\1, \2, \3, \4]", text)
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, path)


def record(
    path: str | os.PathLike[str], capability: str, about: Mapping[str, str], ops: Ops
) -> None:
    """Put what a benchmark run measured on one GPU into the table of a file, which may be new.

    What other compute capabilities have stays. What this one has stays too where it is of the same
    origin (``ORIGIN``: GPU, commit, versions) and was not measured again; entries of another origin
    are of other kernels and go.

    Args:
        path: the file.
        capability: ``"9.0"``.
        about: all of ``ABOUT``, whence the numbers come.
        ops: ``{op: {dtype: [(B, N, D, winner)]}}``.

    Raises:
        ValueError: what the file holds, or what would be written, is no table of winners.
    """
    table: dict[str, Any] = (
        read(path) if Path(path).exists() else {"version": VERSION, "measured": {}}
    )
    before = table["measured"].get(capability)
    same = before is not None and all(before[key] == about.get(key) for key in ORIGIN)
    merged: dict[str, Any] = dict(before["ops"]) if before is not None and same else {}
    for op, dtypes in ops.items():
        fresh = {dtype: [list(e) for e in sorted(entries)] for dtype, entries in dtypes.items()}
        merged[op] = {**merged.get(op, {}), **fresh}
    table["measured"][capability] = {
        **{key: about.get(key) for key in ABOUT},
        "ops": dict(sorted(merged.items())),
    }
    write(path, table)


@cache
def measured() -> dict[str, Ops]:
    """What the shipped table has of each compute capability, read once; empty: look nothing up."""
    return {
        capability: {
            op: {dtype: tuple(tuple(e) for e in entries) for dtype, entries in dtypes.items()}
            for op, dtypes in found["ops"].items()
        }
        for capability, found in read(SHIPPED)["measured"].items()
        if found["ops"]
    }


@lru_cache(maxsize=4096)
def winner(
    op: str, capability: str, dtype: torch.dtype, batch: int, n: int, dim: int
) -> str | None:
    """The faster kernel at the nearest shape that was measured, None where none was.

    Near is in factors: the distance is that of the logarithms of the three sizes. Of shapes that
    are as near, the smallest decides. A backward op that was not measured goes as its forward does.

    Args:
        op: name of the op's schema.
        capability: of the GPU, ``"9.0"``.
        dtype: of the tokens, or of the metric that is matched.
        batch: samples.
        n: tokens of a sample, before merging.
        dim: channels of a token, of the metric, or of a head.
    """
    ops = measured().get(capability, {})
    key = str(dtype).removeprefix("torch.")
    forward = op.removesuffix("_backward")
    entries = ops.get(op, {}).get(key) or ops.get(forward, {}).get(key)
    if not entries:
        return None
    wanted = [math.log2(max(size, 1)) for size in (batch, n, dim)]

    def distance(entry: Entry) -> float:
        return sum((math.log2(a) - b) ** 2 for a, b in zip(entry[:3], wanted, strict=True))

    return min(entries, key=lambda entry: (distance(entry), entry))[3]


def summary(op: str, capability: str) -> str | None:
    """Who wins how often, ``cuda (3 of 4 measured shapes)``; None where nothing was measured."""

    def of(name: str) -> str | None:
        lists = measured().get(capability, {}).get(name, {}).values()
        names = [entry[3] for entries in lists for entry in entries]
        if not names:
            return None
        best = max(CONTENDERS, key=names.count)
        return f"{best} ({names.count(best)} of {len(names)} measured shapes)"

    forward, backward = of(op), of(f"{op}_backward")
    return f"{forward or 'triton'}, backward {backward}" if backward else forward
