"""Argument checks shared by every op: an error names the argument, what it was and what it may be.

They read shapes and dtypes only, never values, so they cost no device synchronisation and vanish
under ``torch.compile``.
"""

from __future__ import annotations

import torch

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def effective_r(n: int, r: int, class_token: bool = True, distill_token: bool = True) -> int:
    """How many tokens a match really merges: ``r`` clamped to half of the unprotected tokens.

    Args:
        n: number of tokens, protected ones included.
        r: number of tokens asked to be merged, 0 or more.
        class_token: whether token 0 is a protected class token.
        distill_token: whether token 1 is a protected distillation token.

    Returns:
        ``min(r, (n - protected) // 2)``, and 0 where no destination is left; the output has ``n``
        minus this many rows.

    Raises:
        TypeError: ``r`` is not an int.
        ValueError: ``r`` is negative.
    """
    if isinstance(r, bool) or not isinstance(r, (int, torch.SymInt)):
        raise TypeError(f"r must be an int, got {type(r).__name__} ({r!r})")
    if r < 0:
        raise ValueError(f"r must be 0 or more, got {r}")
    destinations = n // 2 - int(distill_token)  # a lone DIST takes nobody in
    return 0 if destinations < 1 else min(r, (n - int(class_token) - int(distill_token)) // 2)


def floating(name: str, x: torch.Tensor, shape: str) -> None:
    """Require a floating tensor of the rank that ``shape`` (for example ``"[B, N, D]"``) spells."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor {shape}, got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if x.dim() != shape.count(",") + 1:
        raise ValueError(f"{name} must have shape {shape}, got {list(x.shape)}")


def same(name: str, x: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Require equal shape, dtype and device of two tensors."""
    if x.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape of {other_name}, {list(other.shape)}, got {list(x.shape)}"
        )
    if x.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {x.dtype}")
    on_device(name, x, other_name, other)


def on_device(name: str, x: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Require two tensors on one device."""
    if x.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {x.device}"
        )


def assignment_of(assignment: torch.Tensor, x: torch.Tensor, tokens: int | None = None) -> None:
    """Require an int32 ``[B, N]`` assignment that fits ``x`` (``[B, N, D]`` unless ``tokens``)."""
    if not isinstance(assignment, torch.Tensor) or assignment.dtype != torch.int32:
        kind = getattr(assignment, "dtype", type(assignment).__name__)
        raise TypeError(f"assignment must be an int32 tensor [B, N], got {kind}")
    batch = x.shape[0]
    if (
        assignment.dim() != 2
        or assignment.shape[0] != batch
        or (tokens is not None and assignment.shape[1] != tokens)
    ):
        wanted = f"[{batch}, {'N' if tokens is None else tokens}]"
        raise ValueError(f"assignment must have shape {wanted}, got {list(assignment.shape)}")
    on_device("assignment", assignment, "x", x)


def sources_of(sources: torch.Tensor | None, assignment: torch.Tensor, n_out: int) -> None:
    """Require int32 ``[B, n_out + 1 + N]`` sources of an assignment ``[B, N]``, or None."""
    if sources is None:
        return
    if not isinstance(sources, torch.Tensor) or sources.dtype != torch.int32:
        kind = getattr(sources, "dtype", type(sources).__name__)
        raise TypeError(f"sources must be an int32 tensor or None, got {kind}")
    batch, n = assignment.shape
    if sources.shape != (batch, n_out + 1 + n):
        wanted = f"[{batch}, {n_out + 1 + n}]"
        raise ValueError(
            f"sources must have shape {wanted} for {n} tokens and {n_out} rows, "
            f"got {list(sources.shape)}"
        )
    on_device("sources", sources, "assignment", assignment)


def rows(n_out: int, tokens: int) -> None:
    """Require an output length between 1 and the number of tokens."""
    if isinstance(n_out, bool) or not isinstance(n_out, (int, torch.SymInt)):
        raise TypeError(f"n_out must be an int, got {type(n_out).__name__}")
    if not 0 < n_out <= tokens:
        raise ValueError(f"n_out must be between 1 and the number of tokens, {tokens}, got {n_out}")


def size_of(size: torch.Tensor | None, x: torch.Tensor, name: str = "size") -> None:
    """Require an fp32 ``[B, N]`` token size for ``x``, or None (every token counts once)."""
    if size is None:
        return
    if not isinstance(size, torch.Tensor) or size.dtype != torch.float32:
        kind = getattr(size, "dtype", type(size).__name__)
        raise TypeError(f"{name} must be a float32 tensor or None, got {kind}")
    if size.shape != x.shape[:2]:
        raise ValueError(f"{name} must have shape {list(x.shape[:2])}, got {list(size.shape)}")
    on_device(name, size, "x", x)


def affine(weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> None:
    """Require LayerNorm's ``weight`` and ``bias`` of shape ``[D]`` beside ``x`` ``[..., D]``."""
    for name, p in (("weight", weight), ("bias", bias)):
        floating(name, p, "[D]")
        if p.shape[0] != x.shape[-1]:
            raise ValueError(f"{name} must have shape [{x.shape[-1]}], got {list(p.shape)}")
        on_device(name, p, "x", x)
