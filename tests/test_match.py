"""bipartite_match and key_metric against the published algorithm."""

from __future__ import annotations

import pytest
import torch

from fastast_kernels import bipartite_match, effective_r, key_metric, match_keys, merge, reference
from fastast_kernels.testing import DTYPES, assert_as_accurate, assert_valid_match

pytestmark = pytest.mark.usefixtures("backend", "poison")

PROTECTED = [(True, True), (True, False), (False, True), (False, False)]


@pytest.mark.parametrize("class_token,distill_token", PROTECTED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "batch,n,c",
    [(1, 2, 16), (3, 3, 60), (2, 70, 31), (1, 63, 80), (3, 64, 16), (1, 130, 64), (2, 257, 600)],
)
def test_valid(
    batch: int, n: int, c: int, dtype: torch.dtype, class_token: bool, distill_token: bool
) -> None:
    metric = torch.randn(batch, n, c).to(dtype)
    for r in (0, 1, n // 4, 10**6):
        assignment = bipartite_match(metric, r, class_token, distill_token)
        assert_valid_match(metric, assignment, r, class_token, distill_token)


@pytest.mark.parametrize("n", [512, 1214])
def test_valid_at_audio_lengths(n: int) -> None:
    metric = torch.randn(2, n, 64)
    metric[1] = metric[1].cumsum(0) + 20  # correlated tokens, as neighbours in a spectrogram are
    assignment = bipartite_match(metric, 40)
    assert_valid_match(metric, assignment, 40, True, True)
    # fp32 scores of random tokens are distinct, so here the indices must agree too.
    assert torch.equal(assignment[:1], reference.bipartite_match(metric[:1].double(), 40))


def test_published_order() -> None:
    """facts.md 1.1: N=14, r=3, CLS and DIST: which tokens the 11 output rows are made of."""
    metric = torch.zeros(1, 14, 7)
    for j, token in enumerate(range(1, 14, 2)):
        metric[0, token, j] = 1  # seven orthogonal tokens of B
    for token, near, strength in (
        (0, 5, 9),
        (2, 1, 9),
        (4, 2, 0.3),
        (6, 2, 8),
        (8, 3, 8),
        (10, 4, 8),
        (12, 6, 0.1),
    ):
        metric[0, token] = 0.5
        metric[0, token, near] += strength
    assignment = bipartite_match(metric, 3)
    # CLS, DIST, then the kept of A (2's best partner is DIST's neighbour 3), then B without DIST.
    x = torch.arange(14.0).reshape(1, 14, 1)
    merged, size = merge(x, assignment, 11)
    order = [0, 1, *[i for i in (2, 4, 6, 8, 10, 12) if size[0, assignment[0, i]] == 1]]
    assert len(order) == 5
    assert merged[0, :5, 0].tolist() == order
    assert size.sum() == 14 and size[0, 0] == 1 and size[0, 1] == 1


@pytest.mark.parametrize("n", [40, 400])  # within one tile of a kernel, and across several
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_lowest_index(dtype: torch.dtype, n: int) -> None:
    metric = torch.ones(2, n, 24).to(dtype)  # every score is the same
    assignment = bipartite_match(metric, 5)
    kept = n // 2 - 5
    expected = torch.empty(n, dtype=torch.int32)
    expected[1::2] = torch.arange(n // 2) + kept
    expected[1] = 1
    expected[2:12:2] = kept + 1  # the first five of A but CLS, all into the first of B but DIST
    expected[0] = 0
    expected[12::2] = torch.arange(2, kept + 1)
    assert torch.equal(assignment, expected.expand(2, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_tokens_score_zero(dtype: torch.dtype) -> None:
    metric = torch.randn(1, 30, 16).to(dtype)
    metric[0, 4] = 0  # in A
    metric[0, 7] = 0  # in B
    assignment = bipartite_match(metric, 6)
    assert_valid_match(metric, assignment, 6, True, True)
    assert torch.equal(
        bipartite_match(torch.zeros(1, 30, 16).to(dtype), 6)[0, :2], torch.tensor([0, 1])
    )


def test_only_directions_matter() -> None:
    metric = torch.randn(2, 80, 32)
    lengths = torch.exp2(torch.randint(-6, 6, (2, 80, 1)).float())  # exact in floating point
    assert torch.equal(bipartite_match(metric, 11), bipartite_match(metric * lengths, 11))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_an_error(bad: float, backend: str) -> None:
    """On a GPU looking would cost a synchronisation: rows are still rows there."""
    metric = torch.randn(3, 20, 8)
    metric[1, 5, 2] = bad
    if backend == "triton":
        rows = bipartite_match(metric, 4)
        assert all(row.unique().tolist() == list(range(16)) for row in rows)
        return
    with pytest.raises(RuntimeError, match=r"metric must be finite, but sample 1"):
        bipartite_match(metric, 4)


def test_strided_and_empty() -> None:
    wide = torch.randn(2, 100, 3, 48)
    assert torch.equal(
        bipartite_match(wide[:, :, 1, ::2], 9), bipartite_match(wide[:, :, 1, ::2].contiguous(), 9)
    )
    assert bipartite_match(torch.empty(0, 10, 8), 2).shape == (0, 10)
    assert_valid_match(
        torch.randn(2, 10, 0), bipartite_match(torch.randn(2, 10, 0), 2), 2, True, True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_at_any_thread_count(dtype: torch.dtype, backend: str) -> None:
    metric = torch.randn(1, 1400, 64).to(dtype)  # worth more than one thread on AMX too
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = bipartite_match(metric, 60)
        torch.set_num_threads(2)
        two = bipartite_match(metric, 60)
        batched = bipartite_match(metric.repeat(5, 1, 1), 60)
        metric[0, -1, -1] = torch.inf
        if backend != "triton":  # see test_not_finite_is_an_error
            with pytest.raises(RuntimeError, match=r"metric must be finite, but sample 0"):
                bipartite_match(metric, 60)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, two)
    assert torch.equal(one.expand(5, -1), batched)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_scores_have_the_places_of_fp32(dtype: torch.dtype) -> None:
    """Cosines 2^-21 apart, eight units in fp32's last place: too close for two parts of bf16."""
    n, r = 130, 5
    order = torch.randperm(n // 2)
    near = torch.zeros(n // 2, 40, dtype=dtype)
    near[:, 0] = 1
    near[:, 39] = 0.7 + order * 2.0**-20
    axis = torch.zeros(n // 2, 40, dtype=dtype)
    axis[:, 39] = 1
    # All of A want the token of B that is nearest to the axis ...
    rows = bipartite_match(torch.stack([axis, near], 1).reshape(1, n, 40), r, False, False)
    into = rows[0, ::2][:r]  # of equal proposals the first
    assert (into == n // 2 - r + order.argmax()).all()
    # ... and the nearest of A go into the first of B.
    rows = bipartite_match(torch.stack([near, axis], 1).reshape(1, n, 40), r, False, False)
    merged = (rows[0, ::2] == n // 2 - r).nonzero().flatten()
    assert merged.tolist() == sorted(order.topk(r).indices.tolist())


@pytest.mark.parametrize(
    "n,r,expected", [(2, 9, 0), (3, 9, 0), (4, 9, 1), (5, 9, 1), (7, 9, 2), (1214, 40, 40)]
)
def test_effective_r(n: int, r: int, expected: int) -> None:
    assert effective_r(n, r) == expected


def test_a_lone_distillation_token_takes_nobody_in() -> None:
    assert effective_r(3, 1, class_token=False, distill_token=True) == 0
    rows = bipartite_match(torch.randn(1, 3, 4), 1, class_token=False, distill_token=True)
    assert rows.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_key_metric(dtype: torch.dtype) -> None:
    k = torch.randn(2, 5, 33, 24).to(dtype)
    k[0, :, 3] = 0
    metric = key_metric(k)
    truth = reference.key_metric(k.double()).double()
    assert metric.dtype == torch.float32
    assert_as_accurate(metric, truth, reference.key_metric(k.double()))
    assert (metric[0, 3] == 0).all()


def test_match_keys_is_the_match_of_their_metric() -> None:
    k = torch.randn(2, 90, 3, 4, 16)[:, :, 1].transpose(1, 2)
    metric = key_metric(k)
    for protected in ((True, True), (True, False), (False, True), (False, False)):
        assert torch.equal(match_keys(k, 11, *protected), bipartite_match(metric, 11, *protected))


@pytest.mark.parametrize("n", [2, 3, 10, 63, 130, 301])
def test_sources_are_the_tokens_of_each_row(n: int) -> None:
    k = torch.randn(2, 3, n, 16)
    metric = key_metric(k)
    for protected in PROTECTED:
        for r in (0, 1, n // 4, n):
            rows, sources = bipartite_match(metric, r, *protected, return_sources=True)
            assert torch.equal(rows, bipartite_match(metric, r, *protected))
            n_out = n - effective_r(n, r, *protected)
            assert sources.dtype == torch.int32 and sources.shape == (2, n_out + 1 + n)
            for b in range(2):
                offsets = sources[b, : n_out + 1].tolist()
                tokens = sources[b, n_out + 1 :].tolist()
                assert offsets[0] == 0 and offsets[-1] == n
                for i in range(n_out):
                    expected = [j for j in range(n) if rows[b, j] == i]
                    assert tokens[offsets[i] : offsets[i + 1]] == expected
            of_keys = match_keys(k, r, *protected, return_sources=True)
            assert torch.equal(of_keys[0], rows) and torch.equal(of_keys[1], sources)
    none = bipartite_match(torch.empty(0, 10, 8), 2, return_sources=True)
    assert none[0].shape == (0, 10) and none[1].shape == (0, 19)


def test_reference_sources_end_with_the_dropped() -> None:
    rows = torch.tensor([[2, -1, 0, 2, -1, 0], [1, 1, -1, 1, 0, 1]], dtype=torch.int32)
    expected = [[0, 2, 2, 4, 2, 5, 0, 3, 1, 4], [0, 1, 5, 5, 4, 0, 1, 3, 5, 2]]
    assert reference.sources(rows, 3).tolist() == expected


def test_key_metric_reads_packed_qkv_in_place() -> None:
    qkv = torch.randn(2, 21, 3, 4, 16)
    k = qkv[:, :, 1].transpose(1, 2)
    assert not k.is_contiguous()
    torch.testing.assert_close(key_metric(k), key_metric(k.contiguous()), rtol=0, atol=0)
