from __future__ import annotations

import inspect
import math

import pytest
import torch

import fastast
from fastast.tome import (
    MergeSettings,
    ToMe,
    bipartite_soft_matching,
    compose,
    kth_bipartite_soft_matching,
    macs,
    merge_source,
    merge_wavg,
    parse_r,
    parse_schedule,
    random_bipartite_soft_matching,
)
from fastast_kernels import bipartite_match, effective_r, reference

# ------------------------------------------------------------------------------------- schedules


def test_published_forms_of_r():
    assert parse_r(4, 7) == [7, 7, 7, 7]
    assert parse_r(4, [5, 3]) == [5, 3, 0, 0]
    assert parse_r(2, [5, 3, 1]) == [5, 3, 1]
    assert parse_r(3, (4, 2, 1)) == [4, 2, 1]
    assert parse_r(4, (10, 0.0)) == [10, 10, 10, 10]


def test_slope_loses_nothing():
    falling = parse_r(12, (16, -1))
    assert falling == [32, 29, 26, 23, 20, 17, 15, 12, 9, 6, 3, 0]
    assert sum(falling) == 192  # the published truncation gives 187
    assert parse_r(12, (16, 1)) == falling[::-1]


@pytest.mark.parametrize("layers", [1, 2, 3, 7, 12, 24])
@pytest.mark.parametrize("inflect", [-1, -0.9, -1 / 3, 0, 0.1, 0.77, 1])
def test_slope_is_monotone_and_sums_to_r_a_layer(layers, inflect):
    for r in (0, 1, 2, 5, 16, 41):
        counts = parse_r(layers, (r, inflect))
        assert sum(counts) == r * layers
        assert counts == sorted(counts, reverse=inflect < 0)
        assert min(counts) >= 0
        if layers > 1:
            ends = sorted([r * (1 - inflect), r * (1 + inflect)])
            assert all(ends[0] - 1 < c < ends[1] + 1 for c in counts)


@pytest.mark.parametrize(
    ("r", "error", "message"),
    [
        (-1, ValueError, "r must be 0 or more, got -1"),
        (1.5, TypeError, r"r must be an int, \(r, inflect\), or a list .* got 1.5"),
        (True, TypeError, "got True"),
        ("8", TypeError, "got '8'"),
        (None, TypeError, "got None"),
        ([3, -2, 0], ValueError, r"r\[1\] must be 0 or more, got -2"),
        ([3, 2.0, 0], TypeError, r"r\[1\] must be an int"),
        ([3, True, 0], TypeError, r"r\[1\] must be an int"),
        ((-4, 0.5), ValueError, "r must be 0 or more, got -4"),
        ((4.5, 0.5), TypeError, "r must be an int"),
        ((4, 1.5), ValueError, r"inflect, in r=\(4, 1.5\), must be in \[-1, 1\]"),
        ((4, math.nan), ValueError, "inflect"),
        ((4, "x"), TypeError, "inflect"),
        ((4, True), TypeError, "inflect"),
    ],
)
def test_bad_r(r, error, message):
    for parse in (parse_r, parse_schedule):
        with pytest.raises(error, match=message):
            parse(3, r)


@pytest.mark.parametrize("r", [[], [1, 2], [1, 2, 3, 4], (1, 2, 3, 4)])
def test_a_model_wants_one_int_a_block(r):
    with pytest.raises(ValueError, match=f"one int a block, 3 for this model, got {len(r)}"):
        parse_schedule(3, r)


def test_no_layers():
    with pytest.raises(ValueError, match="num_layers"):
        parse_r(0, 3)


MACS = [  # facts, 2.1: AST-base by clip length: GMAC, then the ratio for each r
    (512, 57.9, {10: 1.12, 20: 1.28, 30: 1.48, 40: 1.74, (20, -1): 1.41, 80: 3.25, 100: 4.01}),
    (128, 12.8, {10: 1.74, 20: 3.24, 30: 4.58, 40: 5.68, (20, -1): 5.44, (40, -1): 7.81}),
    (1024, 130.5, {10: 1.06, 20: 1.13, 30: 1.21, 40: 1.29, (20, -1): 1.18, 80: 1.77, 100: 2.12}),
]


@pytest.mark.parametrize(("frames", "giga", "ratios"), MACS)
def test_macs_of_the_published_table(frames, giga, ratios):
    config = fastast.ASTConfig.base(target_length=frames)
    dense = macs(config, trimmed=False)
    assert dense / 1e9 == pytest.approx(giga, abs=0.05)
    for r, ratio in ratios.items():
        # The table's (r, inflect) rows were computed with the published truncation.
        tolerance = 0.015 if isinstance(r, tuple) else 0.0051
        assert dense / macs(config, r, trimmed=False) == pytest.approx(ratio, abs=tolerance)
    assert 1.073 < dense / macs(config) < 1.0785  # the last block, trimmed
    assert macs(config, n_tokens=config.num_tokens) == macs(config)
    assert macs(config, n_tokens=100) < macs(config)


# --------------------------------------------------------------------------- published functions


def _worked_example() -> torch.Tensor:
    """N = 14: token 6 and 10 are closest to 3, token 8 to 7, and no other pair is alike."""
    metric = torch.eye(14)
    metric[6] += 9 * metric[3]
    metric[10] += 8 * metric[3]
    metric[8] += 7 * metric[7]
    return metric[None]


def test_rows_come_in_the_published_order():
    merge, unmerge = bipartite_soft_matching(_worked_example(), 3, True, True)
    ids = torch.arange(14.0).view(1, 14, 1)
    rows = [{0}, {1}, {2}, {4}, {12}, {3, 6, 10}, {5}, {7, 8}, {9}, {11}, {13}]
    means = torch.tensor([sum(row) / len(row) for row in rows]).view(1, -1, 1)
    torch.testing.assert_close(merge(ids), means)
    assert merge(ids, mode="sum").flatten().tolist() == [float(sum(row)) for row in rows]
    assert merge(ids, mode="amax").flatten().tolist() == [float(max(row)) for row in rows]
    assert merge(ids.long(), mode="amax").flatten().tolist() == [max(row) for row in rows]

    source = merge_source(merge, ids)
    assert source.shape == (1, 11, 14)
    assert [set(row.nonzero().flatten().tolist()) for row in source[0]] == rows

    row_of = [next(i for i, row in enumerate(rows) if token in row) for token in range(14)]
    assert torch.equal(unmerge(means), means[:, row_of])


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("distill_token", [False, True])
@pytest.mark.parametrize(("n", "r"), [(2, 1), (5, 1), (9, 2), (40, 7), (41, 100)])
def test_unmerge_gives_each_token_the_mean_of_its_group(n, r, class_token, distill_token):
    torch.manual_seed(n)
    metric, x = torch.randn(3, n, 8), torch.randn(3, n, 6, dtype=torch.float64)
    merge, unmerge = bipartite_soft_matching(metric, r, class_token, distill_token)
    merged = merge(x)
    assert merged.shape[1] == n - effective_r(n, r, class_token, distill_token)
    together = merge_source(merge, x).double()  # [B, n_out, N]
    group = together.transpose(1, 2) @ together  # 1 where two tokens share a row
    torch.testing.assert_close(unmerge(merged), group @ x / group.sum(-1, keepdim=True))
    if class_token:
        assert torch.equal(merged[:, 0], x[:, 0])
    if distill_token:
        assert torch.equal(merged[:, int(n > 1)], x[:, 1])


@pytest.mark.parametrize("r", [0, -3])
def test_nothing_to_merge_is_the_identity(r):
    x = torch.randn(2, 9, 4)
    merge, unmerge = bipartite_soft_matching(x, r, class_token=True)
    assert merge(x, mode="sum") is x
    assert unmerge(x) is x
    assert merge_wavg(merge, x)[0] is x
    assert torch.equal(merge_wavg(merge, x)[1], torch.ones(2, 9, 1))
    assert torch.equal(merge_source(merge, x)[1], torch.eye(9))


def test_signatures_are_the_published_ones():
    def names(function):
        return list(inspect.signature(function).parameters)

    assert names(bipartite_soft_matching) == ["metric", "r", "class_token", "distill_token"]
    assert names(kth_bipartite_soft_matching) == ["metric", "k"]
    assert names(random_bipartite_soft_matching) == ["metric", "r"]
    assert names(merge_wavg) == ["merge", "x", "size"]
    assert names(merge_source) == ["merge", "x", "source"]
    assert names(parse_r) == ["num_layers", "r"]


def test_two_layers_average_over_original_tokens():
    """The weighted mean after two merges is the mean of all original tokens of a group."""
    torch.manual_seed(3)
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    first, _ = bipartite_soft_matching(x, 9, True, True)
    y, size = merge_wavg(first, x)
    source = merge_source(first, x)
    where = compose(None, first.assignment)
    second, _ = bipartite_soft_matching(y, 8, True, True)
    y, size = merge_wavg(second, y, size)
    source = merge_source(second, y, source)
    where = compose(where, second.assignment)

    assert size.dtype == torch.float32
    torch.testing.assert_close(size, source.sum(-1, keepdim=True))
    torch.testing.assert_close(y, source.double() @ x / size)
    one_hot = torch.arange(13)[None, :, None] == where[:, None, :]
    assert torch.equal(one_hot, source.bool())
    assert where.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_size", [False, True])
def test_merge_wavg_of_a_foreign_callable_is_the_same(dtype, with_size):
    torch.manual_seed(4)
    x = torch.randn(2, 21, 8).to(dtype)
    size = torch.randint(1, 400, (2, 21, 1)).float() if with_size else None
    merge, _ = bipartite_soft_matching(x, 6, True, True)
    ours = merge_wavg(merge, x, size)
    foreign = merge_wavg(lambda t, mode="mean": merge(t, mode=mode), x, size)
    assert ours[0].dtype == foreign[0].dtype == dtype
    assert ours[1].dtype == foreign[1].dtype == torch.float32
    torch.testing.assert_close(*(t[0] for t in (ours, foreign)))
    assert torch.equal(ours[1], foreign[1])


def test_every_kth_token_takes_in_its_closest():
    metric = torch.eye(11)[None].clone()
    metric[0, [0, 1, 3, 4]] = metric[0, [5, 2, 5, 8]]  # 0 -> 5, 1 -> 2, 3 -> 5, 4 -> 8
    metric[0, [6, 7]] = metric[0, [2, 8]]  # 6 -> 2, 7 -> 8; 9 and 10 are the remainder
    merge, unmerge = kth_bipartite_soft_matching(metric, 3)
    source = merge_source(merge, metric)
    groups = [set(row.nonzero().flatten().tolist()) for row in source[0]]
    assert groups == [{1, 2, 6}, {0, 3, 5}, {4, 7, 8}]
    ids = torch.arange(11.0).view(1, 11, 1)
    assert merge(ids).flatten().tolist() == pytest.approx([3.0, 8 / 3, 19 / 3])
    x, size = merge_wavg(merge, ids)
    assert size.flatten().tolist() == [3, 3, 3]
    assert unmerge(x)[0, 9:].eq(0).all()
    assert torch.equal(unmerge(x)[0, [1, 2, 6]], x[0, :1].expand(3, 1))
    assert kth_bipartite_soft_matching(metric, 1)[0](ids) is ids
    with pytest.raises(ValueError, match="k must be at most the number of tokens, 11, got 12"):
        kth_bipartite_soft_matching(metric, 12)


def test_random_matching_merges_r_tokens_into_their_closest():
    torch.manual_seed(5)
    x = torch.randn(4, 20, 8)
    merge, _ = random_bipartite_soft_matching(x, 7)
    source = merge_source(merge, x)
    assert source.shape == (4, 13, 20)
    assert torch.equal(source.sum(1), torch.ones(4, 20))  # each token in exactly one row
    assert not torch.equal(source[0], source[1])
    # Some member of each group, its keeper, is what all the others of it are most similar to.
    unit = torch.nn.functional.normalize(x, dim=-1)
    score = unit @ unit.transpose(1, 2)
    for sample in range(4):
        groups = [row.nonzero().flatten().tolist() for row in source[sample]]
        single = [g[0] for g in groups if len(g) == 1]
        for group in (g for g in groups if len(g) > 1):
            best = [
                keeper
                for keeper in group
                if all(score[sample, t, keeper] >= score[sample, t, single].max() for t in group)
            ]
            assert best
    assert merge_source(random_bipartite_soft_matching(x, 99)[0], x).shape == (4, 1, 20)
    assert random_bipartite_soft_matching(x, 0)[0](x) is x


def test_compose_keeps_dropped_tokens_dropped():
    source = torch.tensor([[0, 1, -1, 2, 1]], dtype=torch.int32)
    assignment = torch.tensor([[1, -1, 0]], dtype=torch.int32)
    assert compose(source, assignment).tolist() == [[1, -1, -1, 0, -1]]


# ------------------------------------------------------------------------------------ ToMe layer


def test_layer_is_the_reference_step():
    torch.manual_seed(6)
    x, metric = torch.randn(2, 26, 12), torch.randn(2, 26, 8)
    tome = ToMe(5, trace=True)
    assert not tome.state_dict()
    assert "r=5" in repr(tome)

    y, size, source = tome(x, metric)
    assignment = reference.bipartite_match(metric, 5)
    wanted, wanted_size = reference.merge(x, assignment, 21)
    torch.testing.assert_close(y, wanted)
    assert torch.equal(size, wanted_size)
    assert torch.equal(source, assignment)

    z, size, source = tome(y, metric[:, :21], size, source, r=3)
    assert z.shape == (2, 18, 12)
    torch.testing.assert_close((z * size[..., None]).sum(1), x.sum(1))
    assert torch.equal(size.sum(1), torch.full((2,), 26.0))
    assert source.shape == (2, 26)
    assert torch.equal(size, torch.nn.functional.one_hot(source.long(), 18).sum(1).float())


def test_layer_passes_on_the_sources_where_they_are_read(monkeypatch):
    x, metric = torch.randn(2, 26, 12), torch.randn(2, 26, 8)
    expected = ToMe(5)(x, metric)
    given = []

    def merge(x, assignment, n_out, size, sources):
        given.append(sources)
        return reference.merge(x, assignment, n_out, size)

    monkeypatch.setattr(fastast.tome, "merge_tokens", merge)
    ToMe(5)(x, metric)
    monkeypatch.setattr(fastast.tome, "runs_in_cuda", lambda op, x: True)
    y, size, _ = ToMe(5)(x, metric)
    assert given[0] is None
    assert torch.equal(given[1], reference.sources(bipartite_match(metric, 5), 21))
    torch.testing.assert_close((y, size), expected[:2])
    monkeypatch.setitem(fastast.tome.POLICIES, "none", lambda metric, r, *_: given.append("own"))
    settings = MergeSettings(policy="none")
    assert settings.match_sources(metric, 5, x) == (None, None) and given[-1] == "own"


def test_layer_that_merges_nothing_returns_what_it_was_given():
    x = torch.randn(1, 9, 4)
    assert ToMe()(x, x)[0] is x
    assert ToMe()(x, x)[1:] == (None, None)
    assert ToMe(9)(x[:, :3], x[:, :3])[0].shape == (1, 3, 4)  # CLS, DIST and one patch


def test_layer_log_size():
    size = torch.tensor([[1.0, 4.0]])
    assert torch.equal(ToMe(1).log_size(size), size.log())
    assert ToMe(1).log_size(None) is None
    assert ToMe(1, prop_attn=False).log_size(size) is None


def test_layer_gradient_is_the_share_of_each_token():
    x = torch.randn(1, 14, 3, dtype=torch.float64, requires_grad=True)
    size = torch.arange(1.0, 15).view(1, 14)
    y, new_size, _ = ToMe(3)(x, _worked_example(), size)
    y.sum().backward()
    share = torch.ones(14)
    share[[3, 6, 10]] = size[0, [3, 6, 10]] / size[0, [3, 6, 10]].sum()
    share[[7, 8]] = size[0, [7, 8]] / size[0, [7, 8]].sum()
    torch.testing.assert_close(x.grad[0, :, 0].float(), share)
    assert not new_size.requires_grad


def test_layer_refuses_bad_arguments():
    x = torch.randn(2, 9, 4)
    with pytest.raises(ValueError, match="r must be 0 or more, got -1"):
        ToMe(-1)
    with pytest.raises(TypeError, match="r must be an int"):
        ToMe(2.0)
    with pytest.raises(ValueError, match=r"policy must be one of \['tome'\], got 'magic'"):
        ToMe(2, policy="magic")
    with pytest.raises(ValueError, match=r"metric must be \[B, N, C\] for x .*\[2, 8, 4\]"):
        ToMe(2)(x, x[:, :8])
    with pytest.raises(ValueError, match="r must be 0 or more"):
        ToMe(2)(x, x, r=-1)
    metric = x.clone()
    metric[1, 3, 0] = math.nan
    with pytest.raises(RuntimeError, match="metric must be finite"):
        ToMe(2)(x, metric)


def test_settings_know_their_policy():
    metric = torch.randn(2, 12, 4)
    settings = MergeSettings(class_token=False, distill_token=False)
    assert settings.merged(12, 50) == 6
    assert torch.equal(settings.match(metric, 6), bipartite_match(metric, 6, False, False))


def test_code_written_for_the_published_tome_runs():
    """The merge inside a block as its users write it, with only the import changed."""
    torch.manual_seed(8)
    x, k = torch.randn(2, 18, 8), torch.randn(2, 2, 18, 4)
    info = {"r": parse_r(2, 4), "size": None, "source": None}
    for _ in range(2):
        r = info["r"].pop(0)
        metric = k.mean(1)[:, : x.shape[1]]
        merge, _unmerge = bipartite_soft_matching(metric, r, True, True)
        info["source"] = merge_source(merge, x, info["source"])
        x, info["size"] = merge_wavg(merge, x, info["size"])
    assert x.shape == (2, 10, 8)
    assert info["size"].shape == (2, 10, 1)
    assert torch.equal(info["source"].sum(-1, keepdim=True), info["size"])
