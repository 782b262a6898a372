"""The whole ToMe step (match, merge x and size): fused C++ against the published, unfused one.

    python bench/tome_step.py [--threads 1] [--rounds 40]

Both sides get the same inputs and run in turns with a warm allocator. No time is printed before the
fused result is checked: a valid matching, and a merge as accurate as PyTorch's.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from timing import conditions, interleaved, ratio, with_warm_allocator
from torch import Tensor

from fastast_kernels import bipartite_match, effective_r, merge, reference
from fastast_kernels.testing import assert_as_accurate, assert_valid_match

N, D, C = 1214, 768, 64


def inputs(batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, metric and sizes of a clip's middle layer."""
    torch.manual_seed(0)
    x = torch.randn(batch, N, D).to(dtype)
    metric = torch.randn(batch, N, C).to(dtype)
    return x, metric, torch.randint(1, 4, (batch, N)).float()


def fused(x: Tensor, metric: Tensor, size: Tensor, r: int) -> tuple[Tensor, Tensor]:
    assignment = bipartite_match(metric, r)
    return merge(x, assignment, N - effective_r(N, r), size)


def check(x: Tensor, metric: Tensor, size: Tensor, r: int) -> None:
    """Raise unless the fused step is right."""
    assignment = bipartite_match(metric, r)
    assert_valid_match(metric, assignment, r, True, True)
    out, _ = fused(x, metric, size, r)
    truth = reference.merge(x.double(), assignment, N - r, size)[0]
    assert_as_accurate(out, truth, truth.to(x.dtype), "merged tokens")


def peak_extra_bytes(provider: str, dtype: str, r: int) -> int:
    """Peak allocation of one call beyond its inputs and outputs, counted by peak_alloc.c."""
    with tempfile.TemporaryDirectory() as folder:
        counter = f"{folder}/peak_alloc.so"
        source = Path(__file__).with_name("peak_alloc.c")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", counter, source], check=True)
        done = subprocess.run(
            [sys.executable, __file__, "--peak", provider, "--dtype", dtype, "--r", str(r)],
            capture_output=True, text=True, check=True, env={**os.environ, "LD_PRELOAD": counter},
        )  # fmt: skip
    return int(done.stdout)


def print_peak(provider: str, dtype: torch.dtype, r: int) -> None:
    """What the process of peak_extra_bytes runs."""
    torch.set_num_threads(1)
    x, metric, size = inputs(1, dtype)
    typed = size.to(dtype)

    def call() -> tuple[Tensor, Tensor]:
        if provider == "fused":
            return fused(x, metric, size, r)
        return reference.published_step(x, metric, r, typed)

    for _ in range(3):
        call()
    counter = ctypes.CDLL(None)
    counter.peak_bytes.restype = ctypes.c_long
    counter.peak_reset()
    out = call()
    print(counter.peak_bytes() - sum(t.numel() * t.element_size() for t in out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--r", type=int, default=40)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--peak", choices=["fused", "published"], help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print_peak(options.peak, getattr(torch, options.dtype), options.r)
        return
    with_warm_allocator()
    torch.set_num_threads(options.threads)
    print(f"ToMe step, N={N}, D={D}, r={options.r}; {conditions()}")
    rows = []
    for batch in (1, 8):
        for dtype in (torch.float32, torch.bfloat16):
            x, metric, size = inputs(batch, dtype)
            check(x, metric, size, options.r)
            typed = size.to(dtype)
            with torch.inference_mode():
                times = interleaved(
                    {
                        "published": lambda x=x, m=metric, s=typed: reference.published_step(
                            x, m, options.r, s
                        ),
                        "fused": lambda x=x, m=metric, s=size: fused(x, m, s, options.r),
                    },
                    options.rounds,
                )
            middle, low, high = ratio(times["published"], times["fused"])
            row = {
                "batch": batch,
                "dtype": str(dtype).removeprefix("torch."),
                "published_ms": min(times["published"]),
                "fused_ms": min(times["fused"]),
                "speedup": middle,
                "interval": [low, high],
            }
            rows.append(row)
            print(
                f"B={batch} {row['dtype']:<9} published {row['published_ms']:7.3f} ms"
                f"  fused {row['fused_ms']:7.3f} ms  {middle:5.2f}x  [{low:.2f}, {high:.2f}]"
            )
    for dtype_name in ("float32", "bfloat16"):
        peaks = {p: peak_extra_bytes(p, dtype_name, options.r) for p in ("published", "fused")}
        row = {"dtype": dtype_name, "peak_extra_bytes": peaks}
        rows.append(row)
        print(
            f"peak extra memory, B=1 {dtype_name}: published {peaks['published'] / 1e6:.2f} MB,"
            f" fused {peaks['fused'] / 1e6:.2f} MB, {peaks['published'] / peaks['fused']:.1f}x less"
        )
    if options.json:
        options.json.write_text(json.dumps({"conditions": conditions(), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
