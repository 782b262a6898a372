"""Measures of a classifier: precision, recall, average precision, ROC AUC, d' and confusions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["ClassReport", "class_reports", "confusion_matrix", "d_prime", "mean_auc"]


@dataclass(frozen=True)
class ClassReport:
    """How one class fared: shares in [0, 1], and its number of clips.

    Attributes:
        precision: Of the clips that were given this class, the share that have it; 0 if none was.
        recall: Of the clips that have this class, the share that were given it.
        average_precision: Area under precision over recall, scikit-learn's definition.
        clips: Clips that have this class.
        auc: Area under the ROC curve: the chance that a clip of this class scores higher than one
            of another, ties counted half. None where every clip has this class.
    """

    precision: float
    recall: float
    average_precision: float
    clips: int
    auc: float | None = None


def class_reports(scores: Tensor, target: Tensor, labels: Sequence[str]) -> dict[str, ClassReport]:
    """One report a class that occurs.

    Args:
        scores: fp32 `[clips, classes]` in [0, 1]; a class of multi-hot targets is given over 0.5.
        target: Class indices int64 `[clips]`, or multi-hot rows `[clips, classes]`.
        labels: Names of the classes.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.metrics import average_precision_score, roc_auc_score
    except ImportError:
        raise ImportError('evaluation needs scikit-learn: pip install "fastast[train]"') from None

    if target.is_floating_point():
        truth, predicted = target > 0.5, scores > 0.5
    else:
        truth = nn.functional.one_hot(target, len(labels)) > 0
        predicted = nn.functional.one_hot(scores.argmax(1), len(labels)) > 0
    hits = (truth & predicted).sum(0).tolist()
    counts, calls = truth.sum(0).tolist(), predicted.sum(0).tolist()
    reports = {}
    for i, label in enumerate(labels):
        if not counts[i]:
            continue
        is_class, score = truth[:, i].numpy(), scores[:, i].numpy()
        always = counts[i] == len(target)
        reports[label] = ClassReport(
            precision=hits[i] / calls[i] if calls[i] else 0.0,
            recall=hits[i] / counts[i],
            average_precision=float(average_precision_score(is_class, score)),
            clips=counts[i],
            auc=None if always else float(roc_auc_score(is_class, score)),
        )
    return reports


def mean_auc(reports: Iterable[ClassReport]) -> float | None:
    """Mean ROC AUC over the classes that have one; None where none has."""
    areas = [report.auc for report in reports if report.auc is not None]
    return statistics.fmean(areas) if areas else None


def d_prime(auc: float) -> float:
    """Sensitivity index of AudioSet: `sqrt(2) * ppf(AUC)`, ppf the normal law's quantile function.

    It is the distance, in standard deviations, between two normal laws of unit variance whose
    samples an AUC tells apart that well: 0 for chance, infinite for an AUC of 1.

    Args:
        auc: In [0, 1].

    Raises:
        ValueError: `auc` is not in [0, 1].
    """
    if not 0 <= auc <= 1:
        raise ValueError(f"auc must be in [0, 1], not {auc}")
    if auc in (0, 1):
        return math.inf if auc else -math.inf
    return math.sqrt(2) * statistics.NormalDist().inv_cdf(auc)


def confusion_matrix(
    predicted: Tensor, target: Tensor, classes: int
) -> tuple[tuple[int, ...], ...]:
    """How many clips of each class (rows) were given each class (columns).

    Args:
        predicted: Class indices int64 `[clips]`.
        target: Class indices int64 `[clips]`.
        classes: Number of classes.
    """
    counts = (target * classes + predicted).bincount(minlength=classes * classes)
    return tuple(tuple(row) for row in counts.view(classes, classes).tolist())
