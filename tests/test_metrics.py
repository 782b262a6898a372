from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn import metrics as sklearn_metrics

from fastast.metrics import class_reports, confusion_matrix, d_prime, mean_auc

LABELS = ("ape", "bee", "cat")
# Four clips: ape, ape, bee, cat. The second ape is taken for a bee, the cat for an ape.
SCORES = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.5, 0.2], [0.1, 0.8, 0.1], [0.5, 0.1, 0.4]])
TARGET = torch.tensor([0, 0, 1, 2])


def test_four_clips_by_hand() -> None:
    reports = class_reports(SCORES, TARGET, LABELS)
    ape, bee, cat = (reports[name] for name in LABELS)
    assert [report.clips for report in reports.values()] == [2, 1, 1]
    # Of the pairs (ape, other): 0.7 beats 0.1 and 0.5; 0.3 beats 0.1 and loses to 0.5.
    assert ape.auc == pytest.approx(3 / 4)
    assert bee.auc == 1
    assert cat.auc == 1
    assert mean_auc(reports.values()) == pytest.approx(11 / 12)
    assert (ape.precision, ape.recall) == (0.5, 0.5)
    assert (bee.precision, bee.recall) == (0.5, 1)
    assert (cat.precision, cat.recall) == (0, 0)
    # Apes are first and third: precision 1 at recall 1/2, 2/3 at recall 1.
    assert ape.average_precision == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    matrix = confusion_matrix(SCORES.argmax(1), TARGET, 3)
    assert matrix == ((1, 1, 0), (0, 1, 0), (1, 0, 0))
    assert type(matrix[0][0]) is int


def test_ties_count_half() -> None:
    scores = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.9, 0.1]])
    # For class 0: one pair is tied, one lost.
    reports = class_reports(scores, torch.tensor([0, 1, 1]), ("a", "b"))
    assert reports["a"].auc == pytest.approx(0.25)


def test_several_classes_a_clip_against_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(60, 5, generator=generator)
    target = (torch.rand(60, 5, generator=generator) < 0.3).float()
    labels = tuple("abcde")
    reports = class_reports(scores, target, labels)
    found = [reports[name].auc for name in labels]
    expected = sklearn_metrics.roc_auc_score(target.numpy(), scores.numpy(), average=None)
    assert found == pytest.approx(expected.tolist())
    assert mean_auc(reports.values()) == pytest.approx(
        sklearn_metrics.roc_auc_score(target.numpy(), scores.numpy(), average="macro")
    )
    precisions = [reports[name].average_precision for name in labels]
    assert precisions == pytest.approx(
        sklearn_metrics.average_precision_score(
            target.numpy(), scores.numpy(), average=None
        ).tolist()
    )
    recalls = sklearn_metrics.recall_score(target.numpy(), scores.numpy() > 0.5, average=None)
    assert [reports[name].recall for name in labels] == pytest.approx(recalls.tolist())


def test_classes_without_an_area_are_left_out() -> None:
    # Class 0 is in every clip, class 1 in one, class 2 in none.
    target = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    scores = torch.tensor([[0.9, 0.4, 0.1], [0.8, 0.6, 0.2], [0.7, 0.3, 0.3]])
    reports = class_reports(scores, target, LABELS)
    assert list(reports) == ["ape", "bee"]
    assert reports["ape"].auc is None
    assert reports["bee"].auc == pytest.approx(0.5)
    assert mean_auc(reports.values()) == pytest.approx(0.5)
    assert mean_auc([reports["ape"]]) is None
    assert mean_auc([]) is None


def test_confusion_against_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(1)
    predicted = torch.randint(5, (200,), generator=generator)
    target = torch.randint(4, (200,), generator=generator)  # the last class never occurs
    expected = sklearn_metrics.confusion_matrix(target, predicted, labels=range(6))
    np.testing.assert_array_equal(confusion_matrix(predicted, target, 6), expected)


@pytest.mark.parametrize(
    ("auc", "expected"),
    [(0.5, 0.0), (0.9, 1.8124), (0.1, -1.8124), (0.75, 0.9539)],
)
def test_d_prime(auc: float, expected: float) -> None:
    assert d_prime(auc) == pytest.approx(expected, abs=5e-5)
    assert d_prime(auc) == pytest.approx(math.sqrt(2) * norm.ppf(auc), abs=1e-12)


def test_d_prime_is_the_distance_of_two_normal_laws() -> None:
    # P(X < Y) for X ~ N(0, 1) and Y ~ N(d, 1) is the area: here by simulation of both.
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal(200_000), generator.standard_normal(200_000) + 1.5
    assert d_prime(float((x < y).mean())) == pytest.approx(1.5, abs=0.02)


def test_d_prime_of_all_or_nothing() -> None:
    assert d_prime(1) == math.inf
    assert d_prime(0.0) == -math.inf
    assert math.isfinite(d_prime(1 - 1e-15))
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"auc must be in \[0, 1\], not"):
            d_prime(bad)
