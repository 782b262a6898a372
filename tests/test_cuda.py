"""On a CUDA device: the CUDA kernels against the reference, and a model on what runs by default.

The tests of the ops (test_shapes, test_match, ...) run there too, on Triton's kernels."""

from __future__ import annotations

import pytest
import torch
from test_registration import samples
from tiny_models import tiny_ast
from torch import Tensor

import fastast
import fastast_kernels as fk
from fastast.inference import captured
from fastast_kernels import reference
from fastast_kernels.backends import why_not
from fastast_kernels.testing import DTYPES, assert_as_accurate, assert_valid_match

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch,heads,n,d", [(1, 1, 1, 8), (2, 3, 146, 64), (3, 12, 1214, 80)])
def test_key_metric(batch: int, heads: int, n: int, d: int, dtype: torch.dtype) -> None:
    reason = why_not("key_metric", "cuda", "cuda", dtype, d)
    if reason is not None:
        pytest.skip(reason)
    qkv = torch.randn(batch, n, 3, heads, d, device="cuda").to(dtype)
    k = qkv[:, :, 1].transpose(1, 2)
    k[0, :, 0] = 0
    with fk.use_backend("cuda"):
        metric = fk.key_metric(k)
    truth = reference.key_metric(k.double())
    assert_as_accurate(metric, truth.double(), truth)
    assert (metric[0, 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ops_on_cuda_tensors(dtype: torch.dtype) -> None:
    """What runs by default on a GPU gives what the CPU gives."""
    x, residual = torch.randn(2, 2, 60, 48).to(dtype)
    metric = torch.randn(2, 60, 16)
    rows = fk.bipartite_match(metric.cuda(), 11)
    assert_valid_match(metric, rows, 11, True, True)
    weight, bias = torch.randn(2, 48).to(dtype)
    arguments = (rows.cpu(), 49, None, weight, bias, 1e-6)
    expected = fk.merge_add_layer_norm(x, residual, *arguments)
    on_gpu = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
    got = fk.merge_add_layer_norm(x.cuda(), residual.cuda(), *on_gpu)
    tolerance = 0.05 if dtype in (torch.bfloat16, torch.float16) else 1e-4
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance)
    q = torch.randn(2, 3, 60, 16).to(dtype)
    log_size = torch.rand(2, 60)
    out = fk.attention(q.cuda(), q.cuda(), q.cuda(), log_size.cuda()).cpu()
    torch.testing.assert_close(out, fk.attention(q, q, q, log_size), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "batch,n,c,r", [(2, 4, 8, 1), (3, 63, 80, 5), (64, 1214, 64, 40), (1, 3000, 600, 10**6)]
)
def test_match(batch: int, n: int, c: int, r: int, dtype: torch.dtype) -> None:
    """The match in CUDA C++: valid, and the same every time though blocks arrive in any order."""
    reason = why_not("bipartite_match", "cuda", "cuda", dtype, c)
    if reason is not None:
        pytest.skip(reason)
    metric = torch.randn(batch, n, c, device="cuda").to(dtype)
    for protected in ((True, True), (True, False), (False, True), (False, False)):
        with fk.use_backend("cuda"):
            rows = fk.bipartite_match(metric, r, *protected)
            for _ in range(5):
                assert torch.equal(fk.bipartite_match(metric, r, *protected), rows)
        assert_valid_match(metric, rows, r, *protected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "batch,heads,n,d,r",
    [(2, 2, 4, 8, 1), (3, 5, 63, 80, 5), (64, 12, 1214, 64, 40), (2, 3, 3000, 128, 10**6)],
)
def test_match_keys(batch: int, heads: int, n: int, d: int, r: int, dtype: torch.dtype) -> None:
    """From the keys in one launch, a cluster of blocks a sample where the GPU has them."""
    reason = why_not("match_keys", "cuda", "cuda", dtype, d)
    if reason is not None:
        pytest.skip(reason)
    k = torch.randn(batch, n, 3, heads, d, device="cuda").to(dtype)[:, :, 1].transpose(1, 2)
    metric = k.double().mean(1)
    for protected in ((True, True), (True, False), (False, True), (False, False)):
        with fk.use_backend("cuda"):
            rows = fk.match_keys(k, r, *protected)
            for _ in range(5):
                assert torch.equal(fk.match_keys(k, r, *protected), rows)
        assert_valid_match(metric, rows, r, *protected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n,d", [(3, 16), (63, 80), (146, 768), (130, 1032), (40, 4096)])
def test_rows(n: int, d: int, dtype: torch.dtype) -> None:
    """The row kernels in CUDA C++, forward and backward, beside the reference."""
    reason = why_not("merge", "cuda", "cuda", dtype, d)
    if reason is not None:
        pytest.skip(reason)
    r = n // 5
    n_out = n - fk.effective_r(n, r)
    rows = reference.bipartite_match(torch.randn(2, n, 16, device="cuda"), r)
    if n > 10:
        rows[:, 3::9] = -1
    size = torch.randint(1, 9, (2, n), device="cuda").float()
    leaves = [torch.randn(s, device="cuda") for s in ((2, n, d), (2, n, d), (d,), (d,))]
    pulls = torch.randn(2, 2, n_out, d, device="cuda")

    def run(ops: object, as_dtype: torch.dtype) -> list[Tensor]:
        x, residual, weight, bias = (t.to(dtype).to(as_dtype).requires_grad_() for t in leaves)
        h, total, y = ops.merge_add_layer_norm(  # type: ignore[attr-defined]
            x, residual, rows, n_out, size, weight, bias, 1e-6
        )
        short, _ = ops.merge(x, rows, n_out, size)  # type: ignore[attr-defined]
        plain, normed = ops.add_layer_norm(x, residual, weight, bias, 1e-6)  # type: ignore[attr-defined]
        long = ops.unmerge(h, rows)  # type: ignore[attr-defined]
        of_rows = (h * pulls[0].to(as_dtype)).sum() + (y * pulls[1].to(as_dtype)).sum()
        rest = short.square().sum() + long.sum() + normed.square().sum() + plain.sum()
        gradients = torch.autograd.grad(of_rows + rest, (x, residual, weight, bias))
        return [t.detach() for t in (h, total, y, short, plain, normed, long, *gradients)]

    with fk.use_backend("cuda"):
        got = run(fk, dtype)
    for i, (g, t, p) in enumerate(
        zip(got, run(reference, torch.float64), run(reference, dtype), strict=True)
    ):
        assert_as_accurate(g, t.double(), p, f"result {i}", factor=3.0)


def layer(x: Tensor, qkv: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """The ops of one layer, in the order of a model."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    n = x.shape[1]
    rows = fk.bipartite_match(fk.key_metric(k), 9)
    out, lse = fk.attention_with_lse(q, k, v, torch.zeros(x.shape[:2], device=x.device))
    sums = fk.attention_column_sums(q, k, lse)
    h, size, log_size, y = fk.merge_add_layer_norm(
        x, out.transpose(1, 2).flatten(2), rows, n - 9, None, weight, bias, return_log_size=True
    )
    h, y = fk.add_layer_norm(h, y, weight, bias)
    return h, size, log_size, fk.unmerge(y, rows), sums


def layer_inputs(n: int = 146, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    x = torch.randn(2, n, 192, device="cuda").to(dtype)
    qkv = torch.randn(2, n, 3, 3, 64, device="cuda").to(dtype)
    weight, bias = torch.randn(2, 192, device="cuda")
    return x, qkv, weight, bias


def test_same_bits_and_no_synchronisation() -> None:
    inputs = layer_inputs()
    first = layer(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = layer(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def test_current_stream() -> None:
    """Kernels wait for what the stream they are called on did before, and for nothing else."""
    inputs = layer_inputs()
    expected = layer(*inputs)
    late = [torch.zeros_like(t) for t in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles: on another stream the zeros would be read
        for zeros, values in zip(late, inputs, strict=True):
            zeros.copy_(values)
        got = layer(*late)
    stream.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_capture() -> None:
    static = layer_inputs()
    replay, results = captured(lambda: layer(*static))
    for _ in range(2):
        fresh = layer_inputs()
        for a, b in zip(static, fresh, strict=True):
            a.copy_(b)
        replay()
        for a, b in zip(results, layer(*fresh), strict=True):
            assert torch.equal(a, b)


def test_another_length_compiles_nothing() -> None:
    from fastast_kernels import triton_kernels
    from fastast_kernels.triton_kernels import attention, match, merge

    assert triton_kernels.merge
    kernels = (attention._attention_kernel, match._best_partner_kernel, merge._reduce_rows_kernel)

    def compiled() -> list[int]:
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    for n in (1214, 602, 146, 34):  # every length of the tiles
        layer(*layer_inputs(n))
    before = compiled()
    for n in (1213, 1200, 1174, 577, 130, 33):
        layer(*layer_inputs(n))
    assert compiled() == before


def test_the_other_gpu() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = layer_inputs()
    expected = layer(*inputs)
    for a, b in zip(layer(*(t.to("cuda:1") for t in inputs)), expected, strict=True):
        assert a.device.index == 1
        torch.testing.assert_close(a.to("cuda:0"), b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_model(dtype: torch.dtype) -> None:
    """A merging AST, forward and backward, beside the reference; in bf16, where a rounding changes
    which tokens merge, without merging."""
    model = fastast.patch(tiny_ast(), r=4 if dtype == torch.float32 else 0).cuda()
    x = torch.randn(3, 96, 48, device="cuda")

    def run() -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            logits = model(x).float()
        logits.square().sum().backward()
        return [
            logits.detach(),
            *(p.grad.clone() for p in model.parameters() if p.grad is not None),
        ]

    ours = run()
    with fk.use_backend("reference"):
        plain = run()
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    for a, b in zip(ours, plain, strict=True):
        assert float((a - b).norm() / b.norm().clamp_min(1e-3)) < tolerance


@pytest.mark.parametrize("op", sorted(samples()))
def test_opcheck(op: str) -> None:
    """Schema, fake kernel, autograd and compilation of every op, on CUDA tensors."""

    def move(t: object) -> object:
        if not isinstance(t, Tensor):
            return t
        return t.detach().cuda().requires_grad_(t.requires_grad)

    for arguments in samples()[op]:
        moved = tuple(move(t) for t in arguments)
        result = torch.library.opcheck(getattr(torch.ops.fastast, op), moved)
        assert set(result.values()) == {"SUCCESS"}, result
