"""Timing that is hard to argue with: interleaved rounds, a warm allocator, stated conditions."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

# Keep freed memory in the process: with the default allocator the first touch of every large
# temporary is a page fault, which would count against whoever makes more of them.
WARM_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "2147483648",
}


def with_warm_allocator() -> None:
    """Start this program again with the allocator kept warm, unless it already is."""
    if not WARM_ALLOCATOR.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **WARM_ALLOCATOR})


def interleaved(
    functions: Mapping[str, Callable[[], object]], rounds: int = 40, warm_up: int = 10
) -> dict[str, list[float]]:
    """Milliseconds of each call, taken in turns (A B A B ...), so that noise falls on all alike."""
    for _ in range(warm_up):
        for function in functions.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def ratio(slow: list[float], fast: list[float]) -> tuple[float, float, float]:
    """Median of the pairwise ratios slow / fast, and its 95 % interval by order statistics."""
    ratios = sorted(s / f for s, f in zip(slow, fast, strict=True))
    n = len(ratios)
    spread = int(0.98 * n**0.5) + 1
    low, high = max(0, n // 2 - spread), min(n - 1, n // 2 + spread)
    return statistics.median(ratios), ratios[low], ratios[high]


def conditions() -> str:
    """Processor, versions, threads and commit, in one line."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x
        ]
        cpu = names[0] if names else cpu
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True, text=True, cwd=Path(__file__).parent,
    ).stdout.strip()  # fmt: skip
    from fastast_kernels.backends import build_information

    isa = build_information().get("cpu_isa", "no extension")
    return (
        f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), {isa}, "
        f"torch {torch.__version__}, Python {platform.python_version()}, commit {commit}"
    )
