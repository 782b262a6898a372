"""From a benchmark run on a GPU to the table of which kernel runs there by default.

    python bench/winners.py ops.json[.gz] [--out fastast_kernels/winners.json]

Compares "fused triton" with "fused cuda" at every shape of `bench/test_ops.py --set gpu`: as CUDA
graphs where there are, for those leave out what the host takes to launch, else eagerly. CUDA C++
wins where the difference shows: their quartiles do not overlap, or it is over 3 % and neither time
is noisy. Triton's kernel stays the default otherwise.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from report import read

from fastast.benchmark.plots import select
from fastast.benchmark.rows import Row, newest
from fastast.benchmark.run import is_noisy
from fastast_kernels import winners

CLEAR = 0.03  # a faster time counts from here, if its quartiles overlap with the other's


@dataclass(frozen=True)
class Duel:
    """Both implementations of an op at one shape.

    Attributes:
        op: name of the op's schema.
        dtype: without ``torch.``.
        shape: batch, tokens, channels.
        graph: both ran as CUDA graphs.
        triton: its milliseconds.
        cuda: those of CUDA C++.
    """

    op: str
    dtype: str
    shape: tuple[int, int, int]
    graph: bool
    triton: Row
    cuda: Row

    @property
    def winner(self) -> str:
        """``"cuda"`` only where its lead is more than noise."""
        apart = self.cuda.high < self.triton.low
        quiet = not (is_noisy(self.cuda) or is_noisy(self.triton))
        clear = quiet and self.cuda.value < (1 - CLEAR) * self.triton.value
        return "cuda" if apart or clear else "triton"


def _op(row: Row) -> str | None:
    """The op that a row is a time of, if it is of a single one that has two implementations."""
    op = "bipartite_match" if row.kernel == "match" else row.kernel
    if op == "merge_add_layer_norm" and row.settings["r"] == 0:
        op = "add_layer_norm"  # its case has the same with nothing to merge beside it
    op = op if row.mode == "forward" else f"{op}_{row.mode}"
    return op if op in winners.OPS else None


def duels(rows: Iterable[Row]) -> list[Duel]:
    """What was measured of both implementations, in the order of the rows."""
    cases: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in select(newest(rows), "ms"):
        cases.setdefault((row.kernel, row.mode, row.config), {})[row.provider] = row
    found = []
    for by in cases.values():
        suffix = "+graph" if {"fused triton+graph", "fused cuda+graph"} <= set(by) else ""
        triton, cuda = (by.get(f"fused {name}{suffix}") for name in ("triton", "cuda"))
        op = None if triton is None else _op(triton)
        if triton is not None and cuda is not None and op is not None:
            c = triton.settings
            shape = int(c["B"]), int(c["N"]), int(c["D" if "D" in c else "C"])
            found.append(Duel(op, str(c["dtype"]), shape, bool(suffix), triton, cuda))
    return found


def table_of(found: Sequence[Duel]) -> dict[str, dict[str, list[winners.Entry]]]:
    """Winners by op, dtype and shape; a shape that was measured twice has to be won twice."""
    table: dict[str, dict[str, dict[tuple[int, int, int], str]]] = {}
    for duel in found:
        shapes = table.setdefault(duel.op, {}).setdefault(duel.dtype, {})
        won = duel.winner == "cuda" and shapes.get(duel.shape, "cuda") == "cuda"
        shapes[duel.shape] = "cuda" if won else "triton"
    return {
        op: {dtype: [(*s, name) for s, name in shapes.items()] for dtype, shapes in dtypes.items()}
        for op, dtypes in table.items()
    }


def origin(rows: Sequence[Row], context: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """The compute capability of a run, and where its numbers come from.

    Raises:
        ValueError: it is a CPU's, or does not say which GPU's.
    """
    last = max(rows, key=lambda row: row.date)
    devices = sorted({row.device for row in rows})
    if any("cores" in device for device in devices):
        raise ValueError(f"this run is of a CPU ({', '.join(devices)}): use one of --set gpu")
    if devices != [context.get("device")] or not devices[0]:
        raise ValueError(
            f"rows must be of the one GPU that machine_info names, {context.get('device')!r}, "
            f"got {devices}"
        )
    capability = context.get("capability")
    if not capability:
        raise ValueError(
            f"machine_info has no compute capability of {devices[0]}: "
            "measure again with this version of the suite"
        )
    versions = dict(part.partition(" ")[::2] for part in last.versions.split(", "))
    about = {"gpu": devices[0], "commit": last.commit, "date": last.date}
    return capability, {**about, **{k: versions.get(k, "") for k in ("torch", "triton")}}


def show(found: Sequence[Duel], title: str) -> None:
    """Print both times of every shape, ``~`` before the noisy ones."""

    def ms(row: Row) -> str:
        return f"{'~' if is_noisy(row) else ''}{row.value:.4g}"

    form = "{:<29} {:<9} {:>4} {:>5} {:>5} {:>10} {:>10} {:>7}  {:<6} {}"
    print(title)
    print(
        form.format("op", "dtype", "B", "N", "D", "triton ms", "cuda ms", "ratio", "as", "winner")
    )
    for duel in found:
        ratio = f"{duel.triton.value / duel.cuda.value:.2f}x"
        times, how = (ms(duel.triton), ms(duel.cuda)), "graph" if duel.graph else "eager"
        print(form.format(duel.op, duel.dtype, *duel.shape, *times, ratio, how, duel.winner))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="pytest-benchmark's JSON of the ops, or its .gz")
    parser.add_argument("--out", type=Path, default=winners.SHIPPED, help="the table to update")
    options = parser.parse_args(arguments)
    try:
        rows, context = read(options.run)
        capability, about = origin(rows, context)
        found = duels(rows)
        if not found:
            raise ValueError('no op was measured as both "fused triton" and "fused cuda"')
    except ValueError as error:
        raise SystemExit(f"no winners in {options.run}: {error}") from None
    show(found, f"{about['gpu']} ({capability}), commit {about['commit']}, {about['date']} UTC")
    winners.record(options.out, capability, about, table_of(found))
    won = sum(duel.winner == "cuda" for duel in found)
    print(f"CUDA C++ is faster in {won} of {len(found)}; wrote {options.out}")


if __name__ == "__main__":
    main()
