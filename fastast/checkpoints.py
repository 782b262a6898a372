"""Weights in and out: whatever the format, they are read by ``formats`` and adapted here."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastast.formats import (
    CONFIG,
    FORMAT_VERSION,
    MODEL_TYPE,
    WEIGHTS,
    CheckpointError,
    State,
    read_checkpoint,
)
from fastast.model import AST, ASTConfig

__all__ = ["CheckpointError", "adapt_position_embedding", "load", "save_pretrained"]

logger = logging.getLogger("fastast")


def adapt_position_embedding(
    pos_embed: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> Tensor:
    """Position embeddings for another grid of patches, as the original AST does it.

    Along time, then along frequency: a shorter axis is cut from the middle, a longer one
    interpolated bilinearly. CLS and DIST keep theirs.

    Args:
        pos_embed: ``[1, 2 + f * t, D]``, patch ``f * t_dim + t``.
        old_grid: its ``(f_dim, t_dim)``.
        new_grid: the ``(f_dim, t_dim)`` wanted.

    Returns:
        ``[1, 2 + f' * t', D]`` in the dtype of ``pos_embed``.
    """
    (f_old, t_old), (f_new, t_new) = old_grid, new_grid
    prefix, patches = pos_embed[:, :2], pos_embed[:, 2:]
    dim = pos_embed.shape[-1]
    image = patches.float().reshape(1, f_old, t_old, dim).permute(0, 3, 1, 2)  # [1, D, f, t]
    if t_new <= t_old:
        start = t_old // 2 - t_new // 2
        image = image[..., start : start + t_new]
    else:
        image = F.interpolate(image, (f_old, t_new), mode="bilinear")
    if f_new <= f_old:
        start = f_old // 2 - f_new // 2
        image = image[:, :, start : start + f_new]
    else:
        image = F.interpolate(image, (f_new, t_new), mode="bilinear")
    patches = image.permute(0, 2, 3, 1).reshape(1, f_new * t_new, dim)
    return torch.cat([prefix, patches.to(pos_embed.dtype)], dim=1)


def _fresh_head(config: ASTConfig) -> State:
    weight = nn.init.trunc_normal_(torch.empty(config.num_classes, config.embed_dim), std=0.02)
    return {
        "head.norm.weight": torch.ones(config.embed_dim),
        "head.norm.bias": torch.zeros(config.embed_dim),
        "head.linear.weight": weight,
        "head.linear.bias": torch.zeros(config.num_classes),
    }


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + rest


def _check_fits(state: State, wanted: State, path: object) -> None:
    """Require the names and shapes of ``wanted``; the error lists what differs."""
    wrong = []
    if missing := wanted.keys() - state.keys():
        wrong.append(f"missing {_listed(missing)}")
    if unexpected := state.keys() - wanted.keys():
        wrong.append(f"unexpected {_listed(unexpected)}")
    shapes = [
        f"{name} {list(state[name].shape)} for {list(wanted[name].shape)}"
        for name in wanted.keys() & state.keys()
        if state[name].shape != wanted[name].shape
    ]
    if shapes:
        wrong.append(f"wrong shape {_listed(shapes)}")
    if wrong:
        raise CheckpointError(f"{path} does not hold the weights of this AST: {'; '.join(wrong)}")


def load(
    path: str | os.PathLike[str],
    *,
    num_classes: int | None = None,
    target_length: int | None = None,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> AST:
    """An AST, in eval mode, with weights from wherever they are: ``AST.from_pretrained``.

    Args:
        path: a folder of ``save_pretrained`` or of Hugging Face's ``ASTForAudioClassification`` or
            ``ASTModel`` (any version), a ``.safetensors`` file with its ``config.json`` beside it,
            an original AST ``.pth``, or a Hugging Face hub id.
        num_classes: with another number than the checkpoint's, or a checkpoint without a head, the
            head is initialised afresh (logged).
        target_length: with another clip length than the checkpoint's, in frames, the position
            embeddings are adapted (:func:`adapt_position_embedding`), as for another
            ``num_mel_bins``.
        dtype: dtype of the parameters, whatever the file stores.
        **overrides: other fields of :class:`ASTConfig`. For an original ``.pth``, which does not
            tell them, ``frequency_stride``, ``time_stride`` and ``num_heads`` describe the file
            (10, 10 and a head dimension of 64 unless given).

    Raises:
        CheckpointError: nothing is there, it cannot be read, or it is not of an AST.
        TypeError: an override is not a field of ``ASTConfig``, or ``dtype`` no floating dtype.
        ValueError: an override has an impossible value.
    """
    unknown = overrides.keys() - {f.name for f in fields(ASTConfig)}
    if unknown:
        raise TypeError(f"not a field of ASTConfig: {_listed(unknown)}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating torch dtype, got {dtype!r}")
    asked = dict(overrides)
    for name, value in (("num_classes", num_classes), ("target_length", target_length)):
        if value is not None:
            asked[name] = value

    stored, state = read_checkpoint(path, asked)
    without_head = not any(name.startswith("head.") for name in state)
    if without_head and num_classes is None:
        raise CheckpointError(f"{path} holds no classification head: give num_classes")
    fresh_head = without_head or asked.get("num_classes", stored.num_classes) != stored.num_classes
    if fresh_head:
        asked.setdefault("labels", ())
    config = replace(stored, **asked)

    if fresh_head:
        logger.warning("%s: new head with random weights, %d classes", path, config.num_classes)
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
        state |= _fresh_head(config)
    # Position embeddings that do not fit their own config stay, and are reported below.
    position = state.get("pos_embed", torch.empty(0))
    if config.grid != stored.grid and position.shape == (1, stored.num_tokens, stored.embed_dim):
        state["pos_embed"] = adapt_position_embedding(position, stored.grid, config.grid)
    with torch.device("meta"):
        model = AST(config)
    _check_fits(state, model.state_dict(), path)
    state = {name: value.to(dtype).contiguous() for name, value in state.items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def save_pretrained(model: AST, folder: str | os.PathLike[str]) -> None:
    """Write ``model.safetensors`` and ``config.json`` (both replaced at once) into ``folder``.

    Args:
        model: its weights are stored in their dtype; patching leaves no trace in the files.
        folder: made if it does not exist.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = {"model_type": MODEL_TYPE, "format_version": FORMAT_VERSION, **asdict(model.config)}
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    # A killed process leaves the old files or the new ones, never half of one.
    save_file(state, folder / f".{WEIGHTS}", metadata={"format": "pt"})
    (folder / f".{CONFIG}").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    for name in (WEIGHTS, CONFIG):
        os.replace(folder / f".{name}", folder / name)
