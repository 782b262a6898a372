"""Pictures of benchmark rows: speed-up against r, time against N, where merging pays."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fastast.benchmark.rows import Row
from fastast.plot import figure_at

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def short(dtype: object) -> str:
    """The usual abbreviation of a dtype's name."""
    return SHORT.get(str(dtype), str(dtype))


def select(rows: Iterable[Row], metric: str, **wanted: object) -> list[Row]:
    """Rows of a metric whose fields, or else config entries, have the wanted values."""

    def value(row: Row, name: str) -> object:
        return getattr(row, name) if hasattr(row, name) else row.settings.get(name)

    return [
        row
        for row in rows
        if row.metric == metric and all(value(row, k) == v for k, v in wanted.items())
    ]


def sweeps(rows: Iterable[Row], metric: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows of models over r by (model, seconds, B, dtype, threads, inflect), each by rising r.

    An amount of merging is one of a sweep where it is held against the fused model at r=0.
    """
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in select(rows, metric, kernel="ast", provider="fused", mode="forward"):
        c = row.settings
        if metric == "speedup" and not str(c.get("against", "")).startswith("fused"):
            continue
        key = (c["model"], c["seconds"], c["B"], c["dtype"], c["threads"], c.get("inflect", 0))
        found.setdefault(key, []).append(row)
    return {key: sorted(group, key=lambda row: row.x) for key, group in found.items()}


def _save(
    path: str | os.PathLike[str], draw: Callable[[Any], None], width: float, columns: int = 1
) -> list[Path]:
    """Draw into ``path`` as SVG and as PNG; a suffix that it has is replaced."""
    files = [Path(path).with_suffix(suffix) for suffix in (".svg", ".png")]
    for file in files:
        with figure_at(file, width, 4, columns=columns) as axes:
            draw(axes)
    return files


def _name(key: tuple[Any, ...]) -> str:
    model, _, batch, dtype, threads, inflect = key
    slope = {0: "", -1: ", decreasing"}.get(inflect, f", inflect {inflect}")
    return f"{model} {short(dtype)}, B={batch}, {threads} thread{'s' * (threads != 1)}{slope}"


def speedup_against_r(
    rows: Iterable[Row], path: str | os.PathLike[str], title: str = ""
) -> list[Path]:
    """Measured speed-up with its 95 % interval, and dashed what the arithmetic saved allows.

    Args:
        rows: with sweeps over r among them.
        path: where to save; both ``.svg`` and ``.png`` are written.
        title: the machine, say.
    """
    rows = list(rows)
    measured, allowed = sweeps(rows, "speedup"), sweeps(rows, "mac_ratio")
    clips = sorted({key[1] for key in measured}, reverse=True)

    def draw(axes: Any) -> None:
        for axis, seconds in zip(np.atleast_1d(axes), clips, strict=True):
            for i, key in enumerate(k for k in measured if k[1] == seconds):
                line = measured[key]
                middle = [1.0, *(row.value for row in line)]
                below = [0.0, *(max(0.0, row.value - row.low) for row in line)]
                above = [0.0, *(max(0.0, row.high - row.value) for row in line)]
                colour = f"C{i}"
                axis.errorbar(
                    [0.0, *(row.x for row in line)], middle, [below, above],
                    marker="o", markersize=3, capsize=2, color=colour, label=_name(key),
                )  # fmt: skip
                ideal = allowed.get(key, [])
                axis.plot(
                    [0.0, *(row.x for row in ideal)], [1.0, *(row.value for row in ideal)],
                    "--", color=colour, alpha=0.5,
                )  # fmt: skip
            axis.axhline(1, color="0.7", linewidth=0.8)
            axis.set(xlabel="r", title=f"{seconds:g}-second clips")
            axis.legend(fontsize=6)
        np.atleast_1d(axes)[0].set_ylabel("speed-up over r=0 (dashed: multiply-adds saved)")
        if title:
            np.atleast_1d(axes)[0].figure.suptitle(title, fontsize=9)

    if not clips:
        return []
    return _save(path, draw, 4.5 * len(clips), len(clips))


def time_against_n(
    rows: Iterable[Row], path: str | os.PathLike[str], title: str = ""
) -> list[Path]:
    """Milliseconds of single ops over the number of tokens, one clip, by provider and dtype."""
    found = [
        row
        for row in select(rows, "ms", mode="forward", x_name="N", B=1)
        if row.settings.get("r", 1) != 0
    ]
    most = max((int(row.settings["threads"]) for row in found), default=0)
    found = [row for row in found if row.settings["threads"] == most]
    kernels = list(dict.fromkeys(row.kernel for row in found))

    def draw(axes: Any) -> None:
        for axis, kernel in zip(np.atleast_1d(axes), kernels, strict=True):
            lines: dict[tuple[str, str], list[Row]] = {}
            for row in found:
                if row.kernel == kernel:
                    lines.setdefault((row.provider, str(row.settings["dtype"])), []).append(row)
            names = list(dict.fromkeys(provider for provider, _ in lines))
            for (provider, dtype), line in lines.items():
                line.sort(key=lambda row: row.x)
                axis.plot(
                    [row.x for row in line], [row.value for row in line],
                    marker="o", markersize=3, color=f"C{names.index(provider)}",
                    linestyle="-" if dtype == "float32" else "--",
                    label=f"{provider} {short(dtype)}",
                )  # fmt: skip
            axis.set(xlabel="N tokens", title=kernel.replace("_", " "), xscale="log", yscale="log")
            ticks = sorted({int(row.x) for row in found})
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
            axis.minorticks_off()
            axis.legend(fontsize=6)
        np.atleast_1d(axes)[0].set_ylabel(f"ms a clip, {most} threads")
        if title:
            np.atleast_1d(axes)[0].figure.suptitle(title, fontsize=9)

    if not kernels:
        return []
    return _save(path, draw, 3.6 * len(kernels), len(kernels))


def break_even(rows: Iterable[Row], path: str | os.PathLike[str], title: str = "") -> list[Path]:
    """Speed-up over r=0 for every clip length, batch and r: red where merging does not pay."""
    measured = {
        key: {int(row.x): row for row in line}
        for key, line in sweeps(rows, "speedup").items()
        if key[5] == 0
    }
    keys = sorted(measured, key=lambda k: (k[0], -k[1], k[2], k[3], k[4]))
    rs = sorted({r for line in measured.values() for r in line})

    def draw(axes: Any) -> None:
        table = np.full((len(keys), len(rs)), np.nan)
        for i, key in enumerate(keys):
            for r, row in measured[key].items():
                table[i, rs.index(r)] = row.value
        # Twice as fast and half as fast are equally far from the middle.
        axes.imshow(np.log2(table), cmap="RdYlGn", vmin=-1, vmax=1, aspect="auto")
        for i, key in enumerate(keys):
            for r, row in measured[key].items():
                pays = verdict(row)
                text = f"{row.value:.2f}" + {"no": "", "same": " ~", "yes": ""}[pays]
                weight = "bold" if pays == "no" else "normal"
                axes.text(rs.index(r), i, text, ha="center", va="center", fontsize=7, weight=weight)
        axes.set_xticks(range(len(rs)), [str(r) for r in rs])
        labels = [f"{key[1]:g} s, {_name(key)}" for key in keys]
        axes.set_yticks(range(len(keys)), labels, fontsize=7)
        axes.set(xlabel="r", title=title or "speed-up over r=0; bold: slower, ~: no difference")

    return _save(path, draw, 9) if keys else []


def verdict(row: Row) -> str:
    """``yes`` where a speed-up's whole interval is above 1, ``no`` where below, else ``same``."""
    if row.low > 1:
        return "yes"
    return "no" if row.high < 1 else "same"
