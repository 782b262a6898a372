"""The command on a data set alone: `stats`."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    DataOption,
    JsonOption,
    PathColumnOption,
    RootsOption,
    SplitColumnOption,
    SplitOption,
    SubsetOption,
    TargetColumnOption,
    WhereOption,
    load_clips,
)

if TYPE_CHECKING:
    from fastast.data import AudioDataset

SAMPLE_RATE = 16000  # that training reads at
EXTREMES = 5  # classes that the table names at each end


def stats(
    data: DataOption,
    split: SplitOption = "train",
    roots: RootsOption = "",
    path_column: PathColumnOption = "",
    target_column: TargetColumnOption = "",
    split_column: SplitColumnOption = "",
    where: WhereOption = "",
    subset: SubsetOption = "",
    target_length: Annotated[
        int, typer.Option(min=0, help="frames of 10 ms a clip (0: from the data)")
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Show what is in a data set: clips, hours, lengths, classes, and its features' mean and std.

    Mean and std are those of the log-mel features of all clips, cut or zero-padded to the target
    length, as AST takes them. The last line is the `fastast train` command that uses them.

    **Examples**

    - `fastast stats --data digits/`
    - `fastast stats --data esc50/ --split '!1' --target-length 512 --json`
    """
    columns = path_column, target_column, split_column
    clips = load_clips(
        data, split, SAMPLE_RATE, roots, columns, where, subset, progress=not as_json
    )
    report = _statistics_of(clips, target_length)
    names = ("roots", "path_column", "target_column", "split_column", "where", "subset")
    values = (roots, *columns, where, subset)
    given = {"data": data, **dict(zip(names, values, strict=True))}
    if split != "train":
        given["train_split"] = split
    if clips.multi_label:
        given["loss"] = "bce"
    report["train_command"] = _train_command(given, report)
    if as_json:
        print(json.dumps(report, indent=2))
        return
    _print_table(f"{data}, split {split}", report)
    print(report["train_command"])


def _statistics_of(clips: AudioDataset, target_length: int) -> dict[str, Any]:
    from fastast.recipe import feature_statistics, usual_length

    seconds = clips.lengths.double() / clips.sample_rate
    if clips.multi_label:
        counts = (clips.targets > 0.5).sum(0)
    else:
        counts = clips.targets.bincount(minlength=len(clips.labels))
    frames = target_length or usual_length(clips)
    mean, std = feature_statistics(clips, frames)
    return {
        "clips": len(clips),
        "unreadable": len(clips.bad),
        "hours": seconds.sum().item() / 3600,
        "seconds": {
            "min": seconds.min().item(),
            "median": seconds.quantile(0.5).item(),
            "max": seconds.max().item(),
        },
        "sample_rate": clips.sample_rate,
        "multi_label": clips.multi_label,
        "classes": dict(zip(clips.labels, counts.tolist(), strict=True)),
        "target_length": frames,
        "mean": mean,
        "std": std,
    }


def _train_command(given: dict[str, str], report: dict[str, Any]) -> str:
    """The command that trains on the same clips with the same features."""
    options = {name: text for name, text in given.items() if text}
    options["target_length"] = str(report["target_length"])
    options |= {name: f"{report[name]:.7g}" for name in ("mean", "std")}
    words = (f"--{name.replace('_', '-')} {shlex.quote(text)}" for name, text in options.items())
    return " ".join(("fastast train", *words))


def _print_table(title: str, report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    by_count = sorted(report["classes"].items(), key=lambda item: -item[1])
    seconds, several = report["seconds"], ", several a clip" if report["multi_label"] else ""
    # As texts: names of classes may hold what a string would make markup.
    table = Table("", "", title=Text(title, "table.title"), show_header=False)
    rows = {
        "clips": f"{report['clips']} ({report['hours']:.3g} hours)",
        "seconds": "min {min:.2f}, median {median:.2f}, max {max:.2f}".format(**seconds),
        "sample rate": f"{report['sample_rate']} Hz",
        "classes": f"{len(by_count)}{several}",
        "most clips": _counted(by_count[:EXTREMES]),
        "fewest clips": _counted(by_count[::-1][:EXTREMES]),
        "log-mel features": f"mean {report['mean']:.7g}, std {report['std']:.7g} "
        f"(over {report['target_length']} frames a clip)",
    }
    if report["unreadable"]:
        rows["clips"] += f", {report['unreadable']} could not be read"
    for name, text in rows.items():
        table.add_row(name, Text(text))
    Console().print(table)


def _counted(classes: list[tuple[str, int]]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in classes)
