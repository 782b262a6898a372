"""How many tokens each block merges, and what that saves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from fastast.config import ASTConfig
from fastast_kernels import effective_r

Schedule: TypeAlias = "int | tuple[int, float] | Sequence[int]"
"""Tokens merged a block: one int for all, ``(r, inflect)`` for a slope, or one int a block."""


def token_count(value: object, what: str) -> int:
    """``value`` as a number of tokens, or an error that names ``what`` it was given for."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} must be an int of 0 or more, got {value!r}")
    if value < 0:
        raise ValueError(f"{what} must be 0 or more, got {value}")
    return value


def _slope(num_layers: int, r: int, inflect: float) -> list[int]:
    """``r`` a block on average, rising (``inflect`` > 0) or falling (< 0) in a straight line.

    Whole numbers closest to the line whose sum is exactly ``r * num_layers`` (largest remainder);
    as monotone as the line itself.
    """
    if num_layers == 1:
        return [r]
    line = [r * (1 - inflect + 2 * inflect * i / (num_layers - 1)) for i in range(num_layers)]
    counts = [math.floor(value) for value in line]
    left = r * num_layers - sum(counts)
    later_first = 1 if inflect > 0 else -1  # equal remainders: the higher end of the line first
    order = sorted(
        range(num_layers), key=lambda i: (line[i] - counts[i], later_first * i), reverse=True
    )
    for i in order[:left]:
        counts[i] += 1
    return counts


def parse_r(num_layers: int, r: Schedule) -> list[int]:
    """Number of tokens to merge in each block, from any of the published forms of ``r``.

    Args:
        num_layers: number of blocks, 1 or more.
        r: an int for every block; ``(r, inflect)`` with ``inflect`` in [-1, 1], where -1 merges
            most in the first block and none in the last, and 1 the other way round; or a list of
            ints, one a block, padded with zeros when it is shorter. A tuple of two is always
            ``(r, inflect)``: give two blocks a list.

    Returns:
        A list of ints. ``(r, inflect)`` sums to exactly ``r * num_layers``.

    Raises:
        TypeError: ``r`` holds something that is not an int (a bool, a float), or has another form.
        ValueError: a negative ``r``, or ``inflect`` out of [-1, 1].
    """
    if token_count(num_layers, "num_layers") == 0:
        raise ValueError("num_layers must be 1 or more, got 0")
    if isinstance(r, tuple) and len(r) == 2:
        mean, inflect = token_count(r[0], "r"), r[1]
        if isinstance(inflect, bool) or not isinstance(inflect, (int, float)):
            raise TypeError(f"inflect, in r={r!r}, must be a number in [-1, 1]")
        if not -1 <= inflect <= 1:  # NaN fails this too
            raise ValueError(f"inflect, in r={r!r}, must be in [-1, 1]")
        return _slope(num_layers, mean, inflect)
    if isinstance(r, (list, tuple)):
        counts = [token_count(value, f"r[{i}]") for i, value in enumerate(r)]
        return counts + [0] * (num_layers - len(counts))
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r must be an int, (r, inflect), or a list of one int a block, got {r!r}")
    return [token_count(r, "r")] * num_layers


def parse_schedule(num_layers: int, r: Schedule) -> tuple[int, ...]:
    """:func:`parse_r` for a model: a list must have exactly one int for each of its blocks.

    Raises:
        TypeError: as :func:`parse_r`.
        ValueError: as :func:`parse_r`, or a list of the wrong length.
    """
    counts = parse_r(num_layers, r)
    slope = isinstance(r, tuple) and len(r) == 2
    if isinstance(r, (list, tuple)) and not slope and len(r) != num_layers:
        raise ValueError(
            f"r as a list must have one int a block, {num_layers} for this model, got {len(r)}"
        )
    return tuple(counts)


def macs(
    config: ASTConfig, r: Schedule = 0, *, trimmed: bool = True, n_tokens: int | None = None
) -> int:
    """Multiply-accumulates of one clip through an AST, patch embedding and head included.

    Matching and merging are left out: they are memory traffic, not arithmetic.

    Args:
        config: the model's dimensions.
        r: tokens merged in each block, as ``model.r``.
        trimmed: count the last block as :class:`fastast.AST` runs it, keys and values of every
            token but queries, projection and MLP of CLS and DIST only.
        n_tokens: tokens in front of the first block; those of ``config`` unless given.
    """
    n = config.num_tokens if n_tokens is None else n_tokens
    d, hidden, prefix = config.embed_dim, config.mlp_dim, config.num_prefix_tokens
    total = (n - prefix) * d * config.patch_size**2 + d * config.num_classes
    schedule = parse_schedule(config.depth, r)
    for layer, count in enumerate(schedule):
        last = trimmed and layer == config.depth - 1
        queries = prefix if last else n
        out = prefix if last else n - effective_r(n, count)
        total += 2 * n * d * d + 2 * queries * d * d  # keys and values; queries and projection
        total += 2 * queries * n * d + 2 * out * d * hidden  # attention; MLP
        n = out
    return total
