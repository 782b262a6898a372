"""On a CUDA device: the sources that the match writes, and merges that read them."""

from __future__ import annotations

import pytest
import torch

import fastast
import fastast_kernels as fk
from fastast_kernels import reference
from fastast_kernels.backends import why_not

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "batch,n,c,r",  # clusters where the GPU has them, and the last block: C not of 8, or too long
    [(3, 2, 8, 0), (3, 63, 80, 5), (64, 1214, 64, 40), (2, 1214, 60, 10**6), (1, 20001, 64, 10**6)],
)
def test_match(batch: int, n: int, c: int, r: int, dtype: torch.dtype) -> None:
    reason = why_not("bipartite_match", "cuda", "cuda", dtype, c)
    if reason is not None:
        pytest.skip(reason)
    metric = torch.randn(batch, n, c, device="cuda").to(dtype)
    metric[0] = 1  # every score ties
    for protected in ((True, True), (True, False), (False, True), (False, False)):
        n_out = n - fk.effective_r(n, r, *protected)
        with fk.use_backend("cuda"):
            plain = fk.bipartite_match(metric, r, *protected)
            for _ in range(5):
                rows, sources = fk.bipartite_match(metric, r, *protected, return_sources=True)
                assert torch.equal(rows, plain)
                assert torch.equal(sources, reference.sources(rows, n_out))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n,d", [(63, 80), (1214, 768), (130, 1032), (40, 4096)])
def test_merge(n: int, d: int, dtype: torch.dtype) -> None:
    reason = why_not("merge", "cuda", "cuda", dtype, d)
    if reason is not None:
        pytest.skip(reason)
    n_out = n - fk.effective_r(n, n // 5)
    rows = reference.bipartite_match(torch.randn(2, n, 16, device="cuda"), n // 5)
    rows[:, 3::9] = -1
    size = torch.randint(1, 9, (2, n), device="cuda").float()
    x, residual = torch.randn(2, 2, n, d, device="cuda").to(dtype)
    norm = torch.randn(2, d, device="cuda")
    found = []
    for sources in (None, reference.sources(rows, n_out)):
        with fk.use_backend("cuda"):
            merged = fk.merge(x, rows, n_out, size, sources)
            more = fk.merge_add_layer_norm(x, residual, rows, n_out, size, *norm, sources=sources)
        found.append((*merged, *more))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same logits with the sources as without, and the sources are there."""
    if why_not("match_keys", "cuda", "cuda") is not None:
        pytest.skip(str(why_not("match_keys", "cuda", "cuda")))
    config = fastast.ASTConfig.tiny(num_classes=10, target_length=128)
    model = fastast.patch(fastast.AST(config), r=8).cuda().eval()
    x = torch.randn(2, 128, 128, device="cuda")
    k = torch.randn(2, 3, 40, 64, device="cuda")
    with torch.no_grad():
        # The attention has no kernel in CUDA C++: the choice is made op by op.
        monkeypatch.setattr(fastast.tome, "runs_in_cuda", lambda op, x: False)
        expected = model(x)
        monkeypatch.setattr(fastast.tome, "runs_in_cuda", lambda op, x: True)
        assert model.tome.match_keys_sources(k, 8, x)[1] is not None
        torch.testing.assert_close(model(x), expected)
