"""The least work each op can do: arithmetic, bytes through memory, kernel launches.

Bytes are the fewest that any implementation must move: each input read once, each output written
once, nothing in between. FLOPs are those of matrix products (a multiply and an add are two) and of
the FFT; elementwise arithmetic is left out, as it takes less time than moving its operands.
:func:`published_step` is the exception, on purpose: it counts every pass of the unfused step.

``itemsize`` is the bytes of one element of the tokens; assignments and sizes are 4 bytes each.
``r`` is clamped as the ops clamp it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from fastast.config import ASTConfig
from fastast.schedules import Schedule, parse_schedule
from fastast_kernels import effective_r

Kernels: TypeAlias = "list[tuple[str, Count]]"
"""Kernels in the order they run, with their names."""


@dataclass(frozen=True)
class Count:
    """Work: floating-point operations, bytes read and written, kernels launched."""

    flops: float
    bytes: float
    launches: int = 1

    def __add__(self, other: Count) -> Count:
        return Count(
            self.flops + other.flops, self.bytes + other.bytes, self.launches + other.launches
        )


NOTHING = Count(0, 0, 0)


@dataclass(frozen=True)
class Ceilings:
    """What a machine can do at best.

    Attributes:
        flops: operations a second.
        bandwidth: bytes a second, read and written together.
        launch: seconds that each kernel adds, whatever it does.
    """

    flops: float
    bandwidth: float
    launch: float = 0.0


def seconds(count: Count, ceilings: Ceilings) -> float:
    """The shortest time for ``count``: arithmetic or memory, whichever is longer, and launches."""
    work = max(count.flops / ceilings.flops, count.bytes / ceilings.bandwidth)
    return work + count.launches * ceilings.launch


def match(B: int, N: int, C: int, itemsize: int) -> Count:
    """Reads the metric ``[B, N, C]``, writes the assignment; A times B is the arithmetic."""
    a, b = (N + 1) // 2, N // 2
    return Count(2.0 * B * a * b * C, B * N * (C * itemsize + 4.0))


def match_keys(B: int, H: int, N: int, C: int, itemsize: int) -> Count:
    """Reads the keys ``[B, H, N, C]`` in place of their metric."""
    return Count(match(B, N, C, 0).flops, B * N * (H * C * itemsize + 4.0))


def merge(B: int, N: int, D: int, r: int, itemsize: int) -> Count:
    """Reads tokens, assignment and sizes; writes the ``N - r`` merged tokens and their sizes."""
    out = N - effective_r(N, r)
    return Count(0, B * ((N + out) * D * itemsize + 4.0 * (2 * N + out)))


def add_layer_norm(B: int, N: int, D: int, itemsize: int, residual: bool = True) -> Count:
    """Reads ``x`` and the residual, writes the sum and its LayerNorm; weight and bias once.

    Without a residual it reads ``x`` and writes the LayerNorm only.
    """
    passes = 4 if residual else 2
    return Count(0, (passes * B * N + 2.0) * D * itemsize)


def merge_add_layer_norm(B: int, N: int, D: int, r: int, itemsize: int) -> Count:
    """Reads ``x``, residual, assignment and sizes; writes ``N - r`` sums, LayerNorms and sizes."""
    out = N - effective_r(N, r)
    tokens = (2.0 * B * (N + out) + 2) * D * itemsize  # two rows more are weight and bias
    return Count(0, tokens + 4.0 * B * (2 * N + out))


def attention(B: int, H: int, N: int, Dh: int, itemsize: int, queries: int | None = None) -> Count:
    """Reads q, k, v and the fp32 key bias ``[B, N]``, writes the output; two products.

    ``queries`` is the number of query tokens, all ``N`` unless given. No logit leaves the chip.
    """
    q = N if queries is None else queries
    return Count(4.0 * B * H * q * N * Dh, 2.0 * B * H * (q + N) * Dh * itemsize + 4.0 * B * N)


def key_metric(B: int, H: int, N: int, Dh: int, itemsize: int) -> Count:
    """Reads the keys ``[B, H, N, Dh]``, writes the fp32 metric ``[B, N, Dh]``."""
    return Count(0, B * N * Dh * (H * itemsize + 4.0))


def unmerge(B: int, N: int, D: int, r: int, itemsize: int) -> Count:
    """Reads the ``N - r`` merged tokens and the assignment, writes ``N`` tokens."""
    out = N - effective_r(N, r)
    return Count(0, B * ((N + out) * D * itemsize + 4.0 * N))


def linear(M: int, N: int, K: int, itemsize: int) -> Count:
    """``[M, K] @ [K, N] + [N]``: reads input, weight and bias, writes the output."""
    return Count(2.0 * M * N * K, float(M * K + K * N + N + M * N) * itemsize)


def fbank(
    B: int, samples: int, target_length: int, n_mels: int = 128, sample_rate: int = 16000
) -> Count:
    """Reads fp32 samples, writes fp32 features; a real FFT a frame, each bin in two filters."""
    fft = 1 << (int(0.025 * sample_rate) - 1).bit_length()
    frames = min(
        max(0, 1 + (samples - int(0.025 * sample_rate)) // (sample_rate // 100)), target_length
    )
    flops = 2.5 * fft * math.log2(fft) + 2 * 2 * (fft // 2 + 1)
    return Count(B * frames * flops, 4.0 * B * (samples + target_length * n_mels))


def published_step(
    B: int, N: int, D: int, C: int, r: int, itemsize: int, from_keys: bool = True
) -> Count:
    """The unfused ToMe step pass by pass, each reading and writing memory.

    ``from_keys`` counts the mean over heads that makes the metric, from keys ``D`` wide in all.
    """
    r = effective_r(N, r)
    a, b, out = (N + 1) // 2, N // 2, N - r
    metric, scores, row = N * C * itemsize, a * b * itemsize, D * itemsize
    passes = {
        "mean of the keys": N * row + metric if from_keys else 0,
        "norm": metric + N * itemsize,
        "divide by it": 2 * metric + N * itemsize,
        "product": metric + scores,
        "maximum": scores + a * (itemsize + 8),
        "argsort and indices": 10 * a * 8 + a * itemsize,
        "x * size": 2 * N * row + N * itemsize,
        "gather the unmerged": 2 * (a - r) * row,
        "gather the merged": 2 * r * row,
        "clone the destinations": 2 * b * row,
        "add to them": 3 * r * row,
        "concatenate": 2 * out * row,
        "divide by size": 2 * out * row + out * itemsize,
        "the same for size": 8 * N * itemsize,
    }
    launches = 30  # about; bench/unverified.py counts them
    return Count(2.0 * B * a * b * C, float(B * sum(passes.values())), launches)


def tome_step(B: int, N: int, D: int, C: int, r: int, itemsize: int, metric_itemsize: int) -> Count:
    """The fused step: :func:`match` and :func:`merge`."""
    return match(B, N, C, metric_itemsize) + merge(B, N, D, r, itemsize)


def ast_kernels(
    config: ASTConfig, r: Schedule, batch: int, itemsize: int, trimmed: bool = True
) -> Kernels:
    """The kernels of one forward pass of an AST, from features to logits, as FastAST orders them.

    Residual, merge and LayerNorm are one kernel, GELU and the bias are part of their product, and
    patches are read where they lie in the features. ``trimmed``: the last block computes queries,
    projection and MLP of CLS and DIST only, and merges nothing, as :class:`fastast.AST` does.
    """
    c, B = config, batch
    d, dh = c.embed_dim, c.embed_dim // c.num_heads
    n, prefix = c.num_tokens, c.num_prefix_tokens

    embed = linear(B * (n - prefix), d, c.patch_size**2, itemsize)
    overlap = (n - prefix) * c.patch_size**2 - c.target_length * c.num_mel_bins
    kernels = [("embed", Count(embed.flops, embed.bytes - B * overlap * itemsize))]
    for layer, wanted in enumerate(parse_schedule(c.depth, r)):
        last = trimmed and layer == c.depth - 1
        merged = 0 if last else effective_r(n, wanted)
        queries = prefix if last else n
        kernels.append(("add_layer_norm", add_layer_norm(B, n, d, itemsize, layer > 0)))
        if last:
            kernels.append(("qkv", linear(B * n, 2 * d, d, itemsize)))
            kernels.append(("qkv", linear(B * queries, d, d, itemsize)))
        else:
            kernels.append(("qkv", linear(B * n, 3 * d, d, itemsize)))
        kernels.append(("attention", attention(B, c.num_heads, n, dh, itemsize, queries)))
        kernels.append(("proj", linear(B * queries, d, d, itemsize)))
        if merged:
            kernels.append(("key_metric", key_metric(B, c.num_heads, n, dh, itemsize)))
            kernels.append(("match", match(B, n, dh, 4)))
            norm = merge_add_layer_norm(B, n, d, merged, itemsize)
            kernels.append(("merge_add_layer_norm", norm))
        else:
            kernels.append(("add_layer_norm", add_layer_norm(B, queries, d, itemsize)))
        rows = B * (queries - merged)
        kernels.append(("fc1", linear(rows, c.mlp_dim, d, itemsize)))
        kernels.append(("fc2", linear(rows, d, c.mlp_dim, itemsize)))
        n -= merged
    kernels.append(("norm", add_layer_norm(B, prefix, d, itemsize)))
    kernels.append(("head", linear(B, c.num_classes, d, itemsize)))
    return kernels


def ast(config: ASTConfig, r: Schedule, batch: int, itemsize: int, trimmed: bool = True) -> Count:
    """Everything in :func:`ast_kernels`, added up.

    Its time is best taken kernel by kernel: one may be bound by memory and the next by arithmetic.
    """
    return sum((count for _, count in ast_kernels(config, r, batch, itemsize, trimmed)), NOTHING)
