"""Blocks of an optimised model as one op on a CPU with AMX (csrc/block.h).

A block is a dozen calls of Python, which with few tokens take as long as their work does. The op
does the same in the same order: the same bits come out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

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


class Plan:
    """What the op wants of a block, found once: asking its modules again takes 20 us a call.

    Raises:
        ValueError: the linear layers are not all in tiles.
    """

    def __init__(self, block: Block) -> None:
        attn, mlp, norms = block.attn, block.mlp, (block.norm1, block.norm2)
        linears = attn.qkv, attn.proj, mlp.fc1, mlp.fc2
        self.weights: list[Tensor] = []
        self.biases: list[Tensor] = []
        self.scales: list[Tensor] = []
        for linear in linears:
            tiles = linear.tiles() if isinstance(linear, InferenceLinear) else None
            if tiles is None or tiles[1] is None or linear.gelu is not (linear is mlp.fc1):
                raise ValueError("not in tiles")
            self.weights.append(tiles[0])
            self.biases.append(tiles[1])
            if tiles[2] is not None:
                self.scales.append(tiles[2])
        if len(self.scales) not in (0, len(linears)):
            raise ValueError("some layers in int8, others not")
        self.norms = [t for norm in norms for t in (norm.weight, norm.bias)]
        self.heads = attn.num_heads
        self.eps_of = norms
        self.eps = norms[0].eps, norms[1].eps
        # Where all this was found: dictionaries, names in them, and what was there.
        self.places: list[tuple[Mapping[str, object], str, object]] = [
            (parent._modules, name, module)
            for parent in (block, attn, mlp)
            for name, module in parent._modules.items()
        ]
        modules = [module for _, _, module in self.places]
        self.places += [
            (norm._parameters, name, getattr(norm, name))
            for norm in norms
            for name in ("weight", "bias")
        ]
        self.inside = [module for module in modules if isinstance(module, nn.Module)]
        self.classes = [type(module) for module in self.inside]

    def holds(self) -> bool:
        """Whether everything is where it was, and nothing is hooked."""
        for place, name, there in self.places:
            if place.get(name) is not there:
                return False
        for module, kind in zip(self.inside, self.classes, strict=True):
            if type(module) is not kind or _is_hooked(module):
                return False
        return (self.eps_of[0].eps, self.eps_of[1].eps) == self.eps


PLANS: WeakKeyDictionary[Block, Plan] = WeakKeyDictionary()


def plan_of(block: Block) -> Plan | None:
    """The plan of a block as it is now; None where a call of it is more than the op."""
    plan = PLANS.get(block)
    if plan is not None and plan.holds():
        return plan
    if not block.packed:
        return None
    try:
        plan = Plan(block)
    except ValueError:
        return None
    PLANS[block] = plan
    return plan if plan.holds() else None


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
    if (
        x.dtype != torch.bfloat16
        or torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or forced() is not None
        or _has_any_global_hook()
        or (r and (tome.trace or POLICIES[tome.policy] is not bipartite_match))
    ):
        return None
    plan = plan_of(block)
    if plan is None:
        return None
    x, pending, *sizes = torch.ops.fastast.block.default(
        x, pending, size, log_size if tome.prop_attn else None,
        plan.norms, plan.weights, plan.biases, plan.scales,
        plan.heads, *plan.eps, r, tome.class_token, tome.distill_token,
    )  # fmt: skip
    return (x, pending, *sizes) if r else (x, pending, size, log_size)


def _is_hooked(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or "forward" in vars(module)
