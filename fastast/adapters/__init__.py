"""Token merging for models that exist: ``patch``, ``unpatch`` and ``patched``.

An adapter is a module with four functions: ``supports(model)``, ``apply(model, r, settings)``,
``remove(model)`` and ``current(model)``. It is chosen by the structure of the model, and acts on
that one instance.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar, cast

from torch import nn

from fastast.adapters import ast
from fastast.tome import MergeSettings, Schedule

Model = TypeVar("Model", bound=nn.Module)


class Adapter(Protocol):
    """What a module of this package offers for one library."""

    def supports(self, model: nn.Module) -> bool:
        """Whether ``model`` has the structure this adapter knows."""

    def apply(self, model: nn.Module, r: Schedule, settings: MergeSettings) -> None:
        """Patch in place, over an earlier patch if there is one; checks ``r`` first."""

    def remove(self, model: nn.Module) -> None:
        """Make it exactly the model it was; nothing to do for an unpatched one."""

    def current(self, model: nn.Module) -> tuple[Schedule, MergeSettings] | None:
        """``r`` and settings of a patched model, None for an unpatched one."""


def _adapter(model: nn.Module) -> Adapter:
    """The adapter for ``model``, or an error that lists what there is."""
    adapters = [ast]
    if "transformers" in sys.modules:  # an object of that library cannot exist without it
        from fastast.adapters import huggingface

        adapters.append(huggingface)
    for adapter in adapters:
        if isinstance(model, nn.Module) and adapter.supports(model):
            return cast(Adapter, adapter)
    raise TypeError(
        f"model must be a fastast.AST or a transformers ASTForAudioClassification or ASTModel, "
        f"patched before it is compiled or wrapped, got {type(model).__name__}"
    )


def patch(
    model: Model,
    r: Schedule = 0,
    prop_attn: bool = True,
    trace: bool = False,
    policy: str = "tome",
) -> Model:
    """Merge redundant tokens between attention and MLP of every block of ``model``, in place.

    State-dict keys do not change, and with ``r=0`` the output is that of the unpatched model bit
    for bit. Patching again replaces the settings. Afterwards ``model.r`` can be assigned and takes
    effect at the next forward, and ``model.tome`` holds the other settings.

    Args:
        model: a ``fastast.AST``, or a transformers ``ASTForAudioClassification`` or ``ASTModel``
            (5.10 or newer).
        r: tokens to merge in each block: an int, ``(r, inflect)`` with ``inflect`` in [-1, 1] for
            a falling (< 0) or rising schedule, or a list of one int a block.
        prop_attn: proportional attention: the log of the size of a token is added to the logits
            of its key.
        trace: leave where every token went in ``model.tome.source``, int32 ``[B, N]``.
        policy: reduction policy, by its name in ``fastast.tome.POLICIES``.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is of another kind, or ``r`` has another form.
        ValueError: a number in ``r`` is out of range, a list has the wrong length, or ``policy``
            is unknown. The model is left as it was.
    """
    settings = MergeSettings(prop_attn=prop_attn, trace=trace, policy=policy)
    _adapter(model).apply(model, r, settings)
    return model


def unpatch(model: Model) -> Model:
    """Make ``model`` exactly what it was before :func:`patch`; an unpatched one is left alone.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is of a kind that :func:`patch` does not know.
    """
    _adapter(model).remove(model)
    return model


@contextmanager
def patched(
    model: Model,
    r: Schedule = 0,
    prop_attn: bool = True,
    trace: bool = False,
    policy: str = "tome",
) -> Iterator[Model]:
    """:func:`patch` for the length of a ``with`` block; then the model is as it was before.

    A model that was patched already gets its earlier ``r`` and settings back.
    """
    adapter = _adapter(model)
    before = adapter.current(model)
    patch(model, r, prop_attn, trace, policy)
    try:
        yield model
    finally:
        adapter.remove(model)
        if before is not None:
            adapter.apply(model, *before)
