"""Residual add and LayerNorm, and the backward of that with and without a merge in it.

``_add_layer_norm_kernel``, one program a row: ``h = x + residual``, ``y = LayerNorm(h)``. Bytes:
2 N D read, 2 N D written, 8 a row of statistics.

``_norm_backward_kernel``, one program a run of tokens. With ``xhat = (h - mean) rstd``, of the
token's row ``i``: ``g = grad_y weight``, ``dh = grad_h + rstd (g - mean(g) - xhat mean(g xhat))``,
``dx_j = w_j dh`` with ``w_j = s_j / S_i`` (1 without a merge), and ``dweight = sum grad_y xhat``,
``dbias = sum grad_y``. Both sums take a row in shares ``w_j``, which add up to one, so that rows
need not be told apart; a row without tokens has only ``dbias`` and is added by the program of the
token of its number. Each program keeps its share of the sums, and one reduction adds them up:
deterministic, no atomics. Bytes: 3 N' D read, N D written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import TINY, accumulator, as_tokens, block_of, launch, layer_norm
from .parameters import parameters


@triton.jit(do_not_specialize=["n"])
def _add_layer_norm_kernel(
    x,
    residual,
    weight,
    bias,
    h,
    y,
    mean_out,
    rstd_out,
    n,
    d,
    x_sample,
    x_token,
    residual_sample,
    residual_token,
    eps,
    ACC: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    b, i = i_row // n, i_row % n
    cols = tl.arange(0, BLOCK_D)
    in_row = cols < d
    value = tl.load(x + b * x_sample + i * x_token + cols, mask=in_row, other=0).to(ACC)
    p = residual + b * residual_sample + i * residual_token + cols
    value += tl.load(p, mask=in_row, other=0).to(ACC)
    tl.store(h + i_row * d + cols, value.to(h.dtype.element_ty), mask=in_row)
    normed, mean, rstd = layer_norm(value, in_row, d, eps, weight, bias, cols)
    tl.store(y + i_row * d + cols, normed.to(y.dtype.element_ty), mask=in_row)
    tl.store(mean_out + i_row, mean)
    tl.store(rstd_out + i_row, rstd)


@triton.jit(do_not_specialize=["tokens", "n", "n_out", "run"])
def _norm_backward_kernel(
    grad_h,
    grad_y,
    h,
    weight,
    mean_in,
    rstd_in,
    assignment,
    size,
    size_out,
    dx,
    dweight,
    dbias,
    tokens,
    n,
    n_out,
    d,
    run,
    MERGED: tl.constexpr,
    SIZED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_run = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    in_row = cols < d
    w = tl.load(weight + cols, mask=in_row, other=0).to(ACC)
    sum_weight = tl.zeros([BLOCK_D], ACC)
    sum_bias = tl.zeros([BLOCK_D], ACC)
    for k in range(run):
        j = i_run * run + k
        present = j < tokens
        row = j
        share = tl.full([], 1.0, ACC)
        if MERGED:
            b = j // n
            to = tl.load(assignment + j, mask=present, other=-1)
            row = b * n_out + to
            empty = b * n_out + j % n  # the row of this token's number, to see if it is empty
            numbered = present & (j % n < n_out)
            if SIZED:
                share = tl.load(size + j, mask=present, other=0).to(ACC)
            kept = present & (to >= 0) & (to < n_out)
            share /= tl.maximum(tl.load(size_out + row, mask=kept, other=1).to(ACC), TINY)
            alone = numbered & (tl.load(size_out + empty, mask=numbered, other=1) == 0)
            p = grad_y + empty * d + cols
            sum_bias += tl.load(p, mask=in_row & alone, other=0).to(ACC)
        else:
            kept = present
        here = in_row & kept
        gy = tl.load(grad_y + row * d + cols, mask=here, other=0).to(ACC)
        gh = tl.load(grad_h + row * d + cols, mask=here, other=0).to(ACC)
        value = tl.load(h + row * d + cols, mask=here, other=0).to(ACC)
        mean = tl.load(mean_in + row, mask=kept, other=0)
        rstd = tl.load(rstd_in + row, mask=kept, other=0)
        xhat = tl.where(here, (value - mean) * rstd, 0.0)
        g = gy * w
        along = tl.sum(g * xhat, axis=0) / d
        constant = tl.sum(g, axis=0) / d
        grad = share * (gh + rstd * (g - constant - xhat * along))
        tl.store(dx + j * d + cols, grad.to(dx.dtype.element_ty), mask=in_row & present)
        sum_weight += share * gy * xhat
        sum_bias += share * gy
    tl.store(dweight + i_run * d + cols, sum_weight, mask=in_row)
    tl.store(dbias + i_run * d + cols, sum_bias, mask=in_row)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``fastast::add_layer_norm``."""
    d = x.shape[-1]
    statistic = torch.float64 if x.dtype == torch.float64 else torch.float32
    h, y = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    mean, rstd = (torch.empty(x.shape[:-1], dtype=statistic, device=x.device) for _ in range(2))
    tokens, added = as_tokens(x), as_tokens(residual)
    launch(
        _add_layer_norm_kernel,
        mean.numel(),
        x,
        tokens,
        added,
        weight.contiguous(),
        bias.contiguous(),
        h,
        y,
        mean,
        rstd,
        tokens.shape[1],
        d,
        *tokens.stride()[:2],
        *added.stride()[:2],
        eps,
        ACC=accumulator(x.dtype),
        BLOCK_D=block_of(d),
        **parameters("add_layer_norm", x, d),
    )
    return h, y, mean, rstd


def _backward(
    grad_h: Tensor,
    grad_y: Tensor,
    h: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    assignment: Tensor | None,
    size: Tensor | None,
    size_out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    d = h.shape[-1]
    n_out = h.shape[-2]
    if assignment is None:
        shape, n = h.shape, n_out
    else:
        assignment = assignment.contiguous()
        shape, n = torch.Size((*assignment.shape, d)), assignment.shape[1]
    dx = torch.empty(shape, dtype=h.dtype, device=h.device)
    tokens = dx.numel() // d
    table = dict(parameters("norm_backward", h, d))
    run = max(1, triton.cdiv(tokens, table.pop("PROGRAMS")))
    programs = triton.cdiv(tokens, run)
    shares = torch.empty((2, programs, d), dtype=mean.dtype, device=h.device)
    launch(
        _norm_backward_kernel,
        programs,
        h,
        grad_h.contiguous(),
        grad_y.contiguous(),
        h.contiguous(),
        weight.contiguous(),
        mean.contiguous(),
        rstd.contiguous(),
        assignment,
        None if size is None else size.contiguous(),
        None if size_out is None else size_out.contiguous(),
        dx,
        shares[0],
        shares[1],
        tokens,
        n,
        n_out,
        d,
        run,
        MERGED=assignment is not None,
        SIZED=size is not None,
        ACC=accumulator(h.dtype),
        BLOCK_D=block_of(d),
        **table,
    )
    if h.dtype == torch.float64:
        # S is rounded to fp32, and in fp64 shares of it do not add up to one.
        xhat = (h - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
        rows = tuple(range(h.dim() - 1))
        return dx, (grad_y * xhat).sum(rows), grad_y.sum(rows)
    return dx, shares[0].sum(dim=0), shares[1].sum(dim=0)


def add_layer_norm_backward(
    grad_h: Tensor, grad_y: Tensor, h: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastast::add_layer_norm_backward``."""
    return _backward(grad_h, grad_y, h, weight, mean, rstd, None, None, None)


def merge_add_layer_norm_backward(
    grad_h: Tensor,
    grad_y: Tensor,
    h: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    assignment: Tensor,
    size: Tensor | None,
    size_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastast::merge_add_layer_norm_backward``."""
    return _backward(grad_h, grad_y, h, weight, mean, rstd, assignment, size, size_out)
