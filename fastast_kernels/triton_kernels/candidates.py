"""Candidates of launch parameters: which are worth trying, and which the compiler rules out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias

import torch
from triton.errors import TritonError

from . import parameters
from .parameters import Entry
from .resources import SHARED_MEMORY_LIMIT, calls, recorded, resources

HEADS = 12  # what resources.calls has
HEAD_DIMS = (64, 128)

Kind: TypeAlias = "tuple[torch.dtype, int]"  # a call's dtype and head dimension


class Refused(Exception):
    """Why a candidate is out."""


@dataclass(frozen=True)
class Tunable:
    """How an op of the table is tuned.

    Attributes:
        call: what is timed, as a whole: a variant of :func:`resources.calls`.
        values: what its parameters may be, besides what they are.
        width: its dimension in the table, in head dimensions.
    """

    call: str
    values: Mapping[str, tuple[int, ...]]
    width: int = 1


_WARPS = {"num_warps": (1, 2, 4, 8)}
_PRODUCTS = {
    "BLOCK_M": (32, 64, 128),
    "BLOCK_N": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (1, 2, 3),
}
TUNABLE = {
    "key_metric": Tunable("key_metric", {"BLOCK_N": (2, 4, 8, 16, 32), **_WARPS}),
    "best_partner": Tunable(
        "match", {"BLOCK_B": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3, 4)}
    ),
    "rank": Tunable(
        "match",
        {"BLOCK_I": (16, 32, 64), "BLOCK_J": (64, 128, 256), "num_warps": (2, 4, 8)},
        width=0,
    ),
    "reduce_rows": Tunable(
        "merge_add_layer_norm", {"CHUNK": (256, 512, 1024, 2048), **_WARPS}, HEADS
    ),
    "gather_rows": Tunable("merge_backward", _WARPS, HEADS),
    "add_layer_norm": Tunable("add_layer_norm", _WARPS, HEADS),
    "norm_backward": Tunable(
        "merge_add_layer_norm_backward",
        {"PROGRAMS": (512, 1024, 2048), "num_warps": (1, 2, 4, 8, 16)},
        HEADS,
    ),
    "attention": Tunable("attention", {**_PRODUCTS, "num_stages": (1, 2, 3, 4)}),
    "attention_column_sums": Tunable("attention_column_sums", _PRODUCTS),
    "attention_grad_q": Tunable("attention_backward", _PRODUCTS),
    "attention_grad_kv": Tunable("attention_backward", _PRODUCTS),
}


def takers(op: str, architecture: str, dtypes: Iterable[torch.dtype]) -> dict[int, list[Kind]]:
    """Numbers of the entries of ``op`` that tokens of these dtypes take, and which take each."""
    found: dict[int, dict[tuple[torch.dtype, int], Kind]] = {}
    for dtype, dim in product(dtypes, HEAD_DIMS):
        in_table = TUNABLE[op].width * dim
        i = parameters.position(op, architecture, dtype.itemsize * 8, in_table)
        if i is not None:
            found.setdefault(i, {}).setdefault((dtype, in_table), (dtype, dim))
    return {i: list(kinds.values()) for i, kinds in found.items()}


def candidates(op: str, current: Entry, steps: int) -> list[Entry]:
    """What differs from ``current`` in so many parameters or fewer, and in one at least.

    A tile that comes in several lengths keeps them.
    """
    values = {
        name: sorted({current[name], *choices})
        for name, choices in TUNABLE[op].values.items()
        if isinstance(current.get(name), int)
    }
    near = [{**current, **dict(zip(values, c, strict=True))} for c in product(*values.values())]
    return [c for c in near if 0 < sum(c[name] != current[name] for name in values) <= steps]


def fitting(
    op: str, candidate: Entry, architecture: str, kinds: Iterable[Kind], call: str | None = None
) -> Entry:
    """A candidate with those lengths of its tile that compile without spills.

    Args:
        op: its name in the table.
        candidate: launch parameters.
        architecture: ``"sm_80"`` or ``"sm_90"``.
        kinds: what it is compiled for.
        call: a variant of :func:`resources.calls`; None: all that launch the op's kernel.

    Raises:
        Refused: the longest does not.
    """
    kinds = list(kinds)
    tile = next((name for name, value in candidate.items() if isinstance(value, list)), None)
    if tile is None:
        _compile(op, candidate, architecture, kinds, call)
        return candidate
    lengths: list[int] = []
    for length in sorted(candidate[tile], reverse=True):
        try:
            _compile(op, {**candidate, tile: length}, architecture, kinds, call)
        except Refused:
            if not lengths:
                raise
        else:
            lengths.append(length)
    return {**candidate, tile: lengths}


def _compile(
    op: str, candidate: Entry, architecture: str, kinds: list[Kind], only: str | None
) -> None:
    kernel = f"_{op.removeprefix('attention_')}_kernel"
    for name, call in (variant for kind in kinds for variant in calls(*kind)):
        if only not in (None, name):
            continue
        with parameters.trying(op, candidate):
            launches = recorded(call)
        for launch in launches:
            if launch.kernel.__name__ != kernel:
                continue
            try:
                found = resources(launch, architecture, name)
            except (TritonError, RuntimeError) as error:
                raise Refused("does not compile") from error
            if found.stack:
                raise Refused("spills registers")
            if found.shared > SHARED_MEMORY_LIMIT[architecture]:
                raise Refused("too much shared memory")
