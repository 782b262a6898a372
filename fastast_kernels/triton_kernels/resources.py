"""What the compiler makes of every kernel: registers, shared memory, spills, without a GPU.

Every op is run on tensors without data, its launches are recorded with the parameters that ship,
and each is compiled for the architecture in question as a GPU of it would. ::

    python -m fastast_kernels.triton_kernels.resources     # the table in docs/triton-kernels.md
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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
MOST_TILES = 3  # lengths that the tile of an entry comes in


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


def calls(
    dtype: torch.dtype, dim: int, batch: int = 2, n: int = 1214, device: str = "meta"
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every op that has a kernel for ``dtype``, by variant, on a 10-second clip.

    Args:
        dtype: of the tokens.
        dim: of a head; rows are twelve heads wide.
        batch: clips.
        n: tokens of each.
        device: ``"meta"`` records launches; on a GPU the inputs have values and the calls run.
    """
    r, heads = 40, 12
    width = heads * dim
    n_out = n - r

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    def positive(*shape: int) -> Tensor:
        return 1 + torch.rand(shape, device=device)

    qkv = normal(batch, n, 3, heads, dim).permute(2, 0, 3, 1, 4)
    x, residual = normal(batch, n, width), normal(batch, n, width)
    h, grad_h, grad_y = (normal(batch, n_out, width) for _ in range(3))
    weight = positive(width)
    rows = (torch.arange(n, dtype=torch.int32, device=device) % n_out).repeat(batch, 1)
    size, size_out = positive(batch, n), positive(batch, n_out)
    norm = weight, weight, 1e-6

    yield "key_metric", partial(kernels.key_metric, qkv[1])
    yield "merge", partial(kernels.merge, x, rows, n_out, size)
    yield "merge_backward", partial(kernels.merge_backward, h, rows, size, size_out)
    yield "unmerge", partial(kernels.unmerge, h, rows)
    yield "unmerge_backward", partial(kernels.unmerge_backward, x, rows, n_out)
    yield "add_layer_norm", partial(kernels.add_layer_norm, x, residual, *norm)
    statistics = grad_h, grad_y, h, weight, size_out, size_out
    yield "add_layer_norm_backward", partial(kernels.add_layer_norm_backward, *statistics)
    merged = x, residual, rows, n_out, size, *norm
    yield "merge_add_layer_norm", partial(kernels.merge_add_layer_norm, *merged)
    merged_backward = partial(kernels.merge_add_layer_norm_backward, *statistics)
    yield "merge_add_layer_norm_backward", partial(merged_backward, rows, size, size_out)
    if dtype == torch.float64:
        return
    # Small whole numbers: scores are exact, so that no order of summation decides between two.
    metric = torch.randint(-2, 3, (batch, n, dim), device=device).to(dtype)
    yield "match", partial(kernels.bipartite_match, metric, r, True, True)
    yield "match, nothing protected", partial(kernels.bipartite_match, metric, r, False, False)
    q, k, v = qkv
    out, grad = (t.view(batch, n, heads, dim).transpose(1, 2) for t in (x, residual))
    lse = torch.full((batch, heads, n), math.log(n) + 2, device=device)
    scale = dim**-0.5
    for log_size, suffix in ((size, ""), (None, ", no sizes")):
        yield f"attention{suffix}", partial(kernels.attention, q, k, v, log_size, scale)
        backward = partial(kernels.attention_backward, grad, q, k, v, log_size, out, lse, scale)
        yield f"attention_backward{suffix}", backward
    sums = partial(kernels.attention_column_sums, q, k, lse, size, scale)
    yield "attention_column_sums", partial(sums, False)
    yield "attention_column_sums, causal", partial(sums, True)


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


def _tool(cubin: bytes, *arguments: str) -> str:
    """What Triton's own cuobjdump prints of a kernel."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), *arguments, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def resources(launch: Launch, architecture: str, variant: str) -> Resources:
    """Compile a launch and read what it takes from the machine code."""
    binary = compiled(launch, architecture)
    cubin = binary.asm["cubin"]
    usage = dict(re.findall(r"(REG|STACK):(\d+)", _tool(cubin, "--dump-resource-usage")))
    code = _tool(cubin, "-sass")
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


def launches(dtype: torch.dtype, dim: int, architecture: str) -> Iterator[tuple[str, Launch]]:
    """Every different launch of every op, by variant, in each length of its tile."""
    seen = set()
    for tile in range(MOST_TILES):
        with target(architecture, tile):
            for variant, call in calls(dtype, dim):
                for launch in recorded(call):
                    key = launch.kernel.__name__, str(launch.options)
                    if key not in seen:
                        seen.add(key)
                        yield variant, launch


def table(architectures: tuple[str, ...] = ARCHITECTURES) -> str:
    """The resources of every kernel in Markdown."""
    lines = [
        "| kernel (op) | for | dtype | head | tile | warps | registers | shared KB | spilled B"
        " | tensor core | 16-byte loads |",
        "|---|---|---|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for architecture in architectures:
        for dtype in (torch.bfloat16, torch.float32):
            for dim in (64, 128):
                for variant, launch in launches(dtype, dim, architecture):
                    r = resources(launch, architecture, variant)
                    tile = " ".join(
                        f"{k.removeprefix('BLOCK_')}={v}"
                        for k, v in launch.options.items()
                        if k.startswith("BLOCK_") or k == "BLOCK"
                    )
                    cells = (
                        f"{r.kernel} ({variant})",
                        architecture,
                        str(dtype).removeprefix("torch."),
                        dim,
                        tile,
                        r.warps,
                        r.registers,
                        f"{r.shared / 1024:.1f}",
                        r.stack,
                        r.mma,
                        r.wide,
                    )
                    lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
