"""The unfused truth: the published algorithms in plain PyTorch, readable and differentiable.

Tests compare every kernel with these functions and benchmarks time against them. Half-precision
input is computed in fp32 (an fp64 input in fp64), because scores rounded to bf16 tie by the dozen.
:func:`published_step` is the exception: it is the unfused ToMe step as published, in the dtype it
is given, and is what speed is measured against.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .checks import effective_r

# A token shorter than this has no direction: it scores 0 against everything, and never NaN.
MIN_NORM = 1e-12


def working(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the dtype its arithmetic is done in: fp64 stays, everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def match_scores(
    metric: torch.Tensor, class_token: bool = True, distill_token: bool = True
) -> torch.Tensor:
    """Cosine similarity of every even token (set A) to every odd token (set B).

    Args:
        metric: ``[B, N, C]``.
        class_token: token 0 is never a source: its row is minus infinity.
        distill_token: token 1 is never a destination: its column is minus infinity.

    Returns:
        Scores ``[B, ceil(N / 2), N // 2]`` in the dtype of ``metric``.
    """
    unit = metric / metric.norm(dim=-1, keepdim=True).clamp_min(MIN_NORM)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(-1, -2)
    if class_token:
        scores[:, 0, :] = -torch.inf
    if distill_token:
        scores[:, :, 0] = -torch.inf
    return scores


@torch.no_grad()
def bipartite_match(
    metric: torch.Tensor, r: int, class_token: bool = True, distill_token: bool = True
) -> torch.Tensor:
    """ToMe's bipartite soft matching (arXiv 2210.09461, section 3) as an assignment.

    Even tokens A propose to their most similar odd token B; the ``r`` best proposals are merged.
    Equal scores go to the lowest index.

    Args:
        metric: ``[B, N, C]``, any floating dtype; only directions matter.
        r: tokens to merge, clamped by :func:`effective_r`.
        class_token: token 0 is protected and stays in row 0.
        distill_token: token 1 is protected and, with a class token, stays in row 1.

    Returns:
        int32 ``[B, N]``: the output row of every token. Rows are CLS, DIST, the unmerged of A
        (ascending; without a class token by falling score), then B.
    """
    batch, n, _ = metric.shape
    r = effective_r(n, r, class_token, distill_token)
    if r == 0:
        return torch.arange(n, dtype=torch.int32, device=metric.device).repeat(batch, 1)

    best, partner = match_scores(working(metric), class_token, distill_token).max(dim=-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    merged, kept = order[:, :r], order[:, r:]
    if class_token:
        kept = kept.sort(dim=-1).values

    n_kept, n_b = kept.shape[1], n // 2
    row_of_kept = torch.arange(n_kept, dtype=torch.int32, device=metric.device)
    row_of_b = n_kept + torch.arange(n_b, dtype=torch.int32, device=metric.device)
    if distill_token:  # DIST, the first of B, moves up to row 1
        row_of_kept[1:] += 1
        row_of_b[0] = 1

    assignment = torch.empty(batch, n, dtype=torch.int32, device=metric.device)
    assignment[:, 1::2] = row_of_b
    of_a = torch.empty_like(best, dtype=torch.int32)
    of_a.scatter_(1, kept, row_of_kept.expand(batch, -1))
    of_a.scatter_(1, merged, row_of_b[partner.gather(1, merged)])
    assignment[:, ::2] = of_a
    return assignment


@torch.no_grad()
def sources(assignment: torch.Tensor, n_out: int) -> torch.Tensor:
    """The inverse of an assignment: the tokens of each output row.

    Args:
        assignment: int32 ``[B, N]``, output row of each token, -1 to drop it.
        n_out: number of output rows.

    Returns:
        int32 ``[B, n_out + 1 + N]``: offsets, then tokens. Those of row ``i`` are
        ``tokens[offsets[i] : offsets[i + 1]]``, ascending; dropped ones are behind
        ``offsets[n_out]``.
    """
    row = torch.where(assignment < 0, n_out, assignment).long()
    count = row.new_zeros(row.shape[0], n_out + 2).scatter_add(1, row + 1, torch.ones_like(row))
    offsets = count[:, :-1].cumsum(dim=1)
    return torch.cat([offsets, row.argsort(dim=1, stable=True)], dim=1).int()


def _sum_rows(x: torch.Tensor, assignment: torch.Tensor, n_out: int) -> torch.Tensor:
    """Sum of the ``[B, N, ...]`` tokens assigned to each of ``n_out`` rows; -1 is left out."""
    index = assignment.clamp_min(0).long()
    x = x * (assignment >= 0).to(x.dtype).reshape(index.shape + (1,) * (x.dim() - 2))
    index = index.reshape(index.shape + (1,) * (x.dim() - 2)).expand_as(x)
    return x.new_zeros(x.shape[0], n_out, *x.shape[2:]).scatter_add(1, index, x)


def merge(
    x: torch.Tensor, assignment: torch.Tensor, n_out: int, size: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Size-weighted mean of the tokens of each output row (ToMe's weighted average).

    Args:
        x: ``[B, N, D]``.
        assignment: int32 ``[B, N]``, output row of each token, -1 to drop it.
        n_out: number of output rows.
        size: fp32 ``[B, N]``, how many original tokens each stands for; None means 1 each.

    Returns:
        ``x`` ``[B, n_out, D]`` in its dtype, and the new size fp32 ``[B, n_out]``. A row that no
        token was assigned to is zero and of size zero.
    """
    if size is None:
        size = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
    total = _sum_rows(size, assignment, n_out)
    summed = _sum_rows(working(x) * size.unsqueeze(-1), assignment, n_out)
    mean = summed / total.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    return mean.to(x.dtype), total


def unmerge(x: torch.Tensor, assignment: torch.Tensor) -> torch.Tensor:
    """Every token gets the row it was merged into: ``[B, n_out, D]`` -> ``[B, N, D]``.

    Dropped tokens (assignment -1) are zero.
    """
    index = assignment.clamp_min(0).long().unsqueeze(-1).expand(-1, -1, x.shape[-1])
    return x.gather(1, index) * (assignment >= 0).to(x.dtype).unsqueeze(-1)


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``h = x + residual`` and ``LayerNorm(h)``, both ``[..., D]``."""
    h = working(x) + working(residual)
    y = F.layer_norm(h, h.shape[-1:], weight.to(h.dtype), bias.to(h.dtype), eps)
    return h.to(x.dtype), y.to(x.dtype)


def merge_add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    assignment: torch.Tensor,
    n_out: int,
    size: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``h, size = merge(x + residual)`` and ``LayerNorm(h)``; returns ``h, size, LayerNorm(h)``."""
    h, size = merge(working(x) + working(residual), assignment, n_out, size)
    y = F.layer_norm(h, h.shape[-1:], weight.to(h.dtype), bias.to(h.dtype), eps)
    return h.to(x.dtype), size, y.to(x.dtype)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_size: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """``softmax(q k^T scale + log_size) v``: ToMe's proportional attention, materialised.

    Args:
        q: ``[B, H, Nq, Dh]``.
        k: ``[B, H, N, Dh]``.
        v: ``[B, H, N, Dh]``.
        log_size: fp32 ``[B, N]`` added to every logit of its key, or None.
        scale: factor of the logits; ``Dh ** -0.5`` unless given.
    """
    logits = attention_logits(q, k, log_size, scale)
    return (logits.softmax(dim=-1) @ working(v)).to(q.dtype)


def attention_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    log_size: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """The logits ``q k^T scale + log_size`` of :func:`attention`, fp32 ``[B, H, Nq, N]``."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = working(q) @ working(k).transpose(-1, -2) * scale
    return logits if log_size is None else logits + log_size[:, None, None, :]


def attention_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    log_size: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """The log-sum-exp of the logits over keys, fp32 ``[B, H, Nq]``."""
    return attention_logits(q, k, log_size, scale).logsumexp(dim=-1)


@torch.no_grad()
def attention_column_sums(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    log_size: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Sums of the attention weights over queries: ``sum_i exp(logits_ij - lse_i)``.

    Args:
        q: ``[B, H, Nq, Dh]``.
        k: ``[B, H, N, Dh]``.
        lse: fp32 ``[B, H, Nq]``, the log-sum-exp of each query's logits.
        log_size: fp32 ``[B, N]`` or None.
        scale: factor of the logits; ``Dh ** -0.5`` unless given.
        causal: query ``i`` saw the keys up to ``N - Nq + i`` only.

    Returns:
        fp32 ``[B, H, N]``.
    """
    logits = attention_logits(q, k, log_size, scale)
    if causal:
        nq, n = logits.shape[-2:]
        seen = torch.ones(nq, n, dtype=torch.bool, device=q.device).tril(n - nq)
        logits = logits.masked_fill(~seen, -torch.inf)
    return (logits - lse.unsqueeze(-1)).exp().sum(dim=-2)


@torch.no_grad()
def key_metric(k: torch.Tensor) -> torch.Tensor:
    """ToMe's metric: the mean of the keys over heads, at unit length.

    Args:
        k: ``[B, H, N, Dh]``.

    Returns:
        fp32 ``[B, N, Dh]``; a zero mean stays zero.
    """
    mean = working(k).mean(dim=1)
    return (mean / mean.norm(dim=-1, keepdim=True).clamp_min(MIN_NORM)).float()


def published_step(
    x: torch.Tensor,
    metric: torch.Tensor,
    r: int,
    size: torch.Tensor | None = None,
    class_token: bool = True,
    distill_token: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole unfused ToMe step as published, in the dtype of its inputs: the speed baseline.

    Match on ``metric``, then merge ``x`` weighted by ``size`` with gathers and one scatter.

    Args:
        x: ``[B, N, D]``.
        metric: ``[B, N, C]``.
        r: tokens to merge, clamped by :func:`effective_r`, at least 1 after that.
        size: ``[B, N]`` in the dtype of ``x``, or None.
        class_token: token 0 is protected.
        distill_token: token 1 is protected.

    Returns:
        ``x`` ``[B, N - r, D]`` and ``size`` ``[B, N - r]``.
    """
    r = effective_r(metric.shape[1], r, class_token, distill_token)
    with torch.no_grad():
        best, partner = match_scores(metric, class_token, distill_token).max(dim=-1)
        order = best.argsort(dim=-1, descending=True)[..., None]
        kept, merged = order[:, r:], order[:, :r]
        into = partner[..., None].gather(1, merged)
        if class_token:
            kept = kept.sort(dim=1).values

    def merge_sum(t: torch.Tensor) -> torch.Tensor:
        a, b = t[:, ::2], t[:, 1::2]
        width = t.shape[-1]
        rest = a.gather(1, kept.expand(-1, -1, width))
        moved = a.gather(1, merged.expand(-1, -1, width))
        b = b.scatter_reduce(1, into.expand(-1, -1, width), moved, reduce="sum")
        if distill_token:
            return torch.cat([rest[:, :1], b[:, :1], rest[:, 1:], b[:, 1:]], dim=1)
        return torch.cat([rest, b], dim=1)

    weight = torch.ones_like(x[..., :1]) if size is None else size.unsqueeze(-1)
    total = merge_sum(weight)
    return merge_sum(x * weight) / total, total.squeeze(-1)
