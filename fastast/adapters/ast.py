"""Patching ``fastast.AST``, which has its merging built in: the adapter hands it the settings."""

from __future__ import annotations

from torch import nn

from fastast.model import AST
from fastast.schedules import Schedule, parse_schedule
from fastast.tome import MergeSettings


def supports(model: nn.Module) -> bool:
    """Whether ``model`` is an AST of this package."""
    return isinstance(model, AST)


def apply(model: AST, r: Schedule, settings: MergeSettings) -> None:
    """Switch merging on."""
    parse_schedule(model.config.depth, r)
    model.tome = settings
    model.r = r


def remove(model: AST) -> None:
    """Switch merging off."""
    if model.tome is not None:
        model.r = 0
        model.tome = None


def current(model: AST) -> tuple[Schedule, MergeSettings] | None:
    """``r`` and settings, or None while unpatched."""
    return None if model.tome is None else (model.r, model.tome)
