"""attention with a per-key log size: values, gradients, and what it means."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastast_kernels import attention, attention_with_lse, reference
from fastast_kernels.backends import forced
from fastast_kernels.testing import (
    DTYPES,
    UNIT,
    assert_as_accurate,
    materialised_attention,
)

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


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float64], ids=str)
def test_logits_by_the_ten_thousand(dtype: torch.dtype) -> None:
    """More than fits beside the fraction in what kernels make powers of two from."""
    q, k, v, log_size = inputs(1, 2, 100, 64, dtype)
    most = 40 if dtype == torch.float16 else 200  # whose own largest number is 65504
    for factors in ((most, most), (most, -most), (30, 30)):
        large, wide = q * factors[0], k * factors[1]
        for first in (0, 40):  # all of them, or those of later keys
            keys = torch.cat([k[:, :, :first], wide[:, :, first:]], dim=2)
            truth = reference.attention(large.double(), keys.double(), v.double(), log_size)
            plain = materialised_attention(large, keys, v, log_size)
            assert_as_accurate(attention(large, keys, v, log_size), truth, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_with_a_gradient(dtype: torch.dtype) -> None:
    """Weights are less exact where nobody asks for the log-sum-exp, not less than their dtype."""
    q, k, v, log_size = inputs(2, 3, 146, 64, dtype)
    truth = reference.attention(q.double(), k.double(), v.double(), log_size)
    plain = materialised_attention(q, k, v, log_size)
    out = attention(q.clone().requires_grad_(), k, v, log_size)
    assert out.requires_grad
    for other in (out.detach(), attention_with_lse(q, k, v, log_size)[0]):
        assert_as_accurate(other, truth, plain)


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
def test_what_was_in_memory_does_not_show(dtype: torch.dtype) -> None:
    """Kernels keep their memory, and multiply more rows and columns of it than they use."""
    for n in (2, 6, 20, 38, 70):
        attention(*(torch.full((1, 2, 300, 64), torch.nan, dtype=dtype) for _ in range(3)))
        q, k, v, log_size = inputs(1, 2, n, 64, dtype)
        truth = reference.attention(q.double(), k.double(), v.double(), log_size)
        plain = materialised_attention(q, k, v, log_size)
        assert_as_accurate(attention(q, k, v, log_size), truth, plain)


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


def gradients(
    fn: Callable[..., Tensor], tensors: tuple[Tensor, ...], pull: Tensor
) -> tuple[Tensor, ...]:
    """Of ``fn`` by q, k and v in their dtypes."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    return torch.autograd.grad(fn(*leaves), leaves, pull.to(leaves[0].dtype))


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """PyTorch's own, whose backward computes the weights again from their log-sum-exp as ours does:
    in fp32 that has its own error, larger than that of weights that were kept."""
    bias = None if log_size is None else log_size[:, None, None, :].to(q.dtype)
    return scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def assert_gradients(
    q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, scale: float | None = None
) -> None:
    """Those of q, k and v are as close to fp64 as those of PyTorch's fused attention.

    Four times the largest of its errors: with two tokens that is one of few, and luck. Eight times
    for Triton: its backward adds up logits in another order than the forward, whose log-sum-exp
    they meet, and a logit of 200 has a last place of 1.5e-5 in fp32.
    """
    factor = 8 if forced() == "triton" else 4
    pull = torch.randn(q.shape).to(q.dtype)
    wide = tuple(t.double() for t in (q, k, v))
    got = gradients(lambda *t: attention(*t, log_size, scale), (q, k, v), pull)
    truth = gradients(lambda *t: materialised_attention(*t, log_size, scale), wide, pull)
    plain = gradients(lambda *t: fused_attention(*t, log_size, scale), (q, k, v), pull)
    for name, g, t, p in zip("qkv", got, truth, plain, strict=True):
        assert_as_accurate(g, t, p, f"gradient of {name}", factor=factor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_one_key(dtype: torch.dtype) -> None:
    """All of its weight, whatever the logit: those of q and k are 0 but for rounding."""
    q, k, v, log_size = inputs(2, 3, 1, 64, dtype)
    pull = torch.randn(2, 3, 1, 64).to(dtype)
    of_q, of_k, of_v = gradients(lambda *t: attention(*t, log_size), (q, k, v), pull)
    ulps = 8 if forced() == "triton" else 1  # of a weight that is computed again
    assert (of_v - pull).abs().max() <= ulps * UNIT[dtype] * pull.abs().max()
    # The sum of products that is taken from itself is some 8 = sqrt(64), and k and q some 3.
    limit = 8 * 3 * UNIT[torch.float32 if dtype != torch.float64 else dtype]
    assert of_q.abs().max() <= limit and of_k.abs().max() <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_beside_weights_that_were_kept(dtype: torch.dtype) -> None:
    """At most twice the errors of attention that writes its weights down."""
    q, k, v, log_size = inputs(2, 3, 70, 64, dtype)
    pull = torch.randn(q.shape).to(dtype)
    wide = tuple(t.double() for t in (q, k, v))
    got = gradients(lambda *t: attention(*t, log_size), (q, k, v), pull)
    truth = gradients(lambda *t: materialised_attention(*t, log_size, 0.125), wide, pull)
    plain = gradients(lambda *t: materialised_attention(*t, log_size, 0.125), (q, k, v), pull)
    for name, g, t, p in zip("qkv", got, truth, plain, strict=True):
        assert_as_accurate(g, t, p, f"gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [16, 64, 80, 128])
@pytest.mark.parametrize("n", [2, 17, 33, 70, 146])
def test_gradients_in_every_dtype(n: int, d: int, dtype: torch.dtype) -> None:
    q, k, v, log_size = inputs(2, 3, n, d, dtype)
    assert_gradients(q, k, v, log_size)
    assert_gradients(q, k, v, None, 0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "nq,n,d", [(1, 33, 8), (2, 300, 64), (260, 515, 24), (530, 259, 64), (5, 40, 200)]
)
def test_gradients_of_more_than_a_block(nq: int, n: int, d: int, dtype: torch.dtype) -> None:
    """More keys and queries than are worked on at a time, and not as many of one as the other."""
    q = torch.randn(1, 2, nq, d).to(dtype)
    _, k, v, log_size = inputs(1, 2, n, d, dtype)
    assert_gradients(q, k, v, log_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_slices(dtype: torch.dtype) -> None:
    """q, k and v of one buffer, a gradient that is expanded or of other strides: no other bits."""
    qkv = torch.randn(2, 40, 3, 4, 64).to(dtype)
    packed = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    dense = tuple(t.contiguous() for t in packed)
    one = torch.ones((), dtype=dtype).expand(2, 4, 40, 64)
    turned = torch.randn(2, 4, 64, 40).to(dtype).transpose(2, 3)
    for pull in (one, turned):
        want = gradients(attention, dense, pull.contiguous())
        for name, g, w in zip("qkv", gradients(attention, packed, pull), want, strict=True):
            assert torch.equal(g, w), f"gradient of {name}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_large_logits(dtype: torch.dtype) -> None:
    """Weights of 0 and 1, and a row of them that only its own maximum keeps finite."""
    q, k, v, log_size = inputs(1, 2, 100, 64, dtype)
    assert_gradients(q * 8, k, v, log_size)
    k[:, :, 60:] *= 30
    assert_gradients(q, k, v, log_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_size_zero(dtype: torch.dtype) -> None:
    """A key that is not there gets none, and leaves the others' as they are."""
    q, k, v, _ = inputs(1, 2, 90, 64, dtype)
    there = torch.arange(90) % 3 > 0
    log_size = torch.where(there, 0.0, -torch.inf)[None]
    pull = torch.randn(1, 2, 90, 64).to(dtype)
    got = gradients(lambda *t: attention(*t, log_size), (q, k, v), pull)
    few = (q, k[:, :, there], v[:, :, there])
    plain = gradients(materialised_attention, few, pull)
    truth = gradients(materialised_attention, tuple(t.double() for t in few), pull)
    for name, g, t, p in zip("qkv", got, truth, plain, strict=True):
        if name != "q":
            assert (g[:, :, ~there] == 0).all(), f"gradient of {name}"
            g = g[:, :, there]
        assert_as_accurate(g, t, p, f"gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_that_is_not_a_number_shows(dtype: torch.dtype) -> None:
    """In its head, and in no other."""
    q, k, v, _ = inputs(1, 3, 70, 32, dtype)
    pull = torch.ones(1, 3, 70, 32, dtype=dtype)
    pull[0, 1, 9, 2] = torch.nan
    for name, g in zip("qkv", gradients(attention, (q, k, v), pull), strict=True):
        wrong = g.isnan().flatten(2).any(-1)[0]
        assert wrong.tolist() == [False, True, False], f"gradient of {name}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_the_same_bits(dtype: torch.dtype, backend: str, poison: None) -> None:
    """From call to call, for any number of threads, and in any batch; none is left unwritten."""
    if backend == "reference":
        pytest.skip("PyTorch's products add up in an order that depends on threads and batch")
    q, k, v, _ = inputs(3, 5, 150, 64, dtype)
    pull = torch.randn(3, 5, 150, 64).to(dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = gradients(attention, (q, k, v), pull)
        torch.set_num_threads(2)
        two = gradients(attention, (q, k, v), pull)
    finally:
        torch.set_num_threads(threads)
    alone = gradients(attention, (q[1:2], k[1:2], v[1:2]), pull[1:2])
    for name, a, b, c in zip("qkv", one, two, alone, strict=True):
        assert torch.equal(a, b), f"gradient of {name}"
        assert torch.equal(c, b[1:2]), f"gradient of {name}"


def test_gradients_of_nothing() -> None:
    for shapes in ((0, 3, 5, 5), (2, 3, 0, 5), (2, 3, 5, 0)):
        batch, heads, nq, n = shapes
        q = torch.randn(batch, heads, nq, 16)
        k, v = torch.randn(2, batch, heads, n, 16)
        for t, g in zip(
            (q, k, v), gradients(attention, (q, k, v), torch.ones_like(q)), strict=True
        ):
            assert g.shape == t.shape and (g == 0).all()
