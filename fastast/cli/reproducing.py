"""The command `reproduce`: the paper's tables on your data."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .options import DataOption, DeviceOption, tuple_of


def _guess(data: str) -> str:
    """The data set that a path looks like."""
    name = data.lower().replace("-", "").replace("_", "")
    for word, dataset in (
        ("kws12", "kws12"),
        ("esc10", "esc10"),
        ("esc50", "esc50"),
        ("speechcommands", "speechcommands"),
        ("fsdd", "digits"),
        ("digit", "digits"),
        ("audioset", "audioset"),
    ):
        if word in name:
            return dataset
    from fastast.reproduce import PRESETS

    raise ValueError(
        f"dataset must be given: it cannot be told from {data!r}; one of {', '.join(PRESETS)}"
    )


def reproduce(
    table: Annotated[str, typer.Argument(help="table1 (merging) or table2 (distillation)")],
    data: DataOption,
    dataset: Annotated[
        str, typer.Option(help="esc50, esc10, speechcommands, kws12, digits or audioset [guessed]")
    ] = "",
    subset: Annotated[
        str, typer.Option(help="kws12 of the official Speech Commands [the data set's]")
    ] = "",
    out: Annotated[str, typer.Option(help="folder for models, tables, plots")] = "runs/reproduce",
    r: Annotated[str, typer.Option(help="first:last:step, or amounts with commas")] = "0:40:5",
    train_r: Annotated[
        str,
        typer.Option(help="mixed: one model, r drawn each step; each: one model an r (the paper)"),
    ] = "mixed",
    seeds: Annotated[str, typer.Option(help="one model of each kind a seed, with commas")] = "0",
    folds: Annotated[str, typer.Option(help="test folds, with commas [all]")] = "",
    init: Annotated[str, typer.Option(help="pretrained AST [random weights]")] = "",
    recipe: Annotated[str, typer.Option(help="recipes of the students [the data set's]")] = "",
    cnn: Annotated[
        str, typer.Option(help="CNN teacher: folder, mn04, efficientnet_b2, timm:NAME, none")
    ] = "efficientnet_b2",
    cnn_weights: Annotated[str, typer.Option(help="pretrained weights of it")] = "",
    cnn_fit: Annotated[
        str, typer.Option(help="all: train it; head: only a linear head on its embeddings")
    ] = "all",
    transformer: Annotated[
        str, typer.Option(help="transformer teacher: folder, none, or self: the unmerged student")
    ] = "self",
    size: Annotated[str, typer.Option(help="of the student: tiny, small, base")] = "",
    epochs: Annotated[int, typer.Option(min=0, help="passes over the data [the recipe's]")] = 0,
    batch_size: Annotated[int, typer.Option(min=0, help="clips a step [the recipe's]")] = 0,
    lr: Annotated[float, typer.Option(min=0, help="learning rate [the recipe's]")] = 0.0,
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16 [the recipe's]")] = "",
    lam: Annotated[float, typer.Option(help="weight of the labels in table 2 [0.1]")] = -1.0,
    limit: Annotated[int, typer.Option(min=0, help="only so many clips a split: a trial")] = 0,
    seconds: Annotated[float, typer.Option(min=0, help="about how long to measure speed")] = 60.0,
    device: DeviceOption = "auto",
) -> None:
    """Train, evaluate at every r, and print a table of the FastAST paper with its numbers beside.

    What is there already is not trained again: a command that was killed goes on when it is given
    again, and table2 uses the models of table1. Students start from random weights unless `--init`
    names a pretrained AST, so that their accuracies are not the paper's.

    **Examples**

    - `fastast reproduce table1 --data esc50/ --init ast-audioset/ --train-r each` - as the paper
    - `fastast reproduce table2 --data esc50/ --dataset esc10 --folds 1 --cnn mn04
      --cnn-weights mn04.safetensors --cnn-fit head`
    - `fastast reproduce table1 --data digits/ --dataset digits --epochs 1 --limit 100` - a trial
    """
    from rich.console import Console

    from fastast.reproduce import Plan
    from fastast.reproduce import reproduce as run
    from fastast.reproduce.results import rich_tables
    from fastast.sweep import read_range

    if table not in ("table1", "table2"):
        raise ValueError(f"table must be table1 or table2, not {table!r}")
    given = {
        "size": size,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "precision": precision,
        "limit": limit,
    }
    options: dict[str, Any] = {name: value for name, value in given.items() if value}
    if lam >= 0:
        options["lam"] = lam
    if device != "auto":
        options["device"] = device
    plan = Plan(
        table=int(table[-1]),
        data=data,
        dataset=dataset or _guess(data),
        out=out,
        rs=read_range(r),
        train_r=train_r,
        seeds=tuple_of("seeds", int, seeds),
        folds=tuple_of("folds", str, folds),
        init=init,
        recipe=recipe,
        cnn=cnn,
        cnn_weights=cnn_weights,
        cnn_fit=cnn_fit,
        transformer=transformer,
        subset=subset,
        options=tuple(options.items()),
    )
    console = Console()
    outcome = run(plan, lambda line: console.print(line, highlight=False, soft_wrap=True), seconds)
    console.print(f"Table {plan.table} on {plan.preset.title}")
    for each in rich_tables(plan, outcome.results, outcome.speeds):
        console.print(each)
    for file in outcome.files:
        print(f"saved {file}")
