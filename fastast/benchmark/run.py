"""``fastast bench``: a subset of the benchmark suite for a user's own machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from fastast.benchmark import machine
from fastast.benchmark.case import Case, Config, measure
from fastast.benchmark.kernels import CASES, FRAMES
from fastast.benchmark.models import sweep
from fastast.benchmark.plots import short, sweeps, verdict
from fastast.benchmark.rows import Row, ceiling_rows, rows_of
from fastast.benchmark.timing import NOISY
from fastast.config import ASTConfig
from fastast_kernels import effective_r

# Ops that a user hears of, the merging step and the passes it rides on, and their names in a table.
OPS = {
    "tome_step": "ToMe step",
    "merge_add_layer_norm": "add+merge+norm",
    "attention": "attention",
}

# A batch longer than this, in seconds of audio, takes minutes on a CPU.
LONGEST_BATCH = {"cpu": 40, "cuda": 10_000}

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        model: tiny, small or base.
        clips: seconds of the clips: 10, 5 or 1.
        batches: clips a forward.
        rs: tokens merged in each block; r=0 is always measured.
        dtype: of the model.
        threads: CPU threads.
        device: where.
        seconds: about how long to time each case; its check comes on top.
        ops: also time single ops.
    """

    model: str
    clips: tuple[int, ...]
    batches: tuple[int, ...]
    rs: tuple[int, ...]
    dtype: torch.dtype
    threads: int
    device: torch.device
    seconds: float = 6.0
    ops: bool = True

    def __post_init__(self) -> None:
        if self.model not in ("tiny", "small", "base"):
            raise ValueError(f"model must be tiny, small or base, not {self.model!r}")
        for clip in self.clips:
            if clip not in FRAMES:
                known = ", ".join(map(str, FRAMES))
                raise ValueError(f"clips must be among {known} seconds, not {clip}")
        if not self.clips or not self.batches:
            raise ValueError("clips and batch must each name at least one value")
        if min(self.batches) < 1:
            raise ValueError(f"batch must be 1 or more, not {min(self.batches)}")
        if self.threads < 1:
            raise ValueError(f"threads must be 1 or more, not {self.threads}")

    def cases(self) -> Iterator[tuple[str, Callable[[], Case]]]:
        """Name and builder of every case, in the order they run."""
        name = str(self.dtype).removeprefix("torch.")
        if self.ops:
            for op in OPS:
                n = ASTConfig.base(target_length=FRAMES[max(self.clips)]).num_tokens
                r = max((effective_r(n, r) for r in self.rs), default=0)
                config: Config = {"B": 1, "N": n}
                if op != "attention":
                    config |= {"D": 768, "C": 64, "r": r or 10}
                config |= {"dtype": name, "threads": self.threads}

                def build(op: str = op, config: Config = config) -> Case:
                    return CASES[op](config, self.device, False, "forward")

                yield OPS[op], build
        for clip in self.clips:
            for batch in self.batches:
                if clip * batch > LONGEST_BATCH[self.device.type]:
                    continue

                def build_model(clip: int = clip, batch: int = batch) -> Case:
                    return sweep(
                        self.model, clip, batch, self.dtype, self.threads, self.device, self.rs,
                        budget=self.seconds,
                    )  # fmt: skip

                yield f"AST-{self.model}, {clip} s, batch {batch}", build_model


def run(plan: Plan, progress: Progress | None = None) -> list[Row]:
    """Check and time everything in a plan.

    Args:
        plan: what to measure.
        progress: told what comes next and the share of cases done.

    Returns:
        Rows as the suite writes them, those of the machine's ceilings first.

    Raises:
        GateError: a result is not within its tolerance of the fp64 truth.
    """
    tell = progress or (lambda what, share: None)
    before = torch.get_num_threads()
    torch.set_num_threads(plan.threads)
    try:
        context = machine.context(plan.device)
        tell("copy and matrix product", 0.0)
        ceilings = machine.ceilings(plan.device, plan.threads)
        rows = ceiling_rows(ceilings, plan.threads, context)
        cases = list(plan.cases())
        for i, (name, build) in enumerate(cases):
            tell(name, i / len(cases))
            case = build()
            rows += rows_of(case, measure(case), context, ceilings)
        tell("done", 1.0)
        return rows
    finally:
        torch.set_num_threads(before)


def _of(rows: Sequence[Row], like: Row, metric: str) -> Row | None:
    """The row of another metric of the same entry."""

    def config(row: Row) -> Config:
        return {k: v for k, v in row.settings.items() if k != "against"}

    wanted = like.kernel, like.provider, like.mode, config(like)
    for row in rows:
        if row.metric == metric and (row.kernel, row.provider, row.mode, config(row)) == wanted:
            return row
    return None


def _ratio(row: Row | None) -> str:
    return "" if row is None else f"{row.value:.2f}x [{row.low:.2f}, {row.high:.2f}]"


def is_noisy(row: Row) -> bool:
    """Whether the quartiles of a time lie too far apart to trust its second digit."""
    return row.metric == "ms" and (row.high - row.low) / row.value > NOISY


def _ms(row: Row) -> str:
    return f"{'~' if is_noisy(row) else ''}{row.value:.4g}"


def op_table(rows: Sequence[Row]) -> Table:
    """Times of single ops, each against the unfused one and against what the machine allows."""
    dtype = next((short(row.settings["dtype"]) for row in rows if row.kernel in OPS), "")
    table = Table(
        title=f"Ops, one clip, {dtype}",
        caption="speed-up over the unfused op; share: of copy or matrix-product speed; ~: noisy",
    )
    for column in ("op", "by", "ms", "speed-up [95 %]", "error", "share"):
        left = column in ("op", "by")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        if row.metric != "ms" or row.kernel == "ast":
            continue
        error, share = (_of(rows, row, metric) for metric in ("error", "share"))
        name = OPS.get(row.kernel, row.kernel)
        if row.settings.get("r") == 0:
            name = "  at r=0"
        table.add_row(
            name,
            row.provider,
            _ms(row),
            _ratio(_of(rows, row, "speedup")),
            f"{error.value:.1e}" if error else "",
            f"{share.value:.0%}" if share else "",
        )
    return table


def model_table(rows: Sequence[Row]) -> Table:
    """Speed of the models at every r."""
    table = Table(
        title="Models, features to logits, random weights",
        caption="eff.: speed-up over the ratio of multiply-adds; ~: noisy",
    )
    for column in ("clip", "batch", "r", "ms", "clips/s", "speed-up [95 %]", "MACs", "eff."):
        table.add_column(column, justify="right", no_wrap=True)
    for line in sweeps(rows, "ms").values():
        for row in line:
            c = row.settings
            macs, efficiency = _of(rows, row, "mac_ratio"), _of(rows, row, "efficiency")
            table.add_row(
                f"{c['seconds']} s",
                str(c["B"]),
                str(c["r"]),
                _ms(row),
                f"{float(c['B']) / row.value * 1e3:.4g}",
                _ratio(_of(rows, row, "speedup")) or "1.00x",
                f"{macs.value:.2f}x" if macs else "1.00x",
                f"{efficiency.value:.2f}" if efficiency else "",
            )
        table.add_section()
    return table


def break_even(rows: Iterable[Row]) -> list[str]:
    """Where merging does not pay on this machine, a line a clip length and batch."""
    lines = []
    for key, line in sweeps(rows, "speedup").items():
        model, seconds, batch, *_ = key
        n = ASTConfig.base(target_length=FRAMES[int(seconds)]).num_tokens
        what = f"AST-{model}, {seconds}-second clips (N={n}), batch {batch}"
        slower = [int(row.x) for row in line if verdict(row) == "no"]
        same = [int(row.x) for row in line if verdict(row) == "same"]
        if not slower and not same:
            lines.append(f"{what}: pays at every r measured, from r={int(line[0].x)}")
            continue
        parts = []
        if slower:
            parts.append(f"slower at r={', '.join(map(str, slower))}")
        if same:
            parts.append(f"no difference that shows at r={', '.join(map(str, same))}")
        pays = [int(row.x) for row in line if verdict(row) == "yes"]
        parts.append(f"pays from r={min(pays)}" if pays else "does not pay at any r measured")
        lines.append(f"{what}: {'; '.join(parts)}")
    return lines


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Everything measured as plain values, for JSON."""
    from dataclasses import asdict

    return {
        "rows": [{**asdict(row), "config": row.settings} for row in rows],
        "break_even": break_even(rows),
    }
