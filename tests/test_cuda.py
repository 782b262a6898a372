"""On a CUDA device: every op on CUDA tensors, and the CUDA kernels against the reference."""

from __future__ import annotations

import pytest
import torch

import fastast_kernels as fk
from fastast_kernels import reference
from fastast_kernels.backends import why_not
from fastast_kernels.testing import DTYPES, assert_as_accurate, assert_valid_match

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch,heads,n,d", [(1, 1, 1, 8), (2, 3, 146, 64), (3, 12, 1214, 80)])
def test_key_metric(batch: int, heads: int, n: int, d: int, dtype: torch.dtype) -> None:
    reason = why_not("key_metric", "cuda", "cuda")
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
