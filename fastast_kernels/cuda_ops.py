"""What runs behind each op on a CUDA device: Triton's kernel or the one in CUDA C++.

The choice is made at the call, below autograd and the dispatcher, so that ``torch.compile`` and
``torch.export`` see one op. Unless a backend is asked for by name, what was measured decides
(:mod:`winners`), and Triton's kernel runs where nothing was. Triton is imported by the first call
that needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import attention_op, winners  # noqa: F401  (attention_op defines some of the schemas)
from .backends import INTERPRETED, built_for, forced, select, why_not
from .ops import library

# Every op of the library by the name of its schema.
_IMPLEMENTED = (
    "bipartite_match",
    "bipartite_match_sources",
    "key_metric",
    "match_keys",
    "match_keys_sources",
    "merge",
    "merge_backward",
    "unmerge",
    "unmerge_backward",
    "add_layer_norm",
    "add_layer_norm_backward",
    "merge_add_layer_norm",
    "merge_add_layer_norm_backward",
    "attention",
    "attention_backward",
    "attention_column_sums",
)


# Where the assignment stands among the arguments of the ops whose first tensor is merged already.
_ASSIGNMENT = {"merge_backward": 1, "unmerge": 1, "merge_add_layer_norm_backward": 6}


@cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _backend(name: str, args: tuple[Any, ...]) -> str:
    """The backend that runs an op on these arguments."""
    name = name.removesuffix("_sources")  # the same kernel as without
    op = name.removesuffix("_backward")
    chosen = select(op, "cuda")
    if chosen != "triton" or forced() is not None or not winners.measured():
        return chosen
    x = args[0]
    n = args[_ASSIGNMENT[name]].shape[1] if name in _ASSIGNMENT else x.shape[-2]
    dim = x.shape[-1]
    major, minor = _capability(x.device.index)
    best = winners.winner(name, f"{major}.{minor}", x.dtype, x.shape[0], n, dim)
    # A table that was measured elsewhere may name what this build does not have.
    if best != "cuda" or not built_for((major, minor)):
        return chosen
    return chosen if why_not(op, "cuda", "cuda", x.dtype, dim) else "cuda"


def runs_in_cuda(op: str, x: Tensor) -> bool:
    """Whether CUDA C++ runs an op: a match there writes its sources too, a merge reads them.

    Args:
        op: a match or a merge, one of ``OPS``.
        x: its first argument.
    """
    if x.device.type != "cuda" or select(op, "cuda", x.dtype, x.shape[-1]) == "reference":
        return False
    # torch.compile traces a choice by name, not one by what was measured.
    if torch.compiler.is_compiling():
        return select(op, "cuda") == "cuda"
    return _backend(op, (x,)) == "cuda"


def _on_gpu(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        if _backend(name, args) == "cuda":
            return getattr(torch.ops.fastast_cuda, name)(*args)
        from . import triton_kernels

        return getattr(triton_kernels, name)(*args)

    return run


def _interpreted(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        from . import triton_kernels

        return getattr(triton_kernels, name)(*args)

    return run


for _name in _IMPLEMENTED:
    library.impl(_name, _on_gpu(_name), "CUDA")
    if INTERPRETED:
        library.impl(_name, _interpreted(_name), "CPU")
