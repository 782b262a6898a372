"""What every amount of merging costs and gains on labelled data: the paper's Table 1 for your own.

Two passes: quality at each r over all clips, then speed at every r in interleaved rounds over one
batch of the same clips, so that a slow moment of the machine hits them all.
"""

from __future__ import annotations

import csv
import io
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

import fastast
from fastast.config import ASTConfig
from fastast.data import AudioDataset
from fastast.env import hardware
from fastast.evaluate import evaluate_at, front_end, time_rounds, window
from fastast.features import FrontEnd
from fastast.linear import is_int8
from fastast.model import AST
from fastast.plot import quality_vs_throughput
from fastast.schedules import macs, parse_r, parse_schedule, token_count
from fastast_kernels import effective_r
from fastast_kernels.backends import select

__all__ = ["Conditions", "Sweep", "SweepRow", "read_csv", "read_range", "sweep"]

ROUNDS = 200  # a median needs no more, however fast the machine


def read_range(text: str) -> tuple[int, ...]:
    """Read amounts of merging: ``"0:40:5"`` (its end included), ``"0,5,10"`` or ``"0:20:5,40"``.

    Returns:
        The amounts in ascending order, each once.

    Raises:
        ValueError: The text is none of these, or an amount is negative.
    """
    found: set[int] = set()
    for part in filter(str.strip, text.split(",")):
        numbers = part.split(":")
        try:
            start = int(numbers[0])
            end = int(numbers[1]) if len(numbers) > 1 else start
            step = int(numbers[2]) if len(numbers) > 2 else 1
        except ValueError:
            numbers = []
        if not 1 <= len(numbers) <= 3:
            raise ValueError(
                "r must be a range ('0:40:5', first:last:step), whole numbers with commas between "
                f"them ('0,5,10') or both, not {text!r}"
            )
        if start < 0 or end < 0:
            raise ValueError(f"r must be 0 or more, not {text!r}; an inflection is given apart")
        if end < start:
            raise ValueError(f"r must be a range that ends at or after its start, not {text!r}")
        if step < 1:
            raise ValueError(f"r must be a range with a step of 1 or more, not {text!r}")
        found.update(range(start, end + 1, step))
    if not found:
        raise ValueError(f"r must name at least one amount of merging, not {text!r}")
    return tuple(sorted(found))


# ------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Conditions:
    """What a sweep was run on; the same for all of its rows.

    Attributes:
        model: Name of the model.
        data: Name of the data set.
        split: Its split.
        clips: Clips that the quality was measured on.
        device: Torch's name of the device.
        hardware: The processor or GPU behind it.
        threads: Threads of torch on the CPU.
        dtype: Of the model's weights.
        kernels: Backend of the merging ops.
        batch: Clips a forward while speed was measured; None before.
        rounds: Forwards at each r that the median is over; None before.
        torch: Version.
        fastast: Version.
        date: When the sweep began, ISO 8601 in UTC.
    """

    model: str
    data: str
    split: str
    clips: int
    device: str
    hardware: str
    threads: int
    dtype: str
    kernels: str
    batch: int | None
    rounds: int | None
    torch: str
    fastast: str
    date: str

    def __str__(self) -> str:
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}"
        return (
            f"{self.hardware}{threads if self.device == 'cpu' else ''}, {self.dtype}, "
            f"{self.kernels} kernels, torch {self.torch}, fastast {self.fastast}; speed of "
            f"the model alone: median of {self.rounds} rounds in turns, batch {self.batch}"
        )


@dataclass(frozen=True)
class SweepRow:
    """One amount of merging. None: not measured yet, or not known of this model.

    Attributes:
        r: Tokens merged in each block, on average.
        inflect: Slope of the schedule over the blocks, 0 for the same in each.
        tokens: Tokens left after the last block's merge.
        metric: `"accuracy"`, or `"mAP"` for data with several classes a clip.
        percent: The metric, in percent.
        drop: `percent` less that at r=0, in percentage points: negative where merging costs.
        clips_per_second: Of the model alone, on features that are ready.
        speedup: `clips_per_second` over that at r=0.
        gmacs: Multiply-accumulates of one clip, in 1e9.
        mac_ratio: `gmacs` at r=0 over `gmacs`.
        merge_efficiency: `speedup / mac_ratio`: 1 where the speed follows the arithmetic.
    """

    r: int
    inflect: float
    tokens: int | None
    metric: str
    percent: float
    drop: float
    clips_per_second: float | None
    speedup: float | None
    gmacs: float | None
    mac_ratio: float | None
    merge_efficiency: float | None


def _cell(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else format(value, form) + unit


@dataclass(frozen=True)
class Sweep:
    """Result of `sweep`: its conditions and one row an r, the first of them r=0."""

    conditions: Conditions
    rows: tuple[SweepRow, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values, for JSON."""
        return {
            "conditions": asdict(self.conditions),
            "results": [asdict(row) for row in self.rows],
        }

    @property
    def title(self) -> str:
        """Model, data and schedule in a line."""
        c = self.conditions
        slope = f", inflect {self.rows[0].inflect:g}" if self.rows[0].inflect else ""
        return f"{Path(c.model).name} on {c.clips} clips of {c.data}, split {c.split}{slope}"

    def table(self) -> Table:
        """The rows for a terminal of 80 columns, the conditions below them."""
        table = Table(
            # As texts: names may hold what a string would make markup or an emoji of.
            title=Text(self.title, "table.title"),
            caption=Text(
                f"{self.conditions}. drop in percentage points; merge eff.: speed-up / MAC ratio",
                "table.caption",
            ),
        )
        metric = f"{self.rows[0].metric}\n%"
        left = ("r", "tokens\nleft", metric, "drop", "clips/s", "speed-\nup")
        for name in (*left, "GMACs", "MAC\nratio", "merge\neff."):
            table.add_column(name, justify="right")
        for row in self.rows:
            table.add_row(
                str(row.r),
                _cell(row.tokens, "d"),
                _cell(row.percent, ".2f"),
                _cell(row.drop, "+.2f") if row.drop else "0",
                _cell(row.clips_per_second, ".4g"),
                _cell(row.speedup, ".2f", "x"),
                _cell(row.gmacs, ".3f" if (row.gmacs or 0) < 10 else ".1f"),
                _cell(row.mac_ratio, ".2f", "x"),
                _cell(row.merge_efficiency, ".2f"),
            )
        return table

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw quality against speed, `.png` or `.svg`.

        Raises:
            ValueError: Speed has not been measured, or `path` has another suffix.
        """
        points = [
            (row.r, row.clips_per_second, row.percent)
            for row in self.rows
            if row.clips_per_second is not None
        ]
        if not points:
            raise ValueError("a sweep must have speeds to be drawn: this one was interrupted")
        name = self.conditions.model
        title = f"{self.title}\n{self.conditions}"
        quality_vs_throughput({name: points}, self.rows[0].metric, path, title)

    def save_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one line an r, with the conditions as columns; the file is replaced at once."""
        path = Path(path)
        names = [f.name for f in (*fields(SweepRow), *fields(Conditions))]
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            writer.writerow(asdict(row) | asdict(self.conditions))
        path.parent.mkdir(parents=True, exist_ok=True)
        # A killed sweep leaves the old file or the new one, never half of one.
        part = path.with_name(f"{path.name}.part")
        part.write_text(text.getvalue(), encoding="utf-8", newline="")
        os.replace(part, path)


def _typed(cls: type, cells: dict[str, str]) -> dict[str, Any]:
    """The cells of a csv's line that are fields of a dataclass, as what they were."""
    values: dict[str, Any] = {}
    for f in fields(cls):
        kind, _, optional = str(f.type).partition(" | ")
        text = cells[f.name]
        empty = optional and not text
        values[f.name] = None if empty else {"int": int, "float": float, "str": str}[kind](text)
    return values


def read_csv(path: str | os.PathLike[str]) -> Sweep:
    """The sweep that `Sweep.save_csv` wrote.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a sweep.
    """
    with Path(path).open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    try:
        rows = tuple(SweepRow(**_typed(SweepRow, line)) for line in lines)
        return Sweep(Conditions(**_typed(Conditions, lines[0])), rows)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"csv {os.fspath(path)} is not a sweep: {type(error).__name__} {error}"
        ) from None


# ------------------------------------------------------------------------------------- measuring


def _dimensions(model: Any) -> tuple[ASTConfig, bool] | None:
    """Dimensions of a model and whether its last block is trimmed; None if it does not tell."""
    if isinstance(model, AST):
        return model.config, True
    try:
        c = model.config  # of a Hugging Face AST, which runs its last block on every token
        config = ASTConfig(
            num_classes=c.num_labels,
            embed_dim=c.hidden_size,
            depth=c.num_hidden_layers,
            num_heads=c.num_attention_heads,
            mlp_ratio=c.intermediate_size / c.hidden_size,
            patch_size=c.patch_size,
            frequency_stride=c.frequency_stride,
            time_stride=c.time_stride,
            num_mel_bins=c.num_mel_bins,
            target_length=c.max_length,
        )
    except (AttributeError, TypeError, ValueError):
        return None
    return config, False


def _tokens_left(config: ASTConfig, r: int | tuple[int, float]) -> int:
    n = config.num_tokens
    for count in parse_schedule(config.depth, r):
        n -= effective_r(n, count)
    return n


def _check_classes(labels: Sequence[str], known: Sequence[str]) -> None:
    """Equally many classes can still be other ones, or the same in another order."""
    if len(labels) != len(known) or all(label.isdecimal() for label in labels):
        return  # told apart when the model runs, or classes without names
    places = {name: i for i, name in enumerate(known)}
    common = [(i, places[name]) for i, name in enumerate(labels) if name in places]
    if not common:
        raise ValueError(
            f"data has other classes than the model: {', '.join(labels[:3])}, ... instead of "
            f"{', '.join(known[:3])}, ..."
        )
    for in_data, in_model in common:
        if in_data != in_model:
            raise ValueError(
                f"data and model order their classes differently: {labels[in_data]!r} is class "
                f"{in_data} of the data and class {in_model} of the model"
            )


def _batch_that_fits(batch: int, speeds: Iterable[float], seconds: float) -> int:
    """`batch`, halved until four rounds, one of them not counted, fit into the time."""
    round_of_one = sum(1 / speed for speed in speeds)
    while batch > 1 and 4 * batch * round_of_one > seconds:
        batch //= 2
    return batch


def _one_batch(dataset: AudioDataset, fbank: FrontEnd, batch: int) -> Tensor:
    """Features of the first clips, on the device of the front end."""
    device = next(iter(fbank.buffers())).device
    clips = dataset.batch(range(batch), window(fbank))
    return fbank(clips.waveform.to(device), clips.lengths.to(device))


def _with_speed(rows: Sequence[SweepRow], speeds: Sequence[float]) -> tuple[SweepRow, ...]:
    done = []
    for row, speed in zip(rows, speeds, strict=True):
        speedup = speed / speeds[0]
        efficiency = None if row.mac_ratio is None else speedup / row.mac_ratio
        done.append(
            replace(row, clips_per_second=speed, speedup=speedup, merge_efficiency=efficiency)
        )
    return tuple(done)


def sweep(
    model: nn.Module,
    dataset: AudioDataset,
    rs: Iterable[int],
    inflect: float = 0.0,
    *,
    seconds: float = 30.0,
    batch_size: int = 64,
    fbank: FrontEnd | None = None,
    csv_path: str | os.PathLike[str] | None = None,
    names: tuple[str, str, str] = ("", "", ""),
    progress: Callable[[str, float], None] | None = None,
) -> Sweep:
    """Measure quality, speed and arithmetic of a model at several amounts of merging.

    Args:
        model: An unpatched AST, or with `fbank` any that `fastast.patch` knows and that has
            classes. It is left as it was.
        dataset: The clips; its labels must be the model's classes.
        rs: Tokens merged in each block; 0 is always among them, the others are compared with it.
        inflect: Slope of every schedule, in [-1, 1]: -1 merges most in the first block and
            nothing in the last, as many in all.
        seconds: About how long to measure speed, over all r together.
        batch_size: Clips a forward. Speed is measured with fewer if three rounds take too long;
            `conditions.batch` tells.
        fbank: Front end; by default the one of the model's config.
        csv_path: Written after every r, first without speeds, so that a sweep that is interrupted
            loses nothing.
        names: Of the model, the data and its split, for the conditions.
        progress: Called with what is being measured and the share of it that is done.

    Raises:
        ParityError: Patched with r=0, the model gives other logits than unpatched.
        TypeError: The model is of a kind that `fastast.patch` does not know, or r is not an int.
        ValueError: An argument is out of its range, the model is patched, or the data is empty or
            has other classes than the model.
    """
    parse_r(1, (0, inflect))  # for its errors
    ordered = sorted({0, *(token_count(r, "r") for r in rs)})
    if not seconds > 0:
        raise ValueError(f"seconds must be more than 0, not {seconds}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if getattr(model, "tome", None) is not None:
        raise ValueError("model must be unpatched: call fastast.unpatch(model)")
    if fbank is None:
        if not isinstance(model, AST):
            raise ValueError(f"fbank must be given for a {type(model).__name__}")
        fbank = front_end(model.config)
    _check_classes(dataset.labels, getattr(getattr(model, "config", None), "labels", ()))

    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    conditions = Conditions(
        *names,
        clips=len(dataset),
        device=str(device),
        hardware=hardware(device),
        threads=torch.get_num_threads(),
        dtype="int8" if is_int8(model) else str(dtype).removeprefix("torch."),
        kernels=select("merge", device.type),
        batch=None,
        rounds=None,
        torch=torch.__version__,
        fastast=fastast.__version__,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )

    def save(result: Sweep) -> Sweep:
        if csv_path is not None:
            result.save_csv(csv_path)
        return result

    def tell(what: str, share: float) -> None:
        if progress is not None:
            progress(what, share)

    schedules = [(r, inflect) if inflect else r for r in ordered]
    metric = "mAP" if dataset.multi_label else "accuracy"
    dimensions = _dimensions(model)
    rough: list[float] = []
    result = Sweep(conditions)
    for i, (r, schedule) in enumerate(zip(ordered, schedules, strict=True)):
        tell(f"{metric} at r={r}", i / len(ordered))
        (found,) = evaluate_at(model, dataset, [schedule], fbank, batch_size)
        rough.append(found.clips_per_second)
        quality = found.mean_average_precision if dataset.multi_label else found.accuracy
        percent = 100 * quality
        tokens = gmacs = ratio = None
        if dimensions is not None:
            config, trimmed = dimensions
            tokens = _tokens_left(config, schedule)
            count = macs(config, schedule, trimmed=trimmed)
            gmacs, ratio = count / 1e9, macs(config, trimmed=trimmed) / count
        row = SweepRow(
            r=r,
            inflect=float(inflect),
            tokens=tokens,
            metric=metric,
            percent=percent,
            drop=percent - (result.rows[0].percent if result.rows else percent),
            clips_per_second=None,
            speedup=None,
            gmacs=gmacs,
            mac_ratio=ratio,
            merge_efficiency=None,
        )
        result = save(replace(result, rows=(*result.rows, row)))

    batch = _batch_that_fits(min(batch_size, len(dataset)), rough, seconds)
    features = _one_batch(dataset, fbank.to(device), batch).to(dtype)
    begin = time.perf_counter()
    times = time_rounds(
        model,
        features,
        schedules,
        ROUNDS,
        seconds,
        lambda: tell("speed", min((time.perf_counter() - begin) / seconds, 1.0)),
    )
    speeds = [batch / statistics.median(times[schedule]) for schedule in schedules]
    conditions = replace(conditions, batch=batch, rounds=len(times[schedules[0]]))
    return save(Sweep(conditions, _with_speed(result.rows, speeds)))
