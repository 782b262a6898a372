"""The attention op: softmax attention with a size per key.

Its CPU kernel is torch's own flash attention, which takes the log size as a mask of stride 0. Under
autocast it runs in the autocast dtype; the log size stays fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, reference
from .backends import forced, select
from .ops import accumulator, autocast_dtype, library

library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? log_size, float scale) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? log_size, Tensor out,"
    " Tensor lse, float scale) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_ops = torch.ops.fastast


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_size: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """``softmax(q k^T scale + log_size) v``: attention in which a token counts ``size`` times.

    Exactly equal to repeating every key and value ``size`` times (ToMe's proportional attention).

    Args:
        q: ``[B, H, Nq, Dh]``.
        k: ``[B, H, N, Dh]``.
        v: ``[B, H, N, Dh]``.
        log_size: fp32 ``[B, N]``, added to every logit of its key, or None. It gets no gradient.
        scale: factor of the logits; ``Dh ** -0.5`` unless given.

    Returns:
        ``[B, H, Nq, Dh]`` in the dtype of ``q`` (under autocast, in the autocast dtype).
    """
    autocast = autocast_dtype(q)
    if autocast is not None:
        q, k, v = q.to(autocast), k.to(autocast), v.to(autocast)
    for name, t in (("q", q), ("k", k), ("v", v)):
        checks.floating(name, t, "[B, H, N, Dh]")
        checks.on_device(name, t, "q", q)
        if t.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {t.dtype}")
    checks.same("v", v, "k", k)
    batch, heads, _, d = k.shape
    if (q.shape[0], q.shape[1], q.shape[3]) != (batch, heads, d):
        raise ValueError(f"q must have shape [{batch}, {heads}, Nq, {d}], got {list(q.shape)}")
    checks.size_of(log_size, k[:, 0], "log_size")
    scale = d**-0.5 if scale is None else float(scale)

    if select("attention", q.device.type) == "cpp":
        return _ops.attention(q, k, v, log_size, scale)[0]
    if forced() == "reference":
        return reference.attention(q, k, v, log_size, scale)
    # No kernel of ours for this device: torch's own, with the bias in q's dtype, because some of
    # its backends read a mask of another dtype as if it were q's (pytorch#191612).
    bias = None if log_size is None else log_size[:, None, None, :].to(q.dtype)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def _dense_rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _key_bias(log_size: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    if log_size is None:
        return None
    # torch's CPU kernel takes an fp32 mask beside half-precision q, and fp64 only with fp64.
    bias = log_size if q.dtype != torch.float64 else log_size.double()
    return bias[:, None, None, :].expand(k.shape[0], 1, q.shape[2], k.shape[2])


def _attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    if q.numel() == 0:
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _dense_rows(q),
        _dense_rows(k),
        _dense_rows(v),
        attn_mask=_key_bias(log_size, q, k),
        scale=scale,
    )
    # The layout of the fake kernel, which versions of torch differ from.
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()


def _attention_backward_cpu(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_size: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if q.numel() == 0:
        return torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    # torch's backward runs three times as fast in fp32 as in half precision, casts included.
    work = accumulator(q.dtype)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(_dense_rows(t).to(work) for t in (grad, q, k, v, out)),
        lse,
        0.0,
        False,
        attn_mask=_key_bias(log_size, q, k),
        scale=scale,
    )
    return tuple(g.to(q.dtype) for g in grads)


library.impl("attention", _attention_cpu, "CPU")
library.impl("attention_backward", _attention_backward_cpu, "CPU")


@torch.library.register_fake("fastast::attention", lib=library)
def _(
    q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    # Laid out as [B, Nq, H, Dh], so that the heads join without a copy.
    batch, heads, n, d = q.shape
    out = q.new_empty((batch, n, heads, d)).transpose(1, 2)
    return out, q.new_empty((batch, heads, n), dtype=accumulator(q.dtype))


@torch.library.register_fake("fastast::attention_backward", lib=library)
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_size: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    def like(t: Tensor) -> Tensor:
        batch, heads, n, d = t.shape
        return t.new_empty((batch, n, heads, d)).transpose(1, 2)

    return like(q), like(k), like(v)


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, log_size, scale = inputs
    ctx.save_for_backward(q, k, v, log_size, *output)
    ctx.scale = scale
    ctx.mark_non_differentiable(output[1])


def _attention_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = _ops.attention_backward(grad, *ctx.saved_tensors, ctx.scale)
    return (*grads, None, None)


torch.library.register_autograd(
    "fastast::attention", _attention_backward, setup_context=_attention_setup, lib=library
)
