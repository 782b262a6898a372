"""merge, unmerge, add_layer_norm and merge_add_layer_norm: values and gradients."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from fastast_kernels import (
    add_layer_norm,
    bipartite_match,
    merge,
    merge_add_layer_norm,
    reference,
    unmerge,
)
from fastast_kernels.backends import INTERPRETED
from fastast_kernels.testing import DTYPES, assert_as_accurate

pytestmark = pytest.mark.usefixtures("backend", "poison")

SHAPES = [(1, 2, 1), (3, 3, 7), (2, 63, 40), (1, 130, 768), (2, 37, 1100)]


def random_assignment(batch: int, n: int, n_out: int, dropped: bool) -> Tensor:
    """Every row gets a token; the rest go anywhere, or are dropped."""
    rows = torch.randint(-1 if dropped else 0, n_out, (batch, n), dtype=torch.int32)
    for b in range(batch):
        rows[b, torch.randperm(n)[:n_out]] = torch.randperm(n_out, dtype=torch.int32)
    return rows


def plain(fn, *args, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    """The reference formula with every floating input and intermediate in ``dtype``."""
    cast = [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    out = fn(*cast)
    return [o.to(dtype) for o in out] if isinstance(out, tuple) else [out.to(dtype)]


@pytest.mark.parametrize("dropped", [False, True])
def test_sources_change_nothing(dropped: bool) -> None:
    """A merge that is told the tokens of each row gives the same bits, and the same gradients."""
    n, n_out, d = 130, 80, 40
    rows = random_assignment(2, n, n_out, dropped)
    size = torch.randint(1, 50, (2, n)).float()
    x, residual = (torch.randn(2, n, d, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(d, requires_grad=True) for _ in range(2))
    results = []
    for sources in (None, reference.sources(rows, n_out)):
        merged, total = merge(x, rows, n_out, size, sources)
        h, _, log_size, y = merge_add_layer_norm(
            x, residual, rows, n_out, size, weight, bias, return_log_size=True, sources=sources
        )
        pull = (merged * merged.detach()).sum() + (h * h.detach()).sum() + (y * y.detach()).sum()
        gradients = torch.autograd.grad(pull, (x, residual, weight, bias))
        results.append((merged, total, h, log_size, y, *gradients))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_sources_of_another_kind() -> None:
    x, rows = torch.randn(2, 6, 8), torch.zeros(2, 6, dtype=torch.int32)
    weight = torch.ones(8)
    for wrong, error, message in (
        (torch.zeros(2, 11), TypeError, "sources must be an int32 tensor or None, got torch.float"),
        ([1, 2], TypeError, "sources must be an int32 tensor or None, got list"),
        (
            torch.zeros(2, 10, dtype=torch.int32),
            ValueError,
            r"sources must have shape \[2, 11\] for 6 tokens and 4 rows, got \[2, 10\]",
        ),
    ):
        with pytest.raises(error, match=message):
            merge(x, rows, 4, None, wrong)  # type: ignore[arg-type]
        with pytest.raises(error, match=message):
            merge_add_layer_norm(x, x, rows, 4, None, weight, weight, sources=wrong)  # type: ignore[call-overload]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch,n,d", SHAPES)
@pytest.mark.parametrize("sized", [False, True], ids=["unit", "sized"])
def test_merge(batch: int, n: int, d: int, dtype: torch.dtype, sized: bool) -> None:
    n_out = max(1, n * 2 // 3)
    x = torch.randn(batch, n, d).to(dtype)
    size = torch.randint(1, 50, (batch, n)).float() if sized else None
    for dropped in (False, True):
        rows = random_assignment(batch, n, n_out, dropped)
        out, new_size = merge(x, rows, n_out, size)
        truth, total = reference.merge(x.double(), rows, n_out, size)
        assert_as_accurate(out, truth, truth.to(dtype))
        assert new_size.dtype == torch.float32
        torch.testing.assert_close(new_size, total, rtol=0, atol=0)  # integers below 2^24 are exact
        kept = (rows >= 0).double() * (torch.ones(batch, n) if size is None else size)
        assert torch.equal(new_size.double().sum(1), kept.sum(1))
        if dtype == torch.float64:
            mass = (x * kept[..., None]).sum(1)
            torch.testing.assert_close((out * new_size[..., None]).sum(1), mass)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everything_into_one_row(dtype: torch.dtype) -> None:
    """The worst fan-in; sizes whose sum bf16 and fp16 could not hold, products fp16 could not."""
    x = (60 + torch.rand(1, 2100, 9)).to(dtype)
    size = torch.full((1, 2100), 3.0)
    rows = torch.zeros(1, 2100, dtype=torch.int32)
    out, new_size = merge(x, rows, 1, size)
    assert new_size.item() == 6300
    truth = reference.merge(x.double(), rows, 1, size)[0]
    in_order = reference.merge(x, rows, 1, size)[0]  # a running fp32 sum, as published
    assert_as_accurate(out, truth, in_order)


def test_row_without_tokens_is_zero() -> None:
    rows = torch.tensor([[0, 2, -1, 0]], dtype=torch.int32)
    out, size = merge(torch.ones(1, 4, 3), rows, 3)
    assert out[0].tolist() == [[1] * 3, [0] * 3, [1] * 3]
    assert size.tolist() == [[2, 0, 1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unmerge(dtype: torch.dtype) -> None:
    x = torch.randn(2, 11, 13).to(dtype)
    rows = random_assignment(2, 20, 11, dropped=True)
    out = unmerge(x, rows)
    for b in range(2):
        for j in range(20):
            row = rows[b, j].item()
            assert torch.equal(out[b, j], x[b, row] if row >= 0 else torch.zeros_like(x[b, 0]))


def test_round_trip_with_a_distillation_token() -> None:
    """The published unmerge returns the wrong tokens here (facts.md 1.1)."""
    x = torch.randn(2, 30, 8)
    rows = bipartite_match(x, 7)
    back = unmerge(merge(x, rows, 23)[0], rows)
    alone = torch.stack([torch.bincount(r, minlength=23)[r.long()] == 1 for r in rows])
    assert alone.sum() >= 2 * (30 - 14) and alone[:, :2].all()
    assert torch.equal(back[alone], x[alone])
    for b in range(2):
        for row in range(23):
            group = rows[b] == row
            torch.testing.assert_close(
                back[b, group], x[b, group].mean(0).expand(int(group.sum()), -1)
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch,n,d", SHAPES)
def test_merge_add_layer_norm(batch: int, n: int, d: int, dtype: torch.dtype) -> None:
    n_out = max(1, n * 2 // 3)
    x, residual = torch.randn(2, batch, n, d).to(dtype)
    weight, bias = torch.randn(2, d).to(dtype)
    size = torch.rand(batch, n) * 9 + 1
    rows = random_assignment(batch, n, n_out, dropped=n > 60)
    args = (x, residual, rows, n_out, size, weight, bias, 1e-6)
    h, new_size, y = merge_add_layer_norm(*args)
    truth = plain(reference.merge_add_layer_norm, *args, dtype=torch.float64)
    unfused = _unfused(*args)
    assert_as_accurate(h, truth[0], unfused[0], "h")
    if d > 1:  # of one channel, LayerNorm is its bias
        assert_as_accurate(y, truth[2], unfused[1], "LayerNorm(h)")
    torch.testing.assert_close(new_size.double(), truth[1], rtol=1e-6, atol=1e-6)


def _unfused(x, residual, rows, n_out, size, weight, bias, eps):  # type: ignore[no-untyped-def]
    """What a PyTorch user would write, in the dtype of x throughout."""
    h = reference.merge(x + residual, rows, n_out, size)[0]
    return h, torch.nn.functional.layer_norm(h, h.shape[-1:], weight, bias, eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7,), (5, 768), (2, 3, 33), (2, 3, 4, 16)], ids=str)
def test_add_layer_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, *shape).to(dtype)
    weight, bias = torch.randn(2, shape[-1]).to(dtype)
    h, y = add_layer_norm(x, residual, weight, bias, 1e-5)
    truth = plain(reference.add_layer_norm, x, residual, weight, bias, 1e-5, dtype=torch.float64)
    unfused = x + residual
    assert_as_accurate(h, truth[0], unfused)
    normed = torch.nn.functional.layer_norm(unfused, shape[-1:], weight, bias, 1e-5)
    assert_as_accurate(y, truth[1], normed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_with_and_without_a_gradient(dtype: torch.dtype) -> None:
    """Two ops on a CPU, the same bits."""
    x, residual = torch.randn(2, 2, 37, 130).to(dtype)
    weight, bias = torch.randn(2, 130).to(dtype)
    rows = random_assignment(2, 37, 25, dropped=False)
    size = torch.rand(2, 37) * 9 + 1

    def both(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        merged = merge_add_layer_norm(
            x, residual, rows, 25, size, weight, bias, return_log_size=True
        )
        return *add_layer_norm(x, residual, weight, bias), *merged

    trained = both(x.clone().requires_grad_())
    assert trained[0].requires_grad
    for a, b in zip(trained, both(x), strict=True):
        assert torch.equal(a, b)


def test_add_layer_norm_without_residual() -> None:
    x, weight, bias = torch.randn(4, 8), torch.randn(8), torch.randn(8)
    h, y = add_layer_norm(x, None, weight, bias, 1e-6)
    assert h is x
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (8,), weight, bias, 1e-6))


def test_layer_norm_of_large_offsets() -> None:
    """The variance is taken about the mean, so an offset of 1e4 costs no digits."""
    x = torch.randn(3, 256) + 1e4
    zero, one = torch.zeros(256), torch.ones(256)
    _, y = add_layer_norm(x, torch.zeros_like(x), one, zero, 1e-6)
    truth = reference.add_layer_norm(x.double(), torch.zeros_like(x).double(), one, zero, 1e-6)[1]
    assert (y - truth).abs().max() < 4e-3  # the mean is only known to fp32's 1e-3 at 1e4


def test_mixed_parameter_dtype() -> None:
    """A bf16 stream beside fp32 LayerNorm parameters, as after model.to(bf16) of all but norms."""
    x, residual = torch.randn(2, 3, 16).to(torch.bfloat16)
    weight, bias = torch.randn(2, 16)
    _, y = add_layer_norm(x, residual, weight, bias)
    assert y.dtype == torch.bfloat16
    truth = reference.add_layer_norm(
        x.double(), residual.double(), weight.double(), bias.double(), 1e-6
    )
    assert (y - truth[1]).abs().max() < 0.05


def test_strided_inputs() -> None:
    x = torch.randn(2, 8, 30).transpose(1, 2)
    residual = torch.randn(2, 30, 16)[..., ::2]
    size = (torch.rand(30, 2) + 1).t()
    rows = random_assignment(2, 30, 20, False)
    weight, bias = torch.randn(16)[::2], torch.randn(16)[::2]
    got = merge_add_layer_norm(x, residual, rows, 20, size, weight, bias)
    dense = merge_add_layer_norm(
        x.contiguous(),
        residual.contiguous(),
        rows,
        20,
        size.contiguous(),
        weight.clone(),
        bias.clone(),
    )
    for a, b in zip(got, dense, strict=True):
        assert torch.equal(a, b)


def test_empty_batch() -> None:
    x, rows = torch.empty(0, 6, 4), torch.empty(0, 6, dtype=torch.int32)
    weight = torch.ones(4, requires_grad=True)
    assert merge(x, rows, 4)[0].shape == (0, 4, 4)
    assert unmerge(x, torch.empty(0, 9, dtype=torch.int32)).shape == (0, 9, 4)
    h, size, y = merge_add_layer_norm(x, x, rows, 4, None, weight, weight)
    assert h.shape == y.shape == (0, 4, 4) and size.shape == (0, 4)
    y.sum().backward()
    assert (weight.grad == 0).all()


def test_gradients_exactly() -> None:
    """gradcheck in fp64: merge (unit and weighted, dropping), unmerge, both LayerNorms."""
    rows = random_assignment(2, 9, 5, dropped=True)
    size = torch.rand(2, 9) + 0.5
    x = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    short = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    # In Triton's interpreter a whole Jacobian takes minutes: one product with it says as much.
    check = functools.partial(torch.autograd.gradcheck, fast_mode=INTERPRETED)
    # fp32 sizes are constants of 24 bits in these fp64 sums: the tolerance is theirs.
    assert check(lambda t: merge(t, rows, 5)[0], (x,), atol=1e-6)
    assert check(lambda t: merge(t, rows, 5, size)[0], (x,), atol=1e-6)
    assert check(lambda t: unmerge(t, rows), (short,))
    assert check(lambda *t: add_layer_norm(*t, 1e-6), (x, residual, weight, bias))

    def fused(*t: Tensor) -> tuple[Tensor, Tensor]:
        h, _, y = merge_add_layer_norm(t[0], t[1], rows, 5, size, t[2], t[3], 1e-6)
        return h, y

    assert check(fused, (x, residual, weight, bias), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch,n,d", [(1, 65, 768), (9, 40, 33)])
def test_gradients_in_every_dtype(batch: int, n: int, d: int, dtype: torch.dtype) -> None:
    """Fused backward against autograd of the unfused chain, on enough rows for several threads."""
    n_out = n * 2 // 3
    rows = random_assignment(batch, n, n_out, dropped=True)
    size = torch.rand(batch, n) + 0.5
    inputs = [torch.randn(batch, n, d), torch.randn(batch, n, d), torch.randn(d), torch.randn(d)]
    pulls = [torch.randn(batch, n_out, d).to(dtype) for _ in range(2)]

    def gradients(fn, as_dtype: torch.dtype) -> list[Tensor]:  # type: ignore[no-untyped-def]
        leaves = [t.to(dtype).to(as_dtype).requires_grad_() for t in inputs]
        h, y = fn(*leaves)
        grads = torch.autograd.grad((h, y), leaves, [p.to(as_dtype) for p in pulls])
        return list(grads)

    def fused(x, residual, weight, bias):  # type: ignore[no-untyped-def]
        h, _, y = merge_add_layer_norm(x, residual, rows, n_out, size, weight, bias, 1e-6)
        return h, y

    def unfused(x, residual, weight, bias):  # type: ignore[no-untyped-def]
        return _unfused(x, residual, rows, n_out, size, weight, bias, 1e-6)

    got = gradients(fused, dtype)
    truth = gradients(unfused, torch.float64)
    pytorch = gradients(unfused, dtype)
    for name, g, t, p in zip(("x", "residual", "weight", "bias"), got, truth, pytorch, strict=True):
        assert_as_accurate(g, t, p, f"gradient of {name}")


def test_same_bits_run_after_run() -> None:
    x, residual = torch.randn(2, 4, 200, 64)
    rows = random_assignment(4, 200, 90, dropped=False)
    size = torch.rand(4, 200) + 1
    weight, bias = torch.randn(2, 64)
    first = merge_add_layer_norm(x, residual, rows, 90, size, weight, bias)
    for _ in range(3):
        for a, b in zip(
            first, merge_add_layer_norm(x, residual, rows, 90, size, weight, bias), strict=True
        ):
            assert torch.equal(a, b)
