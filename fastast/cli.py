"""The `fastast` command: thin layers over the functions of the same names.

Commands import what they need when they run, so that `--help` is quick.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn, get_args, get_origin, get_type_hints

import typer

from fastast.recipe import TrainConfig

app = typer.Typer(
    name="fastast",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Audio Spectrogram Transformers made fast by merging similar tokens.

**Examples**

- `fastast classify clip.wav` - what is it?
- `fastast classify recordings/ --r 10 --json` - a folder, faster, for a program
- `fastast train --data digits/ --r-choices 0,5,10 --out runs/digits` - a model of your own
- `fastast evaluate --data digits/ --model runs/digits/model --r 0,5,10` - what does merging cost?
- `fastast sweep --data digits/ --model runs/digits/model --r 0:40:5` - and what does it gain?
- `fastast bench` - what does merging gain on this machine, and where does it not pay?
- `fastast visualize clip.wav --r 10 --out groups.png` - what was merged with what?
""",
)


def _fail(message: str, status: int) -> NoReturn:
    print(f"fastast: {message}", file=sys.stderr)
    raise SystemExit(status)


def main(argv: list[str] | None = None) -> None:
    """Run the command line; errors of ours are one line on stderr, not a traceback.

    Exit status: 0, 1 where an input could not be used, 2 where an option could not.
    `FASTAST_DEBUG=1` in the environment shows tracebacks.
    """
    from fastast.audio import AudioError
    from fastast.formats import CheckpointError
    from fastast_kernels import BackendError

    if argv is None and sys.argv[1:2] == ["bench"] and not {"-h", "--help"} & set(sys.argv):
        from fastast.benchmark.timing import in_measuring_environment

        in_measuring_environment()
    try:
        app(argv)
    except (AudioError, CheckpointError, BackendError, OSError) as error:
        if os.environ.get("FASTAST_DEBUG") == "1":
            raise
        _fail(str(error), 1)
    except (ValueError, TypeError, ImportError) as error:
        if os.environ.get("FASTAST_DEBUG") == "1":
            raise
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _tuple_of(name: str, element: type, text: str) -> tuple[Any, ...]:
    """Values written with commas between them."""
    try:
        return tuple(element(part) for part in text.split(",") if part.strip())
    except ValueError:
        kind = {"int": "whole numbers", "float": "numbers"}.get(element.__name__, "values")
        raise ValueError(f"{name} must be {kind} with commas between them, not {text!r}") from None


def _options_of(config: type) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """Give a command one option for each field of a dataclass; tuples are written with commas."""
    hints = get_type_hints(config)

    def decorate(command: Callable[[Any], None]) -> Callable[..., None]:
        parameters = []
        for field in dataclasses.fields(config):
            kind, default = hints[field.name], field.default
            if get_origin(kind) is tuple:
                kind, default = str, ",".join(map(str, getattr(config, field.name)))
            text = field.metadata["help"]
            option = typer.Option(help=text, show_default=default not in ("", None))
            parameters.append(
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=default,
                    annotation=Annotated[kind, option],
                )
            )

        def run(**options: Any) -> None:
            for name, value in options.items():
                if get_origin(hints[name]) is tuple:
                    options[name] = _tuple_of(name, get_args(hints[name])[0], value)
            command(config(**options))

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


ModelOption = Annotated[
    str, typer.Option(help="folder, checkpoint or Hugging Face id [the shipped digits model]")
]
ROption = Annotated[
    str, typer.Option(help="tokens merged in each block: 20, '20,-1' or one number a block")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
BatchOption = Annotated[int, typer.Option(min=1, help="clips or windows a forward")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON for a program")]
DataOption = Annotated[str, typer.Option(help="csv, folder with a csv, or folder of class folders")]
SplitOption = Annotated[str, typer.Option(help="split or fold; '!1' is all but fold 1")]
RootsOption = Annotated[str, typer.Option(help="folders and zips with the audio, with commas")]
PathColumnOption = Annotated[str, typer.Option(help="csv column with the file name")]
TargetColumnOption = Annotated[str, typer.Option(help="csv column with the class")]
SplitColumnOption = Annotated[str, typer.Option(help="csv column with the split or fold")]


@app.command()
def classify(
    files: Annotated[list[str], typer.Argument(help="audio files and folders of them")],
    model: ModelOption = "",
    r: ROption = "10",
    top_k: Annotated[int, typer.Option(min=1, help="classes to show")] = 3,
    as_json: JsonOption = False,
    batch_size: BatchOption = 16,
    device: DeviceOption = "auto",
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


def _evaluation_table(title: str, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("r", "accuracy", "mAP", "clips/s", title=title)
    for row in rows:
        table.add_row(
            str(row["r"]),
            f"{100 * row['accuracy']:.2f} %",
            f"{row['mean_average_precision']:.4f}",
            f"{row['clips_per_second']:.0f}",
        )
    Console().print(table)


@app.command()
@_options_of(TrainConfig)
def train(config: TrainConfig) -> None:
    """Train an AST on your own audio, with merging on if you like.

    A run that was killed goes on when the same command is given again.

    **Examples**

    - `fastast train --data digits/ --out runs/digits` - a csv with its audio beside it, or one
      folder a class
    - `fastast train --data digits/ --r-choices 0,5,10,15` - one model that is good at many r
    - `fastast train --data esc50/ --test-split 1 --init base/ --lr 1e-5` - fine-tune on a fold
    - `fastast train --data speech/ --optimizer adam --betas 0.95,0.999 --weight-decay 5e-7
      --schedule step --lr 2.5e-4 --loss bce` - the recipe of the AST paper
    """
    from rich.console import Console

    from fastast.train import train as run

    console = Console()
    metrics = run(config, report=lambda line: console.print(line, highlight=False))
    _evaluation_table(f"{config.out}/model", metrics["model"])


@app.command()
def evaluate(
    data: DataOption,
    model: ModelOption = "",
    r: Annotated[str, typer.Option(help="amounts of merging, with commas")] = "0,5,10,15,20",
    split: SplitOption = "test",
    roots: RootsOption = "",
    path_column: PathColumnOption = "",
    target_column: TargetColumnOption = "",
    split_column: SplitColumnOption = "",
    per_class: Annotated[bool, typer.Option(help="also show every class")] = False,
    as_json: JsonOption = False,
    batch_size: BatchOption = 64,
    device: DeviceOption = "auto",
) -> None:
    """Measure accuracy, mean average precision and throughput at several amounts of merging.

    **Example:** `fastast evaluate --data digits/ --model runs/digits/model --r 0,5,10 --per-class`
    """
    from rich.console import Console
    from rich.table import Table

    from fastast.classify import default_model, pick_device
    from fastast.data import AudioDataset, list_clips
    from fastast.evaluate import evaluate_at
    from fastast.model import AST

    rs = _tuple_of("r", int, r)
    if not rs:
        raise ValueError("r must name at least one amount of merging")
    path = model or str(default_model())
    network = AST.from_pretrained(path).to(pick_device(device))
    listing = list_clips(
        data, _tuple_of("roots", str, roots), path_column, target_column, split_column
    )
    clips = AudioDataset.load(listing, split, network.config.sample_rate, progress=not as_json)
    results = evaluate_at(network, clips, rs, batch_size=batch_size)
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


@app.command()
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
    as_json: JsonOption = False,
    batch_size: BatchOption = 64,
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
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

    import torch
    from rich.console import Console
    from rich.progress import Progress

    from fastast.classify import default_model, pick_device
    from fastast.data import AudioDataset, list_clips
    from fastast.model import AST
    from fastast.schedules import parse_r
    from fastast.sweep import read_range
    from fastast.sweep import sweep as run

    rs = read_range(r)
    parse_r(1, (0, inflect))  # a wrong one is said before anything is read
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise ValueError(f"dtype must be one of {', '.join(dtypes)}, not {dtype!r}")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder, not the file {out!r}")
    if 0 not in rs:
        print("fastast: r=0 is swept too: drop and speed-up are against it", file=sys.stderr)
    path = model or str(default_model())
    network = AST.from_pretrained(path, dtype=dtypes[dtype]).to(pick_device(device))
    listing = list_clips(
        data, _tuple_of("roots", str, roots), path_column, target_column, split_column
    )
    clips = AudioDataset.load(listing, split, network.config.sample_rate, progress=not as_json)
    console = Console(stderr=True)
    # No thread of its own, which would draw while the clock runs.
    hidden = not console.is_terminal
    with Progress(console=console, auto_refresh=False, transient=True, disable=hidden) as bar:
        task = bar.add_task("sweeping", total=1.0)
        result = run(
            network,
            clips,
            rs,
            inflect,
            seconds=seconds,
            batch_size=batch_size,
            csv_path=folder / "sweep.csv",
            names=(path, data, split),
            progress=lambda what, share: bar.update(
                task, description=what, completed=share, refresh=True
            ),
        )
    for name in ("sweep.svg", "sweep.png"):
        result.plot(folder / name)
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
        return
    Console().print(result.table())
    for name in ("sweep.csv", "sweep.svg", "sweep.png"):
        print(f"saved {folder / name}")


@app.command()
def bench(
    model: Annotated[str, typer.Option(help="tiny, small or base, with random weights")] = "base",
    clips: Annotated[str, typer.Option(help="seconds of the clips: 10, 5, 1")] = "10,5,1",
    batch: Annotated[str, typer.Option(help="clips a forward")] = "1,8",
    r: Annotated[
        str, typer.Option(help="first:last:step, or amounts with commas; r=0 is always measured")
    ] = "10,20,40",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, or auto: bfloat16 where it is fast")
    ] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 means all")] = 0,
    device: DeviceOption = "auto",
    seconds: Annotated[float, typer.Option(min=1, help="about how long to time each case")] = 6.0,
    ops: Annotated[bool, typer.Option(help="also time the ops by themselves")] = True,
    as_json: JsonOption = False,
    plot: Annotated[str, typer.Option(help="folder for pictures")] = "",
) -> None:
    """Measure what merging gains on this machine, and where it does not pay.

    Every result is held against fp64 first: no speed is reported for a wrong one. Then all
    variants run in turns and the medians count, with the 95 % interval of each ratio. Takes a few
    minutes on a CPU; leave the machine alone meanwhile.

    **Examples**

    - `fastast bench` - the ops, and AST-base on clips of 10, 5 and 1 seconds
    - `fastast bench --model tiny --clips 1 --r 0:20:5 --no-ops` - in seconds
    - `fastast bench --dtype float32 --threads 1 --plot pictures/`
    - `fastast bench --json > bench.json`
    """
    from pathlib import Path

    import torch
    from rich.console import Console
    from rich.progress import Progress

    from fastast.benchmark import machine, plots
    from fastast.benchmark import run as benchmark
    from fastast.classify import pick_device
    from fastast.demo import fastest_dtype
    from fastast.sweep import read_range

    where = pick_device(device)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype != "auto" and dtype not in dtypes:
        raise ValueError(f"dtype must be auto, {', '.join(dtypes)}, not {dtype!r}")
    plan = benchmark.Plan(
        model,
        _tuple_of("clips", int, clips),
        _tuple_of("batch", int, batch),
        read_range(r),
        fastest_dtype(where) if dtype == "auto" else dtypes[dtype],
        threads or torch.get_num_threads(),
        where,
        seconds,
        ops,
    )
    busy = machine.others_busy()
    if busy > machine.BUSY_CORES:
        print(f"fastast: other processes use {busy:.1f} cores: expect noise", file=sys.stderr)
    console = Console(stderr=True)
    # No thread of its own, which would draw while the clock runs.
    hidden = not console.is_terminal
    with Progress(console=console, auto_refresh=False, transient=True, disable=hidden) as bar:
        task = bar.add_task("measuring", total=1.0)
        rows = benchmark.run(
            plan,
            lambda what, share: bar.update(task, description=what, completed=share, refresh=True),
        )
    if as_json:
        print(json.dumps(benchmark.summary(rows), indent=2))
    else:
        out = Console()
        count = f"{plan.threads} thread{'s' * (plan.threads > 1)}"
        out.print(f"{rows[0].device}, {count}, {rows[0].versions}", highlight=False)
        if ops:
            out.print(benchmark.op_table(rows))
        out.print(benchmark.model_table(rows))
        for line in benchmark.break_even(rows):
            out.print(line, highlight=False)
    if plot:
        title = f"{rows[0].device}, {rows[0].date}"
        saved = plots.speedup_against_r(rows, Path(plot) / "speedup", title)
        saved += plots.break_even(rows, Path(plot) / "break_even", title)
        for file in saved:
            print(f"saved {file}", file=sys.stderr)


@app.command()
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


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="folder for the pictures")] = "demo_output",
    seconds: Annotated[float, typer.Option(min=1, help="time for measuring AST-base")] = 60.0,
) -> None:
    """Classify the shipped clips at several r, measure what merging gains, and draw it."""
    from fastast.demo import demo as run

    run(out, seconds)


@app.command()
def env(as_json: JsonOption = False) -> None:
    """Show versions, processor, GPUs, and which kernels run here and why not the others."""
    from fastast.env import environment, format_environment

    report = environment()
    print(json.dumps(report, indent=2, default=str) if as_json else format_environment(report))
