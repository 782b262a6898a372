"""Which cases each set runs: quick (3 minutes), cpu (15, on two cores), gpu (9), full (hours)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import torch
from specs import ModelSpec, OpSpec, SweepSpec

from fastast.benchmark.case import Config

Specs: TypeAlias = "Iterator[OpSpec | SweepSpec | ModelSpec]"

# Dimensions that an op has beside B, N and r, and its directions.
OPS: dict[str, tuple[Config, tuple[str, ...]]] = {
    "tome_step": ({"D": 768, "C": 64}, ("forward",)),
    "match": ({"C": 64}, ("forward",)),
    "match_keys": ({"C": 64}, ("forward",)),
    "merge": ({"D": 768}, ("forward", "backward")),
    "merge_add_layer_norm": ({"D": 768}, ("forward", "backward")),
    "attention": ({}, ("forward", "backward")),
}
# Tokens of a clip of 10, 5 and 1 seconds (734: 10 seconds after 12 blocks), and a usual r.
MERGED = {1214: 40, 734: 40, 602: 40, 146: 10}
# r of the paper's Table 1, and the two that ten-second clips need to beat other remedies.
PAPER = (5, 10, 15, 20, 25, 30, 35, 40, 80, 100)
BF16, FP32 = "bfloat16", "float32"


def op(
    kernel: str, mode: str, n: int, batch: int, dtype: str, threads: int, compiled: bool = False
) -> OpSpec:
    shape, _ = OPS[kernel]
    merged: Config = {} if kernel == "attention" else {"r": MERGED[n]}
    config = {"B": batch, "N": n, **shape, **merged, "dtype": dtype, "threads": threads}
    return OpSpec(kernel, mode, config, compiled)


def fbank(batch: int, threads: int) -> OpSpec:
    config: Config = {"B": batch, "seconds": 10, "dtype": FP32, "threads": threads}
    return OpSpec("fbank", "forward", config)


def grid(shapes: Iterable[tuple[int, int]], dtypes: Sequence[str], threads: int) -> Specs:
    """Every op in every direction at the shapes (N, B), compiled too at the first."""
    first, *others = shapes
    for kernel, (_, modes) in OPS.items():
        for mode in modes:
            for dtype in dtypes:
                yield op(kernel, mode, *first, dtype, threads, compiled=True)
                for n, batch in others:
                    yield op(kernel, mode, n, batch, dtype, threads)


def quick(threads: int) -> Specs:
    for dtype in (FP32, BF16):
        yield op("tome_step", "forward", 1214, 1, dtype, threads)
        yield op("merge_add_layer_norm", "forward", 1214, 1, dtype, threads)
        yield op("attention", "forward", 1214, 1, dtype, threads)
    yield ModelSpec("engines", 1, 8, threads, 10, "few", 12)
    yield SweepSpec("base", 1, 8, BF16, threads, (5, 10, 20, 40), 0, 6)
    yield SweepSpec("tiny", 1, 1, BF16, threads, (5, 10, 20, 40), 0, 2)


def cpu(threads: int) -> Specs:
    # Before any engine has run in this process: what they leave behind costs a forward some 5 %.
    yield SweepSpec("base", 10, 1, BF16, threads, (5, 10, 20, 30, 40, 80, 100), 0, 25)
    yield SweepSpec("base", 10, 1, BF16, threads, (10, 20, 40, 80), -1, 10)
    yield SweepSpec("base", 5, 1, BF16, threads, (10, 20, 40, 60), 0, 7)
    yield SweepSpec("base", 5, 8, BF16, threads, (10, 40), 0, 15)
    yield SweepSpec("base", 1, 1, BF16, threads, (5, 10, 20, 40), 0, 3)
    yield SweepSpec("base", 1, 8, BF16, threads, (5, 10, 20, 40), 0, 8)
    yield SweepSpec("base", 1, 8, FP32, threads, (5, 10, 20, 40), 0, 12)
    yield SweepSpec("tiny", 1, 1, BF16, threads, (5, 10, 20, 40), 0, 2)
    yield SweepSpec("tiny", 1, 8, BF16, threads, (5, 10, 20, 40), 0, 3)
    yield SweepSpec("tiny", 10, 1, BF16, threads, (10, 20, 40, 80), 0, 5)
    yield ModelSpec("engines", 10, 1, threads, 40, "most", 90)
    yield ModelSpec("engines", 5, 1, threads, 40, "some", 30)
    yield ModelSpec("engines", 1, 8, threads, 10, "some", 25)
    yield ModelSpec("waveform", 10, 1, threads, 40, budget=15)
    for batch in (32, 128):  # 128: the recipe of AST on Speech Commands
        yield ModelSpec("training", 1, batch, threads, 10, budget=8, model="tiny")
    yield ModelSpec("training", 5, 1, threads, 40, budget=15)
    yield from grid([(1214, 1)], (FP32, BF16), threads)
    for dtype in (FP32, BF16):
        for kernel in OPS:
            for n in (602, 146):
                yield op(kernel, "forward", n, 1, dtype, threads)
        for mode in ("forward", "backward"):
            yield op("merge_add_layer_norm", mode, 1214, 8, dtype, threads)
        yield op("tome_step", "forward", 1214, 8, dtype, threads)
    yield fbank(1, threads)
    yield fbank(8, threads)
    if threads > 1:  # and everything that a server with one core a process would ask
        yield ModelSpec("engines", 1, 1, 1, 10, "few", 10)
        yield SweepSpec("base", 5, 1, BF16, 1, (10, 20, 40), 0, 8)
        for dtype in (FP32, BF16):
            for kernel in OPS:
                yield op(kernel, "forward", 1214, 1, dtype, 1)
            yield op("tome_step", "forward", 1214, 8, dtype, 1)
        yield fbank(8, 1)


def gpu(threads: int) -> Specs:
    """What the G targets ask; compiling the models takes most of it."""
    for batch, level in ((64, "all"), (1, "most"), (8, "some")):
        yield ModelSpec("engines", 10, batch, threads, 40, level, 6)
    yield ModelSpec("engines", 5, 64, threads, 40, "most", 4)
    yield ModelSpec("engines", 1, 64, threads, 10, "most", 4)
    yield ModelSpec("waveform", 10, 64, threads, 40, budget=10)
    yield ModelSpec("training", 10, 16, threads, 40, budget=5)
    for seconds in (10, 5, 1):
        for batch in (1, 8, 64, 128):
            for inflect in (0, -1):
                yield SweepSpec("base", seconds, batch, BF16, threads, PAPER, inflect, 2)
    yield SweepSpec("tiny", 1, 64, BF16, threads, PAPER, 0, 2)
    shapes = [(1214, 64), (1214, 1), (1214, 8), (602, 64), (602, 1), (146, 64), (146, 1), (734, 64)]
    yield from grid(shapes, (BF16,), threads)
    yield op("tome_step", "forward", 1214, 64, FP32, threads)
    yield op("attention", "forward", 1214, 64, FP32, threads)
    yield fbank(1, threads)
    yield fbank(64, threads)


def full(threads: int) -> Specs:
    """The whole matrix on a CPU: hours."""
    for seconds, batches, r in ((10, (1, 2, 8), 40), (5, (1, 2, 8), 40), (1, (1, 8), 10)):
        for batch in batches:
            yield ModelSpec("engines", seconds, batch, threads, r, "all", 120)
    yield ModelSpec("waveform", 10, 1, threads, 40, budget=40)
    for seconds, batch, r, model in ((1, 32, 10, "tiny"), (5, 1, 40, "base"), (10, 1, 40, "base")):
        for dtype in (FP32, BF16):
            yield ModelSpec("training", seconds, batch, threads, r, "all", 60, model, dtype)
    for model in ("base", "tiny"):
        for seconds in (10, 5, 1):
            for batch in (1, 2, 8):
                for dtype in (BF16, FP32):
                    for inflect in (0, -1):
                        yield SweepSpec(
                            model, seconds, batch, dtype, threads, PAPER, inflect, 40
                        )  # fmt: skip
    shapes = [(n, batch) for n in (1214, 734, 602, 146) for batch in (1, 2, 8)]
    for t in dict.fromkeys((threads, 1)):
        yield from grid(shapes, (FP32, BF16), t)
        for batch in (1, 8, 32):
            yield fbank(batch, t)


SETS = {"quick": quick, "cpu": cpu, "gpu": gpu, "full": full}


def specs(name: str) -> list[OpSpec | SweepSpec | ModelSpec]:
    """All cases of a set, for as many threads as torch has now."""
    return list(SETS[name](torch.get_num_threads()))


def op_specs(name: str) -> list[OpSpec]:
    """Its single ops."""
    return [spec for spec in specs(name) if isinstance(spec, OpSpec)]


def model_specs(name: str) -> list[SweepSpec | ModelSpec]:
    """Its whole models."""
    return [spec for spec in specs(name) if not isinstance(spec, OpSpec)]
