"""Attention on a CPU beside PyTorch's own: a table of microseconds.

    python bench/attention.py --tokens 1214,602,146 --dtype bfloat16 --inputs 8

12 heads of 64 dims read from a packed qkv buffer, a log size for each key. With one set of inputs
they come from the cache; as many sets in turn as exceed it, they come from memory. Both results are
held against fp64 first; medians of calls in turns.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastast_kernels as kernels
from fastast.benchmark.timing import in_measuring_environment, quartiles, ratio
from fastast_kernels import reference

HEADS, DIM = 12, 64
DTYPES = ("float64", "float32", "bfloat16", "float16")
TOLERANCE = dict(zip(DTYPES, (1e-13, 1e-6, 5e-3, 1e-3), strict=True))
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def draw(batch: int, tokens: int, dtype: torch.dtype) -> Inputs:
    """q, k and v as a model's qkv product leaves them, and log sizes."""
    qkv = torch.randn(batch, tokens, 3, HEADS, DIM).to(dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v, torch.randint(1, 4, (batch, tokens)).float().log()


def sdpa(q: Tensor, k: Tensor, v: Tensor, log_size: Tensor) -> Tensor:
    """PyTorch's attention, its mask a row of log sizes."""
    return F.scaled_dot_product_attention(q, k, v, log_size.to(q.dtype)[:, None, None])


def ours(q: Tensor, k: Tensor, v: Tensor, log_size: Tensor) -> Tensor:
    """FastAST's."""
    return kernels.attention(q, k, v, log_size)


def checked(call: Callable[..., Tensor], inputs: Inputs) -> None:
    """Raise unless the result is as close to the truth as the dtype allows."""
    q, k, v, log_size = inputs
    truth = reference.attention(q.double(), k.double(), v.double(), log_size.double())
    error = float((call(*inputs).double() - truth).norm() / truth.norm())
    if not error <= TOLERANCE[str(q.dtype).removeprefix("torch.")]:
        raise RuntimeError(f"{call.__name__} is off by {error:.1e}")


def turns(sets: list[Inputs], budget: float) -> dict[str, list[float]]:
    """Microseconds a call, of calls that take turns, each many times over if it is short."""
    start = time.perf_counter()
    for call in (sdpa, ours):
        call(*sets[0])
    repeats = max(1, int(2e-3 / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {"sdpa": [], "ours": []}
    rotation = itertools.cycle(sets)
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(times["ours"]) < 7:
        for call in (sdpa, ours):
            begin = time.perf_counter()
            for _ in range(repeats):
                call(*next(rotation))
            times[call.__name__].append((time.perf_counter() - begin) / repeats * 1e6)
    return times


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", default="1214,602,146")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--inputs", default="1,8", help="numbers of sets of inputs in turn")
    parser.add_argument("--budget", type=float, default=2, help="seconds of each number")
    options = parser.parse_args()
    in_measuring_environment()
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    columns = ("tokens", "threads", "inputs", "SDPA, us", "FastAST, us", "times")
    print("| " + " | ".join(columns) + " |\n|" + "--:|" * len(columns))
    for tokens in map(int, options.tokens.split(",")):
        for threads in map(int, options.threads.split(",")):
            torch.set_num_threads(threads)
            for number in map(int, options.inputs.split(",")):
                sets = [draw(options.batch, tokens, dtype) for _ in range(number)]
                for call in (sdpa, ours):
                    checked(call, sets[0])
                times = turns(sets, options.budget)
                middle = {name: quartiles(t)[0] for name, t in times.items()}
                fold = ratio(times["sdpa"], times["ours"])[0]
                print(
                    f"| {tokens} | {threads} | {number} | {middle['sdpa']:.1f} "
                    f"| {middle['ours']:.1f} | {fold:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
