"""Which clips an epoch sees, and in what order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .dataset import AudioDataset

__all__ = ["balanced_weights", "epoch_order", "missing_classes"]

# Rows that are summed at a time: targets of a large data set as float64 would fill the memory.
_ROWS = 1 << 16


def balanced_weights(targets: Tensor) -> Tensor:
    """How often each clip should be drawn so that rare classes come as often as common ones.

    AST's weights for AudioSet: the sum over the clip's classes of `1000 / (count + 0.01)`, where
    `count` is the number of clips with that class.

    Args:
        targets: Class indices int64 `[n]`, or multi-hot rows `[n, classes]` of any dtype.

    Returns:
        float64 `[n]`; only ratios matter. A clip without a class has weight 0.

    Raises:
        ValueError: `targets` has another rank.
    """
    if targets.dim() == 1:
        counts = torch.bincount(targets)
        return (1000 / (counts.double() + 0.01))[targets]
    if targets.dim() != 2:
        raise ValueError(f"targets must be [n] or [n, classes], not {list(targets.shape)}")
    blocks = targets.split(_ROWS)
    counts = torch.stack([(block > 0).sum(0) for block in blocks]).sum(0)
    weights = 1000 / (counts.double() + 0.01)
    return torch.cat([(block > 0).double() @ weights for block in blocks])


def epoch_order(n: int, generator: torch.Generator, weights: Tensor | None = None) -> Tensor:
    """The clips of an epoch: each once, or `n` draws with replacement by weight.

    Args:
        n: Number of clips.
        generator: Where the draws come from.
        weights: Not negative, `[n]`; a clip is drawn in proportion to its weight. None: each once.

    Returns:
        int64 `[n]`.

    Raises:
        ValueError: `weights` has another shape, a value that is negative or not finite, or no
            positive one.
    """
    if weights is None:
        return torch.randperm(n, generator=generator)
    if weights.shape != (n,):
        raise ValueError(f"weights must be [{n}], not {list(weights.shape)}")
    if not (weights.isfinite().all() and (weights >= 0).all() and (weights > 0).any()):
        raise ValueError("weights must be finite and not negative, and one of them positive")
    # Not torch.multinomial: it refuses more than 2**24 clips.
    cumulated = weights.double().cumsum(0)
    draws = torch.rand(n, generator=generator, dtype=torch.float64) * cumulated[-1]
    # A draw that rounds up to the sum would be past the end.
    last = int(weights.nonzero()[-1])
    return torch.searchsorted(cumulated, draws, right=True).clamp(max=last)


def missing_classes(train: AudioDataset, test: AudioDataset) -> tuple[str, ...]:
    """Names of the classes that a clip of `test` has and no clip of `train`.

    Raises:
        ValueError: The two have different classes.
    """
    if train.labels != test.labels:
        raise ValueError("train and test must have the same labels, in the same order")
    missing = _present(test) & ~_present(train)
    return tuple(label for label, gone in zip(test.labels, missing.tolist(), strict=True) if gone)


def _present(dataset: AudioDataset) -> Tensor:
    if dataset.multi_label:
        return dataset.targets.any(0)
    present = torch.zeros(len(dataset.labels), dtype=torch.bool)
    present[dataset.targets] = True
    return present
