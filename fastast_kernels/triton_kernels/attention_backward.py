"""Attention's backward: weights are computed again from the log-sum-exp, nothing is N x N.

With ``p_ij = exp(scale q_i k_j + b_j - lse_i)``, ``g`` the output's gradient and
``delta_i = o_i g_i``: ``ds_ij = p_ij (g_i v_j - delta_i)``, and

- ``_grad_q_kernel``, one program a tile of queries: ``dq_i = scale sum_j ds_ij k_j``; it also
  writes ``delta``, 4 bytes a query, for the next. 6 Nq N D operations.
- ``_grad_kv_kernel``, one program a tile of keys: ``dk_j = scale sum_i ds_ij q_i`` and
  ``dv_j = sum_i p_ij g_i``. 8 Nq N D operations.

The log size gets no gradient, so there is no sum over queries and heads. No atomics: deterministic.
Layout: as in the forward; gradients are written as [B, N, H, D].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import PRECISION, power, scores, unit
from .common import block_of, dense_rows, dot, launch
from .parameters import parameters


@triton.jit(do_not_specialize=["nq", "n"])
def _grad_q_kernel(
    grad,
    q,
    k,
    v,
    log_size,
    out,
    lse,
    delta_out,
    grad_q,
    heads,
    nq,
    n,
    d,
    g_sample,
    g_head,
    g_token,
    q_sample,
    q_head,
    q_token,
    k_sample,
    k_head,
    k_token,
    v_sample,
    v_head,
    v_token,
    o_sample,
    o_head,
    o_token,
    scale,
    SIZED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(nq, BLOCK_M)
    i_head = tl.program_id(0) // tiles
    b, h = (i_head // heads).to(tl.int64), (i_head % heads).to(tl.int64)
    i = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    i_wide = i.to(tl.int64)[:, None]
    lanes = tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    in_row = cols < d
    mask = (i < nq)[:, None] & in_row[None, :]
    p_k = k + b * k_sample + h * k_head + cols[None, :]
    p_v = v + b * v_sample + h * v_head + cols[:, None]
    bias = log_size + b * n if SIZED else k
    p = q + b * q_sample + h * q_head + i_wide * q_token + cols[None, :]
    tile_q = tl.load(p, mask=mask, other=0)
    p = grad + b * g_sample + h * g_head + i_wide * g_token + cols[None, :]
    tile_g = tl.load(p, mask=mask, other=0)
    p = out + b * o_sample + h * o_head + i_wide * o_token + cols[None, :]
    tile_o = tl.load(p, mask=mask, other=0)
    delta = tl.sum(tile_o.to(tl.float32) * tile_g.to(tl.float32), axis=1)
    per_query = i_head.to(tl.int64) * nq + i
    tl.store(delta_out + per_query, delta, mask=i < nq)
    u = unit(q.dtype.element_ty)
    shift = tl.load(lse + per_query, mask=i < nq, other=float("inf")) * u
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, n, BLOCK_N):
        j = start + lanes
        j_wide = j.to(tl.int64)
        present = j < n
        tile_k = tl.load(
            p_k + j_wide[:, None] * k_token, mask=present[:, None] & in_row[None, :], other=0
        )
        vt = tl.load(
            p_v + j_wide[None, :] * v_token, mask=in_row[:, None] & present[None, :], other=0
        )
        s = scores(tile_q, tl.trans(tile_k), bias, j, n, scale, SIZED, PRECISION)
        weights = power(s - shift[:, None], q.dtype.element_ty)
        along = dot(tile_g, vt, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        ds = weights * (along - delta[:, None])
        acc = dot(ds.to(tile_k.dtype), tile_k, acc, PRECISION)
    p = grad_q + ((b * nq + i_wide) * heads + h) * d + cols[None, :]
    tl.store(p, (acc * scale).to(grad_q.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["nq", "n"])
def _grad_kv_kernel(
    grad,
    q,
    k,
    v,
    log_size,
    lse,
    delta_in,
    grad_k,
    grad_v,
    heads,
    nq,
    n,
    d,
    g_sample,
    g_head,
    g_token,
    q_sample,
    q_head,
    q_token,
    k_sample,
    k_head,
    k_token,
    v_sample,
    v_head,
    v_token,
    scale,
    SIZED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(n, BLOCK_N)
    i_head = tl.program_id(0) // tiles
    b, h = (i_head // heads).to(tl.int64), (i_head % heads).to(tl.int64)
    j = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    j_wide = j.to(tl.int64)[:, None]
    lanes = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    in_row = cols < d
    mask = (j < n)[:, None] & in_row[None, :]
    p = k + b * k_sample + h * k_head + j_wide * k_token + cols[None, :]
    tile_k = tl.load(p, mask=mask, other=0)
    p = v + b * v_sample + h * v_head + j_wide * v_token + cols[None, :]
    tile_v = tl.load(p, mask=mask, other=0)
    # Scores are kept transposed, keys by queries, so that both products take them as they are.
    u = unit(q.dtype.element_ty)
    of_key = tl.zeros([BLOCK_N], tl.float32)
    if SIZED:
        of_key = tl.load(log_size + b * n + j, mask=j < n, other=float("-inf")) * u
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    p_q = q + b * q_sample + h * q_head + cols[None, :]
    p_g = grad + b * g_sample + h * g_head + cols[None, :]
    for start in range(0, nq, BLOCK_M):
        i = start + lanes
        i_wide = i.to(tl.int64)[:, None]
        present = (i < nq)[:, None] & in_row[None, :]
        tile_q = tl.load(p_q + i_wide * q_token, mask=present, other=0)
        tile_g = tl.load(p_g + i_wide * g_token, mask=present, other=0)
        per_query = i_head.to(tl.int64) * nq + i
        shift = tl.load(lse + per_query, mask=i < nq, other=float("inf")) * u
        delta = tl.load(delta_in + per_query, mask=i < nq, other=0)
        zero = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        st = dot(tile_k, tl.trans(tile_q), zero, PRECISION) * (scale * u) + of_key[:, None]
        weights = power(st - shift[None, :], q.dtype.element_ty)
        acc_v = dot(weights.to(tile_g.dtype), tile_g, acc_v, PRECISION)
        along = dot(tile_v, tl.trans(tile_g), zero, PRECISION)
        ds = weights * (along - delta[None, :])
        acc_k = dot(ds.to(tile_q.dtype), tile_q, acc_k, PRECISION)
    at = ((b * n + j_wide) * heads + h) * d + cols[None, :]
    tl.store(grad_k + at, (acc_k * scale).to(grad_k.dtype.element_ty), mask=mask)
    tl.store(grad_v + at, acc_v.to(grad_v.dtype.element_ty), mask=mask)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_size: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastast::attention_backward``: the gradients of q, k and v."""
    grad, q, k, v, out = (dense_rows(t) for t in (grad, q, k, v, out))
    batch, heads, nq, d = q.shape
    n = k.shape[2]

    def like(tokens: int) -> Tensor:
        return torch.empty((batch, tokens, heads, d), dtype=q.dtype, device=q.device)

    grad_q, grad_k, grad_v = like(nq), like(n), like(n)
    delta = torch.empty_like(lse)
    log_size = None if log_size is None else log_size.contiguous()
    lse = lse.contiguous()
    shape = heads, nq, n, d
    strides = [s for t in (grad, q, k, v) for s in t.stride()[:3]]
    options = {
        "SIZED": log_size is not None,
        "PRECISION": PRECISION,
        "BLOCK_D": block_of(d),
    }
    table = parameters("attention_grad_q", q, d)
    launch(
        _grad_q_kernel,
        batch * heads * triton.cdiv(nq, table["BLOCK_M"]),
        q,
        *(grad, q, k, v, log_size, out, lse, delta, grad_q),
        *shape,
        *strides,
        *out.stride()[:3],
        scale,
        **options,
        **table,
    )
    table = parameters("attention_grad_kv", q, d)
    launch(
        _grad_kv_kernel,
        batch * heads * triton.cdiv(n, table["BLOCK_N"]),
        q,
        *(grad, q, k, v, log_size, lse, delta, grad_k, grad_v),
        *shape,
        *strides,
        scale,
        **options,
        **table,
    )
    return grad_q.transpose(1, 2), grad_k.transpose(1, 2), grad_v.transpose(1, 2)
