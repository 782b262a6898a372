"""Where the milliseconds of a CPU forward go: a table of parts, at r=0 and at another.

    python bench/forward_parts.py --seconds 10 --r 40

AST-base as fastast.optimize leaves it, random weights; each operator by the clock around it, which
adds a few microseconds of its own to each. Medians.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastast
from fastast.benchmark.kernels import FRAMES
from fastast.benchmark.timing import in_measuring_environment
from fastast_kernels import use_backend

# Parts by the names of the operators in them; what is not named is everything else.
PARTS = {
    "linear layers": ("linear", "linear_int8", "_linear_pointwise", "addmm", "mm"),
    "attention": ("attend", "attention"),
    "LayerNorm, residual, merge": (
        "add_norm",
        "merge_add_norm",
        "native_layer_norm",
    ),
    "metric and match": ("match_keys", "bipartite_match", "key_metric"),
}


class Clock(TorchDispatchMode):
    """Seconds by operator, of those that are not inside another."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        self.seconds[func.overloadpacket.__name__] += time.perf_counter() - start
        return out


def parts(call: Callable[[], object], turns: int) -> dict[str, float]:
    """Median milliseconds of each part, and of the whole without the clock."""
    found: dict[str, list[float]] = {part: [] for part in [*PARTS, "everything else", "whole"]}
    for _ in range(turns):
        start = time.perf_counter()
        call()
        found["whole"].append(time.perf_counter() - start)
        # A backend asked for by name: a block makes its calls one by one.
        with use_backend("cpp"), Clock() as clock:
            call()
        spent = clock.seconds
        for part, ops in PARTS.items():
            found[part].append(sum(spent.pop(op, 0.0) for op in ops))
        found["everything else"].append(sum(spent.values()))
    return {part: 1e3 * statistics.median(times) for part, times in found.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, choices=sorted(FRAMES), default=10)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--r", type=int, default=40)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "int8"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    in_measuring_environment()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = fastast.ASTConfig.base(target_length=FRAMES[options.seconds])
    model = fastast.AST(config).eval()
    x = torch.randn(options.batch, config.target_length, config.num_mel_bins)
    dtype = options.dtype if options.dtype == "int8" else getattr(torch, options.dtype)
    columns = []
    for r in (0, options.r):
        fast = fastast.optimize(fastast.patch(copy.deepcopy(model), r=r), dtype=dtype)
        for _ in range(3):
            fast(x)
        columns.append(parts(lambda fast=fast: fast(x), options.turns))
    print(f"| ms | r=0 | r={options.r} | times |\n|---|--:|--:|--:|")
    for part, none in columns[0].items():
        merged = columns[1][part]
        times = f"{none / merged:.2f}" if none and merged else ""
        print(f"| {part} | {none:.1f} | {merged:.1f} | {times} |")


if __name__ == "__main__":
    main()
