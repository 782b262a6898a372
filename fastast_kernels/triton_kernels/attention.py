"""Attention with a log size per key: forward, and the column sums of its weights.

``_attention_kernel``, one program a tile of queries: ``o_i = sum_j p_ij v_j`` with
``p_ij = exp(scale q_i k_j + b_j - lse_i)``, by one pass over the tiles of keys with a running
maximum. The bias costs one fp32 load a key and tile. 4 Nq N D operations; reads
q, k, v, writes o and 4 Nq bytes of log-sum-exp a head. A tile of another head reads k and v again,
from the L2 cache.

``_column_sums_kernel``, one program a tile of keys: ``c_j = sum_i p_ij`` from a saved log-sum-exp,
2 Nq N D operations, writes 4 N bytes a head.

Layout: q, k, v [B, H, N, D] with dense rows and any other strides, such as slices of one packed qkv
buffer; o is written as [B, Nq, H, D], so that heads join without a copy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LOG2E, block_of, dense_rows, dot, launch
from .parameters import parameters, tiled

# fp32 by tensor cores, to fp32 accuracy (half precision does not look at it).
PRECISION = "tf32x3"
MAX_HEAD_DIM = 128


# Half precision works in powers of two, which saves a multiplication a logit. fp32 does not: a
# logit and its log-sum-exp are larger then, and so is the rounding of both.


@triton.jit
def unit(dtype: tl.constexpr):
    """The factor of natural logarithms in a kernel for ``dtype``."""
    return 1.0 if dtype == tl.float32 else LOG2E


@triton.jit
def power(x, dtype: tl.constexpr):
    """``exp`` of a difference of logits in :func:`unit`."""
    return tl.exp(x) if dtype == tl.float32 else tl.exp2(x)


@triton.jit
def scores(q, kt, bias, j, n, scale, SIZED: tl.constexpr, PRECISION: tl.constexpr):
    """Logits of a tile in :func:`unit`, minus infinity past the last key; ``bias`` is [N]."""
    u = unit(q.dtype)
    s = dot(q, kt, tl.zeros([q.shape[0], kt.shape[1]], tl.float32), PRECISION) * (scale * u)
    if SIZED:
        s += (tl.load(bias + j, mask=j < n, other=float("-inf")) * u)[None, :]
    else:
        s = tl.where((j < n)[None, :], s, float("-inf"))
    return s


@triton.jit(do_not_specialize=["nq", "n"])
def _attention_kernel(
    q,
    k,
    v,
    log_size,
    out,
    lse,
    heads,
    nq,
    n,
    d,
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
    tiles = tl.cdiv(nq, BLOCK_M)
    i_head = tl.program_id(0) // tiles  # of all samples
    b, h = (i_head // heads).to(tl.int64), (i_head % heads).to(tl.int64)
    i = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    lanes = tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    in_row = cols < d
    p_q = q + b * q_sample + h * q_head + i.to(tl.int64)[:, None] * q_token + cols[None, :]
    p_k = k + b * k_sample + h * k_head + cols[:, None]
    p_v = v + b * v_sample + h * v_head + cols[None, :]
    bias = log_size + b * n if SIZED else k
    tile_q = tl.load(p_q, mask=(i < nq)[:, None] & in_row[None, :], other=0)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, n, BLOCK_N):
        j = start + lanes
        p = p_k + j.to(tl.int64)[None, :] * k_token
        kt = tl.load(p, mask=in_row[:, None] & (j < n)[None, :], other=0)
        s = scores(tile_q, kt, bias, j, n, scale, SIZED, PRECISION)
        new = tl.maximum(highest, tl.max(s, axis=1))
        # A row of which every logit is minus infinity so far has no finite maximum to subtract.
        shift = tl.where(new == float("-inf"), 0.0, new)
        weights = power(s - shift[:, None], q.dtype.element_ty)
        rescale = power(highest - shift, q.dtype.element_ty)
        total = total * rescale + tl.sum(weights, axis=1)
        p = p_v + j.to(tl.int64)[:, None] * v_token
        tile_v = tl.load(p, mask=(j < n)[:, None] & in_row[None, :], other=0)
        acc = dot(weights.to(tile_v.dtype), tile_v, acc * rescale[:, None], PRECISION)
        highest = new
    p = out + ((b * nq + i.to(tl.int64)) * heads + h)[:, None] * d + cols[None, :]
    acc = acc / total[:, None]
    tl.store(p, acc.to(out.dtype.element_ty), mask=(i < nq)[:, None] & in_row[None, :])
    p = lse + i_head.to(tl.int64) * nq + i
    tl.store(p, highest / unit(q.dtype.element_ty) + tl.log(total), mask=i < nq)


@triton.jit(do_not_specialize=["nq", "n"])
def _column_sums_kernel(
    q,
    k,
    log_size,
    lse,
    out,
    heads,
    nq,
    n,
    d,
    q_sample,
    q_head,
    q_token,
    k_sample,
    k_head,
    k_token,
    scale,
    SIZED: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(n, BLOCK_N)
    i_head = tl.program_id(0) // tiles
    b, h = (i_head // heads).to(tl.int64), (i_head % heads).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK_N
    j = first + tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    in_row = cols < d
    p_k = k + b * k_sample + h * k_head + j.to(tl.int64)[None, :] * k_token + cols[:, None]
    p_q = q + b * q_sample + h * q_head + cols[None, :]
    bias = log_size + b * n if SIZED else k
    kt = tl.load(p_k, mask=in_row[:, None] & (j < n)[None, :], other=0)
    sums = tl.zeros([BLOCK_N], tl.float32)
    begin = 0
    if CAUSAL:  # query i sees keys up to n - nq + i
        begin = tl.maximum(first - (n - nq), 0) // BLOCK_M * BLOCK_M
    for start in range(begin, nq, BLOCK_M):
        i = start + lanes
        p = p_q + i.to(tl.int64)[:, None] * q_token
        tile_q = tl.load(p, mask=(i < nq)[:, None] & in_row[None, :], other=0)
        s = scores(tile_q, kt, bias, j, n, scale, SIZED, PRECISION)
        of_row = tl.load(lse + i_head.to(tl.int64) * nq + i, mask=i < nq, other=float("inf"))
        if CAUSAL:
            s = tl.where(j[None, :] <= (n - nq) + i[:, None], s, float("-inf"))
        of_row *= unit(q.dtype.element_ty)
        sums += tl.sum(power(s - of_row[:, None], q.dtype.element_ty), axis=0)
    tl.store(out + i_head.to(tl.int64) * n + j, sums, mask=j < n)


def attention(
    q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """``fastast::attention``: the output and its log-sum-exp."""
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    batch, heads, nq, d = q.shape
    n = k.shape[2]
    out = torch.empty((batch, nq, heads, d), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, nq), dtype=torch.float32, device=q.device)
    table, programs = tiled("attention", q, d, batch * heads, nq, "BLOCK_M")
    launch(
        _attention_kernel,
        programs,
        q,
        q,
        k,
        v,
        None if log_size is None else log_size.contiguous(),
        out,
        lse,
        heads,
        nq,
        n,
        d,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        scale,
        SIZED=log_size is not None,
        PRECISION=PRECISION,
        BLOCK_D=block_of(d),
        **table,
    )
    return out.transpose(1, 2), lse


def attention_column_sums(
    q: Tensor, k: Tensor, lse: Tensor, log_size: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """``fastast::attention_column_sums``."""
    q, k = dense_rows(q), dense_rows(k)
    batch, heads, nq, d = q.shape
    n = k.shape[2]
    out = torch.empty((batch, heads, n), dtype=torch.float32, device=q.device)
    table = parameters("attention_column_sums", q, d)
    launch(
        _column_sums_kernel,
        batch * heads * triton.cdiv(n, table["BLOCK_N"]),
        q,
        q,
        k,
        None if log_size is None else log_size.contiguous(),
        lse.contiguous(),
        out,
        heads,
        nq,
        n,
        d,
        *q.stride()[:3],
        *k.stride()[:3],
        scale,
        SIZED=log_size is not None,
        CAUSAL=causal,
        PRECISION=PRECISION,
        BLOCK_D=block_of(d),
        **table,
    )
    return out
