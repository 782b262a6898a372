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

__all__ = ["Result", "Summary", "markdown", "rich_table", "summarise", "write_csv"]


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


def _cells(
    plan: Plan, results: Sequence[Result], speeds: Mapping[int, float]
) -> tuple[list[str], list[list[str]]]:
    metrics: tuple[str, ...] = ("mAP",) if plan.multi_label else ("accuracy",)
    if plan.table == 2 and not plan.multi_label:
        metrics = ("accuracy", "mAP")
    summaries = {metric: summarise(results, metric) for metric in metrics}
    variants = [v for v in TABLES[plan.table] if v in summaries[metrics[0]]]
    dataset = plan.preset.paper
    header = ["r", "clips/s", "speed-up"]
    for variant in variants:
        header += [f"{VARIANTS[variant]}: {metric}" for metric in metrics] + ["drop"]
    shown = {v: published(plan.table, dataset, v) for v in variants} if dataset else {}
    paper = "balanced AudioSet, mAP" if plan.table == 2 else dataset
    header += [f"paper ({paper}): {VARIANTS[v]}" for v in variants if shown.get(v)]
    paper_speed = published(plan.table, dataset, "speed") if dataset else {}
    if paper_speed:
        header.append("paper: speed-up")
    rows = []
    for r in plan.rs:
        speed = speeds.get(r)
        row = [str(r)]
        row += [f"{speed:.1f}", f"{speed / speeds[0]:.2f}"] if speed else ["", ""]
        for variant in variants:
            for metric in metrics:
                cell = summaries[metric][variant].get(r)
                spread = f" ± {cell.spread:.1f}" if cell and cell.spread is not None else ""
                row.append(f"{cell.percent:.1f}{spread}" if cell else "")
            first = summaries[metrics[0]][variant].get(r)
            row.append(f"{first.drop:+.1f}" if first else "")
        row += [f"{shown[v][r]:.1f}" if r in shown[v] else "" for v in variants if shown.get(v)]
        if paper_speed:
            row.append(f"{paper_speed[r] / paper_speed[0]:.2f}" if r in paper_speed else "")
        rows.append(row)
    return header, rows


def rich_table(
    plan: Plan, results: Sequence[Result], speeds: Mapping[int, float], title: str
) -> Table:
    """The paper's table, for a terminal."""
    header, rows = _cells(plan, results, speeds)
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    return table


def markdown(plan: Plan, results: Sequence[Result], speeds: Mapping[int, float]) -> str:
    """The paper's table, for a document."""
    header, rows = _cells(plan, results, speeds)
    lines = [header, ["---:"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
