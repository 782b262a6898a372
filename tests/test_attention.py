"""attention with a per-key log size: values, gradients, and what it means."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastast_kernels import attention, reference
from fastast_kernels.testing import DTYPES, assert_as_accurate, materialised_attention

pytestmark = pytest.mark.usefixtures("backend")


def inputs(batch: int, heads: int, n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    q, k, v = (torch.randn(batch, heads, n, d).to(dtype) for _ in range(3))
    return q, k, v, torch.randint(1, 30, (batch, n)).float().log()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n,d", [(1, 64), (2, 16), (63, 64), (146, 64), (130, 80)])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "sized"])
def test_forward(n: int, d: int, dtype: torch.dtype, biased: bool) -> None:
    q, k, v, log_size = inputs(2, 3, n, d, dtype)
    bias = log_size if biased else None
    out = attention(q, k, v, bias)
    truth = reference.attention(q.double(), k.double(), v.double(), bias)
    assert_as_accurate(out, truth, materialised_attention(q, k, v, bias, d**-0.5))


def test_a_token_counts_size_times() -> None:
    q, k, v, _ = inputs(1, 2, 10, 16, torch.float32)
    size = torch.tensor([[3, 1, 1, 5, 1, 1, 2, 1, 1, 1]])
    repeated = [t.repeat_interleave(size[0], dim=2) for t in (k, v)]
    out = attention(q, k, v, size.float().log())
    torch.testing.assert_close(out, attention(q, *repeated), rtol=1e-5, atol=1e-5)


def test_fewer_queries_than_keys() -> None:
    q, k, v, log_size = inputs(2, 3, 50, 32, torch.float32)
    out = attention(q, k, v, log_size, scale=0.3)
    torch.testing.assert_close(attention(q[:, :, :2], k, v, log_size, scale=0.3), out[:, :, :2])


def test_packed_and_strided() -> None:
    qkv = torch.randn(2, 40, 3, 4, 16)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    dense = attention(q.contiguous(), k.contiguous(), v.contiguous())
    torch.testing.assert_close(attention(q, k, v), dense, rtol=0, atol=0)
    wide = torch.randn(2, 4, 16, 40).transpose(2, 3)  # the last dimension is not dense
    torch.testing.assert_close(attention(wide, k, v), attention(wide.contiguous(), k, v))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "nq,n,d",
    [(1, 33, 8), (40, 257, 12), (33, 600, 96), (15, 300, 128), (33, 70, 320), (5, 40, 600)],
)
def test_other_heads_and_lengths(nq: int, n: int, d: int, dtype: torch.dtype) -> None:
    """Dims that are no multiple of a vector, and keys that are more than a block of them."""
    q, k, v, log_size = inputs(2, 2, n, d, dtype)
    q = q[:, :, :nq]
    truth = reference.attention(q.double(), k.double(), v.double(), log_size)
    assert_as_accurate(
        attention(q, k, v, log_size), truth, materialised_attention(q, k, v, log_size)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_far_apart(dtype: torch.dtype) -> None:
    """The first keys' logits say nothing about the others': far below them, then far above."""
    q, k, v, log_size = inputs(1, 2, 400, 64, dtype)
    for factors in ((1, 60), (60, 1)):
        for first in (32, 300):
            scaled = torch.cat([k[:, :, :first] * factors[0], k[:, :, first:] * factors[1]], dim=2)
            truth = reference.attention(q.double(), scaled.double(), v.double(), log_size)
            plain = materialised_attention(q, scaled, v, log_size)
            assert_as_accurate(attention(q, scaled, v, log_size), truth, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_size_zero_is_not_there(dtype: torch.dtype) -> None:
    q, k, v, _ = inputs(1, 2, 90, 64, dtype)
    for there in (slice(0, 20), slice(60, 90)):
        log_size = torch.full((1, 90), -torch.inf)
        log_size[:, there] = 0
        truth = reference.attention(q.double(), k[:, :, there].double(), v[:, :, there].double())
        plain = materialised_attention(q, k[:, :, there], v[:, :, there])
        assert_as_accurate(attention(q, k, v, log_size), truth, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_a_number_shows(dtype: torch.dtype) -> None:
    """In its head, or its query's row, and nowhere else."""
    q, k, v, _ = inputs(1, 3, 70, 32, dtype)
    k[0, 1, 50, 3] = torch.nan
    q[0, 0, 9, 2] = torch.nan
    wrong = attention(q, k, v).isnan().all(-1)[0]
    assert wrong[1].all() and wrong[0].nonzero().tolist() == [[9]] and not wrong[2].any()
    assert attention(q, k, v, torch.full((1, 70), -torch.inf)).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_batch_change_no_bit(dtype: torch.dtype) -> None:
    q, k, v, log_size = inputs(3, 5, 150, 64, dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = attention(q, k, v, log_size)
        torch.set_num_threads(2)
        two = attention(q, k, v, log_size)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, two)
    alone = attention(q[1:2], k[1:2], v[1:2], log_size[1:2])
    assert torch.equal(alone, two[1:2])


def test_no_keys_in_cpu_kernels() -> None:
    q = torch.randn(1, 2, 3, 16)
    assert (attention(q, q[:, :, :0], q[:, :, :0]) == 0).all()


def test_empty_batch() -> None:
    q, k, v, log_size = inputs(0, 3, 5, 16, torch.float32)
    assert attention(q, k, v, log_size).shape == (0, 3, 5, 16)


def test_gradients_exactly() -> None:
    q, k, v, log_size = inputs(1, 2, 5, 4, torch.float64)
    leaves = tuple(t.requires_grad_() for t in (q, k, v))
    assert torch.autograd.gradcheck(lambda *t: attention(*t, log_size), leaves)
    assert torch.autograd.gradcheck(lambda *t: attention(*t, None, 0.7), leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_in_every_dtype(dtype: torch.dtype) -> None:
    q, k, v, log_size = inputs(2, 3, 70, 64, dtype)
    pull = torch.randn(2, 3, 70, 64).to(dtype)

    def gradients(fn, as_dtype: torch.dtype) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
        leaves = [t.to(as_dtype).requires_grad_() for t in (q, k, v)]
        return torch.autograd.grad(fn(*leaves), leaves, pull.to(as_dtype))

    got = gradients(lambda *t: attention(*t, log_size), dtype)
    truth = gradients(lambda *t: materialised_attention(*t, log_size, 0.125), torch.float64)
    pytorch = gradients(lambda *t: materialised_attention(*t, log_size, 0.125), dtype)
    for name, g, t, p in zip("qkv", got, truth, pytorch, strict=True):
        assert_as_accurate(g, t, p, f"gradient of {name}")
