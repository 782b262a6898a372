"""Token Merging: schedules, settings, the ``ToMe`` layer and the published function names.

Every policy here answers one question, which output row each token goes to, with an assignment
(int32 ``[B, N]``); ``fastast_kernels`` does the rest. Token Merging is arXiv 2210.09461; its use in
audio spectrogram transformers is FastAST (Interspeech 2024), section 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from fastast.schedules import Schedule, macs, parse_r, parse_schedule, token_count
from fastast_kernels import bipartite_match, effective_r, key_metric, match_keys, unmerge
from fastast_kernels import merge as merge_tokens
from fastast_kernels.cuda_ops import runs_in_cuda

__all__ = [
    "POLICIES",
    "MergeSettings",
    "Schedule",
    "ToMe",
    "bipartite_soft_matching",
    "compose",
    "kth_bipartite_soft_matching",
    "macs",
    "merge_source",
    "merge_wavg",
    "parse_r",
    "parse_schedule",
    "random_bipartite_soft_matching",
]

POLICIES: dict[str, Callable[[Tensor, int, bool, bool], Tensor]] = {"tome": bipartite_match}
"""Reduction policies by name: ``(metric, r, class_token, distill_token) -> assignment``."""


# --------------------------------------------------------------------------- settings and layer


def compose(source: Tensor | None, assignment: Tensor) -> Tensor:
    """Follow every original token through one more merge.

    ``next[b, i] = assignment[b, source[b, i]]``, one int a token where the published trace keeps an
    N x N matrix.

    Args:
        source: int32 ``[B, N0]``, where each original token is now, -1 if dropped; None at first.
        assignment: int32 ``[B, N]``, the merge that follows.

    Returns:
        int32 ``[B, N0]``.
    """
    if source is None:
        return assignment
    moved = assignment.gather(1, source.clamp_min(0).long())
    return torch.where(source >= 0, moved, source)


@dataclass
class MergeSettings:
    """How a patched model merges: what ``model.tome`` is. How much it merges is ``model.r``.

    Attributes:
        prop_attn: proportional attention, log of the token size added to the logits of its key.
        trace: follow every token, and leave where it went in ``source`` after each forward.
        class_token: token 0 is protected.
        distill_token: token 1 is protected.
        policy: name of the reduction policy, a key of ``POLICIES``.
        source: int32 ``[B, N]``, the output row each original token ended in at the last forward
            with ``trace``; None before. The last forward wins where threads share a model.
    """

    prop_attn: bool = True
    trace: bool = False
    class_token: bool = True
    distill_token: bool = True
    policy: str = "tome"
    source: Tensor | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy must be one of {sorted(POLICIES)}, got {self.policy!r}")

    def merged(self, n: int, r: int) -> int:
        """How many of ``n`` tokens a block really merges when asked for ``r``."""
        return effective_r(n, r, self.class_token, self.distill_token)

    @torch.no_grad()
    def match(self, metric: Tensor, r: int) -> Tensor:
        """The policy's assignment, int32 ``[B, N]``, for a ``metric`` ``[B, N, C]``."""
        return POLICIES[self.policy](metric, r, self.class_token, self.distill_token)

    def match_keys(self, k: Tensor, r: int) -> Tensor:
        """The policy's assignment for the mean of the keys ``[B, H, N, Dh]`` over heads."""
        if POLICIES[self.policy] is bipartite_match:
            return match_keys(k, r, self.class_token, self.distill_token)
        return self.match(key_metric(k), r)

    def match_sources(self, metric: Tensor, r: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """:meth:`match`, and the sources that ``merge`` of ``x`` ``[B, N, D]`` would gain by."""
        tome = POLICIES[self.policy] is bipartite_match
        if tome and runs_in_cuda("bipartite_match", metric) and runs_in_cuda("merge", x):
            protected = self.class_token, self.distill_token
            return bipartite_match(metric, r, *protected, return_sources=True)
        return self.match(metric, r), None

    def match_keys_sources(self, k: Tensor, r: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same of :meth:`match_keys`, for ``merge_add_layer_norm`` of ``x``."""
        tome = POLICIES[self.policy] is bipartite_match
        if tome and runs_in_cuda("match_keys", k) and runs_in_cuda("merge_add_layer_norm", x):
            return match_keys(k, r, self.class_token, self.distill_token, return_sources=True)
        return self.match_keys(k, r), None

    def log_size(self, size: Tensor | None) -> Tensor | None:
        """Bias of the attention logits, fp32 ``[B, N]``, or None while every token counts once."""
        return size.log() if self.prop_attn and size is not None else None


class ToMe(nn.Module):
    """Token merging between the attention and the MLP of any transformer block.

    It has no parameters and keeps nothing between calls: size and source go in and come out. ::

        x = x + attention(norm1(x), bias=tome.log_size(size))     # bias: [B, N], one a key
        x, size, source = tome(x, keys.mean(1), size, source)     # keys: [B, H, N, Dh]
        x = x + mlp(norm2(x))

    Args:
        r: tokens to merge, 0 or more; clamped to half of the unprotected ones.
        class_token: token 0 is protected and stays first.
        distill_token: token 1 is protected and stays second.
        prop_attn: whether :meth:`log_size` returns a bias.
        trace: follow where every token went.
        policy: name of the reduction policy.

    Raises:
        TypeError: ``r`` is not an int.
        ValueError: ``r`` is negative, or ``policy`` unknown.
    """

    def __init__(
        self,
        r: int = 0,
        class_token: bool = True,
        distill_token: bool = True,
        prop_attn: bool = True,
        trace: bool = False,
        policy: str = "tome",
    ) -> None:
        super().__init__()
        self.r = token_count(r, "r")
        self.settings = MergeSettings(prop_attn, trace, class_token, distill_token, policy)

    def log_size(self, size: Tensor | None) -> Tensor | None:
        """Proportional attention: fp32 ``[B, N]`` to add to the logits of each key, or None."""
        return self.settings.log_size(size)

    def forward(
        self,
        x: Tensor,
        metric: Tensor,
        size: Tensor | None = None,
        source: Tensor | None = None,
        r: int | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Merge the ``r`` most redundant tokens.

        Args:
            x: tokens ``[B, N, D]``, after the attention residual.
            metric: ``[B, N, C]``, what similarity is measured on: the mean of the keys over heads.
            size: fp32 ``[B, N]``, original tokens behind each token; None at first.
            source: int32 ``[B, N0]`` from the merge before, used with ``trace``; None at first.
            r: tokens to merge in this call; the layer's own unless given.

        Returns:
            ``x`` ``[B, N', D]``, ``size`` ``[B, N']`` and ``source`` ``[B, N0]``; ``size`` and
            ``source`` are returned as they came when nothing is merged or traced.

        Raises:
            ValueError: ``x`` and ``metric`` do not agree, or ``r`` is negative.
        """
        if x.dim() != 3 or metric.shape[:-1] != x.shape[:2]:
            raise ValueError(
                "metric must be [B, N, C] for x [B, N, D], "
                f"got {list(metric.shape)} for {list(x.shape)}"
            )
        n = x.shape[1]
        count = self.settings.merged(n, self.r if r is None else r)
        if count == 0:
            return x, size, source
        assignment, sources = self.settings.match_sources(metric, count, x)
        x, size = merge_tokens(x, assignment, n - count, size, sources)
        return x, size, compose(source, assignment) if self.settings.trace else source

    def extra_repr(self) -> str:
        """What ``print`` shows between the brackets."""
        s = self.settings
        return f"r={self.r}, class_token={s.class_token}, distill_token={s.distill_token}"


# ------------------------------------------------------------------------------ published names


class MergeFunction(Protocol):
    """What the published ``merge`` callables look like."""

    def __call__(self, x: Tensor, mode: str = "mean") -> Tensor:
        """Reduce ``[B, N, D]`` to ``[B, n_out, D]``."""


class Merge:
    """The published ``merge(x, mode="mean")``: ``[B, N, D]`` -> ``[B, n_out, D]``.

    Attributes:
        assignment: int32 ``[B, N]``, the output row of each token, -1 for a dropped one.
        n_out: number of output rows.
    """

    def __init__(self, assignment: Tensor, n_out: int) -> None:
        self.assignment = assignment
        self.n_out = n_out

    def __call__(self, x: Tensor, mode: str = "mean") -> Tensor:
        """Reduce the tokens of each row by ``mode``: mean, sum, amax, amin or prod."""
        if mode == "mean" and x.is_floating_point():
            return merge_tokens(x, self.assignment, self.n_out)[0]
        # Dropped tokens fall into one spare row, cut off at the end.
        row = torch.where(self.assignment < 0, self.n_out, self.assignment).long()
        out = x.new_zeros(x.shape[0], self.n_out + 1, x.shape[-1])
        index = row.unsqueeze(-1).expand_as(x)
        return out.scatter_reduce(1, index, x, reduce=mode, include_self=False)[:, :-1]


class Unmerge:
    """The published ``unmerge(x)``: ``[B, n_out, D]`` -> ``[B, N, D]``, to every token its row."""

    def __init__(self, assignment: Tensor) -> None:
        self.assignment = assignment

    def __call__(self, x: Tensor) -> Tensor:
        """Gather the row of every token; a dropped token is zero."""
        return unmerge(x, self.assignment)


def do_nothing(x: Tensor, mode: str | None = None) -> Tensor:
    """What ``merge`` and ``unmerge`` are when there is nothing to merge."""
    return x


def _callables(assignment: Tensor, n_out: int) -> tuple[MergeFunction, Callable[[Tensor], Tensor]]:
    return Merge(assignment, n_out), Unmerge(assignment)


def bipartite_soft_matching(
    metric: Tensor, r: int, class_token: bool = False, distill_token: bool = False
) -> tuple[MergeFunction, Callable[[Tensor], Tensor]]:
    """ToMe's matching under its published name and signature (arXiv 2210.09461, section 3).

    Args:
        metric: ``[B, N, C]``.
        r: tokens to merge; at most half of the unprotected ones are.
        class_token: token 0 is a class token, never merged.
        distill_token: token 1 is a distillation token, never merged.

    Returns:
        ``merge(x, mode="mean")`` and ``unmerge(x)``. Rows come out as CLS, DIST, the rest of the
        even tokens, then the odd ones. Unlike the published one, ``unmerge`` is right with a
        distillation token, and sizes are kept in fp32 by :func:`merge_wavg`.
    """
    n = metric.shape[1]
    count = effective_r(n, max(r, 0), class_token, distill_token)
    if count == 0:
        return do_nothing, do_nothing
    return _callables(bipartite_match(metric, count, class_token, distill_token), n - count)


@torch.no_grad()
def _closest(metric: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    """Which of ``targets`` ``[B, M]`` (token indices) each of ``sources`` is most similar to."""
    unit = nn.functional.normalize(metric.float(), dim=-1)
    a, b = (
        unit.gather(1, index.unsqueeze(-1).expand(-1, -1, unit.shape[-1]))
        for index in (sources, targets)
    )
    return (a @ b.transpose(1, 2)).argmax(dim=-1)


def _merge_into(metric: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    """Assignment that merges every source into its closest target; all other tokens are dropped."""
    batch, n, _ = metric.shape
    closest = _closest(metric, sources, targets)
    rows = torch.arange(targets.shape[1], device=metric.device).expand(batch, -1)
    assignment = torch.full((batch, n), -1, dtype=torch.int64, device=metric.device)
    return assignment.scatter(1, targets, rows).scatter(1, sources, closest).int()


def kth_bipartite_soft_matching(
    metric: Tensor, k: int
) -> tuple[MergeFunction, Callable[[Tensor], Tensor]]:
    """Keep every ``k``-th token and merge all others into the most similar of those kept.

    Args:
        metric: ``[B, N, C]``.
        k: 1 or less changes nothing; 2 halves the tokens. ``N // k`` remain, and the last
            ``N % k`` tokens are dropped, as published; ``unmerge`` gives zeros for them.

    Raises:
        ValueError: ``k`` is more than the number of tokens.
    """
    if k <= 1:
        return do_nothing, do_nothing
    batch, n, _ = metric.shape
    if k > n:
        raise ValueError(f"k must be at most the number of tokens, {n}, got {k}")
    tokens = torch.arange(n // k * k, device=metric.device).view(-1, k)
    sources = tokens[:, :-1].reshape(1, -1).expand(batch, -1)
    targets = tokens[:, -1].reshape(1, -1).expand(batch, -1)
    return _callables(_merge_into(metric, sources, targets), n // k)


def random_bipartite_soft_matching(
    metric: Tensor, r: int
) -> tuple[MergeFunction, Callable[[Tensor], Tensor]]:
    """Merge ``r`` random tokens of each sample into the most similar of the others.

    Args:
        metric: ``[B, N, C]``.
        r: 0 or less changes nothing; at least one token always remains.
    """
    batch, n, _ = metric.shape
    r = min(r, n - 1)
    if r <= 0:
        return do_nothing, do_nothing
    order = torch.rand(batch, n, device=metric.device).argsort(dim=1)
    targets = order[:, r:].sort(dim=1).values
    return _callables(_merge_into(metric, order[:, :r], targets), n - r)


def merge_wavg(
    merge: MergeFunction, x: Tensor, size: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Merge by the mean weighted by token size, under its published name and signature.

    Args:
        merge: from a matching above (merged in one pass), or any callable like it.
        x: ``[B, N, D]``.
        size: ``[B, N, 1]``; None means every token counts once.

    Returns:
        ``x`` ``[B, n_out, D]`` in its dtype and the new size, fp32 ``[B, n_out, 1]``.
    """
    if isinstance(merge, Merge):
        flat = None if size is None else size[..., 0].float()
        x, total = merge_tokens(x, merge.assignment, merge.n_out, flat)
        return x, total.unsqueeze(-1)
    weight = x.new_ones(*x.shape[:2], 1, dtype=torch.float32) if size is None else size.float()
    if merge is do_nothing:
        return x, weight
    total = merge(weight, mode="sum")
    return (merge(x * weight, mode="sum") / total).to(x.dtype), total


def merge_source(merge: MergeFunction, x: Tensor, source: Tensor | None = None) -> Tensor:
    """Which original tokens each token holds, as the published ``[B, n, N]`` matrix of 0 and 1.

    :func:`compose` holds the same in ``[B, N]``.

    Args:
        merge: from a matching above.
        x: ``[B, N, D]``, read for its shape only.
        source: matrix from the merge before; None at first.
    """
    if source is None:
        batch, n, _ = x.shape
        source = torch.eye(n, device=x.device).expand(batch, n, n)
    return merge(source, mode="amax")
