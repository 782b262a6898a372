"""Commands on the machine at hand: `bench`, `tune`, `demo` and `env`."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .options import DeviceOption, JsonOption, dtype_of, progress_bar, tuple_of

if TYPE_CHECKING:
    from rich.table import Table

    from fastast_kernels.triton_kernels.tune import Outcome


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

    from fastast.benchmark import machine, plots
    from fastast.benchmark import run as benchmark
    from fastast.classify import pick_device
    from fastast.demo import fastest_dtype
    from fastast.sweep import read_range

    where = pick_device(device)
    plan = benchmark.Plan(
        model,
        tuple_of("clips", int, clips),
        tuple_of("batch", int, batch),
        read_range(r),
        dtype_of(dtype, auto=lambda: fastest_dtype(where)),
        threads or torch.get_num_threads(),
        where,
        seconds,
        ops,
    )
    busy = machine.others_busy()
    if busy > machine.BUSY_CORES:
        print(f"fastast: other processes use {busy:.1f} cores: expect noise", file=sys.stderr)
    with progress_bar("measuring") as progress:
        rows = benchmark.run(plan, progress)
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


def tune(
    out: Annotated[str, typer.Option(help="file to write")] = "launch_parameters.json",
    ops: Annotated[str, typer.Option(help="ops of the table, with commas [all worth it]")] = "",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32")] = "bfloat16",
    quick: Annotated[
        bool, typer.Option("--quick", help="fewer candidates, and only the longest clips")
    ] = False,
    install: Annotated[
        bool, typer.Option("--install", help="write over the table of this editable checkout")
    ] = False,
) -> None:
    """Measure the Triton kernels' launch parameters on this GPU, and write a table of the fastest.

    No kernel tunes itself. An entry of the table stays unless another is faster by more than 2 %,
    twice; what spills registers, or computes something else, is refused. Takes ten minutes or
    more, with `--quick` a few; leave the machine alone meanwhile. The table is written after every
    entry, so that a run that is interrupted loses nothing.

    `FASTAST_LAUNCH_PARAMETERS=launch_parameters.json` in the environment makes the kernels use it.
    With that set, `tune` starts from it: tune one dtype after the other, or one op again.

    **Examples**

    - `fastast tune` - everything that bfloat16 tokens take
    - `fastast tune --ops attention,best_partner --quick`
    - `FASTAST_LAUNCH_PARAMETERS=launch_parameters.json fastast tune --dtype float32`
    """
    from pathlib import Path

    from rich.console import Console

    from fastast_kernels import BackendError

    try:
        from fastast_kernels.triton_kernels import parameters
        from fastast_kernels.triton_kernels import tune as tuning
    except ImportError as error:
        raise BackendError(f"tune measures Triton's kernels: {error}") from None

    path = Path(out)
    if install:
        path = parameters.SHIPPED
        if not (path.parents[2] / "pyproject.toml").exists():
            raise ValueError(f"install must be into an editable checkout, which {path} is not in")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"out must be a file in a folder that exists, not {out!r}")
    names = tuple_of("ops", str, ops) or tuple(tuning.TUNABLE)
    values = dtype_of(dtype)
    bench = tuning.gpu()
    outcomes = []
    with progress_bar("tuning") as progress:
        for outcome in tuning.tune(bench, names, values, quick, progress):
            outcomes.append(outcome)
            parameters.write(path, tuning.tuned_table(bench.architecture, outcomes))
    Console().print(_tuning_table(outcomes))
    print(f"saved {path}")
    if not install:
        print(f"use it: export FASTAST_LAUNCH_PARAMETERS={path.resolve()}")


def _tuning_table(outcomes: list[Outcome]) -> Table:
    from rich.table import Table

    table = Table("op", "for", "was, ms", "is, ms", "speed-up", "change", "candidates", "refused")
    for o in outcomes:
        limits = (f"{name} <= {o.before[name]}" for name in ("bits", "dim") if name in o.before)
        changes = (f"{k}: {v} -> {o.after[k]}" for k, v in o.before.items() if v != o.after[k])
        table.add_row(
            o.op,
            ", ".join(limits) or "all",
            f"{o.before_ms:.4f}",
            f"{o.after_ms:.4f}",
            f"{o.speedup:.2f}x",
            ", ".join(changes) or "none",
            str(o.tried),
            ", ".join(f"{count} {reason}" for reason, count in o.refused.items()) or "none",
        )
    return table


def demo(
    out: Annotated[str, typer.Option(help="folder for the pictures")] = "demo_output",
    seconds: Annotated[float, typer.Option(min=1, help="time for measuring AST-base")] = 60.0,
) -> None:
    """Classify the shipped clips at several r, measure what merging gains, and draw it."""
    from fastast.demo import demo as run

    run(out, seconds)


def env(as_json: JsonOption = False) -> None:
    """Show versions, processor, GPUs, and which kernels run here and why not the others."""
    from fastast.env import environment, format_environment

    report = environment()
    print(json.dumps(report, indent=2, default=str) if as_json else format_environment(report))
