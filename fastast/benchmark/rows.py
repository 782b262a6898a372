"""Rows of the results table, and the CSV file that keeps them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from fastast.benchmark.case import Case, Config, Measurement
from fastast.benchmark.timing import quartiles


@dataclass(frozen=True)
class Row:
    """One number and where it comes from.

    Attributes:
        kernel: what was computed.
        provider: by whom.
        mode: ``forward``, ``backward``, ``training``.
        metric: ``ms`` (low and high are quartiles); ``speedup`` (against ``config["against"]``, low
            and high are its 95 % interval); ``vs_best`` (the same, against the fastest other in the
            same dtype); ``error`` (relative, against fp64); ``GB/s`` and ``GFLOP/s`` (of the least
            bytes and operations that the result takes); ``share`` (of what the machine's ceilings
            allow); ``peak_MB``; ``dispatches``; ``mac_ratio``; ``efficiency`` (speed-up over MAC
            ratio).
        x_name: the entry of the config that plots put on the x axis.
        x: its value.
        value: the number.
        low: lower end, or the number.
        high: upper end, or the number.
        config: shape, dtype, r, threads, as JSON with sorted keys.
        device: GPU or processor.
        versions: of FastAST, torch, Triton, Python.
        commit: of the source tree.
        date: UTC.
    """

    kernel: str
    provider: str
    mode: str
    metric: str
    x_name: str
    x: float
    value: float
    low: float
    high: float
    config: str
    device: str
    versions: str
    commit: str
    date: str

    @property
    def settings(self) -> Config:
        """The config as a dict."""
        return dict(json.loads(self.config))

    @property
    def key(self) -> tuple[str, ...]:
        """What a newer row of the same number has in common with this one."""
        return self.kernel, self.provider, self.mode, self.metric, self.config, self.device


COLUMNS = tuple(f.name for f in fields(Row))
NUMBERS = ("x", "value", "low", "high")


def dumps(config: Mapping[str, object]) -> str:
    """A config as it stands in the CSV."""
    return json.dumps(dict(config), sort_keys=True, separators=(",", ":"))


def _rounded(value: float) -> float:
    """Five digits: more would be noise."""
    return float(f"{value:.5g}")


def _row(
    what: tuple[str, str, str],
    provider: str,
    metric: str,
    config: Config,
    numbers: tuple[float, float, float],
    context: Mapping[str, str],
) -> Row:
    """A row of ``what``: kernel, mode, and the name of its x."""
    kernel, mode, x_name = what
    value, low, high = map(_rounded, numbers)
    return Row(
        kernel=kernel,
        provider=provider,
        mode=mode,
        metric=metric,
        x_name=x_name,
        x=float(config[x_name]),
        value=value,
        low=low,
        high=high,
        config=dumps(config),
        device=context["device"],
        versions=context["versions"],
        commit=context["commit"],
        date=context["date"],
    )


def rows_of(
    case: Case,
    measurements: Iterable[Measurement],
    context: Mapping[str, str],
    ceilings: Mapping[str, float],
    peaks: Mapping[str, float] | None = None,
    dispatches: Mapping[str, float] | None = None,
) -> list[Row]:
    """All rows of a measured case.

    Args:
        case: what was measured.
        measurements: of :func:`fastast.benchmark.case.measure`.
        context: of :func:`fastast.benchmark.machine.context`.
        ceilings: of :func:`fastast.benchmark.machine.ceilings`, for the case's threads.
        peaks: peak extra bytes by label, where they were counted.
        dispatches: kernel launches, or dispatcher calls on a CPU, by label.
    """
    measurements = list(measurements)
    base = next(m for m in measurements if m.entry.provider == case.baseline)
    what = case.kernel, case.mode, case.x
    rows = []
    for m in measurements:
        config = {**case.config, **m.entry.config}
        label = case.label(m.entry)

        def row(
            metric: str, value: float, low: float | None = None, high: float | None = None,
            m: Measurement = m, config: Config = config,
        ) -> None:  # fmt: skip
            low, high = value if low is None else low, value if high is None else high
            rows.append(_row(what, m.entry.provider, metric, config, (value, low, high), context))

        middle, low, high = quartiles(m.times)
        row("ms", middle, low, high)
        if m is not base:
            row("speedup", *m.speedup, config={**config, "against": case.label(base.entry)})
        if m.against_best is not None:
            row("vs_best", *m.against_best, config={**config, "against": m.best_other or ""})
        row("error", m.error)
        if m.entry.count is not None:
            count, seconds = m.entry.count, middle / 1e3
            peak_rate = ceilings.get(str(config.get("dtype")), ceilings["float32"])
            row("GB/s", count.bytes / seconds / 1e9)
            row("GFLOP/s", count.flops / seconds / 1e9)
            floor = max(count.flops / peak_rate, count.bytes / ceilings["copy"])
            row("share", floor / seconds)
        if peaks and label in peaks:
            row("peak_MB", peaks[label] / 1e6)
        if dispatches and label in dispatches:
            row("dispatches", dispatches[label])
        if m.entry.macs and base.entry.macs and m is not base:
            mac_ratio = base.entry.macs / m.entry.macs
            row("mac_ratio", mac_ratio)
            middle, low, high = m.speedup
            row("efficiency", middle / mac_ratio, low / mac_ratio, high / mac_ratio)
    return rows


def ceiling_rows(
    ceilings: Mapping[str, float], threads: int, context: Mapping[str, str]
) -> list[Row]:
    """The machine's ceilings as rows of kernel ``ceiling``."""
    rows = []
    for name, value in ceilings.items():
        config: Config = {"threads": threads}
        provider, metric = ("copy", "GB/s") if name == "copy" else ("matmul", "GFLOP/s")
        if provider == "matmul":
            config["dtype"] = name
        number = value / 1e9
        rows.append(
            _row(
                ("ceiling", "forward", "threads"), provider, metric, config, (number,) * 3, context
            )
        )
    return rows


def append_csv(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a CSV file, which gets a header when it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or not path.stat().st_size
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:g}" if k in NUMBERS else v for k, v in asdict(row).items()})


def read_csv(path: Path) -> list[Row]:
    """Rows of a CSV file that :func:`append_csv` wrote.

    Raises:
        ValueError: the file has other columns.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} is not a results table: its columns are {reader.fieldnames}")
        return [
            Row(**{k: float(v) if k in NUMBERS else v for k, v in line.items()})  # type: ignore[arg-type]
            for line in reader
        ]


def newest(rows: Iterable[Row]) -> list[Row]:
    """Of each number only its newest row."""
    latest: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row.key not in latest or latest[row.key].date <= row.date:
            latest[row.key] = row
    return list(latest.values())
