"""Commands on data sets: `train`, `evaluate` and `sweep`."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastast.recipe import TrainConfig

from .options import (
    BatchOption,
    DataOption,
    DeviceOption,
    InferenceDtypeOption,
    JsonOption,
    ModelOption,
    PathColumnOption,
    RootsOption,
    SplitColumnOption,
    SplitOption,
    SubsetOption,
    TargetColumnOption,
    WhereOption,
    inference_dtype_of,
    load_clips,
    options_of,
    progress_bar,
    tuple_of,
)

if TYPE_CHECKING:
    from fastast.evaluate import Evaluation


def _evaluation_table(title: str, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from fastast.metrics import d_prime

    table = Table("r", "accuracy", "mAP", "mAUC", "d'", "clips/s", title=title)
    for row in rows:
        auc = row["mean_auc"]
        table.add_row(
            str(row["r"]),
            f"{100 * row['accuracy']:.2f} %",
            f"{row['mean_average_precision']:.4f}",
            "-" if auc is None else f"{auc:.4f}",
            "-" if auc is None else f"{d_prime(auc):.3f}",
            f"{row['clips_per_second']:.0f}",
        )
    Console().print(table)


def _plot_confusion(result: Evaluation, labels: tuple[str, ...], folder: str, title: str) -> None:
    from pathlib import Path

    from fastast.plot import confusion_matrix

    assert result.confusion is not None  # one class a clip
    file = Path(folder) / "confusion.png"
    confusion_matrix(result.confusion, labels, file, f"{title}, r = {result.r}")
    print(f"saved {file}", file=sys.stderr)


@options_of(TrainConfig)
def train(config: TrainConfig) -> None:
    """Train an AST on your own audio, with merging on if you like.

    A run that was killed goes on when the same command is given again.

    **Examples**

    - `fastast train --data digits/ --out runs/digits` - a csv with its audio beside it, or one
      folder a class
    - `fastast train --data digits/ --r-choices 0,5,10,15` - one model that is good at many r
    - `fastast train --data esc50/ --test-split 1 --init base/ --recipe esc50` - fine-tune on a
      fold as the AST paper does
    - `fastast train --data esc50/ --init base/ --recipe esc50,fastast --teacher cnn/ --lr 3e-5` -
      two recipes, the second one for the distillation, and an option that wins over both
    """
    from rich.console import Console

    from fastast.train import train as run

    console = Console()
    metrics = run(config, report=lambda line: console.print(line, highlight=False, soft_wrap=True))
    if "model" not in metrics:  # another process of several evaluates
        return
    _evaluation_table(f"{config.out}/model", metrics["model"])
    accuracies = {
        row["epoch"]: row["accuracy_r0"] for row in metrics["history"] if "accuracy_r0" in row
    }
    if accuracies:
        best = max(accuracies, key=lambda epoch: accuracies[epoch])
        print(
            f"accuracy at r=0: {100 * accuracies[best]:.2f} % in the best epoch ({best:.0f}), "
            f"{100 * accuracies[max(accuracies)]:.2f} % in the last"
        )


def evaluate(
    data: DataOption,
    model: ModelOption = "",
    r: Annotated[str, typer.Option(help="amounts of merging, with commas")] = "0,5,10,15,20",
    split: SplitOption = "test",
    roots: RootsOption = "",
    path_column: PathColumnOption = "",
    target_column: TargetColumnOption = "",
    split_column: SplitColumnOption = "",
    where: WhereOption = "",
    subset: SubsetOption = "",
    per_class: Annotated[bool, typer.Option(help="also show every class")] = False,
    plot: Annotated[
        str, typer.Option(help="folder for confusion.png: which classes the first r mixes up")
    ] = "",
    as_json: JsonOption = False,
    batch_size: BatchOption = 64,
    device: DeviceOption = "auto",
) -> None:
    """Measure accuracy, mAP, AUC and throughput at several amounts of merging.

    mAUC is the mean over classes of the area under the ROC curve, and d' the distance of two
    normal laws that would have it: AudioSet's measure, 0 for chance.

    **Examples**

    - `fastast evaluate --data digits/ --model runs/digits/model --r 0,5,10 --per-class`
    - `fastast evaluate --data esc50/ --split 1 --model esc50/model --plot pictures/`
    """
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

    from fastast.classify import default_model, pick_device
    from fastast.evaluate import evaluate_at
    from fastast.model import AST

    rs = tuple_of("r", int, r)
    if not rs:
        raise ValueError("r must name at least one amount of merging")
    if plot and Path(plot).exists() and not Path(plot).is_dir():
        raise ValueError(f"plot must be a folder, not the file {plot!r}")
    path = model or str(default_model())
    network = AST.from_pretrained(path).to(pick_device(device))
    columns = path_column, target_column, split_column
    rate = network.config.sample_rate
    clips = load_clips(data, split, rate, roots, columns, where, subset, progress=not as_json)
    if plot and clips.multi_label:
        raise ValueError("plot must be left out for data with several classes a clip")
    results = evaluate_at(network, clips, rs, batch_size=batch_size)
    if plot:
        _plot_confusion(results[0], clips.labels, plot, f"{path} on {len(clips)} clips of {data}")
    rows = [result.to_dict() for result in results]
    if as_json:
        print(json.dumps({"model": path, "clips": len(clips), "results": rows}, indent=2))
        return
    _evaluation_table(f"{path} on {len(clips)} clips", rows)
    if per_class:
        table = Table("class", "clips", *(f"recall, r={value}" for value in rs))
        for name, report in results[0].per_class.items():
            recalls = (f"{100 * result.per_class[name].recall:.1f} %" for result in results)
            table.add_row(name, str(report.clips), *recalls)
        Console().print(table)


def sweep(
    data: DataOption,
    model: ModelOption = "",
    r: Annotated[
        str, typer.Option(help="first:last:step, or amounts with commas; r=0 is always swept")
    ] = "0:40:5",
    inflect: Annotated[
        float, typer.Option(help="slope of every schedule: -1 falls to nothing, 1 rises from it")
    ] = 0.0,
    out: Annotated[
        str, typer.Option(help="folder for sweep.csv, sweep.svg and sweep.png")
    ] = "sweep_output",
    seconds: Annotated[float, typer.Option(min=1, help="about how long to measure speed")] = 30.0,
    split: SplitOption = "test",
    roots: RootsOption = "",
    path_column: PathColumnOption = "",
    target_column: TargetColumnOption = "",
    split_column: SplitColumnOption = "",
    where: WhereOption = "",
    subset: SubsetOption = "",
    as_json: JsonOption = False,
    batch_size: BatchOption = 64,
    device: DeviceOption = "auto",
    dtype: InferenceDtypeOption = "float32",
) -> None:
    """Measure what merging costs and gains at every r: Table 1 of the paper, for your data.

    Accuracy (mAP where clips have several classes), its drop against r=0, clips/s, speed-up and
    multiply-accumulates, as a table, a csv and a plot. Speed is that of the model alone: every
    round times every r once, and the median counts. The csv is written after every r, so that a
    sweep that is interrupted loses nothing.

    **Examples**

    - `fastast sweep --data digits/ --model runs/digits/model --r 0:40:5`
    - `fastast sweep --data digits/ --r 0,10,20 --inflect -1 --out falling` - first blocks most
    - `fastast sweep --data esc50/ --split 1 --model esc50/model --dtype bfloat16 --seconds 120`
    """
    from pathlib import Path

    from rich.console import Console

    from fastast.classify import default_model, pick_device
    from fastast.inference import optimize
    from fastast.model import AST
    from fastast.schedules import parse_r
    from fastast.sweep import read_range
    from fastast.sweep import sweep as run

    rs = read_range(r)
    parse_r(1, (0, inflect))  # a wrong one is said before anything is read
    values = inference_dtype_of(dtype)
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder, not the file {out!r}")
    if 0 not in rs:
        print("fastast: r=0 is swept too: drop and speed-up are against it", file=sys.stderr)
    path = model or str(default_model())
    network = AST.from_pretrained(path).to(pick_device(device))
    # Only int8 has to be in the model before its accuracy is measured.
    if values == "int8":
        optimize(network, values)
    else:
        network.to(values)
    columns = path_column, target_column, split_column
    rate = network.config.sample_rate
    clips = load_clips(data, split, rate, roots, columns, where, subset, progress=not as_json)
    with progress_bar("sweeping") as progress:
        result = run(
            network,
            clips,
            rs,
            inflect,
            seconds=seconds,
            batch_size=batch_size,
            csv_path=folder / "sweep.csv",
            names=(path, data, split),
            progress=progress,
        )
    for name in ("sweep.svg", "sweep.png"):
        result.plot(folder / name)
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
        return
    Console().print(result.table())
    for name in ("sweep.csv", "sweep.svg", "sweep.png"):
        print(f"saved {folder / name}")
