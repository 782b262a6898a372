"""Functions compiled, or captured as CUDA graphs, for timing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastast.inference import captured

__all__ = ["captured", "compiled", "forget_compiled"]


def compiled(function: Callable[..., Any], threads: int, **options: Any) -> Callable[..., Any]:
    """``torch.compile(function)`` for static shapes and, on a CPU, for ``threads`` threads.

    Inductor writes the number of threads into its code, and Dynamo does not look at it again: a
    function compiled for two threads goes on using two. Call :func:`forget_compiled` first where
    the number changes.
    """
    from torch._inductor import config as inductor

    inductor.cpp.threads = threads
    return torch.compile(function, dynamic=False, **options)


def forget_compiled() -> None:
    """Forget what was compiled: Dynamo keeps eight shapes of a function and then gives up."""
    torch._dynamo.reset()
