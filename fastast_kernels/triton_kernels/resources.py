"""What the compiler makes of every kernel: registers, shared memory, spills, without a GPU.

Every op is run on tensors without data, its launches are recorded with the parameters that ship,
and each is compiled for the architecture in question with the compiler that a GPU would use. ::

    python -m fastast_kernels.triton_kernels.resources      # writes docs/triton-kernels.md's table
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import fastast_kernels.triton_kernels as kernels

from .parameters import ARCHITECTURES, target

# Bytes of shared memory that one block may have. sm_80's entries also serve 8.6, 8.9 and 12.x,
# which have 99 KB.
SHARED_MEMORY_LIMIT = {"sm_80": 99 << 10, "sm_90": 227 << 10}


@dataclass(frozen=True)
class Launch:
    """One launch, recorded instead of run."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]
    programs: int


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes.

    Attributes:
        kernel: name of the kernel.
        architecture: ``"sm_80"`` or ``"sm_90"``.
        variant: dtype, dimension and flags.
        registers: a thread.
        shared: bytes of shared memory a block.
        stack: bytes of local memory a thread; more than 0 means spilled registers.
        warps: a block.
        mma: tensor-core instructions in the machine code.
        wide: 16-byte global loads in the machine code.
    """

    kernel: str
    architecture: str
    variant: str
    registers: int
    shared: int
    stack: int
    warps: int
    mma: int
    wide: int


def recorded(function: Callable[[], Any]) -> list[Launch]:
    """The launches of a call on tensors of the ``meta`` device."""
    launches: list[Launch] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(self, args, options, grid[0]))

    with mock.patch.object(JITFunction, "run", record):
        function()
    return launches


def calls(dtype: torch.dtype, dim: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every op that has a kernel for ``dtype``, by variant, on a 10-second clip.

    Args:
        dtype: of the tokens.
        dim: of a head; rows are twelve heads wide.
    """
    batch, n, r, heads = 2, 1214, 40, 12
    width = heads * dim
    n_out = n - r

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    qkv = empty(batch, n, 3, heads, dim).permute(2, 0, 3, 1, 4)
    x, h = empty(batch, n, width), empty(batch, n_out, width)
    weight = empty(width, dtype=torch.float32)
    rows = empty(batch, n, dtype=torch.int32)
    size, size_out = (empty(batch, m, dtype=torch.float32) for m in (n, n_out))
    norm = weight, weight, 1e-6

    yield "key_metric", lambda: kernels.key_metric(qkv[1])
    if dtype != torch.float64:
        metric = empty(batch, n, dim)
        yield "match", lambda: kernels.bipartite_match(metric, r, True, True)
        yield "match, no CLS", lambda: kernels.bipartite_match(metric, r, False, False)
    yield "merge", lambda: kernels.merge(x, rows, n_out, size)
    yield "merge_add_layer_norm", (
        lambda: kernels.merge_add_layer_norm(x, x, rows, n_out, size, *norm)
    )
    yield "merge_backward", lambda: kernels.merge_backward(h, rows, size, size_out)
    yield "unmerge", lambda: kernels.unmerge(h, rows)
    yield "unmerge_backward", lambda: kernels.unmerge_backward(x, rows, n_out)
    yield "add_layer_norm", lambda: kernels.add_layer_norm(x, x, *norm)
    mean, mean_out = size, size_out
    yield "add_layer_norm_backward", (
        lambda: kernels.add_layer_norm_backward(x, x, x, weight, mean, mean)
    )
    yield "merge_add_layer_norm_backward", (
        lambda: kernels.merge_add_layer_norm_backward(
            h, h, h, weight, mean_out, mean_out, rows, size, size_out
        )
    )
    if dtype != torch.float64:
        q, k, v = qkv
        lse = empty(batch, heads, n, dtype=torch.float32)
        scale = dim**-0.5
        for log_size, sized in ((size, ""), (None, ", no size")):
            yield "attention" + sized, lambda b=log_size: kernels.attention(q, k, v, b, scale)
            yield "attention_backward" + sized, (
                lambda b=log_size: kernels.attention_backward(q, q, k, v, b, q, lse, scale)
            )
        for causal in (False, True):
            yield "attention_column_sums" + (", causal" if causal else ""), (
                lambda c=causal: kernels.attention_column_sums(q, k, lse, size, scale, c)
            )


def compiled(launch: Launch, architecture: str) -> Any:
    """A recorded launch, compiled for an architecture as a GPU of it would."""
    gpu = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    backend = make_backend(gpu)
    options = {"debug": False, "instrumentation_mode": "", **launch.options}
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialization, _ = bind(*launch.args, **options)
    parsed, signature, constants, attributes = launch.kernel._pack_args(
        backend, options, bound, specialization, None
    )
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=gpu, options=parsed.__dict__)


def _tool(name: str, cubin: bytes, *arguments: str) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), *arguments, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def resources(launch: Launch, architecture: str, variant: str) -> Resources:
    """Compile a launch and read what it takes from the machine code."""
    binary = compiled(launch, architecture)
    cubin = binary.asm["cubin"]
    usage = dict(re.findall(r"(REG|STACK):(\d+)", _tool("cuobjdump", cubin, "--dump-resource-usage")))
    code = _tool("cuobjdump", cubin, "-sass")
    return Resources(
        launch.kernel.__name__.strip("_").removesuffix("_kernel"),
        architecture,
        variant,
        int(usage["REG"]),
        binary.metadata.shared,
        int(usage["STACK"]),
        binary.metadata.num_warps,
        len(re.findall(r"\b(?:HMMA|HGMMA|WGMMA)\b", code)),
        len(re.findall(r"\b(?:LDG|LDGSTS)\S*\.128", code)),
    )
