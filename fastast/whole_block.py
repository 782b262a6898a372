"""Blocks of an optimised model as one op on a CPU with AMX (csrc/block.h).

A block is a dozen calls of Python, which with few tokens take as long as their work does. The op
does the same in the same order: the same bits come out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastast.linear import InferenceLinear
from fastast.tome import POLICIES, MergeSettings
from fastast_kernels import bipartite_match
from fastast_kernels.backends import forced

if TYPE_CHECKING:
    from fastast.model import Block

State = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def run_whole(
    block: Block,
    x: Tensor,
    pending: Tensor,
    size: Tensor | None,
    log_size: Tensor | None,
    tome: MergeSettings,
    r: int,
) -> State | None:
    """The block's forward on ``x + pending``, merging ``r`` tokens, as one op.

    Args:
        block: of an optimised model.
        x: ``[B, N, D]``.
        pending: ``[B, N, D]``.
        size: fp32 ``[B, N]`` or None.
        log_size: its logarithm or None.
        tome: how to merge.
        r: how many tokens, as ``tome.merged`` says.

    Returns:
        ``x``, ``pending``, ``size`` and ``log_size`` for the next block; None where that is not
        what was asked for (gradients, a trace, another policy or backend, a hook inside), or the
        linear layers are not all in tiles.
    """
    attn, mlp, norm1, norm2 = block.attn, block.mlp, block.norm1, block.norm2
    linears = attn.qkv, attn.proj, mlp.fc1, mlp.fc2
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    scales: list[Tensor] = []
    for linear in linears:
        tiles = linear.tiles() if isinstance(linear, InferenceLinear) else None
        if tiles is None or tiles[1] is None or linear.gelu is not (linear is mlp.fc1):
            return None
        weights.append(tiles[0])
        biases.append(tiles[1])
        if tiles[2] is not None:
            scales.append(tiles[2])
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return None
    if r and (tome.trace or POLICIES[tome.policy] is not bipartite_match):
        return None
    inside = norm1, attn, norm2, mlp, mlp.activation_fn, block.residual, *linears
    if (
        len(scales) not in (0, len(linears))
        or x.dtype != torch.bfloat16
        or forced() is not None
        or _has_any_global_hook()
        or any(_is_hooked(module) for module in inside)
    ):
        return None
    x, pending, *sizes = torch.ops.fastast.block.default(
        x, pending, size, log_size if tome.prop_attn else None,
        [norm1.weight, norm1.bias, norm2.weight, norm2.bias], weights, biases, scales,
        attn.num_heads, norm1.eps, norm2.eps, r, tome.class_token, tome.distill_token,
    )  # fmt: skip
    return (x, pending, *sizes) if r else (x, pending, size, log_size)


def _is_hooked(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or "forward" in vars(module)
