"""Clocks that are hard to argue with: interleaved rounds, quartiles, intervals of ratios."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch

# What a process that measures runs in.
ENVIRONMENT = {
    # Keep freed memory: with the default allocator the first touch of every large temporary is a
    # page fault, which would count against whoever makes more of them.
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "2147483648",
    # NumPy's threads go on spinning after its products, into the turn of whatever comes next: with
    # them torchaudio took three times as long after Hugging Face's extractor, which gains nothing.
    "OPENBLAS_NUM_THREADS": "1",
}

# Quartiles further apart than this share of the median: say so beside the number.
NOISY = 0.1


def in_measuring_environment() -> None:
    """Start this program again in :data:`ENVIRONMENT`, unless it is in it already."""
    if not ENVIRONMENT.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **ENVIRONMENT})


def synchronize(device: torch.device | str) -> None:
    """Wait until ``device`` has done what it was asked to; a CPU always has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def timed(function: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Milliseconds of one call, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3


def warm_up(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device | str = "cpu",
    seconds: float = 0.3,
    least: int = 2,
) -> float:
    """Run all functions in turns until ``seconds`` have passed; the seconds of the last turn.

    Args:
        functions: what will be measured.
        device: where it runs.
        seconds: how long to warm up.
        least: turns that always run.
    """
    begin, turns = time.perf_counter(), 0
    while True:
        turn = sum(timed(function, device) for function in functions.values()) / 1e3
        turns += 1
        if turns >= least and time.perf_counter() - begin > seconds:
            return turn


def rounds_for(turn_seconds: float, seconds: float, least: int = 7, most: int = 40) -> int:
    """How many turns of ``turn_seconds`` fit into ``seconds``.

    Seven at least: with fewer pairs the extremes of a ratio are not a 95 % interval.
    """
    return max(least, min(most, int(seconds / max(turn_seconds, 1e-9))))


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    rounds: int = 40,
    device: torch.device | str = "cpu",
) -> dict[str, list[float]]:
    """Milliseconds of each call, taken in turns (A B A B ...), so that noise falls on all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(timed(function, device))
    return times


def quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    if len(times) < 2:
        return times[0], times[0], times[0]
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return middle, low, high


def noise(times: Sequence[float]) -> float:
    """Distance of the quartiles as a share of the median."""
    middle, low, high = quartiles(times)
    return (high - low) / middle


def ratio(slow: Sequence[float], fast: Sequence[float]) -> tuple[float, float, float]:
    """Median of the pairwise ratios slow / fast, and its 95 % interval by order statistics."""
    ratios = sorted(s / f for s, f in zip(slow, fast, strict=True))
    n = len(ratios)
    spread = int(0.98 * n**0.5) + 1
    low, high = max(0, n // 2 - spread), min(n - 1, n // 2 + spread)
    return statistics.median(ratios), ratios[low], ratios[high]
