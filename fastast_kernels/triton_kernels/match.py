"""Bipartite matching: best partners, the r best pairs, output rows; and the metric it runs on.

Three launches. Scores live in registers and only the best of each row of A is written:

1. ``_best_partner_kernel``, one program a tile of A (even tokens): the cosines
   ``s_ij = a_i b_j / (|a_i| |b_j|)`` over tiles of B (odd tokens), with a running maximum and its
   index a row. fp32 accumulation from tensor cores: half precision products are exact, fp32 is
   split in three (tf32x3). Equal scores go to the lowest index. 2 na nb C operations on N C values,
   8 na bytes written.
2. ``_rank_kernel``, one program a tile of A: how many tokens of A come before each, by score and
   then by index: na comparisons a token, 12 na bytes.
3. ``_assign_kernel``, one program a tile of tokens: a token of A ranked below r joins its partner's
   row; the others get theirs by counting the unmerged in front of them. 4 N bytes written.

No program waits for another, nothing is sorted, and the same input gives the same bits.

``_key_metric_kernel``, one program a few tokens: the mean of k over heads at unit length, in fp32.
It reads H N D values in place from the packed qkv buffer and writes 4 N D bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import sources
from .common import accumulator, block_of, dense_rows, dot, launch
from .parameters import parameters, tiled

# Products of fp32 by tensor cores, to fp32 accuracy; other dtypes do not look at it.
PRECISION = "tf32x3"


@triton.jit(do_not_specialize=["n"])
def _best_partner_kernel(
    metric,
    best_out,
    partner_out,
    n,
    c,
    sample,
    token,
    CLASS_TOKEN: tl.constexpr,
    DISTILL_TOKEN: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    na, nb = (n + 1) // 2, n // 2
    tiles = tl.cdiv(na, BLOCK_A)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles * BLOCK_A + tl.arange(0, BLOCK_A)
    lanes = tl.arange(0, BLOCK_B)
    cols = tl.arange(0, BLOCK_C)
    p_a = metric + b * sample + (2 * i)[:, None].to(tl.int64) * token + cols[None, :]
    p_b = metric + b * sample + token + cols[:, None]
    # With one part, A stays in registers; with more, its parts are read again for every tile of B.
    a = tl.load(p_a, mask=(i < na)[:, None] & (cols < c)[None, :], other=0)
    square_a = tl.sum(a.to(tl.float32) * a.to(tl.float32), axis=1)
    for part in tl.static_range(1, PARTS):
        a = tl.load(
            p_a + part * BLOCK_C,
            mask=(i < na)[:, None] & (part * BLOCK_C + cols < c)[None, :],
            other=0,
        )
        square_a += tl.sum(a.to(tl.float32) * a.to(tl.float32), axis=1)
    best = tl.full([BLOCK_A], float("-inf"), tl.float32)
    partner = tl.zeros([BLOCK_A], tl.int32)
    for start in range(0, nb, BLOCK_B):
        j = start + lanes
        scores = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
        square_b = tl.zeros([BLOCK_B], tl.float32)
        for part in tl.static_range(PARTS):
            in_part = part * BLOCK_C + cols < c
            if PARTS > 1:
                mask_a = (i < na)[:, None] & in_part[None, :]
                a = tl.load(p_a + part * BLOCK_C, mask=mask_a, other=0)
            bt = tl.load(
                p_b + part * BLOCK_C + (2 * j)[None, :].to(tl.int64) * token,
                mask=in_part[:, None] & (j < nb)[None, :],
                other=0,
            )
            square_b += tl.sum(bt.to(tl.float32) * bt.to(tl.float32), axis=0)
            scores = dot(a, bt, scores, PRECISION)
        scores *= 1.0 / tl.maximum(tl.sqrt(square_b), 1e-12)[None, :]
        allowed = j < nb
        if DISTILL_TOKEN:
            allowed = allowed & (j > 0)
        scores = tl.where(allowed[None, :], scores, float("-inf"))
        highest, at = tl.max(scores, 1, return_indices=True, return_indices_tie_break_left=True)
        better = highest > best
        best = tl.where(better, highest, best)
        partner = tl.where(better, start + at, partner)
    best = best / tl.maximum(tl.sqrt(square_a), 1e-12)
    # NaN would break the ranking, and with it every output row: such a token is not merged.
    best = tl.where(best == best, best, float("-inf"))
    if CLASS_TOKEN:
        best = tl.where(i == 0, float("-inf"), best)
    tl.store(best_out + b * na + i, best, mask=i < na)
    tl.store(partner_out + b * na + i, partner, mask=i < na)


@triton.jit(do_not_specialize=["na"])
def _rank_kernel(best_in, rank_out, na, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    tiles = tl.cdiv(na, BLOCK_I)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles * BLOCK_I + tl.arange(0, BLOCK_I)
    mine = tl.load(best_in + b * na + i, mask=i < na, other=float("-inf"))
    rank = tl.zeros([BLOCK_I], tl.int32)
    for start in range(0, na, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        other = tl.load(best_in + b * na + j, mask=j < na, other=float("-inf"))
        before = (other[None, :] > mine[:, None]) | (
            (other[None, :] == mine[:, None]) & (j[None, :] < i[:, None])
        )
        rank += tl.sum((before & (j < na)[None, :]).to(tl.int32), axis=1)
    tl.store(rank_out + b * na + i, rank, mask=i < na)


@triton.jit(do_not_specialize=["n", "r"])
def _assign_kernel(
    rank_in,
    partner_in,
    rows_out,
    n,
    r,
    CLASS_TOKEN: tl.constexpr,
    DISTILL_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    na, nb = (n + 1) // 2, n // 2
    tiles = tl.cdiv(na, BLOCK)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK
    lanes = tl.arange(0, BLOCK)
    i = first + lanes
    rank = tl.load(rank_in + b * na + i, mask=i < na, other=0)
    merged = rank < r
    if CLASS_TOKEN:  # in the order of the tokens
        before = tl.zeros([BLOCK], tl.int32)
        for start in range(0, first, BLOCK):
            other = tl.load(rank_in + b * na + start + lanes)
            before += (other >= r).to(tl.int32)
        kept = (~merged & (i < na)).to(tl.int32)
        row = tl.sum(before, axis=0) + tl.cumsum(kept, axis=0) - kept
    else:  # in the order of the scores
        row = rank - r
    joined = na - r + tl.load(partner_in + b * na + i, mask=i < na, other=0)
    if DISTILL_TOKEN:  # the first of B is in row 1, and nobody joins it
        row += (row > 0).to(tl.int32)
    tl.store(rows_out + b * n + 2 * i, tl.where(merged, joined, row), mask=i < na)
    row_of_b = na - r + i
    if DISTILL_TOKEN:
        row_of_b = tl.where(i == 0, 1, row_of_b)
    tl.store(rows_out + b * n + 2 * i + 1, row_of_b, mask=i < nb)


@triton.jit(do_not_specialize=["n"])
def _key_metric_kernel(
    k,
    out,
    n,
    heads,
    d,
    sample,
    head,
    token,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(n, BLOCK_N)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    mask = (i < n)[:, None] & (cols < d)[None, :]
    p = k + b * sample + i.to(tl.int64)[:, None] * token + cols[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    for _ in tl.range(0, heads, loop_unroll_factor=4):
        total += tl.load(p, mask=mask, other=0).to(ACC)
        p += head
    total /= heads
    length = tl.sqrt(tl.sum(total * total, axis=1))
    unit = total / tl.maximum(length, 1e-12)[:, None]
    at = out + (b * n + i.to(tl.int64))[:, None] * d + cols[None, :]
    tl.store(at, unit.to(tl.float32), mask=mask)


def bipartite_match(metric: Tensor, r: int, class_token: bool, distill_token: bool) -> Tensor:
    """``fastast::bipartite_match``; ``r`` is already clamped."""
    batch, n, c = metric.shape
    if r == 0:
        return torch.arange(n, dtype=torch.int32, device=metric.device).repeat(batch, 1)
    na = (n + 1) // 2
    metric = dense_rows(metric)
    best = torch.empty((batch, na), dtype=torch.float32, device=metric.device)
    partner = torch.empty((batch, na), dtype=torch.int32, device=metric.device)
    rank = torch.empty_like(partner)
    rows = torch.empty((batch, n), dtype=torch.int32, device=metric.device)
    table, programs = tiled("best_partner", metric, c, batch, na, "BLOCK_A")
    block_c = min(block_of(c), 64)
    launch(
        _best_partner_kernel,
        programs,
        metric,
        metric,
        best,
        partner,
        n,
        c,
        *metric.stride()[:2],
        CLASS_TOKEN=class_token,
        DISTILL_TOKEN=distill_token,
        PRECISION=PRECISION,
        PARTS=triton.cdiv(c, block_c),
        BLOCK_C=block_c,
        **table,
    )
    table = parameters("rank", metric, 0)
    programs = batch * triton.cdiv(na, table["BLOCK_I"])
    launch(_rank_kernel, programs, metric, best, rank, na, **table)
    table = parameters("assign", metric, 0)
    launch(
        _assign_kernel,
        batch * triton.cdiv(na, table["BLOCK"]),
        metric,
        rank,
        partner,
        rows,
        n,
        r,
        CLASS_TOKEN=class_token,
        DISTILL_TOKEN=distill_token,
        **table,
    )
    return rows


def key_metric(k: Tensor) -> Tensor:
    """``fastast::key_metric``."""
    k = dense_rows(k)
    batch, heads, n, d = k.shape
    out = torch.empty((batch, n, d), dtype=torch.float32, device=k.device)
    table = parameters("key_metric", k, d)
    launch(
        _key_metric_kernel,
        batch * triton.cdiv(n, table["BLOCK_N"]),
        k,
        k,
        out,
        n,
        heads,
        d,
        k.stride(0),
        k.stride(1),
        k.stride(2),
        ACC=accumulator(k.dtype),
        BLOCK_D=block_of(d),
        **table,
    )
    return out


def match_keys(k: Tensor, r: int, class_token: bool, distill_token: bool) -> Tensor:
    """``fastast::match_keys``: the metric is written, four bytes a value, and read again."""
    return bipartite_match(key_metric(k), r, class_token, distill_token)


def bipartite_match_sources(
    metric: Tensor, r: int, class_token: bool, distill_token: bool
) -> tuple[Tensor, Tensor]:
    """``fastast::bipartite_match_sources``, by PyTorch's sort: the merge here does not use them."""
    rows = bipartite_match(metric, r, class_token, distill_token)
    return rows, sources(rows, rows.shape[1] - r)


def match_keys_sources(
    k: Tensor, r: int, class_token: bool, distill_token: bool
) -> tuple[Tensor, Tensor]:
    """``fastast::match_keys_sources``."""
    return bipartite_match_sources(key_metric(k), r, class_token, distill_token)
