"""What the Triton kernels share: launching them, and the arithmetic of one row.

All kernels run on a one-dimensional grid, take pointers with explicit strides and a dense last
dimension, compute offsets in 64 bits, and take lengths that change from layer to layer as runtime
values that nothing is specialised on, so that a new N compiles nothing.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# In the interpreter a dot of bf16 is wrong, and the GPU is this machine's CPU.
INTERPRETED = bool(triton.knobs.runtime.interpret)
INTERPRET = tl.constexpr(INTERPRETED)

LOG2E = tl.constexpr(1.4426950408889634)
TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal fp32

_ACCUMULATORS = {torch.float64: tl.float64}


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The dtype that a kernel sums values of ``dtype`` in."""
    return _ACCUMULATORS.get(dtype, tl.float32)


def launch(kernel: Any, programs: int, on: Tensor, *args: Any, **options: Any) -> None:
    """Run ``programs`` programs of a kernel on the device of ``on`` and its current stream."""
    if programs == 0:
        return
    with torch.cuda.device(on.device) if on.is_cuda else nullcontext():
        kernel[(programs,)](*args, **options)


def dense_rows(t: Tensor) -> Tensor:
    """``t`` with adjacent values in its last dimension, copied only where they are not."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def as_tokens(t: Tensor) -> Tensor:
    """``[..., D]`` as ``[B, N, D]`` with dense rows; a slice of tokens is not copied."""
    return dense_rows(t if t.dim() == 3 else t.reshape(1, -1, t.shape[-1]))


def block_of(length: int, at_least: int = 16) -> int:
    """The power of two that a dimension is padded to inside a kernel."""
    return max(at_least, triton.next_power_of_2(length))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` with fp32 accumulation."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def layer_norm(h, in_row, d, eps, weight, bias, cols):
    """LayerNorm of one row ``h`` (zero outside ``in_row``): the row, its mean and 1 / deviation."""
    mean = tl.sum(h, axis=0) / d
    centred = tl.where(in_row, h - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / d + eps)
    w = tl.load(weight + cols, mask=in_row, other=0.0).to(h.dtype)
    b = tl.load(bias + cols, mask=in_row, other=0.0).to(h.dtype)
    return centred * rstd * w + b, mean, rstd
