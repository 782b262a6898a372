"""The experiments of the FastAST paper (arXiv 2406.07676) as one command each: Tables 1 and 2.

Table 1: what merging costs a model that was trained without it, and one that was trained with it.
Table 2: what a teacher gives back, a CNN or a transformer (CMKD). What is missing is trained, each
model in a folder of its own, so that a reproduction that was killed goes on where it stopped.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fastast.recipe import TrainConfig
from fastast.reproduce.paper import published
from fastast.reproduce.plan import PRESETS, VARIANTS, Member, Plan
from fastast.reproduce.results import Result, markdown, summarise, write_csv

__all__ = ["PRESETS", "Outcome", "Plan", "reproduce"]

SPEED_BATCH = 16


@dataclass(frozen=True)
class Outcome:
    """What a reproduction found.

    Attributes:
        results: One for each model and r.
        speeds: Clips a second at each r, of the model alone.
        epochs: For each kind of model, the accuracy at r=0 of the best epoch and of the last, in
            percent, averaged over folds before the best is picked, then over seeds.
        conditions: Hardware, dtype, batch and versions behind the speeds; command, date.
        files: What was written.
    """

    results: tuple[Result, ...]
    speeds: dict[int, float]
    epochs: dict[str, tuple[float, float]]
    conditions: dict[str, Any]
    files: tuple[Path, ...]


def _trained(member: Member, report: Callable[[str], None]) -> dict[str, Any]:
    """The metrics of a run: as stored, if it ended and was evaluated at every r; else run now."""
    from fastast.train import train

    path, config = member.folder / "metrics.json", member.config
    if path.exists():
        metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = {row["r"] or 0 for row in metrics["model"]}  # None: of what does not merge
        if known >= set(config.final_r) and not config.differences(metrics["config"]):
            return metrics
        # What was evaluated before is not forgotten.
        config = replace(config, final_r=tuple(sorted(known.union(config.final_r))))
    report(f"training {member.folder}" if not path.exists() else f"evaluating {member.folder}")
    return train(config, report)


def _last_model(metrics: dict[str, Any]) -> str:
    """The averaged weights where the recipe averages them, else the last epoch's."""
    return "model_averaged" if "model_averaged" in metrics else "model"


def _cnn_teacher(plan: Plan, fold: str, report: Callable[[str], None]) -> str:
    """Folder of the CNN teacher for a fold, trained or fitted on its training clips if missing."""
    if Path(plan.cnn).is_dir():
        return plan.cnn
    member = plan.cnn_member(fold)
    if plan.cnn_fit == "all":
        return str(member.folder / _last_model(_trained(member, report)))
    folder = member.folder / "model"
    if not (folder / "config.json").exists():
        report(f"fitting a head for {folder}")
        _fit_head(member.config, folder, report)
    return str(folder)


def _fit_head(config: TrainConfig, folder: Path, report: Callable[[str], None]) -> None:
    from fastast import probe
    from fastast.evaluate import evaluate
    from fastast.recipe import build_model
    from fastast.train import load_splits

    train_set, test_set = load_splits(config, report)
    network, front_end = build_model(config, train_set)
    probe.fit_head(network, train_set, augment=config.augment())
    found = evaluate(network, test_set, fbank=front_end)
    report(f"teacher: {100 * found.accuracy:.1f} % of {found.clips} test clips")
    network.save_pretrained(folder)


def _transformer_teacher(plan: Plan, seed: int, fold: str, report: Callable[[str], None]) -> str:
    if plan.transformer != "self":
        return plan.transformer
    (member,) = plan.student("plain", seed, fold)
    return str(member.folder / _last_model(_trained(member, report)))


def _results(plan: Plan, member: Member, metrics: dict[str, Any]) -> list[Result]:
    found = []
    for row in metrics[_last_model(metrics)]:
        if row["r"] not in plan.rs:
            continue
        auc = row.get("mean_auc")
        found.append(
            Result(
                dataset=plan.dataset,
                variant=member.variant,
                seed=member.seed,
                fold=member.fold,
                r=row["r"],
                accuracy=100 * row["accuracy"],
                mean_average_precision=100 * row["mean_average_precision"],
                mean_auc=None if auc is None else 100 * auc,
                clips=row["clips"],
                epochs=metrics["config"]["epochs"],
                train_seconds=metrics["train_seconds"],
            )
        )
    return found


def _epochs(
    histories: Sequence[tuple[Member, list[dict[str, float]]]],
) -> dict[str, tuple[float, float]]:
    """Best-epoch and last-epoch accuracy at r=0: folds first, as the AST paper does on ESC-50."""
    groups: dict[str, dict[int, list[list[float]]]] = {}
    for member, history in histories:
        curve = [row["accuracy_r0"] for row in history if "accuracy_r0" in row]
        if len(curve) == len(history):
            groups.setdefault(member.variant, {}).setdefault(member.seed, []).append(curve)
    found = {}
    for variant, by_seed in groups.items():
        means = [
            [statistics.fmean(e) for e in zip(*curves, strict=True)] for curves in by_seed.values()
        ]
        best = statistics.fmean(max(curve) for curve in means)
        last = statistics.fmean(curve[-1] for curve in means)
        found[variant] = 100 * best, 100 * last
    return found


def _speeds(
    plan: Plan,
    member: Member,
    metrics: dict[str, Any],
    seconds: float,
    report: Callable[[str], None],
) -> tuple[dict[int, float], dict[str, Any]]:
    """Clips a second at each r; all models of a plan have one shape, so one of them is measured."""
    from fastast.demo import fastest_dtype
    from fastast.env import hardware
    from fastast.evaluate import measure
    from fastast.model import AST

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = fastest_dtype(device)
    model = AST.from_pretrained(member.folder / _last_model(metrics), dtype=dtype).to(device)
    config = model.config
    generator = torch.Generator().manual_seed(0)
    shape = SPEED_BATCH, config.target_length, config.num_mel_bins
    features = torch.randn(shape, generator=generator).to(device, dtype)
    report(f"measuring speed, {seconds:.0f} s")
    speeds = measure(model, features, plan.rs, rounds=200, seconds=seconds)
    return speeds, {
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "batch": SPEED_BATCH,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _conditions(plan: Plan) -> dict[str, Any]:
    import fastast

    return {
        "command": shlex.join(["fastast", *sys.argv[1:]])
        if sys.argv[0].endswith("fastast")
        else "",
        "plan": asdict(plan),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "fastast": fastast.__version__,
        "torch": torch.__version__,
    }


def _write(
    plan: Plan,
    folder: Path,
    results: Sequence[Result],
    speeds: dict[int, float],
    epochs: dict[str, tuple[float, float]],
    conditions: dict[str, Any],
) -> tuple[Path, ...]:
    """Write everything that is known so far."""
    from fastast.plot import quality_vs_r, quality_vs_throughput
    from fastast.run import write_text

    name = f"table{plan.table}"
    table, runs, about = (folder / f"{name}.{suffix}" for suffix in ("md", "csv", "json"))
    write_csv(results, runs)
    lines = [markdown(plan, results, speeds)]
    for variant, (best, last) in epochs.items():
        lines.append(
            f"{VARIANTS[variant]}, r = 0: {best:.1f} % in the best epoch, {last:.1f} % in the last"
        )
    write_text(table, "\n".join(lines) + "\n")
    stored = {**conditions, "speeds": speeds, "epochs": epochs}
    write_text(about, json.dumps(stored, indent=2) + "\n")

    metric = "mAP" if plan.multi_label else "accuracy"
    summaries = summarise(results, metric)
    seeds = len({result.seed for result in results})
    title = f"{plan.preset.title}, {results[0].clips} test clips, {seeds} seed{'s' * (seeds > 1)}"
    pictures = [folder / f"{name}_accuracy.png"]
    curves = {
        VARIANTS[variant]: [(r, s.percent, s.spread) for r, s in by_r.items()]
        for variant, by_r in summaries.items()
    }
    quality_vs_r(curves, metric, pictures[0], title)
    if speeds:
        pictures.append(folder / f"{name}_speed.png")
        against = {
            VARIANTS[variant]: [(r, speeds[r] / speeds[0], s.percent) for r, s in by_r.items()]
            for variant, by_r in summaries.items()
        }
        for variant in summaries:
            if points := _paper_curve(plan, variant):
                against[f"paper ({plan.preset.paper}): {VARIANTS[variant]}"] = points
        quality_vs_throughput(
            against,
            metric,
            pictures[1],
            title,
            xlabel="throughput, r = 0 is 1; r beside the points",
        )
    return table, runs, about, *pictures


def _paper_curve(plan: Plan, variant: str) -> list[tuple[int, float, float]]:
    percents = published(plan.table, plan.preset.paper, variant)
    speeds = published(plan.table, plan.preset.paper, "speed")
    if not plan.preset.paper or (plan.table == 2 and not plan.preset.same):
        return []
    return [(r, speeds[r] / speeds[0], percent) for r, percent in percents.items()]


def reproduce(plan: Plan, report: Callable[[str], None] = print, seconds: float = 60.0) -> Outcome:
    """Train what a table needs and is not there, evaluate it at every r, and write it all down.

    Writes to `plan.out/dataset`: `tableN.md`, `tableN.csv` (a row for each model and r),
    `tableN.json` (command, hardware, versions, speeds), `tableN_accuracy.png` (against r) and
    `tableN_speed.png` (against throughput, with the paper's curve). The files are written anew
    after every model, so that a run that is interrupted leaves a table of what there is.

    Args:
        plan: What to run.
        report: Called with a line now and then.
        seconds: About how long to measure speed; 0 leaves it out.

    Raises:
        ValueError: The data or a teacher does not fit, or a run's folder holds another run.
    """
    folder = Path(plan.out) / plan.dataset
    folder.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    histories: list[tuple[Member, list[dict[str, float]]]] = []
    speeds: dict[int, float] = {}
    conditions: dict[str, Any] = _conditions(plan)
    files: tuple[Path, ...] = ()
    for variant, seed, fold in plan.groups():
        teacher = ""
        if variant == "cnn":
            teacher = _cnn_teacher(plan, fold, report)
        elif variant == "transformer":
            teacher = _transformer_teacher(plan, seed, fold, report)
        for member in plan.student(variant, seed, fold, teacher):
            metrics = _trained(member, report)
            results += _results(plan, member, metrics)
            histories.append((member, metrics["history"]))
            last = member, metrics
        files = _write(plan, folder, results, speeds, _epochs(histories), conditions)
    if seconds > 0:
        speeds, measured = _speeds(plan, *last, seconds, report)
        conditions.update(measured)
    epochs = _epochs(histories)
    files = _write(plan, folder, results, speeds, epochs, conditions)
    return Outcome(tuple(results), speeds, epochs, conditions, files)
