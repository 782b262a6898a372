"""Pictures: merged tokens, throughput, confusions of classes, and how a training went."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from fastast.model import AST
    from fastast.schedules import Schedule

__all__ = [
    "confusion_matrix",
    "group_colours",
    "merge_groups",
    "quality_vs_throughput",
    "throughput_vs_r",
    "training_curve",
    "visualize",
]

SUFFIXES = (".png", ".svg")
CLASSES_WITH_NUMBERS = 15  # a picture of more has too little room in its cells
LONGEST_LABEL = 28  # in characters


@contextmanager
def figure_at(
    path: str | os.PathLike[str], width: float, height: float, rows: int = 1, columns: int = 1
) -> Iterator[Any]:
    """An empty plot (an array of them for several), saved to `path` when the block ends."""
    # Not pyplot: it holds global state and may look for a display.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"path must end in {' or '.join(SUFFIXES)}, not {path.name!r}")
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    yield figure.subplots(rows, columns, sharex=rows > 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same picture is the same file: no date, and ids that do not depend on the process.
    dated: dict[str, Any] = {"metadata": {"Date": None}} if path.suffix.lower() == ".svg" else {}
    with rc_context({"svg.hashsalt": "fastast"}):
        figure.savefig(path, **dated)


def training_curve(history: Sequence[Mapping[str, float]], path: str | os.PathLike[str]) -> None:
    """Loss and test accuracy over the epochs.

    Args:
        history: One mapping an epoch, with `epoch`, `loss` and `accuracy_r...`.
        path: Where to save, `.png` or `.svg`.
    """
    with figure_at(path, 7, 4) as axes:
        epochs = [row["epoch"] for row in history]
        axes.plot(epochs, [row["loss"] for row in history], color="0.6", label="loss")
        axes.set_xlabel("epoch")
        axes.set_ylabel("training loss")
        right = axes.twinx()
        for name in dict.fromkeys(name for row in history for name in row):
            if name.startswith("accuracy_r"):
                values = [100 * row.get(name, float("nan")) for row in history]
                right.plot(epochs, values, label=f"r = {name.removeprefix('accuracy_r')}")
        right.set_ylabel("test accuracy (%)")
        right.legend(loc="center right")


def throughput_vs_r(
    curves: Mapping[str, Mapping[int, float]],
    path: str | os.PathLike[str],
    title: str = "",
) -> None:
    """Throughput against the amount of merging, one line a model, relative to no merging.

    Args:
        curves: For each model, clips per second at each r; r=0 must be there. The legend tells it.
        path: Where to save, `.png` or `.svg`.
        title: Conditions of the measurement: hardware, dtype, batch.

    Raises:
        ValueError: A curve lacks r=0, or `path` has another suffix.
    """
    for name, curve in curves.items():
        if 0 not in curve:
            raise ValueError(f"curves[{name!r}] must have r=0, it has r={sorted(curve)}")
    with figure_at(path, 7, 4) as axes:
        for name, curve in curves.items():
            rs = sorted(curve)
            label = f"{name} ({curve[0]:.3g} clips/s at r = 0)"
            axes.plot(rs, [curve[r] / curve[0] for r in rs], marker="o", label=label)
        axes.axhline(1, color="0.7", linewidth=0.8)
        axes.set_xlabel("r: tokens merged in each block")
        axes.set_ylabel("throughput, r = 0 is 1")
        axes.set_ylim(bottom=0)
        axes.set_title(title, fontsize="small")
        axes.legend(loc="best")


def quality_vs_r(
    curves: Mapping[str, Sequence[tuple[int, float, float | None]]],
    metric: str,
    path: str | os.PathLike[str],
    title: str = "",
) -> None:
    """What merging costs: one line a model, a band of one standard deviation where there is one.

    Args:
        curves: For each name, `(r, percent, deviation or None)` in ascending order of r.
        metric: What the percentage is: `"accuracy"` or `"mAP"`.
        path: Where to save, `.png` or `.svg`.
        title: Data and number of models.

    Raises:
        ValueError: A curve has no points, or `path` has another suffix.
    """
    for name, points in curves.items():
        if not points:
            raise ValueError(f"curves[{name!r}] must have at least one point")
    with figure_at(path, 7, 4) as axes:
        for name, points in curves.items():
            rs, percents, spreads = zip(*points, strict=True)
            (line,) = axes.plot(rs, percents, marker="o", label=name)
            if all(spread is not None for spread in spreads):
                low = [p - s for p, s in zip(percents, spreads, strict=True)]
                high = [p + s for p, s in zip(percents, spreads, strict=True)]
                axes.fill_between(rs, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set_xlabel("r: tokens merged in each block")
        axes.set_ylabel(f"{metric} (%)")
        axes.grid(color="0.9")
        axes.set_title(title, fontsize="small", parse_math=False)
        axes.legend(loc="best")


def quality_vs_throughput(
    curves: Mapping[str, Sequence[tuple[int, float, float]]],
    metric: str,
    path: str | os.PathLike[str],
    title: str = "",
    xlabel: str = "clips per second, r beside the points",
) -> None:
    """What merging costs against what it gains: one line a model or schedule, one point an r.

    Args:
        curves: For each name, `(r, clips per second, percent)` in ascending order of r.
        metric: What the percentage is: `"accuracy"` or `"mAP"`.
        path: Where to save, `.png` or `.svg`.
        title: Conditions of the measurement: data, hardware, dtype, batch.
        xlabel: What the speeds are, where not clips a second.

    Raises:
        ValueError: A curve has no points, or `path` has another suffix.
    """
    for name, points in curves.items():
        if not points:
            raise ValueError(f"curves[{name!r}] must have at least one point")
    with figure_at(path, 7, 4) as axes:
        for name, points in curves.items():
            rs, speeds, percents = zip(*points, strict=True)
            axes.plot(speeds, percents, marker="o", label=name)
            for r, speed, percent in zip(rs, speeds, percents, strict=True):
                axes.annotate(
                    f"r = {r}" if r == rs[0] else str(r),
                    (speed, percent),
                    xytext=(0, 6),
                    textcoords="offset points",
                    ha="center",
                    fontsize="small",
                )
        values = [percent for points in curves.values() for _, _, percent in points]
        # Room for a point at each side: without it a rounding error would look like a cliff.
        margin = max(1.0, 0.15 * (max(values) - min(values)))
        axes.set_ylim(min(values) - margin, max(values) + margin)
        axes.margins(x=0.08)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(f"{metric} (%)")
        axes.grid(color="0.9")
        lines = "\n".join(textwrap.fill(line, 95) for line in title.splitlines())
        axes.set_title(lines, fontsize="small", parse_math=False)  # names may hold a dollar sign
        if len(curves) > 1:
            axes.legend(loc="best")


def confusion_matrix(
    matrix: Sequence[Sequence[int]],
    labels: Sequence[str],
    path: str | os.PathLike[str],
    title: str = "",
) -> None:
    """Which classes are taken for which, coloured by the share of a row; counts where they fit.

    Args:
        matrix: Clips of each class (rows) that were given each class (columns), as
            `Evaluation.confusion`. A class without clips has a white row.
        labels: Names of the classes.
        path: Where to save, `.png` or `.svg`.
        title: Model, data and amount of merging.

    Raises:
        ValueError: `matrix` is not one row and one column a label, or `path` has another suffix.
    """
    count = len(labels)
    if not count or [len(row) for row in matrix] != [count] * count:
        raise ValueError(
            f"matrix must have a row and a column for each of {count} labels, its rows have "
            f"{[len(row) for row in matrix]} columns"
        )
    counts = np.asarray(matrix, dtype=np.int64)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    numbered = count <= CLASSES_WITH_NUMBERS
    # A cell must hold a number, or the height of a label's letters.
    side = max(4.0, min(count, 100) * (0.45 if numbered else 0.18) + 2.0)
    step = -(-count // 100)
    places = np.arange(0, count, step)
    names = [
        name
        if len(name) <= LONGEST_LABEL
        else f"{name[: LONGEST_LABEL - 1]}\N{HORIZONTAL ELLIPSIS}"
        for name in labels[::step]
    ]
    # Names may hold a dollar sign.
    text: dict[str, Any] = {"fontsize": 8 if numbered else 7, "parse_math": False}
    with figure_at(path, side + 1.0, side) as axes:
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axes.set_xticks(places, names, rotation=90, **text)
        axes.set_yticks(places, names, **text)
        axes.set_xlabel("class given")
        axes.set_ylabel("true class")
        axes.set_title(textwrap.fill(title, int(side * 11)), fontsize="small", parse_math=False)
        axes.figure.colorbar(image, shrink=0.6, label="share of the true class")
        if numbered:
            for (row, column), clips in np.ndenumerate(counts):
                if clips:
                    colour = "white" if shares[row, column] > 0.5 else "black"
                    axes.text(
                        column, row, clips, ha="center", va="center", color=colour, fontsize=8
                    )


def group_colours(source: np.ndarray) -> np.ndarray:
    """A colour for every token that shares its output row with another; the largest groups first.

    Args:
        source: Output row of each token, integers `[N]`.

    Returns:
        RGBA `[N, 4]` in [0, 1]; tokens that stayed alone are transparent.
    """
    from matplotlib.colors import hsv_to_rgb

    rows, index, counts = np.unique(source, return_inverse=True, return_counts=True)
    rank = np.empty(len(rows), dtype=np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(rows))
    # Steps of the golden ratio around the colour wheel keep neighbours in rank far apart.
    hue = (rank * 0.618033988749895) % 1.0
    value = np.where(rank % 2, 0.75, 1.0)
    colours = hsv_to_rgb(np.stack([hue, np.full(len(rows), 0.85), value], axis=1))
    rgba = np.concatenate([colours, (counts > 1)[:, None]], axis=1)
    return rgba[index]


def merge_groups(
    spectrogram: Tensor | np.ndarray,
    source: Tensor | np.ndarray,
    grid: tuple[int, int],
    path: str | os.PathLike[str],
    prefix: int = 2,
    patch_size: int = 16,
    strides: tuple[int, int] = (10, 10),
    title: str = "",
) -> None:
    """A spectrogram, and the same with its merged tokens drawn over it as coloured groups.

    Patches overlap, so each is drawn as the stride-sized cell at its centre. Tokens of one colour
    have become one token; tokens without colour stayed alone.

    Args:
        spectrogram: Features of one clip `[frames, mel bins]`.
        source: Output row of every token, integers `[prefix + f_dim * t_dim]`: one row of
            `model.tome.source`. Patch tokens are frequency-major: `prefix + f * t_dim + t`.
        grid: Patches along frequency and time, `model.config.grid`.
        path: Where to save, `.png` or `.svg`.
        prefix: Tokens before the patches (CLS and DIST).
        patch_size: Side of a patch, in bins and frames.
        strides: Step between patches along frequency and time.
        title: Shown above.

    Raises:
        ValueError: `source` or `spectrogram` does not have the shape that `grid` asks for, or
            `path` has another suffix.
    """
    image, rows = np.asarray(spectrogram, dtype=np.float32), np.asarray(source)
    f_dim, t_dim = grid
    if rows.shape != (prefix + f_dim * t_dim,):
        raise ValueError(
            f"source must have {prefix} + {f_dim} * {t_dim} tokens, its shape is {rows.shape}"
        )
    if image.ndim != 2:
        raise ValueError(f"spectrogram must be [frames, mel bins], its shape is {image.shape}")
    frames, bins = image.shape
    colours = group_colours(rows)[prefix:].reshape(f_dim, t_dim, 4)
    overlay = np.zeros((bins, frames, 4), dtype=np.float32)
    f_step, t_step = strides
    f_margin, t_margin = (patch_size - f_step) // 2, (patch_size - t_step) // 2
    cells = colours.repeat(f_step, axis=0).repeat(t_step, axis=1)
    cells = cells[: bins - f_margin, : frames - t_margin]
    height, width = cells.shape[:2]
    overlay[f_margin : f_margin + height, t_margin : t_margin + width] = cells
    overlay[..., 3] *= 0.6

    left = len(np.unique(rows))
    extent = (0.0, frames * 0.01, 0.0, float(bins))
    with figure_at(path, max(5.0, min(12.0, frames / 100)), 5.5, rows=2) as axes:
        for plot, name in zip(
            axes, ("log-mel features", f"{len(rows)} tokens became {left}"), strict=True
        ):
            plot.imshow(image.T, origin="lower", aspect="auto", extent=extent, cmap="gray")
            plot.set_ylabel("mel bin")
            plot.set_title(name, fontsize="small")
        axes[1].imshow(
            overlay, origin="lower", aspect="auto", extent=extent, interpolation="nearest"
        )
        axes[1].set_xlabel("seconds")
        axes[0].figure.suptitle(title, fontsize="medium")


def visualize(
    model: AST,
    file: str | os.PathLike[str],
    path: str | os.PathLike[str],
    r: Schedule = 10,
    start: float = 0.0,
) -> int:
    """Draw which tokens of an audio file a model merges.

    Args:
        model: An AST, patched or not; it is left as it was.
        file: The audio.
        path: Where to save, `.png` or `.svg`.
        r: Tokens to merge in each block.
        start: Where the window starts in the file, in seconds.

    Returns:
        How many tokens are left.

    Raises:
        AudioError: The file cannot be used, or `start` is not before its end.
        ValueError: `path` has another suffix, or `r` is not one for this model.
    """
    import torch

    import fastast
    from fastast.audio import AudioError, load_audio
    from fastast.evaluate import front_end, window

    config = model.config
    device = next(model.parameters()).device
    fbank = front_end(config).to(device)
    waveform = load_audio(file, config.sample_rate)
    waveform = waveform[int(start * config.sample_rate) :][: window(fbank)]
    if start < 0 or len(waveform) < fbank.window_length:
        raise AudioError(f"{os.fspath(file)}: has less than 25 ms after {start:g} s")
    was_training = model.training
    with torch.inference_mode(), fastast.patched(model.eval(), r=r, trace=True):
        features = fbank(waveform.unsqueeze(0).to(device))
        label = int(model(features).argmax())
        tome = model.tome
        assert tome is not None and tome.source is not None  # patched with trace=True
        source = tome.source[0].cpu()
    model.train(was_training)
    name = config.labels[label] if config.labels else str(label)
    merge_groups(
        features[0].cpu(),
        source,
        config.grid,
        path,
        config.num_prefix_tokens,
        config.patch_size,
        (config.frequency_stride, config.time_stride),
        title=f"{Path(file).name}: {name} (r = {r})",
    )
    return len(source.unique())
