"""What runs behind each op on a CUDA device: Triton's kernel or the one in CUDA C++.

The choice is made at the call, below autograd and the dispatcher, so that ``torch.compile`` and
``torch.export`` see one op. Triton is imported by the first call that needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import attention_op  # noqa: F401  (it defines some of the schemas)
from .backends import INTERPRETED, select
from .ops import library

# Every op of the library by the name of its schema.
_IMPLEMENTED = (
    "bipartite_match",
    "key_metric",
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


def _on_gpu(name: str) -> Callable[..., Any]:
    op = name.removesuffix("_backward")

    def run(*args: Any) -> Any:
        if select(op, "cuda") == "cuda":
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
