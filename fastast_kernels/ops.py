"""The public ops: argument checks, dispatch, and for each its schema, fake kernel and autograd.

A public function checks its arguments, asks :mod:`backends` what runs, and calls either the
reference or ``torch.ops.fastast.<op>``. The schemas are defined here, so that the package imports
without the compiled extension, which only adds kernels to them (csrc/library.cpp).

Every op works under ``torch.compile(fullgraph=True)`` and ``torch.export``: output shapes follow
from argument shapes and Python ints alone. Under autocast, sums run in the wider dtype of their
inputs; sizes are fp32 always. Attention, with its torch-provided CPU kernel, is in attention.py.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import checks, reference
from .backends import select

library = torch.library.Library("fastast", "DEF")

_NORM_STATE = "Tensor h, Tensor weight, Tensor mean, Tensor rstd"
for _schema in (
    "bipartite_match(Tensor metric, int r, bool class_token, bool distill_token) -> Tensor",
    "bipartite_match_sources(Tensor metric, int r, bool class_token, bool distill_token)"
    " -> (Tensor, Tensor)",
    "fbank_frames(Tensor windows, Tensor mean, Tensor window, Tensor(a!) out) -> ()",
    "block(Tensor x, Tensor pending, Tensor? size, Tensor? log_size, Tensor[] norms,"
    " Tensor[] weights, Tensor[] biases, Tensor[] scales, int heads, float eps1, float eps2, int r,"
    " bool class_token, bool distill_token) -> (Tensor, Tensor, Tensor, Tensor)",
    "key_metric(Tensor k) -> Tensor",
    "log_mel(Tensor spectrum, Tensor weights, Tensor spans, float floor, Tensor(a!) out) -> ()",
    "round_to_int8(Tensor x) -> (Tensor, Tensor)",
    "linear(Tensor x, Tensor weight, Tensor? bias, bool gelu) -> Tensor",
    "linear_int8(Tensor x, Tensor weight, Tensor scale, Tensor? bias, bool gelu) -> Tensor",
    "match_keys(Tensor k, int r, bool class_token, bool distill_token) -> Tensor",
    "match_keys_sources(Tensor k, int r, bool class_token, bool distill_token) -> (Tensor, Tensor)",
    "merge(Tensor x, Tensor assignment, SymInt n_out, Tensor? size, Tensor? sources=None)"
    " -> (Tensor, Tensor)",
    "merge_backward(Tensor grad, Tensor assignment, Tensor? size, Tensor size_out) -> Tensor",
    "unmerge(Tensor x, Tensor assignment) -> Tensor",
    "unmerge_backward(Tensor grad, Tensor assignment, SymInt n_out) -> Tensor",
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "add_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps)"
    " -> (Tensor, Tensor)",
    f"add_layer_norm_backward(Tensor grad_h, Tensor grad_y, {_NORM_STATE})"
    " -> (Tensor, Tensor, Tensor)",
    "merge_add_layer_norm(Tensor x, Tensor residual, Tensor assignment, SymInt n_out,"
    " Tensor? size, Tensor weight, Tensor bias, float eps, Tensor? sources=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "merge_add_norm(Tensor x, Tensor residual, Tensor assignment, SymInt n_out, Tensor? size,"
    " Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    f"merge_add_layer_norm_backward(Tensor grad_h, Tensor grad_y, {_NORM_STATE},"
    " Tensor assignment, Tensor? size, Tensor size_out) -> (Tensor, Tensor, Tensor)",
):
    # No op aliases its inputs or depends on the layout that it is given, and only the filterbank's
    # write to one.
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

_ops = torch.ops.fastast


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums over values of ``dtype`` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants of matrix products on the device of ``x``, or None."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether autograd records what is computed of ``tensors``."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _forward_alone(backend: str, *tensors: Tensor) -> bool:
    """Whether the CPU's op without autograd will do, which takes half the time of few tokens.

    Graphs keep the other one, which every device has.
    """
    return backend == "cpp" and not torch.compiler.is_compiling() and not wants_gradient(*tensors)


def _common_dtype(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast, the two terms of a sum in the wider of their dtypes."""
    if x.dtype != residual.dtype and autocast_dtype(x) is not None:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        return x.to(dtype), residual.to(dtype)
    return x, residual


# --- matching -------------------------------------------------------------------------------------


@overload
def bipartite_match(
    metric: Tensor,
    r: int,
    class_token: bool = True,
    distill_token: bool = True,
    return_sources: Literal[False] = False,
) -> Tensor: ...


@overload
def bipartite_match(
    metric: Tensor,
    r: int,
    class_token: bool = True,
    distill_token: bool = True,
    *,
    return_sources: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def bipartite_match(
    metric: Tensor,
    r: int,
    class_token: bool = True,
    distill_token: bool = True,
    return_sources: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """ToMe's bipartite soft matching (arXiv 2210.09461, section 3) as an assignment.

    Even tokens A propose to the odd token B with the highest cosine similarity; the ``r`` best
    proposals are merged. Scores are compared in fp32 (fp64 for fp64); equal scores go to the lowest
    index; a token shorter than 1e-12 scores 0. Not differentiable: an assignment is discrete.

    Args:
        metric: ``[B, N, C]``, any floating dtype; only directions matter.
        r: tokens to merge, clamped to half of the unprotected ones (:func:`effective_r`).
        class_token: token 0 is protected and keeps row 0.
        distill_token: token 1 is protected; with a class token it keeps row 1.
        return_sources: also return the inverse of the assignment, which CUDA's :func:`merge` reads
            instead of looking for the tokens of a row.

    Returns:
        int32 ``[B, N]``: the output row of every token, out of ``N' = N - effective_r(...)``. Rows
        are CLS, DIST, the unmerged of A (ascending; without a class token by falling score), then
        B. With ``return_sources`` also int32 ``[B, N' + 1 + N]``: where each row begins among the
        tokens and the last ends, then the tokens row by row, ascending
        (:func:`reference.sources`).

    Raises:
        TypeError, ValueError: ``metric`` or ``r`` is of the wrong kind, shape or range.
        RuntimeError: a value of ``metric`` is not finite (checked on the CPU, where it is free).
    """
    checks.floating("metric", metric, "[B, N, C]")
    r = checks.effective_r(metric.shape[1], r, class_token, distill_token)
    metric = metric.detach()
    if select("bipartite_match", metric.device.type, metric.dtype) == "reference":
        if metric.device.type == "cpu" and not torch.compiler.is_compiling():
            finite = metric.isfinite().all(dim=-1).all(dim=-1)
            if not finite.all():
                raise RuntimeError(
                    f"metric must be finite, but sample {int(finite.int().argmin())}"
                    " has a NaN or infinite value"
                )
        rows = reference.bipartite_match(metric, r, class_token, distill_token)
        return (rows, reference.sources(rows, rows.shape[1] - r)) if return_sources else rows
    if return_sources:
        return _ops.bipartite_match_sources(metric, r, class_token, distill_token)
    return _ops.bipartite_match(metric, r, class_token, distill_token)


def _empty_match(x: Tensor, n: int) -> Tensor:
    return x.new_empty((x.shape[0], n), dtype=torch.int32)


@torch.library.register_fake("fastast::bipartite_match", lib=library)
def _(metric: Tensor, r: int, class_token: bool, distill_token: bool) -> Tensor:
    return _empty_match(metric, metric.shape[1])


@torch.library.register_fake("fastast::bipartite_match_sources", lib=library)
def _(metric: Tensor, r: int, class_token: bool, distill_token: bool) -> tuple[Tensor, Tensor]:
    n = metric.shape[1]
    return _empty_match(metric, n), _empty_match(metric, 2 * n - r + 1)


def key_metric(k: Tensor) -> Tensor:
    """ToMe's metric: the mean of the keys over heads, at unit length. Not differentiable.

    Args:
        k: ``[B, H, N, Dh]``; may be a slice of the packed qkv buffer, which is read in place.

    Returns:
        fp32 ``[B, N, Dh]``; a mean shorter than 1e-12 is not stretched.
    """
    checks.floating("k", k, "[B, H, N, Dh]")
    k = k.detach()
    if select("key_metric", k.device.type, k.dtype, k.shape[-1]) == "reference":
        return reference.key_metric(k)
    return _ops.key_metric(k)


@torch.library.register_fake("fastast::key_metric", lib=library)
def _(k: Tensor) -> Tensor:
    batch, _, n, d = k.shape
    return k.new_empty((batch, n, d), dtype=torch.float32)


@overload
def match_keys(
    k: Tensor,
    r: int,
    class_token: bool = True,
    distill_token: bool = True,
    return_sources: Literal[False] = False,
) -> Tensor: ...


@overload
def match_keys(
    k: Tensor,
    r: int,
    class_token: bool = True,
    distill_token: bool = True,
    *,
    return_sources: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def match_keys(
    k: Tensor,
    r: int,
    class_token: bool = True,
    distill_token: bool = True,
    return_sources: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``bipartite_match(key_metric(k), r)`` in one op, which need not write the metric.

    Args:
        k: ``[B, H, N, Dh]``; may be a slice of the packed qkv buffer, which is read in place.
        r: as :func:`bipartite_match`.
        class_token: likewise.
        distill_token: likewise.
        return_sources: likewise.

    Returns:
        int32 ``[B, N]``, with ``return_sources`` also int32 ``[B, N' + 1 + N]``.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`bipartite_match`.
    """
    checks.floating("k", k, "[B, H, N, Dh]")
    r = checks.effective_r(k.shape[2], r, class_token, distill_token)
    k = k.detach()
    if select("match_keys", k.device.type, k.dtype, k.shape[-1]) == "reference":
        metric = key_metric(k)
        if return_sources:
            return bipartite_match(metric, r, class_token, distill_token, return_sources=True)
        return bipartite_match(metric, r, class_token, distill_token)
    if return_sources:
        return _ops.match_keys_sources(k, r, class_token, distill_token)
    return _ops.match_keys(k, r, class_token, distill_token)


@torch.library.register_fake("fastast::match_keys", lib=library)
def _(k: Tensor, r: int, class_token: bool, distill_token: bool) -> Tensor:
    return _empty_match(k, k.shape[2])


@torch.library.register_fake("fastast::match_keys_sources", lib=library)
def _(k: Tensor, r: int, class_token: bool, distill_token: bool) -> tuple[Tensor, Tensor]:
    n = k.shape[2]
    return _empty_match(k, n), _empty_match(k, 2 * n - r + 1)


@torch.library.register_fake("fastast::round_to_int8", lib=library)
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((), dtype=torch.float32)


# --- the filterbank: csrc/fbank.h, for fastast.features -------------------------------------------


@torch.library.register_fake("fastast::fbank_frames", lib=library)
def _(windows: Tensor, mean: Tensor, window: Tensor, out: Tensor) -> None:
    return


@torch.library.register_fake("fastast::log_mel", lib=library)
def _(spectrum: Tensor, weights: Tensor, spans: Tensor, floor: float, out: Tensor) -> None:
    return


# --- linear layers in tiles: csrc/linear.h, for fastast.linear ------------------------------------


def _like_linear(x: Tensor, weight: Tensor, gelu: bool) -> Tensor:
    out_features = weight.shape[0] * 32
    row = out_features + 32 if gelu and out_features % 256 == 0 else out_features
    return x.new_empty((*x.shape[:-1], row), dtype=torch.bfloat16)[..., :out_features]


@torch.library.register_fake("fastast::linear", lib=library)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    return _like_linear(x, weight, gelu)


@torch.library.register_fake("fastast::linear_int8", lib=library)
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    return _like_linear(x, weight, gelu)


# --- a whole block of such layers: csrc/block.h, for fastast.whole_block --------------------------


@torch.library.register_fake("fastast::block", lib=library)
def _(
    x: Tensor,
    pending: Tensor,
    size: Tensor | None,
    log_size: Tensor | None,
    norms: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    scales: list[Tensor],
    heads: int,
    eps1: float,
    eps2: float,
    r: int,
    class_token: bool,
    distill_token: bool,
) -> tuple[Tensor, ...]:
    batch, n, d = x.shape
    sizes = x.new_empty((batch, n - r) if r else (0,), dtype=torch.float32)
    tokens = x.new_empty((batch, n - r, d))
    return tokens, torch.empty_like(tokens), sizes, torch.empty_like(sizes)


# --- merging and unmerging ------------------------------------------------------------------------


def merge(
    x: Tensor,
    assignment: Tensor,
    n_out: int,
    size: Tensor | None = None,
    sources: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Size-weighted mean of the tokens assigned to each output row.

    ``x'_i = sum_j s_j x_j / S_i`` and ``S_i = sum_j s_j`` over the tokens ``j`` of row ``i``. The
    gradient of ``x_j`` is ``(s_j / S_i) g_i``; sizes get none.

    Args:
        x: ``[B, N, D]``.
        assignment: int32 ``[B, N]``, the output row of each token in ``[0, n_out)``, -1 to drop it.
        n_out: number of output rows.
        size: fp32 ``[B, N]``, how many original tokens each stands for; None means 1 each.
        sources: int32 ``[B, n_out + 1 + N]``, the inverse of this very assignment
            (:func:`bipartite_match`), or None. Not checked, and read by the CUDA kernel only.

    Returns:
        ``x'`` ``[B, n_out, D]`` in the dtype of ``x``, and ``S`` fp32 ``[B, n_out]``. A row without
        tokens is zero and of size zero.
    """
    checks.floating("x", x, "[B, N, D]")
    checks.assignment_of(assignment, x, x.shape[1])
    checks.rows(n_out, x.shape[1])
    checks.size_of(size, x)
    checks.sources_of(sources, assignment, n_out)
    if select("merge", x.device.type, x.dtype, x.shape[-1]) == "reference":
        return reference.merge(x, assignment, n_out, size)
    return _ops.merge(x, assignment, n_out, size, sources)


@torch.library.register_fake("fastast::merge", lib=library)
def _(
    x: Tensor,
    assignment: Tensor,
    n_out: int,
    size: Tensor | None,
    sources: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, _, d = x.shape
    return x.new_empty((batch, n_out, d)), x.new_empty((batch, n_out), dtype=torch.float32)


@torch.library.register_fake("fastast::merge_backward", lib=library)
def _(grad: Tensor, assignment: Tensor, size: Tensor | None, size_out: Tensor) -> Tensor:
    return grad.new_empty((*assignment.shape, grad.shape[-1]))


def _merge_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, assignment, _, size, *_ = inputs
    ctx.save_for_backward(assignment, size, output[1])
    ctx.mark_non_differentiable(output[1])


def _merge_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return _ops.merge_backward(grad, *ctx.saved_tensors), None, None, None, None


torch.library.register_autograd(
    "fastast::merge", _merge_backward, setup_context=_merge_setup, lib=library
)


def unmerge(x: Tensor, assignment: Tensor) -> Tensor:
    """Give every token the row it was merged into: the inverse of :func:`merge`, up to the mean.

    Args:
        x: ``[B, n_out, D]``.
        assignment: int32 ``[B, N]`` with values in ``[-1, n_out)``.

    Returns:
        ``[B, N, D]``; dropped tokens (-1) are zero.
    """
    checks.floating("x", x, "[B, n_out, D]")
    checks.assignment_of(assignment, x)
    if select("unmerge", x.device.type, x.dtype, x.shape[-1]) == "reference":
        return reference.unmerge(x, assignment)
    return _ops.unmerge(x, assignment)


@torch.library.register_fake("fastast::unmerge", lib=library)
def _(x: Tensor, assignment: Tensor) -> Tensor:
    return x.new_empty((*assignment.shape, x.shape[-1]))


@torch.library.register_fake("fastast::unmerge_backward", lib=library)
def _(grad: Tensor, assignment: Tensor, n_out: int) -> Tensor:
    return grad.new_empty((grad.shape[0], n_out, grad.shape[-1]))


def _unmerge_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    x, assignment = inputs
    ctx.save_for_backward(assignment)
    ctx.n_out = x.shape[1]


def _unmerge_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _ops.unmerge_backward(grad, *ctx.saved_tensors, ctx.n_out), None


torch.library.register_autograd(
    "fastast::unmerge", _unmerge_backward, setup_context=_unmerge_setup, lib=library
)


# --- residual add, merge and LayerNorm ------------------------------------------------------------


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """``h = x + residual`` and ``LayerNorm(h)`` in one pass.

    Args:
        x: ``[..., D]``.
        residual: like ``x``, or None for ``h = x``.
        weight: ``[D]``, any floating dtype.
        bias: ``[D]``, any floating dtype.
        eps: added to the variance.

    Returns:
        ``h`` and ``LayerNorm(h)``, both like ``x``.
    """
    checks.affine(weight, bias, x)
    if residual is None:
        dtype = x.dtype
        y = torch.nn.functional.layer_norm(x, x.shape[-1:], weight.to(dtype), bias.to(dtype), eps)
        return x, y.to(dtype)
    x, residual = _common_dtype(x, residual)
    checks.same("residual", residual, "x", x)
    backend = select("add_layer_norm", x.device.type, x.dtype, x.shape[-1])
    if backend == "reference":
        return reference.add_layer_norm(x, residual, weight, bias, eps)
    if _forward_alone(backend, x, residual, weight, bias):
        return _ops.add_norm.default(x, residual, weight, bias, eps)
    h, y, _, _ = _ops.add_layer_norm(x, residual, weight, bias, eps)
    return h, y


@torch.library.register_fake("fastast::add_layer_norm", lib=library)
def _(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def statistic() -> Tensor:
        return x.new_empty(x.shape[:-1], dtype=accumulator(x.dtype))

    return x.new_empty(x.shape), x.new_empty(x.shape), statistic(), statistic()


@torch.library.register_fake("fastast::add_norm", lib=library)
def _(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.register_fake("fastast::add_layer_norm_backward", lib=library)
def _(
    grad_h: Tensor, grad_y: Tensor, h: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    def of_weight() -> Tensor:
        return h.new_empty(weight.shape, dtype=accumulator(h.dtype))

    return h.new_empty(h.shape), of_weight(), of_weight()


def _add_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, _, mean, rstd = output
    ctx.save_for_backward(h, inputs[2], mean, rstd)
    ctx.bias_dtype = inputs[3].dtype
    ctx.mark_non_differentiable(mean, rstd)


def _add_norm_backward(
    ctx: Any, grad_h: Tensor, grad_y: Tensor, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # unpacked once, as activation checkpointing demands
    grad, of_weight, of_bias = _ops.add_layer_norm_backward(grad_h, grad_y, *saved)
    return grad, grad, of_weight.to(saved[1].dtype), of_bias.to(ctx.bias_dtype), None


torch.library.register_autograd(
    "fastast::add_layer_norm", _add_norm_backward, setup_context=_add_norm_setup, lib=library
)


@overload
def merge_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    assignment: Tensor,
    n_out: int,
    size: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    return_log_size: Literal[False] = False,
    sources: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...


@overload
def merge_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    assignment: Tensor,
    n_out: int,
    size: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    *,
    return_log_size: Literal[True],
    sources: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...


def merge_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    assignment: Tensor,
    n_out: int,
    size: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    return_log_size: bool = False,
    sources: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """``merge(x + residual)`` and its LayerNorm in one pass: the merge rides on the residual add.

    Args:
        x: ``[B, N, D]``.
        residual: like ``x``.
        assignment: int32 ``[B, N]``, the output row of each token in ``[0, n_out)``, -1 to drop it.
        n_out: number of output rows.
        size: fp32 ``[B, N]`` or None, see :func:`merge`.
        weight: ``[D]``, any floating dtype.
        bias: ``[D]``, any floating dtype.
        eps: added to the variance.
        return_log_size: also return the log of the new size, what :func:`attention` wants next.
        sources: the inverse of the assignment or None, see :func:`merge`.

    Returns:
        ``h`` ``[B, n_out, D]``, the new size fp32 ``[B, n_out]``, and ``LayerNorm(h)``; with
        ``return_log_size`` the log, fp32 ``[B, n_out]``, comes after the size.
    """
    x, residual = _common_dtype(x, residual)
    checks.floating("x", x, "[B, N, D]")
    checks.same("residual", residual, "x", x)
    checks.assignment_of(assignment, x, x.shape[1])
    checks.rows(n_out, x.shape[1])
    checks.size_of(size, x)
    checks.sources_of(sources, assignment, n_out)
    checks.affine(weight, bias, x)
    backend = select("merge_add_layer_norm", x.device.type, x.dtype, x.shape[-1])
    if backend == "reference":
        h, size, y = reference.merge_add_layer_norm(
            x, residual, assignment, n_out, size, weight, bias, eps
        )
        return (h, size, size.log(), y) if return_log_size else (h, size, y)
    if _forward_alone(backend, x, residual, weight, bias):
        h, size, log_size, y = _ops.merge_add_norm.default(
            x, residual, assignment, n_out, size, weight, bias, eps
        )
    else:
        h, size, log_size, y, _, _ = _ops.merge_add_layer_norm(
            x, residual, assignment, n_out, size, weight, bias, eps, sources
        )
    return (h, size, log_size, y) if return_log_size else (h, size, y)


@torch.library.register_fake("fastast::merge_add_layer_norm", lib=library)
def _(
    x: Tensor,
    residual: Tensor,
    assignment: Tensor,
    n_out: int,
    size: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    sources: Tensor | None = None,
) -> tuple[Tensor, ...]:
    batch, _, d = x.shape

    def rows() -> Tensor:
        return x.new_empty((batch, n_out, d))

    def per_row(dtype: torch.dtype) -> Tensor:
        return x.new_empty((batch, n_out), dtype=dtype)

    statistic = accumulator(x.dtype)
    sizes = per_row(torch.float32), per_row(torch.float32)
    return rows(), *sizes, rows(), per_row(statistic), per_row(statistic)


@torch.library.register_fake("fastast::merge_add_norm", lib=library)
def _(
    x: Tensor,
    residual: Tensor,
    assignment: Tensor,
    n_out: int,
    size: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    h = x.new_empty((x.shape[0], n_out, x.shape[2]))
    size_out = x.new_empty((x.shape[0], n_out), dtype=torch.float32)
    return h, size_out, torch.empty_like(size_out), torch.empty_like(h)


@torch.library.register_fake("fastast::merge_add_layer_norm_backward", lib=library)
def _(
    grad_h: Tensor,
    grad_y: Tensor,
    h: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    assignment: Tensor,
    size: Tensor | None,
    size_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    def of_weight() -> Tensor:
        return h.new_empty(weight.shape, dtype=accumulator(h.dtype))

    return h.new_empty((*assignment.shape, h.shape[-1])), of_weight(), of_weight()


def _merge_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, assignment, _, size, weight, bias, *_ = inputs
    h, size_out, log_size_out, _, mean, rstd = output
    ctx.save_for_backward(h, weight, mean, rstd, assignment, size, size_out)
    ctx.bias_dtype = bias.dtype
    ctx.mark_non_differentiable(size_out, log_size_out, mean, rstd)


def _merge_norm_backward(
    ctx: Any,
    grad_h: Tensor,
    _: Tensor | None,
    __: Tensor | None,
    grad_y: Tensor,
    *___: Tensor | None,
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grad, of_weight, of_bias = _ops.merge_add_layer_norm_backward(grad_h, grad_y, *saved)
    of_weight, of_bias = of_weight.to(saved[1].dtype), of_bias.to(ctx.bias_dtype)
    return grad, grad, None, None, None, of_weight, of_bias, None, None


torch.library.register_autograd(
    "fastast::merge_add_layer_norm",
    _merge_norm_backward,
    setup_context=_merge_norm_setup,
    lib=library,
)
