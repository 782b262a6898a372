"""Every op against the fp32 reference over the shapes that break kernels: lengths around tiles and
powers of two, heads that are no power of two, nothing and everything merged, slices, no batch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import fastast_kernels as fk
from fastast_kernels import reference
from fastast_kernels.testing import assert_as_accurate, assert_valid_match, materialised_attention

pytestmark = pytest.mark.usefixtures("backend", "poison")

TOKENS = (2, 3, 63, 64, 130, 512, 1214)
HEAD_DIMS = (16, 60, 64, 80)
PROTECTED = tuple(itertools.product((True, False), repeat=2))
HALF = (torch.bfloat16, torch.float16)


def shapes(dtypes: tuple[torch.dtype, ...]) -> list[pytest.ParameterSet]:  # type: ignore[name-defined]
    """Every length, short ones with every r; batches, head dims and dtypes take turns."""
    found = []
    turns = zip(
        itertools.product(TOKENS, (0, 1, 10**6)),
        itertools.cycle((1, 3)),
        itertools.cycle(HEAD_DIMS),
        itertools.cycle(dtypes),
        strict=False,
    )
    for (n, r), batch, d, dtype in turns:
        if n > 500:
            if r != (1 if n < 1000 else 10**6):
                continue  # says no more than at 130, and Triton's interpreter takes its time
            batch = 1
        name = f"B{batch}-N{n}-D{d}-r{'max' if r > n else r}-{str(dtype).removeprefix('torch.')}"
        found.append(pytest.param(batch, n, d, r, dtype, id=name))
    return found


def qkv(batch: int, heads: int, n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Slices of one packed buffer, as a model has them."""
    return torch.randn(batch, n, 3, heads, d).to(dtype).permute(2, 0, 3, 1, 4).unbind(0)


@pytest.mark.parametrize("batch,n,d,r,dtype", shapes((torch.float32, *HALF)))
def test_match(batch: int, n: int, d: int, r: int, dtype: torch.dtype) -> None:
    _, k, _ = qkv(batch, 2, n, d, dtype)
    metric = fk.key_metric(k)
    mean = k.double().mean(1)
    truth = mean / mean.norm(dim=-1, keepdim=True)
    assert_as_accurate(metric, truth, reference.key_metric(k))
    for class_token, distill_token in PROTECTED:
        rows = fk.bipartite_match(metric, r, class_token, distill_token)
        assert_valid_match(metric, rows, r, class_token, distill_token)
        of_keys = fk.match_keys(k, r, class_token, distill_token)
        assert_valid_match(metric, of_keys, r, class_token, distill_token)
    in_half = fk.bipartite_match(metric.to(dtype), r)
    assert_valid_match(metric.to(dtype), in_half, r, True, True)


@pytest.mark.parametrize("batch,n,d,r,dtype", shapes((torch.float32, *HALF)))
def test_merge(batch: int, n: int, d: int, r: int, dtype: torch.dtype) -> None:
    n_out = n - fk.effective_r(n, r)
    rows = fk.bipartite_match(torch.randn(batch, n, 16), r)
    wide = torch.randn(batch, n, 2, d).to(dtype)
    x, residual = wide[:, :, 0], wide[:, :, 1]  # slices: tokens are not next to each other
    size = torch.randint(1, 9, (batch, n)).float()
    weight, bias = torch.randn(2, d)
    out, total = fk.merge(x, rows, n_out, size)
    truth, expected = reference.merge(x.double(), rows, n_out, size)
    assert_as_accurate(out, truth, reference.merge(x, rows, n_out, size)[0])
    assert torch.equal(total, expected)
    back = fk.unmerge(out, rows)
    assert torch.equal(back, reference.unmerge(out, rows))
    norm = weight, bias, 1e-6
    h, total, log_size, y = fk.merge_add_layer_norm(
        x, residual, rows, n_out, size, *norm, return_log_size=True
    )
    assert torch.equal(total, expected)
    torch.testing.assert_close(log_size, expected.log())
    wanted = reference.merge_add_layer_norm(x.double(), residual.double(), rows, n_out, size, *norm)
    plain = reference.merge_add_layer_norm(x, residual, rows, n_out, size, *norm)
    assert_as_accurate(h, wanted[0], plain[0], "h")
    assert_as_accurate(y, wanted[2], plain[2], "y")


@pytest.mark.parametrize("batch,n,d,r,dtype", shapes((torch.float32, *HALF)))
def test_merge_gradients(batch: int, n: int, d: int, r: int, dtype: torch.dtype) -> None:
    if n > 500:
        n = 257  # a gradient at 1214 says nothing more, and the interpreter takes its time
    n_out = n - fk.effective_r(n, r)
    rows = fk.bipartite_match(torch.randn(batch, n, 16), r)
    rows[:, 1::7] = -1  # dropped tokens, and rows that lose all of theirs
    size = torch.randint(1, 9, (batch, n)).float()
    leaves = [torch.randn(batch, n, d), torch.randn(batch, n, d), torch.randn(d), torch.randn(d)]
    pulls = torch.randn(2, batch, n_out, d).to(dtype)

    def gradients(function, as_dtype: torch.dtype) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
        inputs = [t.to(dtype).to(as_dtype).requires_grad_() for t in leaves]
        h, _, y = function(*inputs[:2], rows, n_out, size, *inputs[2:], 1e-6)
        short, _ = (fk.merge if function is fk.merge_add_layer_norm else reference.merge)(
            inputs[0], rows, n_out, size
        )
        long = (fk.unmerge if function is fk.merge_add_layer_norm else reference.unmerge)(h, rows)
        total = (h * pulls[0].to(as_dtype)).sum() + (y * pulls[1].to(as_dtype)).sum()
        return torch.autograd.grad(total + short.square().sum() + long.sum(), inputs)

    got = gradients(fk.merge_add_layer_norm, dtype)
    truth = gradients(reference.merge_add_layer_norm, torch.float64)
    plain = gradients(reference.merge_add_layer_norm, dtype)
    # PyTorch's half-precision gradients of the sums over thousands of rows are rounded once, like
    # ours, and those of x twice: three times its error is what two roundings more may cost.
    for name, g, t, p in zip(("x", "residual", "weight", "bias"), got, truth, plain, strict=True):
        assert_as_accurate(g, t, p, f"gradient of {name}", factor=3.0)


@pytest.mark.parametrize(
    "n,d,sized",
    [
        *itertools.product([n for n in TOKENS if n < 500], HEAD_DIMS, (True, False)),
        *[(512, 60, True), (512, 64, False), (1214, 64, True), (1214, 80, False)],
    ],
)
def test_attention(n: int, d: int, sized: bool) -> None:
    dtype = (torch.float32, *HALF)[(n + d) % 3]
    heads = 1 if n > 500 else 2
    q, k, v = qkv(1 if n > 500 else 2, heads, n, d, dtype)
    log_size = torch.randint(1, 30, (len(q), n)).float().log() if sized else None
    out, lse = fk.attention_with_lse(q, k, v, log_size)
    truth = reference.attention(q.double(), k.double(), v.double(), log_size)
    assert_as_accurate(out, truth, materialised_attention(q, k, v, log_size), "output")
    exact = reference.attention_lse(q.double(), k.double(), log_size)
    # torch's CPU kernel has a fast exponential in half precision, which shows here.
    factor = 100.0 if dtype in HALF else 2.0
    assert_as_accurate(lse, exact, reference.attention_lse(q, k, log_size), "log-sum-exp", factor)


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("nq,n,d", [(2, 2, 16), (63, 130, 64), (130, 130, 80), (512, 512, 60)])
def test_column_sums(nq: int, n: int, d: int, causal: bool) -> None:
    for dtype in (torch.float32, *HALF):
        q, k, _ = qkv(2, 2, n, d, dtype)
        q = q[:, :, n - nq :]
        log_size = torch.randint(1, 30, (2, n)).float().log()
        logits = reference.attention_logits(q.double(), k.double(), log_size)
        if causal:
            hidden = torch.ones(nq, n, dtype=torch.bool).triu(n - nq + 1)
            logits = logits.masked_fill(hidden, -torch.inf)
        lse = logits.logsumexp(-1).float()
        sums = fk.attention_column_sums(q, k, lse, log_size, causal=causal)
        truth = logits.softmax(-1).sum(-2)
        assert_as_accurate(sums, truth, logits.float().softmax(-1).sum(-2), factor=4.0)
        torch.testing.assert_close(sums.sum(-1), torch.full((2, 2), float(nq)))


@pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=str)
@pytest.mark.parametrize("n,d", [(3, 16), (64, 60), (130, 64), (200, 80), (70, 128)])
def test_attention_gradients(n: int, d: int, dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 2, n, d, dtype)
    log_size = torch.randint(1, 30, (2, n)).float().log()
    pull = torch.randn(2, 2, n, d).to(dtype)

    def gradients(function, as_dtype: torch.dtype) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
        leaves = [t.to(as_dtype).requires_grad_() for t in (q, k, v)]
        return torch.autograd.grad(function(*leaves, log_size), leaves, pull.to(as_dtype))

    got = gradients(fk.attention, dtype)
    truth = gradients(reference.attention, torch.float64)
    plain = gradients(materialised_attention, dtype)
    # The backward has the softmax by its log-sum-exp, rounded, which plain PyTorch does not.
    for name, g, t, p in zip("qkv", got, truth, plain, strict=True):
        assert_as_accurate(g, t, p, f"gradient of {name}", factor=6.0)


def test_no_batch() -> None:
    x, rows = torch.empty(0, 20, 16), torch.empty(0, 20, dtype=torch.int32)
    weight = torch.ones(16)
    assert fk.bipartite_match(x, 3).shape == (0, 20)
    assert fk.merge(x, rows, 17)[0].shape == (0, 17, 16)
    assert fk.unmerge(x, rows).shape == (0, 20, 16)
    assert fk.merge_add_layer_norm(x, x, rows, 17, None, weight, weight)[0].shape == (0, 17, 16)
    q = torch.empty(0, 2, 20, 16)
    out, lse = fk.attention_with_lse(q, q, q)
    assert out.shape == q.shape and lse.shape == (0, 2, 20)
    assert fk.attention_column_sums(q, q, lse).shape == (0, 2, 20)
    assert fk.key_metric(q).shape == (0, 20, 16)
    assert fk.match_keys(q, 3).shape == (0, 20)
