"""The attention ops: softmax attention with a size per key, and what each key received of it.

The CPU kernels of attention and its backward are csrc/attention.h's; where they are not built it is
torch's own flash attention, which takes the log size as a mask of stride 0. Under autocast it runs
in the autocast dtype; the log size stays fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, reference
from .backends import COMPILED, INTERPRETED, forced, select
from .ops import accumulator, autocast_dtype, library, wants_gradient

library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? log_size, float scale) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# The output alone, without a gradient: weights as exact as their dtype, no log-sum-exp.
library.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor? log_size, float scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? log_size, Tensor out,"
    " Tensor lse, float scale) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)

library.define(
    "attention_column_sums(Tensor q, Tensor k, Tensor lse, Tensor? log_size, float scale,"
    " bool causal) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_ops = torch.ops.fastast


def _checked(
    q: Tensor, k: Tensor, log_size: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor, float]:
    """q and k in autocast's dtype, and the scale, or an error that says what is wrong."""
    autocast = autocast_dtype(q)
    if autocast is not None:
        q, k = q.to(autocast), k.to(autocast)
    _check_keys(q, k, log_size)
    return q, k, q.shape[-1] ** -0.5 if scale is None else float(scale)


def _check_keys(q: Tensor, k: Tensor, log_size: Tensor | None) -> None:
    for name, t in (("q", q), ("k", k)):
        checks.floating(name, t, "[B, H, N, Dh]")
    _like_q("k", k, q)
    batch, heads, _, d = k.shape
    if (q.shape[0], q.shape[1], q.shape[3]) != (batch, heads, d):
        raise ValueError(f"q must have shape [{batch}, {heads}, Nq, {d}], got {list(q.shape)}")
    checks.size_of(log_size, k[:, 0], "log_size")


def _like_q(name: str, t: Tensor, q: Tensor) -> None:
    checks.on_device(name, t, "q", q)
    if t.dtype != q.dtype:
        raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {t.dtype}")


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
    return _attend(q, k, v, log_size, scale, with_lse=False)[0]


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_size: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`attention`, and the log-sum-exp that :func:`attention_column_sums` wants.

    Args:
        q: ``[B, H, Nq, Dh]``.
        k: ``[B, H, N, Dh]``.
        v: ``[B, H, N, Dh]``.
        log_size: fp32 ``[B, N]`` or None.
        scale: factor of the logits; ``Dh ** -0.5`` unless given.

    Returns:
        The output ``[B, H, Nq, Dh]``, and fp32 (fp64 for fp64) ``[B, H, Nq]``, which gets no
        gradient.
    """
    out, lse = _attend(q, k, v, log_size, scale, with_lse=True)
    if lse is None:
        with torch.no_grad():
            lse = reference.attention_lse(q, k, log_size, scale)
    return out, lse


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_size: Tensor | None,
    scale: float | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    autocast = autocast_dtype(q)
    if autocast is not None:
        q, k, v = q.to(autocast), k.to(autocast), v.to(autocast)
    if not _fit(q, k, v, log_size):
        _check_keys(q, k, log_size)
        checks.floating("v", v, "[B, H, N, Dh]")
        _like_q("v", v, q)
        checks.same("v", v, "k", k)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    backend = select("attention", q.device.type, q.dtype, q.shape[-1])
    if backend == "cpp" and not with_lse and not wants_gradient(q, k, v):
        return _ops.attend.default(q, k, v, log_size, scale), None
    if backend != "reference":
        return _ops.attention(q, k, v, log_size, scale)
    if forced() == "reference" or q.dtype == torch.float64:
        return reference.attention(q, k, v, log_size, scale), None
    # No kernel of ours for this device: torch's own, with the bias in q's dtype, because some of
    # its backends read a mask of another dtype as if it were q's (pytorch#191612).
    bias = None if log_size is None else log_size[:, None, None, :].to(q.dtype)
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, attn_mask=bias, scale=scale), None


def _fit(q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None) -> bool:
    """Whether all is as it should be, at a glance: the checks that say what is not take longer."""
    if not (isinstance(k, Tensor) and isinstance(v, Tensor)):
        return False
    shape, queries = k.shape, q.shape
    if not (len(shape) == len(queries) == 4 and shape == v.shape):
        return False
    batch, heads, n, d = shape
    if not (queries[0] == batch and queries[1] == heads and queries[3] == d):
        return False
    if not (q.dtype == k.dtype == v.dtype and q.dtype in checks.FLOAT_DTYPES):
        return False
    if not q.device == k.device == v.device:
        return False
    return log_size is None or (
        isinstance(log_size, Tensor)
        and log_size.dtype == torch.float32
        and log_size.shape == (batch, n)
        and log_size.device == q.device
    )


def attention_column_sums(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    log_size: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """How much attention each key received: the sums of the softmax over queries.

    ``c_j = sum_i exp(scale q_i k_j + log_size_j - lse_i)``, what speech language models weigh their
    tokens by (FastAdaSP, arXiv 2410.03007). The weights are computed again, not kept. Not
    differentiable.

    Args:
        q: ``[B, H, Nq, Dh]``.
        k: ``[B, H, N, Dh]``.
        lse: fp32 ``[B, H, Nq]``, from :func:`attention_with_lse` or any flash attention (natural
            log).
        log_size: fp32 ``[B, N]`` or None, as the attention had it.
        scale: factor of the logits; ``Dh ** -0.5`` unless given.
        causal: query ``i`` saw the keys up to ``N - Nq + i`` only.

    Returns:
        fp32 ``[B, H, N]`` (fp64 for fp64).
    """
    q, k, scale = _checked(q.detach(), k.detach(), log_size, scale)
    if lse.shape != q.shape[:3] or lse.dtype != accumulator(q.dtype):
        wanted = f"{accumulator(q.dtype)} {list(q.shape[:3])}"
        raise ValueError(f"lse must be {wanted}, got {lse.dtype} {list(lse.shape)}")
    checks.on_device("lse", lse, "q", q)
    if causal and q.shape[2] > k.shape[2]:
        raise ValueError(
            "causal attention needs at least as many keys as queries, "
            f"got {k.shape[2]} keys and {q.shape[2]} queries"
        )
    lse = lse.detach()
    if select("attention_column_sums", q.device.type, q.dtype, q.shape[-1]) == "reference":
        return reference.attention_column_sums(q, k, lse, log_size, scale, causal)
    return _ops.attention_column_sums(q, k, lse, log_size, scale, causal)


@torch.library.register_fake("fastast::attention_column_sums", lib=library)
def _(
    q: Tensor, k: Tensor, lse: Tensor, log_size: Tensor | None, scale: float, causal: bool
) -> Tensor:
    return lse.new_empty(k.shape[:3])


def _dense_rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _key_bias(log_size: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    if log_size is None:
        return None
    # torch's CPU kernel takes an fp32 mask beside half-precision q, and fp64 only with fp64.
    bias = log_size if q.dtype != torch.float64 else log_size.double()
    return bias[:, None, None, :].expand(k.shape[0], 1, q.shape[2], k.shape[2])


def _attention_torch(
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


def _attention_backward_torch(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_size: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
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


def _attention_column_sums_cpu(
    q: Tensor, k: Tensor, lse: Tensor, log_size: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """One head of one sample at a time, so that the weights stay small."""
    out = lse.new_empty(k.shape[:3])
    for b in range(q.shape[0]):
        bias = None if log_size is None else log_size[b : b + 1]
        for h in range(q.shape[1]):
            i = (slice(b, b + 1), slice(h, h + 1))
            out[i] = reference.attention_column_sums(q[i], k[i], lse[i], bias, scale, causal)
    return out


if not INTERPRETED:
    if not COMPILED:
        library.impl("attention", _attention_torch, "CPU")
        library.impl("attend", lambda *inputs: _attention_torch(*inputs)[0], "CPU")
        library.impl("attention_backward", _attention_backward_torch, "CPU")
    library.impl("attention_column_sums", _attention_column_sums_cpu, "CPU")


@torch.library.register_fake("fastast::attend", lib=library)
def _fake_attend(q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, scale: float) -> Tensor:
    # Laid out as [B, Nq, H, Dh], so that the heads join without a copy.
    batch, heads, n, d = q.shape
    return q.new_empty((batch, n, heads, d)).transpose(1, 2)


@torch.library.register_fake("fastast::attention", lib=library)
def _(
    q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    out = _fake_attend(q, k, v, log_size, scale)
    return out, q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))


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
