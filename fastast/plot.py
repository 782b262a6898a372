"""Pictures: what merging does to a spectrogram, to throughput, and how a training went."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

__all__ = ["merge_groups", "throughput_vs_r", "training_curve"]

SUFFIXES = (".png", ".svg")


@contextmanager
def _figure(path: str | os.PathLike[str], width: float, height: float) -> Iterator[Axes]:
    """An empty plot that is saved to `path` when the block ends."""
    # Not pyplot: it holds global state and may look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"path must end in {' or '.join(SUFFIXES)}, not {path.name!r}")
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    yield figure.add_subplot()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def training_curve(history: Sequence[Mapping[str, float]], path: str | os.PathLike[str]) -> None:
    """Loss and test accuracy over the epochs.

    Args:
        history: One mapping an epoch, with `epoch`, `loss` and `accuracy_r...`.
        path: Where to save, `.png` or `.svg`.
    """
    with _figure(path, 7, 4) as axes:
        epochs = [row["epoch"] for row in history]
        axes.plot(epochs, [row["loss"] for row in history], color="0.6", label="loss")
        axes.set_xlabel("epoch")
        axes.set_ylabel("training loss")
        right = axes.twinx()
        for name in history[-1] if history else ():
            if name.startswith("accuracy_r"):
                values = [100 * row[name] for row in history]
                right.plot(epochs, values, label=f"r = {name.removeprefix('accuracy_r')}")
        right.set_ylabel("test accuracy (%)")
        right.legend(loc="center right")
