"""Commands on audio files: `classify` and `visualize`."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from .options import (
    BatchOption,
    DeviceOption,
    InferenceDtypeOption,
    JsonOption,
    ModelOption,
    ROption,
    inference_dtype_of,
)


def classify(
    files: Annotated[list[str], typer.Argument(help="audio files and folders of them")],
    model: ModelOption = "",
    r: ROption = "10",
    top_k: Annotated[int, typer.Option(min=1, help="classes to show")] = 3,
    as_json: JsonOption = False,
    batch_size: BatchOption = 16,
    device: DeviceOption = "auto",
    dtype: InferenceDtypeOption = "float32",
    multi_label: Annotated[
        bool, typer.Option(help="a probability for each class, as for AudioSet models")
    ] = False,
) -> None:
    """Say what is in audio files: any sample rate, mono or not, long ones in windows.

    A file that cannot be used is one line on stderr, the others are done, and the status is 1.

    **Examples**

    - `fastast classify clip.wav`
    - `fastast classify recordings/ --r 0` - without merging
    - `fastast classify *.flac --model MIT/ast-finetuned-audioset-10-10-0.4593 --multi-label --r 40`
    """
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from fastast.audio import AudioError, find_audio
    from fastast.classify import Classifier, default_model
    from fastast.evaluate import read_r

    paths = find_audio(files)
    classifier = Classifier.from_pretrained(
        model or default_model(),
        device=device,
        r=read_r(r),
        top_k=top_k,
        batch_size=batch_size,
        multi_label=multi_label,
        dtype=inference_dtype_of(dtype),
    )
    errors: list[str] = []

    def report(error: AudioError) -> None:
        errors.append(str(error))
        print(f"fastast: {error}", file=sys.stderr)

    bar = track(
        paths,
        description="classifying",
        console=Console(stderr=True),
        transient=True,
        disable=len(paths) < 10,
    )
    results = list(classifier(bar, on_error=report))
    if as_json:
        print(json.dumps({"results": [s.to_dict() for s in results], "errors": errors}, indent=2))
    elif results:
        table = Table("file", "seconds", "class", "probability")
        for scores in results:
            for rank, best in enumerate(scores.predictions):
                first = (scores.file, f"{scores.seconds:.2f}") if rank == 0 else ("", "")
                table.add_row(*first, best.label, f"{100 * best.probability:.1f} %")
        Console().print(table)
    if errors:
        raise typer.Exit(1)


def visualize(
    file: Annotated[str, typer.Argument(help="audio file")],
    out: Annotated[str, typer.Option(help="picture to write, .png or .svg")] = "merged_tokens.png",
    model: ModelOption = "",
    r: ROption = "10",
    start: Annotated[float, typer.Option(min=0, help="second of the file to begin at")] = 0.0,
    device: DeviceOption = "auto",
) -> None:
    """Draw which parts of a spectrogram a model merges into one token.

    **Example:** `fastast visualize clip.wav --r 10 --out groups.svg`
    """
    from fastast.classify import default_model, pick_device
    from fastast.evaluate import read_r
    from fastast.model import AST
    from fastast.plot import visualize as draw

    network = AST.from_pretrained(model or default_model()).to(pick_device(device))
    left = draw(network, file, out, read_r(r), start)
    print(f"{out}: {network.config.num_tokens} tokens became {left}")
