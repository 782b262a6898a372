"""What a training step is made of, and what merging makes of each part: a table.

    python bench/training_step.py --model tiny --seconds 1 --batch 32 --r 10

Forward and backward under autocast with random weights, as in the suite's training cases; times by
torch's profiler, which adds some of its own, and of whole steps without it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import time
from collections.abc import Callable

import torch

import fastast
from fastast.benchmark.kernels import FRAMES
from fastast.benchmark.timing import in_measuring_environment
from fastast.schedules import macs

# Parts by what the profiler calls the ops in them; what runs under autograd has its wrapper's name.
PARTS = {
    "matrix products": ("aten::mm", "aten::addmm"),
    "copies between types": ("aten::copy_",),
    "attention": ("GeneratedBackwardFor_fastast_attention_default",),
    "attention, backward": ("fastast::attention_backward",),
    "GELU, both ways": ("aten::gelu", "aten::gelu_backward"),
    "LayerNorm and merge": (
        "GeneratedBackwardFor_fastast_add_layer_norm_default",
        "GeneratedBackwardFor_fastast_merge_add_layer_norm_default",
    ),
    "LayerNorm and merge, backward": (
        "fastast::add_layer_norm_backward",
        "fastast::merge_add_layer_norm_backward",
    ),
    "match": ("fastast::match_keys",),
    "sums, joined gradients": ("aten::sum", "aten::cat"),
}


def gradients(model: torch.nn.Module, x: torch.Tensor, dtype: torch.dtype) -> None:
    """Of all weights, for a loss of some classes."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = model(x)
    target = torch.arange(len(x)) % logits.shape[-1]
    loss = torch.nn.functional.cross_entropy(logits.float(), target)
    torch.autograd.grad(loss, list(model.parameters()))


def profiled(step: Callable[[], None], steps: int = 5) -> dict[str, float]:
    """Milliseconds of a step by part."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(steps):
            step()
    spent = {e.key: e.self_cpu_time_total / 1e3 / steps for e in profile.key_averages()}
    parts = {part: sum(spent.pop(op, 0.0) for op in ops) for part, ops in PARTS.items()}
    return {**parts, "all else": sum(spent.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("tiny", "small", "base"), default="tiny")
    parser.add_argument("--seconds", type=int, choices=sorted(FRAMES), default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--r", type=int, default=10)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of whole steps")
    options = parser.parse_args()
    in_measuring_environment()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = getattr(fastast.ASTConfig, options.model)(target_length=FRAMES[options.seconds])
    model = fastast.AST(config)
    x = torch.randn(options.batch, config.target_length, config.num_mel_bins)
    dtype = getattr(torch, options.dtype)
    steps = [
        functools.partial(gradients, fastast.patch(copy.deepcopy(model), r=r), x, dtype)
        for r in (0, options.r)
    ]
    for step in steps * 2:
        step()
    best = [float("inf")] * 2
    end = time.perf_counter() + options.budget
    while time.perf_counter() < end:
        for i, step in enumerate(steps):
            start = time.perf_counter()
            step()
            best[i] = min(best[i], time.perf_counter() - start)
    ratio = macs(config, 0) / macs(config, options.r)
    faster = best[0] / best[1]
    print(f"| ms | r=0 | r={options.r} | times |\n|---|--:|--:|--:|")
    none, merged = (profiled(step) for step in steps)
    for part, spent in none.items():
        times = f"{spent / merged[part]:.2f}" if spent and merged[part] else ""
        print(f"| {part} | {spent:.1f} | {merged[part]:.1f} | {times} |")
    print(f"| whole step | {best[0] * 1e3:.1f} | {best[1] * 1e3:.1f} | {faster:.3f} |")
    print(f"multiply-accumulates {ratio:.3f}, the step {faster / ratio:.3f} of that")


if __name__ == "__main__":
    main()
