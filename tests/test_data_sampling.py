"""The order of an epoch, and what it is drawn from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastast.data import AudioDataset, balanced_weights, epoch_order, missing_classes, sampling


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_balanced_weights() -> None:
    weights = balanced_weights(torch.tensor([0, 2, 0, 0, 2]))
    thrice, twice = 1000 / 3.01, 1000 / 2.01
    torch.testing.assert_close(weights.tolist(), [thrice, twice, thrice, thrice, twice])
    assert weights.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.uint8])
def test_balanced_weights_of_several_classes(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_ROWS", 2)
    targets = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 0, 0], [1, 0, 0], [0, 0, 1]]).to(dtype)
    first, last = 1000 / 3.01, 1000 / 2.01
    expected = [first + last, first, 0.0, first, last]
    torch.testing.assert_close(balanced_weights(targets).tolist(), expected)


def test_targets_of_another_rank() -> None:
    with pytest.raises(ValueError, match=r"targets must be \[n\] or \[n, classes\]"):
        balanced_weights(torch.zeros(1, 2, 3))


def test_each_once() -> None:
    order = epoch_order(100, generator())
    assert sorted(order.tolist()) == list(range(100))
    assert order.dtype == torch.int64
    torch.testing.assert_close(order, epoch_order(100, generator()))
    assert not torch.equal(order, epoch_order(100, generator(1)))


def test_draws_follow_the_weights() -> None:
    n = 40_000
    weights = torch.ones(n, dtype=torch.float64)
    weights[: n // 10] = 5.0
    weights[-1] = 0.0
    order = epoch_order(n, generator(), weights)
    assert order.shape == (n,)
    assert order.dtype == torch.int64
    heavy = int((order < n // 10).sum())
    share = 5 * (n // 10) / float(weights.sum())
    sigma = math.sqrt(n * share * (1 - share))
    assert abs(heavy - n * share) < 4 * sigma
    assert n - 1 not in order
    assert len(order.unique()) < n  # with replacement
    # The first and the last tenth of the heavy ones are drawn alike.
    tenth = n // 100
    edges = [
        int((order < tenth).sum()),
        int(((order >= n // 10 - tenth) & (order < n // 10)).sum()),
    ]
    mean = n * 5 * tenth / float(weights.sum())
    assert all(abs(count - mean) < 4 * math.sqrt(mean) for count in edges)


def test_balanced_draws_make_classes_equal() -> None:
    targets = torch.cat([torch.zeros(9_000), torch.ones(1_000)]).long()
    order = epoch_order(10_000, generator(), balanced_weights(targets))
    rare = int(targets[order].sum())
    assert abs(rare - 5_000) < 4 * math.sqrt(10_000 / 4)


def test_more_than_two_to_the_24_clips() -> None:
    """Where torch.multinomial gives up, and float32 sums no longer grow."""
    n = 2**24 + 3
    with pytest.raises(RuntimeError):
        torch.multinomial(torch.ones(n), 1)
    weights = torch.zeros(n, dtype=torch.float32)
    weights[-3:-1] = 1.0
    order = epoch_order(n, generator(), weights)
    first, second = (int((order == i).sum()) for i in (n - 3, n - 2))
    assert first + second == n
    assert abs(first - n / 2) < 4 * math.sqrt(n / 4)


def test_a_draw_of_the_whole_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draw can round up to the sum of the weights: it is the last clip that has any."""
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.ones(n, dtype=torch.float64))
    order = epoch_order(4, generator(), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert order.tolist() == [2, 2, 2, 2]


def test_small_weights_beside_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 the sums would not grow from 2**26 by 3."""
    weights = torch.tensor([2.0**26, 3.0, 3.0, 3.0])
    middles = torch.tensor([2.0**25, 2**26 + 1.5, 2**26 + 4.5, 2**26 + 7.5], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda n, **_: middles / (2**26 + 9))
    assert epoch_order(4, generator(), weights).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(3), r"weights must be \[2\], not \[3\]"),
        (torch.tensor([1.0, -1.0]), "not negative"),
        (torch.tensor([1.0, math.nan]), "finite"),
        (torch.zeros(2), "one of them positive"),
    ],
)
def test_bad_weights(weights: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        epoch_order(2, generator(), weights)


def dataset(targets: list[tuple[int, ...]], multi_label: bool) -> AudioDataset:
    waves = [np.ones(8, np.float32)] * len(targets)
    names = [str(i) for i in range(len(targets))]
    return AudioDataset(waves, targets, ("a", "b", "c", "d"), names, multi_label=multi_label)


def test_missing_classes() -> None:
    train, test = dataset([(0,), (2,)], False), dataset([(3,), (1,), (2,), (3,)], False)
    assert missing_classes(train, test) == ("b", "d")
    assert missing_classes(test, train) == ("a",)
    several = dataset([(0, 1), ()], True), dataset([(1, 2), (0,)], True)
    assert missing_classes(*several) == ("c",)
    other = AudioDataset([np.ones(8)], [(0,)], ("x",), ("0",))
    with pytest.raises(ValueError, match="same labels"):
        missing_classes(train, other)
