"""Merging and unmerging: a size-weighted mean of rows, its inverse, and the gradients of both.

``_reduce_rows_kernel``, one program an output row: ``h_i = sum_j s_j (x_j + residual_j) / S_i``,
``S_i = sum_j s_j`` over the tokens ``j`` assigned to row ``i``, in ascending order, and if asked
for ``y_i = LayerNorm(h_i)``. A program finds its tokens by scanning the sample's assignment (4 N
bytes, in the L1 cache), so there are no atomics, any fan-in works, each token is read once, each
row written once, and the result is the same bit for bit every time. Bytes: N D read (twice that
with a residual), N' D written (twice with a LayerNorm), and 12 a row.

``_gather_rows_kernel``, one program a token: ``out_j = w_j x_i`` of its row ``i``, where ``w_j`` is
1 (unmerge) or ``s_j / S_i`` (the gradient of a merge). Bytes: N' D read, N D written.

Layout: rows of D values dense, any stride between tokens and samples; the assignment dense.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import TINY, accumulator, as_tokens, block_of, dense_rows, launch, layer_norm
from .parameters import parameters


@triton.jit(do_not_specialize=["n", "n_out"])
def _reduce_rows_kernel(
    x,
    residual,
    assignment,
    size,
    weight,
    bias,
    h,
    size_out,
    log_size_out,
    y,
    mean_out,
    rstd_out,
    n,
    n_out,
    d,
    x_sample,
    x_token,
    residual_sample,
    residual_token,
    eps,
    MEAN: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SIZED: tl.constexpr,
    NORM: tl.constexpr,
    ACC: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_out = tl.program_id(0).to(tl.int64)
    b = i_out // n_out
    row = (i_out % n_out).to(tl.int32)
    cols = tl.arange(0, BLOCK_D)
    in_row = cols < d
    lanes = tl.arange(0, CHUNK)
    acc = tl.zeros([BLOCK_D], ACC)
    total = tl.full([], 0.0, tl.float32)
    weight_so_far = tl.full([], 0.0, ACC)  # the same, but not rounded to fp32 where ACC is fp64
    for start in range(0, n, CHUNK):
        rows = tl.load(assignment + b * n + start + lanes, mask=start + lanes < n, other=-1)
        mine = rows == row
        lane = tl.min(tl.where(mine, lanes, CHUNK), axis=0)
        while lane < CHUNK:
            j = start + lane
            p = x + b * x_sample + j.to(tl.int64) * x_token + cols
            value = tl.load(p, mask=in_row, other=0).to(ACC)
            if RESIDUAL:
                p = residual + b * residual_sample + j.to(tl.int64) * residual_token + cols
                value += tl.load(p, mask=in_row, other=0).to(ACC)
            if MEAN:
                # A running mean: a token that stays alone comes out exactly as it went in.
                s = tl.full([], 1.0, tl.float32)
                if SIZED:
                    s = tl.load(size + b * n + j)
                total += s
                weight_so_far += s.to(ACC)
                acc += (value - acc) * (s.to(ACC) / tl.maximum(weight_so_far, TINY))
            else:
                acc += value
            lane = tl.min(tl.where(mine & (lanes > lane), lanes, CHUNK), axis=0)
    if MEAN:
        acc *= tl.maximum(weight_so_far, TINY) / tl.maximum(total, TINY).to(ACC)
        tl.store(size_out + i_out, total)
    tl.store(h + i_out * d + cols, acc.to(h.dtype.element_ty), mask=in_row)
    if NORM:
        tl.store(log_size_out + i_out, tl.log(total))
        normed, mean, rstd = layer_norm(acc, in_row, d, eps, weight, bias, cols)
        tl.store(y + i_out * d + cols, normed.to(y.dtype.element_ty), mask=in_row)
        tl.store(mean_out + i_out, mean)
        tl.store(rstd_out + i_out, rstd)


@triton.jit(do_not_specialize=["n", "n_out"])
def _gather_rows_kernel(
    x,
    assignment,
    size,
    size_out,
    out,
    n,
    n_out,
    d,
    x_sample,
    x_token,
    WEIGHTED: tl.constexpr,
    SIZED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_token = tl.program_id(0).to(tl.int64)
    b = i_token // n
    cols = tl.arange(0, BLOCK_D)
    row = tl.load(assignment + i_token)
    kept = (row >= 0) & (row < n_out)
    p = x + b * x_sample + row.to(tl.int64) * x_token + cols
    value = tl.load(p, mask=(cols < d) & kept, other=0)
    if WEIGHTED:
        s = tl.full([], 1.0, ACC)
        if SIZED:
            s = tl.load(size + i_token).to(ACC)
        total = tl.load(size_out + b * n_out + row, mask=kept, other=1).to(ACC)
        value = value.to(ACC) * (s / tl.maximum(total, TINY))
    tl.store(out + i_token * d + cols, value.to(out.dtype.element_ty), mask=cols < d)


def reduce_rows(
    x: Tensor,
    residual: Tensor | None,
    assignment: Tensor,
    n_out: int,
    size: Tensor | None,
    norm: tuple[Tensor, Tensor, float] | None,
    mean: bool = True,
) -> tuple[Tensor, ...]:
    """Launch ``_reduce_rows_kernel``: ``h``, ``S``, and with ``norm`` log S, y and statistics."""
    batch, n, d = x.shape
    x = dense_rows(x)
    added = x if residual is None else dense_rows(residual)
    assignment = assignment.contiguous()
    size = None if size is None else size.contiguous()
    statistic = torch.float64 if x.dtype == torch.float64 else torch.float32

    def per_row(dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((batch, n_out), dtype=dtype, device=x.device)

    h = torch.empty((batch, n_out, d), dtype=x.dtype, device=x.device)
    size_out = per_row() if mean else None
    weight, bias, eps = (None, None, 0.0) if norm is None else norm
    more: tuple[Tensor | None, ...] = (None,) * 4
    if norm is not None:
        more = per_row(), torch.empty_like(h), per_row(statistic), per_row(statistic)
    launch(
        _reduce_rows_kernel,
        batch * n_out,
        x,
        x,
        added,
        assignment,
        size,
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        h,
        size_out,
        *more,
        n,
        n_out,
        d,
        *x.stride()[:2],
        *added.stride()[:2],
        eps,
        MEAN=mean,
        RESIDUAL=residual is not None,
        SIZED=size is not None,
        NORM=norm is not None,
        ACC=accumulator(x.dtype),
        BLOCK_D=block_of(d),
        **parameters("reduce_rows", x, d),
    )
    return tuple(t for t in (h, size_out, *more) if t is not None)


def merge(
    x: Tensor,
    assignment: Tensor,
    n_out: int,
    size: Tensor | None,
    sources: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``fastast::merge``; the sources are not used."""
    h, size_out = reduce_rows(x, None, assignment, n_out, size, None)
    return h, size_out


def merge_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    assignment: Tensor,
    n_out: int,
    size: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    sources: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """``fastast::merge_add_layer_norm``; the sources are not used."""
    return reduce_rows(x, residual, assignment, n_out, size, (weight, bias, eps))


def unmerge_backward(grad: Tensor, assignment: Tensor, n_out: int) -> Tensor:
    """``fastast::unmerge_backward``: a row's gradient is the sum over its tokens."""
    return reduce_rows(grad, None, assignment, n_out, None, None, mean=False)[0]


def _gather(x: Tensor, assignment: Tensor, size: Tensor | None, size_out: Tensor | None) -> Tensor:
    x = as_tokens(x)
    d = x.shape[-1]
    batch, n = assignment.shape
    out = torch.empty((batch, n, d), dtype=x.dtype, device=x.device)
    launch(
        _gather_rows_kernel,
        batch * n,
        x,
        x,
        assignment.contiguous(),
        None if size is None else size.contiguous(),
        None if size_out is None else size_out.contiguous(),
        out,
        n,
        x.shape[1],
        d,
        *x.stride()[:2],
        WEIGHTED=size_out is not None,
        SIZED=size is not None,
        ACC=accumulator(x.dtype),
        BLOCK_D=block_of(d),
        **parameters("gather_rows", x, d),
    )
    return out


def unmerge(x: Tensor, assignment: Tensor) -> Tensor:
    """``fastast::unmerge``."""
    return _gather(x, assignment, None, None)


def merge_backward(
    grad: Tensor, assignment: Tensor, size: Tensor | None, size_out: Tensor
) -> Tensor:
    """``fastast::merge_backward``."""
    return _gather(grad, assignment, size, size_out)
