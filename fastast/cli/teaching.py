"""Commands about teachers: `teacher` fits one for a data set, `probe` judges a model's features."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from .options import (
    BatchOption,
    DataOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    PathColumnOption,
    RootsOption,
    SplitColumnOption,
    SubsetOption,
    TargetColumnOption,
    WhereOption,
    tuple_of,
)

if TYPE_CHECKING:
    from fastast.data import AudioDataset

TrainSplitOption = Annotated[
    str, typer.Option(help="split to fit on [train, or all but the test split]")
]
TestSplitOption = Annotated[str, typer.Option(help="split to test on [test, or the first]")]
StrengthOption = Annotated[
    float, typer.Option(help="inverse of the L2 regularisation's strength (scikit-learn's C)")
]


def _both_splits(
    data: str,
    splits: tuple[str, str],
    roots: str,
    columns: tuple[str, str, str],
    where: str,
    subset: str,
    progress: bool,
) -> tuple[AudioDataset, AudioDataset]:
    from fastast.data import AudioDataset, list_clips

    chosen = {name: text for name, text in (("where", where), ("subset", subset)) if text}
    listing = list_clips(data, tuple_of("roots", str, roots), *columns, **chosen)
    train, test = (
        AudioDataset.load(listing, split, progress=progress)
        for split in listing.split_names(*splits)
    )
    return train, test


def teacher(
    data: DataOption,
    out: Annotated[str, typer.Option(help="folder for the network")],
    arch: Annotated[
        str,
        typer.Option(help="mn04 (mn10, ...), passt, efficientnet_b2[_psla], timm:NAME[_psla]"),
    ] = "mn04",
    weights: Annotated[
        str, typer.Option(help="its weights: file, folder, or pretrained for timm's own [random]")
    ] = "",
    train_split: TrainSplitOption = "",
    test_split: TestSplitOption = "",
    subset: SubsetOption = "",
    where: WhereOption = "",
    roots: RootsOption = "",
    path_column: PathColumnOption = "",
    target_column: TargetColumnOption = "",
    split_column: SplitColumnOption = "",
    target_length: Annotated[
        int, typer.Option(min=0, help="frames of 10 ms [0: as it was published]")
    ] = 0,
    copies: Annotated[
        int, typer.Option(min=0, help="also fit on so many copies of each clip, augmented")
    ] = 3,
    recipe: Annotated[
        str, typer.Option(help="recipes of the student, whose augmentation they get")
    ] = "",
    c: StrengthOption = 0.05,
    as_json: JsonOption = False,
    batch_size: BatchOption = 64,
    device: DeviceOption = "auto",
) -> None:
    """Make a teacher for your data: a linear head fitted on the embeddings of a frozen network.

    Takes minutes on a CPU: every clip goes through the network, as it is and augmented as the
    student will hear it. The folder is a teacher for `fastast train --teacher`.

    **Examples**

    - `fastast teacher --weights mn04_as_mAP_432.safetensors --data esc50/ --test-split 1
      --target-length 500 --out teachers/esc50-1` - for the fold that leaves out 1
    - `fastast teacher --arch passt --weights passt.pt --data esc50/ --subset esc10 --out teacher`
    - `fastast teacher --arch timm:resnet18 --weights pretrained --data digits/ --out teacher`
    """
    from fastast import recipes
    from fastast.classify import pick_device
    from fastast.evaluate import evaluate
    from fastast.probe import fit_head
    from fastast.recipe import TrainConfig
    from fastast.teachers import build, front_end_of

    columns = path_column, target_column, split_column
    splits = train_split, test_split
    train, test = _both_splits(data, splits, roots, columns, where, subset, not as_json)
    labels = train.labels
    network = build(arch, len(labels), labels, target_length or None, weights=weights)
    network.to(pick_device(device))
    augment = TrainConfig(**recipes.read(*tuple_of("recipe", str, recipe))).augment()
    fit_head(network, train, batch_size=batch_size, c=c, augment=augment, copies=copies)
    front_end = front_end_of(network)
    shares = {
        f"{name}_accuracy": evaluate(
            network, clips, fbank=front_end, batch_size=batch_size
        ).accuracy
        for name, clips in (("train", train), ("test", test))
    }
    network.save_pretrained(out)
    if as_json:
        clips = {"model": out, "train_clips": len(train), "test_clips": len(test)}
        print(json.dumps({**clips, **shares}, indent=2))
        return
    print(
        f"{arch}, {len(labels)} classes: accuracy {100 * shares['train_accuracy']:.2f} % on "
        f"{len(train)} training clips, {100 * shares['test_accuracy']:.2f} % on {len(test)} test "
        "clips"
    )
    print(f"saved {out}")


def probe(
    data: DataOption,
    model: ModelOption = "",
    train_split: TrainSplitOption = "",
    test_split: TestSplitOption = "",
    subset: SubsetOption = "",
    where: WhereOption = "",
    roots: RootsOption = "",
    path_column: PathColumnOption = "",
    target_column: TargetColumnOption = "",
    split_column: SplitColumnOption = "",
    target_length: Annotated[
        int, typer.Option(min=0, help="frames of 10 ms [0: as it was trained]")
    ] = 0,
    c: StrengthOption = 0.05,
    as_json: JsonOption = False,
    batch_size: BatchOption = 64,
    device: DeviceOption = "auto",
) -> None:
    """Measure how well a linear layer on a model's frozen embeddings tells your classes apart.

    Logistic regression is fitted on the train split and measured on the test split; the model
    itself, trained on the same classes or on others, stays as it is.

    **Examples**

    - `fastast probe --data digits/ --model runs/esc50/model` - do its features carry over?
    - `fastast probe --data esc50/ --test-split 1 --model teachers/esc50-1 --c 0.01`
    """
    from fastast.classify import default_model, pick_device
    from fastast.probe import linear_probe
    from fastast.teachers import load

    model = model or str(default_model())
    network = load(model, target_length or None).to(pick_device(device))
    columns = path_column, target_column, split_column
    splits = train_split, test_split
    train, test = _both_splits(data, splits, roots, columns, where, subset, not as_json)
    share = linear_probe(network, train, test, batch_size, c)
    if as_json:
        result = {"model": model, "train_clips": len(train), "test_clips": len(test)}
        print(json.dumps({**result, "test_accuracy": share}, indent=2))
        return
    print(
        f"{model}: linear probe {100 * share:.2f} % on {len(test)} test clips "
        f"(fitted on {len(train)})"
    )
