"""Tables, csv and plots of a reproduction: means over folds, then mean and spread over seeds."""

from __future__ import annotations

import csv
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rich.table import Table

from fastast.reproduce.paper import published
from fastast.reproduce.plan import TABLES, VARIANTS, Plan

__all__ = ["Result", "Summary", "markdown", "rich_tables", "summarise", "write_csv"]


@dataclass(frozen=True)
class Result:
    """One model at one r. Percentages; `best_epoch` is that of the test accuracy at r=0."""

    dataset: str
    variant: str
    seed: int
    fold: str
    r: int
    accuracy: float
    mean_average_precision: float
    mean_auc: float | None
    clips: int
    epochs: int
    train_seconds: float


@dataclass(frozen=True)
class Summary:
    """One kind of model at one r: percent over seeds (each the mean of its folds)."""

    percent: float
    spread: float | None
    drop: float


def write_csv(results: Sequence[Result], path: str | os.PathLike[str]) -> None:
    """Write every single result, replacing the file at once."""
    path = Path(path)
    part = path.with_suffix(".csv.part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[field.name for field in fields(Result)])
        writer.writeheader()
        writer.writerows(asdict(result) for result in results)
    os.replace(part, path)


def summarise(results: Sequence[Result], metric: str) -> dict[str, dict[int, Summary]]:
    """Percent of each variant at each r.

    Args:
        results: All models; a seed counts with those folds that it has.
        metric: `"accuracy"` or `"mAP"`.
    """
    found: dict[str, dict[int, dict[int, list[float]]]] = {}
    for result in results:
        value = result.accuracy if metric == "accuracy" else result.mean_average_precision
        by_seed = found.setdefault(result.variant, {}).setdefault(result.r, {})
        by_seed.setdefault(result.seed, []).append(value)
    summary: dict[str, dict[int, Summary]] = {}
    for variant, by_r in found.items():
        means = {
            r: [statistics.fmean(values) for values in by_seed.values()]
            for r, by_seed in sorted(by_r.items())
        }
        base = statistics.fmean(means[min(means)])
        summary[variant] = {
            r: Summary(
                statistics.fmean(values),
                statistics.stdev(values) if len(values) > 1 else None,
                statistics.fmean(values) - base,
            )
            for r, values in means.items()
        }
    return summary


Column = tuple[str, list[str]]
"""A heading, and a cell for each r."""


def _columns(
    plan: Plan, results: Sequence[Result], speeds: Mapping[int, float]
) -> tuple[list[Column], dict[str, list[Column]]]:
    """What all models share, and each variant's numbers with the paper's beside them."""
    metrics: tuple[str, ...] = ("mAP",) if plan.multi_label else ("accuracy",)
    if plan.table == 2 and not plan.multi_label:
        metrics = ("accuracy", "mAP")
    summaries = {metric: summarise(results, metric) for metric in metrics}
    dataset = plan.preset.paper

    shared = [("r", [str(r) for r in plan.rs])]
    if speeds:
        known = [speeds.get(r) for r in plan.rs]
        shared.append(("clips/s", [f"{speed:.1f}" if speed else "" for speed in known]))
        shared.append(
            ("speed-up", [f"{speed / speeds[0]:.2f}" if speed else "" for speed in known])
        )
    paper_speed = published(plan.table, dataset, "speed") if dataset else {}
    if paper_speed:
        theirs = {r: f"{speed / paper_speed[0]:.2f}" for r, speed in paper_speed.items()}
        shared.append(("paper: speed-up", [theirs.get(r, "") for r in plan.rs]))

    paper = "balanced AudioSet, mAP" if plan.table == 2 else dataset
    columns: dict[str, list[Column]] = {}
    for variant in TABLES[plan.table]:
        if variant not in summaries[metrics[0]]:
            continue
        own = columns[variant] = []
        for metric in metrics:
            cells = [summaries[metric][variant].get(r) for r in plan.rs]
            own.append((metric, [_percent(cell) if cell else "" for cell in cells]))
        drops = [summaries[metrics[0]][variant].get(r) for r in plan.rs]
        own.append(("drop", [f"{cell.drop:+.1f}" if cell else "" for cell in drops]))
        shown = published(plan.table, dataset, variant) if dataset else {}
        if shown:
            cells_of_paper = [f"{shown[r]:.1f}" if r in shown else "" for r in plan.rs]
            own.append((f"paper ({paper})", cells_of_paper))
    return shared, columns


def _percent(cell: Summary) -> str:
    return f"{cell.percent:.1f}" + (f" ± {cell.spread:.1f}" if cell.spread is not None else "")


def rich_tables(plan: Plan, results: Sequence[Result], speeds: Mapping[int, float]) -> list[Table]:
    """The paper's table, for a terminal: one for each variant, as all of them are too wide."""
    shared, columns = _columns(plan, results, speeds)
    tables = []
    for variant, own in columns.items():
        table = Table(title=VARIANTS[variant])
        for heading, cells in (*shared, *own):  # a heading may wrap, a number not
            table.add_column(heading, justify="right", min_width=max(map(len, cells)))
        for row in zip(*(cells for _, cells in (*shared, *own)), strict=True):
            table.add_row(*row)
        tables.append(table)
    return tables


def markdown(plan: Plan, results: Sequence[Result], speeds: Mapping[int, float]) -> str:
    """The paper's table, for a document."""
    shared, columns = _columns(plan, results, speeds)
    whole = shared + [
        (f"{VARIANTS[variant]}: {heading}" if heading != "drop" else heading, cells)
        for variant, own in columns.items()
        for heading, cells in own
    ]
    rows = zip(*(cells for _, cells in whole), strict=True)
    lines = [[heading for heading, _ in whole], ["---:"] * len(whole), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
