"""The CUDA kernels without a GPU: their grid is walked on the CPU (tests/cuda_walk.cpp), team by
team and lane by lane, on the source that nvcc compiles, against the reference."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastast_kernels import bipartite_match, effective_r, reference
from fastast_kernels.testing import assert_as_accurate, assert_valid_match

ROOT = Path(__file__).parent.parent
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Tokens, width, r: around the 128 tokens of a scan and the values that a lane holds.
SHAPES = [(2, 8, 0), (3, 16, 1), (63, 80, 9), (130, 768, 40), (257, 256, 10**6), (40, 1032, 7)]
WIDE = (20, 4096, 5)
EPS = 1e-6


class Tokens(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("sample", ctypes.c_int64), ("token", ctypes.c_int64)]

    @classmethod
    def of(cls, t: Tensor | None) -> Tokens:
        return cls(None, 0, 0) if t is None else cls(t.data_ptr(), *t.stride()[:2])


class Norm(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("y", ctypes.c_void_p),
        ("mean", ctypes.c_void_p),
        ("rstd", ctypes.c_void_p),
    ]


def structure(name: str, fields: str) -> type[ctypes.Structure]:
    """A params struct of rows.h: ``*`` a pointer, ``:`` Tokens, ``!`` Norm, else an int64."""
    kinds = {"*": ctypes.c_void_p, ":": Tokens, "!": Norm}
    found = [(f.lstrip("*:!"), kinds.get(f[0], ctypes.c_int64)) for f in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": found})


REDUCE_ROWS = ":x :residual *assignment *size *h *size_out *log_size_out !norm batch n n_out d mean"
ReduceRows = structure("ReduceRows", REDUCE_ROWS)
ReduceListedRows = structure("ReduceListedRows", f"{REDUCE_ROWS} *sources")
KeyMetric = structure("KeyMetric", "*k *out batch n heads d sample head token")


class Match(ctypes.Structure):
    _fields_ = [
        ("metric", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("batch", "n", "c", "r", "sample", "token")],
        ("class_token", ctypes.c_bool),
        ("distill_token", ctypes.c_bool),
        *[
            (name, ctypes.c_void_p)
            for name in ("best", "partner", "rank", "arrived", "rows", "sources")
        ],
    ]


class ClusterMatch(ctypes.Structure):
    _fields_ = [
        ("tokens", ctypes.c_void_p),
        *[
            (name, ctypes.c_int64)
            for name in ("batch", "n", "c", "heads", "r", "sample", "token", "head")
        ],
        ("class_token", ctypes.c_bool),
        ("distill_token", ctypes.c_bool),
        ("blocks", ctypes.c_int),
        ("rows", ctypes.c_void_p),
        ("sources", ctypes.c_void_p),
    ]


GatherRows = structure("GatherRows", ":x *assignment *size *size_out *out batch n n_out d")
AddNormRows = structure("AddNormRows", ":x :residual *h !norm batch n d")
NormGradRuns = structure(
    "NormGradRuns",
    "*grad_h *grad_y *h *weight *mean *rstd *assignment *size *size_out *dx *dweight *dbias"
    " batch n n_out d run",
)


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """``walk("reduce_rows", dtype, params)``; a width that no kernel has is a ValueError."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    path = tmp_path_factory.mktemp("walk") / "walk.so"
    source = ROOT / "tests" / "cuda_walk.cpp"
    flags = [
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Werror",
        "-Wno-class-memaccess",
        "-Wno-unknown-pragmas",
        "-shared",
        "-fPIC",
    ]
    subprocess.run([compiler, *flags, str(source), "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))

    def run(
        kernel: str, dtype: torch.dtype, params: ctypes.Structure, backwards: bool = False
    ) -> None:
        library.set_backwards(backwards)
        if getattr(library, f"walk_{kernel}")(DTYPES.index(dtype), ctypes.byref(params)):
            raise ValueError("rows must have a multiple of 8 values up to 4096")

    return run


def pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def step(n: int, d: int, r: int, dtype: torch.dtype, batch: int = 2) -> dict[str, Any]:
    """Tokens that are slices, an assignment with dropped tokens and empty rows, sizes."""
    n_out = n - effective_r(n, r)
    rows = bipartite_match(torch.randn(batch, n, 16), r)
    if n > 10:
        rows[:, 3::9] = -1
    # Rows of 16 bytes: those of bf16 and fp16 are multiples of 8 values apart.
    wide = torch.randn(batch, n, 2, d).to(dtype)
    return {
        "x": wide[:, :, 0],
        "residual": wide[:, :, 1],
        "rows": rows,
        "n_out": n_out,
        "size": torch.randint(1, 9, (batch, n)).float(),
        "weight": torch.randn(d),
        "bias": torch.randn(d),
    }


def shapes(function: Any) -> Any:
    function = pytest.mark.parametrize("dtype", DTYPES, ids=str)(function)
    return pytest.mark.parametrize("n,d,r", [*SHAPES, WIDE])(function)


@shapes
def test_reduce_rows(walk: Any, n: int, d: int, r: int, dtype: torch.dtype) -> None:
    s = step(n, d, r, dtype)
    batch, n_out = 2, s["n_out"]
    h, y = nan(batch, n_out, d, dtype=dtype), nan(batch, n_out, d, dtype=dtype)
    size_out, log_size, mean, rstd = (nan(batch, n_out) for _ in range(4))
    norm = Norm(pointer(s["weight"]), pointer(s["bias"]), EPS, *map(pointer, (y, mean, rstd)))
    common = (pointer(s["rows"]), pointer(s["size"]), pointer(h), pointer(size_out))
    sizes = (batch, n, n_out, d)
    x, residual = Tokens.of(s["x"]), Tokens.of(s["residual"])

    # With the sources, nothing of the assignment: the same bits.
    sources = reference.sources(s["rows"], n_out)
    rest = (*common[1:], pointer(log_size), norm, *sizes, 1)
    listed = ReduceListedRows(x, residual, None, *rest, pointer(sources))
    walk("reduce_listed_rows", dtype, listed)
    written = (h, size_out, log_size, y, mean, rstd)
    expected = [t.clone() for t in written]
    for t in written:
        t.fill_(float("nan"))
    walk("reduce_rows", dtype, ReduceRows(x, residual, common[0], *rest))
    for a, b in zip(written, expected, strict=True):
        assert torch.equal(a, b)
    arguments = (s["rows"], n_out, s["size"], s["weight"], s["bias"], EPS)
    truth = reference.merge_add_layer_norm(s["x"].double(), s["residual"].double(), *arguments)
    plain = reference.merge_add_layer_norm(s["x"], s["residual"], *arguments)
    for name, a, t, p in zip(("h", "size", "y"), (h, size_out, y), truth, plain, strict=True):
        assert_as_accurate(a, t.double(), p, name)
    torch.testing.assert_close(log_size, truth[1].log().float())
    exact = truth[0]
    torch.testing.assert_close(mean.double(), exact.mean(-1), rtol=1e-5, atol=1e-5)
    deviation = (exact.var(-1, unbiased=False) + EPS).rsqrt()
    torch.testing.assert_close(rstd.double(), deviation, rtol=1e-4, atol=1e-4)

    # The merge alone: without a residual, a LayerNorm or sizes.
    walk(
        "reduce_rows",
        dtype,
        ReduceRows(x, Tokens.of(None), common[0], None, *common[2:], None, Norm(), *sizes, 1),
    )
    truth = reference.merge(s["x"].double(), s["rows"], n_out)
    assert_as_accurate(h, truth[0], reference.merge(s["x"], s["rows"], n_out)[0], "merged")
    assert torch.equal(size_out, truth[1])

    # The gradient of an unmerge: the plain sum.
    walk(
        "reduce_rows",
        dtype,
        ReduceRows(x, Tokens.of(None), common[0], None, common[2], None, None, Norm(), *sizes, 0),
    )
    total = truth[0] * truth[1][..., None]
    plain_sum = reference.merge(s["x"].float(), s["rows"], n_out)[0] * truth[1][..., None]
    assert_as_accurate(h, total, plain_sum.to(dtype), "sum")


@shapes
def test_gather_rows(walk: Any, n: int, d: int, r: int, dtype: torch.dtype) -> None:
    s = step(n, d, r, dtype)
    batch, n_out = 2, s["n_out"]
    short = torch.randn(batch, n_out, d).to(dtype)
    out = nan(batch, n, d, dtype=dtype)
    sizes = (batch, n, n_out, d)
    rows = pointer(s["rows"])
    params = GatherRows(Tokens.of(short), rows, None, None, pointer(out), *sizes)
    walk("gather_rows", dtype, params)
    assert torch.equal(out, reference.unmerge(short, s["rows"]))

    _, size_out = reference.merge(s["x"], s["rows"], n_out, s["size"])
    weights = (pointer(s["size"]), pointer(size_out))
    walk("gather_rows", dtype, GatherRows(Tokens.of(short), rows, *weights, pointer(out), *sizes))
    leaf = s["x"].double().requires_grad_()
    merged = reference.merge(leaf, s["rows"], n_out, s["size"])[0]
    (truth,) = torch.autograd.grad(merged, leaf, short.double())
    assert_as_accurate(out, truth, truth.to(dtype), "gradient")


@shapes
def test_add_norm_rows(walk: Any, n: int, d: int, r: int, dtype: torch.dtype) -> None:
    s = step(n, d, r, dtype)
    h, y = nan(2, n, d, dtype=dtype), nan(2, n, d, dtype=dtype)
    mean, rstd = nan(2, n), nan(2, n)
    norm = Norm(pointer(s["weight"]), pointer(s["bias"]), EPS, *map(pointer, (y, mean, rstd)))
    x, residual = Tokens.of(s["x"]), Tokens.of(s["residual"])
    walk("add_norm_rows", dtype, AddNormRows(x, residual, pointer(h), norm, 2, n, d))
    arguments = (s["weight"], s["bias"], EPS)
    truth = reference.add_layer_norm(s["x"].double(), s["residual"].double(), *arguments)
    plain = reference.add_layer_norm(s["x"], s["residual"], *arguments)
    for name, a, t, p in zip("hy", (h, y), truth, plain, strict=True):
        assert_as_accurate(a, t, p, name)


@pytest.mark.parametrize("run", [1, 7])
@shapes
def test_norm_grad_runs(walk: Any, n: int, d: int, r: int, dtype: torch.dtype, run: int) -> None:
    for merged in (True, False):
        s = step(n, d, r, dtype)
        n_out = s["n_out"] if merged else n
        leaves = [s["x"].double(), s["residual"].double(), s["weight"].double(), s["bias"].double()]
        leaves = [t.requires_grad_() for t in leaves]
        grad_h, grad_y = torch.randn(2, 2, n_out, d).to(dtype)
        if merged:
            h, size_out, y = reference.merge_add_layer_norm(
                *leaves[:2], s["rows"], n_out, s["size"], *leaves[2:], EPS
            )
        else:
            h, y = reference.add_layer_norm(*leaves, EPS)
            size_out = None
        pulls = (grad_h.double(), grad_y.double())
        dx, _, dweight, dbias = torch.autograd.grad((h, y), leaves, pulls)
        h = h.detach()
        mean = h.mean(-1).float().contiguous()
        rstd = (h.var(-1, unbiased=False) + EPS).rsqrt().float().contiguous()
        kept = h.to(dtype)
        runs = -(-2 * n // run)
        got = nan(2, n, d, dtype=dtype)
        shares = nan(2, runs, d)
        of_merge = (s["rows"], s["size"], size_out) if merged else (None, None, None)
        tensors = (grad_h, grad_y, kept, s["weight"], mean, rstd, *of_merge, got, *shares)
        walk("norm_grad_runs", dtype, NormGradRuns(*map(pointer, tensors), 2, n, n_out, d, run))
        # What PyTorch in the dtype of the tokens gets wrong beside the truth is its rounding of h.
        xhat = (kept.double() - mean[..., None]) * rstd[..., None]
        rounded = ((grad_y.double() * xhat).sum((0, 1)), grad_y.double().sum((0, 1)))
        for name, a, t, p in (
            ("dweight", shares[0].sum(0), dweight, rounded[0].float()),
            ("dbias", shares[1].sum(0), dbias, rounded[1].float()),
        ):
            assert_as_accurate(a, t, p, name, factor=4.0)
        scale = float(dx.abs().max())
        unit = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
        assert float((got.double() - dx).abs().max()) <= unit * max(scale, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads,n,d", [(1, 1, 8), (3, 30, 80), (12, 146, 64), (5, 7, 128)])
def test_key_metric(walk: Any, heads: int, n: int, d: int, dtype: torch.dtype) -> None:
    k = torch.randn(2, n, 3, heads, d).to(dtype)[:, :, 1].transpose(1, 2)
    k[0, :, 0] = 0
    out = nan(2, n, d)
    walk("key_metric", dtype, KeyMetric(pointer(k), pointer(out), 2, n, heads, d, *k.stride()[:3]))
    mean = k.double().mean(1)
    truth = mean / mean.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    assert_as_accurate(out, truth, reference.key_metric(k))
    assert (out[0, 0] == 0).all()


def of_both_orders(
    walk: Any, kernel: str, dtype: torch.dtype, n: int, r: int, batch: int, params: Any
) -> Tensor:
    """The rows that a match writes into ``params(rows, sources)``; checks the sources on the way.

    Lanes run in one order and in the other, and what is behind the sources stays as it was.
    """
    plain = torch.full((batch, n), -9, dtype=torch.int32)
    walk(kernel, dtype, params(plain, None))
    for backwards in (False, True):
        rows = torch.full((batch, n), -9, dtype=torch.int32)
        width = 2 * n - r + 1
        sources = torch.full((batch * width + 5,), -11, dtype=torch.int32)
        walk(kernel, dtype, params(rows, sources), backwards)
        assert torch.equal(rows, plain)
        assert (sources[batch * width :] == -11).all()
        found = sources[: batch * width].view(batch, width)
        assert torch.equal(found, reference.sources(rows, n - r))
    return rows


def matched(
    walk: Any, metric: Tensor, r: int, class_token: bool = True, distill_token: bool = True
) -> Tensor:
    batch, n, c = metric.shape
    na = (n + 1) // 2

    def params(rows: Tensor, sources: Tensor | None) -> Match:
        integers = torch.full((3, batch, na), -7, dtype=torch.int32)
        best, arrived = nan(batch, na), torch.zeros(batch, dtype=torch.int32)
        kept.append((integers, best, arrived))
        sizes = (batch, n, c, r, *metric.stride()[:2], class_token, distill_token)
        scratch = (best, integers[0], integers[1], arrived, rows, sources)
        return Match(pointer(metric), *sizes, *map(pointer, scratch))

    kept: list[Any] = []
    return of_both_orders(walk, "match", metric.dtype, n, r, batch, params)


def matched_in_cluster(
    walk: Any,
    k: Tensor,
    r: int,
    class_token: bool = True,
    distill_token: bool = True,
    most_blocks: int = 16,
) -> Tensor:
    batch, heads, n, c = k.shape
    sample, head, token = k.stride()[:3]
    sizes = (batch, n, c, heads, r, sample, token, head, class_token, distill_token)
    blocks = min(-(-n // 128), most_blocks)

    def params(rows: Tensor, sources: Tensor | None) -> ClusterMatch:
        return ClusterMatch(pointer(k), *sizes, blocks, pointer(rows), pointer(sources))

    return of_both_orders(walk, "match_cluster", k.dtype, n, r, batch, params)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "heads,n,c,r,most_blocks",
    [(1, 4, 8, 1, 16), (3, 63, 24, 5, 16), (12, 130, 64, 40, 16), (2, 602, 80, 10**6, 2)],
)
def test_match_in_cluster(
    walk: Any, heads: int, n: int, c: int, r: int, most_blocks: int, dtype: torch.dtype
) -> None:
    k = torch.randn(2, n, 3, heads, c).to(dtype)[:, :, 1].transpose(1, 2)  # of the packed qkv
    k[1, :, 2] = 0
    metric = k.float().mean(1)
    for class_token in (True, False):
        for distill_token in (True, False):
            protected = class_token, distill_token
            count = effective_r(n, r, *protected)
            rows = matched_in_cluster(walk, k, count, *protected, most_blocks)
            assert_valid_match(metric, rows, count, *protected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "n,c,r", [(4, 8, 1), (9, 8, 0), (63, 60, 5), (130, 64, 40), (301, 80, 10**6)]
)
def test_match(walk: Any, n: int, c: int, r: int, dtype: torch.dtype) -> None:
    metric = torch.randn(2, n, 2, c).to(dtype)[:, :, 0]
    metric[1, 2] = 0
    for class_token in (True, False):
        for distill_token in (True, False):
            protected = class_token, distill_token
            count = effective_r(n, r, *protected)
            rows = matched(walk, metric, count, *protected)
            assert_valid_match(metric, rows, count, *protected)


def alike(n: int, kind: str) -> Tensor:
    """A metric ``[1, n, 8]`` whose tokens of A choose at random, in clumps, or all the same."""
    if kind == "random":
        return torch.randn(1, n, 8)
    if kind == "clumps":  # a handful of directions, so that many scores tie
        return torch.eye(8)[torch.randint(0, 8, (1, n))]
    metric = torch.zeros(1, n, 8)
    metric[..., 0] = 1
    metric[:, 1::2, 0] = -1
    metric[:, n // 4 * 2 + 1 if n > 3 else 1, 0] = 1  # a token in the midst of B
    return metric


@pytest.mark.parametrize("kind", ["random", "clumps", "one"])
@pytest.mark.parametrize("blocks", [0, 2])
def test_sources(walk: Any, blocks: int, kind: str) -> None:
    """Around tiles and warps, from one merged token to all: ``of_both_orders`` compares."""
    for n in (*range(2, 12), 31, 33, 63, 64, 127, 129, 130, 259, 300):
        for protected in ((True, True), (True, False), (False, True), (False, False)):
            most = effective_r(n, n, *protected)
            for r in {1, most // 2, most} if n < 100 else {most // 3, most}:
                if r == 0 or r > most:
                    continue
                metric = alike(n, kind)
                if blocks == 0:
                    rows = matched(walk, metric.bfloat16(), r, *protected)
                else:
                    rows = matched_in_cluster(walk, metric[:, None], r, *protected, blocks)
                if kind == "one" and n > 5:
                    assert rows.unique(return_counts=True)[1].max() == r + 1
                assert rows.unique().tolist() == list(range(n - r))


@pytest.mark.parametrize("blocks", [0, 16])
def test_sources_of_one_row_by_many_turns(walk: Any, blocks: int) -> None:
    """More tokens in a row than threads, on both sides of its own token."""
    metric = alike(700, "one")
    if blocks == 0:
        rows = matched(walk, metric.bfloat16(), 340)
    else:
        rows = matched_in_cluster(walk, metric[:, None], 340, most_blocks=blocks)
    assert rows.unique(return_counts=True)[1].max() == 341


def test_nothing_merged_has_sources(walk: Any) -> None:
    for n in (2, 3, 130):
        assert torch.equal(matched(walk, torch.randn(2, n, 8), 0)[0], torch.arange(n).int())


def test_sources_that_point_nowhere(walk: Any) -> None:
    """What is outside of the sample is left out, as in an assignment."""
    x = torch.randn(2, 3, 8)
    sources = torch.tensor([[-4, 2, 9, 1, -7, 2], [0, 1, 3, 2, 3, 0]], dtype=torch.int32)
    h, size = nan(2, 2, 8), nan(2, 2)
    fields = (None, None, pointer(h), pointer(size), None, Norm(), 2, 3, 2, 8, 1, pointer(sources))
    params = ReduceListedRows(Tokens.of(x), Tokens.of(None), *fields)
    walk("reduce_listed_rows", torch.float32, params)
    assert torch.equal(size, torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
    assert torch.equal(h[0], x[0, [1, 2]]) and torch.equal(h[1], x[1, [2, 0]])


@pytest.mark.parametrize("blocks", [0, 2, 16])
def test_match_ties_and_not_numbers(walk: Any, blocks: int) -> None:
    def match(metric: Tensor, r: int) -> Tensor:
        if blocks == 0:
            return matched(walk, metric, r)
        return matched_in_cluster(walk, metric[:, None], r, most_blocks=blocks)

    metric = torch.ones(2, 700, 24)
    assert torch.equal(match(metric, 5), bipartite_match(metric, 5))
    assert torch.equal(match(metric, 100), bipartite_match(metric, 100))
    metric = torch.randn(2, 90, 16)
    metric[1, 7, 3] = float("nan")
    metric[0, [8, 12], 3] = float("inf")  # two, that would rank alike if they were not looked for
    for row in match(metric, 11):
        assert row.unique().tolist() == list(range(79))


@pytest.mark.parametrize("blocks", [0, 2])
def test_rows_of_tokens_that_are_not_finite(walk: Any, blocks: int) -> None:
    """More to be merged than have a partner: rows are rows still, and have their sources."""
    for n in (6, 21, 140):
        metric = torch.randn(2, n, 8)
        metric[0, ::2] = float("nan")
        metric[1] = float("inf")
        for protected in ((True, True), (True, False), (False, True), (False, False)):
            r = effective_r(n, n, *protected)
            if blocks == 0:
                rows = matched(walk, metric, r, *protected)
            else:
                rows = matched_in_cluster(walk, metric[:, None], r, *protected, blocks)
            assert all(row.unique().tolist() == list(range(n - r)) for row in rows)


@pytest.mark.parametrize("cluster", [False, True])
def test_match_of_more_tokens_than_keys(walk: Any, cluster: bool) -> None:
    metric = torch.randn(1, 2301, 8)
    rows = matched_in_cluster(walk, metric[None], 300) if cluster else matched(walk, metric, 300)
    assert_valid_match(metric, rows, 300, True, True)


def test_widths_without_a_kernel(walk: Any) -> None:
    for d in (0, 12, 4104):
        with pytest.raises(ValueError, match="multiple of 8"):
            walk("add_norm_rows", torch.float32, AddNormRows(d=d))
