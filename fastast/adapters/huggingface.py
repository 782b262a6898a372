"""Patching the Audio Spectrogram Transformer of transformers (5.10 or newer), instance by instance.

Three official seams carry the merging, so that almost nothing of the library is repeated here:

- a forward pre-hook on the ``ASTModel`` puts a :class:`ForwardState` among the keyword arguments,
  which the library hands to every layer and to the attention function;
- an attention function registered with ``AttentionInterface`` leaves the matching metric in that
  state and adds the token sizes; where there is nothing to add, the model's own implementation
  runs. Each patched attention module gets its own shallow copy of the config to name it;
- each layer gets a ``forward`` on the instance, because the library's has no seam between
  attention and MLP. A layer that merges nothing calls the library's.

The state of layer i is only ever written to slot i with what the layer computes again from the
same input, so gradient checkpointing may run it twice.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastast.schedules import Schedule, parse_schedule
from fastast.tome import MergeSettings, compose
from fastast_kernels import attention, key_metric, merge_add_layer_norm

NAME = "fastast"  # of our attention function among the library's
LAYER_PARTS = ("attention", "layernorm_before", "layernorm_after", "mlp", "dropout")
ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")


class ForwardState:
    """What one forward of an ``ASTModel`` knows about its tokens.

    Attributes:
        tome: the model's settings.
        schedule: tokens to merge, by layer.
        size: fp32 ``[B, N]`` before each layer, and after the last; None while one token each.
        log_size: its logarithm, likewise.
        source: int32 ``[B, N0]``, likewise, when tracing.
        metric: what each layer matches on, between its attention and its merge.
    """

    def __init__(self, tome: MergeSettings, schedule: tuple[int, ...]) -> None:
        self.tome = tome
        self.schedule = schedule
        self.size: list[Tensor | None] = [None] * (len(schedule) + 1)
        self.log_size: list[Tensor | None] = [None] * (len(schedule) + 1)
        self.source: list[Tensor | None] = [None] * (len(schedule) + 1)
        self.metric: dict[int, Tensor] = {}


class Patch:
    """The patch of one ``ASTModel``: its forward hooks, and what undoes it.

    Attributes:
        owner: the module given to ``patch``, whose ``r`` is read at every forward.
        tome: its settings.
    """

    def __init__(self, owner: Any, base: nn.Module, tome: MergeSettings) -> None:
        self.owner = owner
        self.tome = tome
        self.handles = [
            base.register_forward_pre_hook(self.before, with_kwargs=True),
            base.register_forward_hook(self.after, with_kwargs=True),
        ]

    def before(
        self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give this forward its state."""
        schedule = parse_schedule(len(base.layers), self.owner.r)
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        if mask is not None and any(schedule):
            raise ValueError("attention_mask must be None where tokens are merged (r > 0)")
        return args, {**kwargs, "fastast_state": ForwardState(self.tome, schedule)}

    def after(
        self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Publish where the tokens went."""
        if self.tome.trace:
            source = kwargs["fastast_state"].source[-1]
            if source is None:
                tokens = output[0]
                source = torch.arange(tokens.shape[1], dtype=torch.int32, device=tokens.device)
                source = source.repeat(tokens.shape[0], 1)
            self.tome.source = source


class LayerForward:
    """The forward of one patched layer; without a state, or nothing to merge, the library's own."""

    def __init__(self, layer: Any, index: int) -> None:
        self.layer = layer
        self.index = index
        self.instance_forward = layer.__dict__.get("forward")  # of another patch, if any

    def __call__(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """``[B, N, D]`` to ``[B, N', D]``."""
        layer, i = self.layer, self.index
        state: ForwardState | None = kwargs.get("fastast_state")
        n = hidden_states.shape[1]
        r = 0 if state is None else state.tome.merged(n, state.schedule[i])
        if state is None or r == 0:
            if state is not None:
                for of_layers in (state.size, state.log_size, state.source):
                    of_layers[i + 1] = of_layers[i]
            if self.instance_forward is not None:
                return self.instance_forward(hidden_states, attention_mask, **kwargs)
            return type(layer).forward(layer, hidden_states, attention_mask, **kwargs)

        y = layer.layernorm_before(hidden_states)
        out = layer.dropout(layer.attention(y, attention_mask, **kwargs)[0])
        assignment = state.tome.match(state.metric.pop(i), r)
        if state.tome.trace:
            state.source[i + 1] = compose(state.source[i], assignment)
        norm = layer.layernorm_after
        x, state.size[i + 1], state.log_size[i + 1], y = merge_add_layer_norm(
            hidden_states,
            out,
            assignment,
            n - r,
            state.size[i],
            norm.weight,
            norm.bias,
            norm.eps,
            return_log_size=True,
        )
        return x + layer.dropout(layer.mlp(y))


class AttentionPatch:
    """What the attention function needs to know of the module that calls it.

    Attributes:
        config: the module's own config, shared with the model: its attention implementation runs.
        eager: the library's unfused attention, where it returns the weights.
        index: number of the layer.
    """

    def __init__(self, module: Any, index: int) -> None:
        self.config = module.config
        self.index = index
        self.eager = _eager_attention(type(module))


def _eager_attention(cls: type) -> Callable[..., Any]:
    """``eager_attention_forward`` of the file in which the class, or a parent, is written."""
    for parent in cls.__mro__:
        found = getattr(sys.modules.get(parent.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise TypeError(f"{cls.__module__} has no eager_attention_forward")


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    fastast_state: ForwardState | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a patched module, as ``AttentionInterface`` wants it.

    Args:
        module: the attention module.
        query: ``[B, H, N, Dh]``.
        key: ``[B, H, N, Dh]``.
        value: ``[B, H, N, Dh]``.
        attention_mask: the library's mask; None where tokens are merged.
        dropout: probability of dropping an attention weight.
        scaling: factor of the logits.
        fastast_state: state of this forward.
        **kwargs: for the model's own implementation.

    Returns:
        The output ``[B, N, H, Dh]``, and the weights where the model's implementation has them.
    """
    patch: AttentionPatch = module.fastast
    implementation = patch.config._attn_implementation
    log_size = None
    if fastast_state is not None:
        if fastast_state.tome.prop_attn:
            log_size = fastast_state.log_size[patch.index]
        if fastast_state.tome.merged(key.shape[2], fastast_state.schedule[patch.index]):
            fastast_state.metric[patch.index] = key_metric(key.detach())
    if log_size is not None:
        if not dropout and implementation != "eager":
            return attention(query, key, value, log_size, scaling).transpose(1, 2), None
        # Weights, and their dropout, exist only where the sizes can go in as a mask.
        attention_mask = log_size[:, None, None, :].to(query.dtype)
        implementation = "eager" if implementation == "eager" else "sdpa"
    run = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, patch.eager)
    return run(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


AttentionInterface.register(NAME, attention_forward)


def _base(model: Any) -> Any:
    """The ``ASTModel`` inside ``model``, or ``model`` itself."""
    return getattr(model, "audio_spectrogram_transformer", model)


def supports(model: nn.Module) -> bool:
    """Whether ``model`` has the structure of the library's AST, with or without a head.

    Raises:
        TypeError: it has the structure the library had before 5.10.
    """
    base = _base(model)
    embeddings = getattr(base, "embeddings", None)
    if not all(hasattr(embeddings, token) for token in ("cls_token", "distillation_token")):
        return False
    if hasattr(base, "encoder"):
        raise TypeError(
            f"model is a {type(model).__name__} of an old transformers: token merging needs "
            'transformers 5.10 or newer (pip install "fastast[hf]")'
        )
    layers = getattr(base, "layers", None)
    return isinstance(layers, nn.ModuleList) and all(
        all(hasattr(layer, part) for part in LAYER_PARTS)
        and all(hasattr(layer.attention, part) for part in ATTENTION_PARTS)
        for layer in layers
    )


def apply(model: Any, r: Schedule, settings: MergeSettings) -> None:
    """Patch the ``ASTModel`` in ``model``; ``r`` and ``tome`` appear on ``model``."""
    base = _base(model)
    parse_schedule(len(base.layers), r)
    remove(model)
    patches = [AttentionPatch(layer.attention, i) for i, layer in enumerate(base.layers)]
    for i, layer in enumerate(base.layers):
        layer.attention.fastast = patches[i]
        layer.attention.config = copy.copy(layer.attention.config)
        layer.attention.config._attn_implementation = NAME
        layer.forward = LayerForward(layer, i)
    base.fastast = Patch(model, base, settings)
    model.r = r
    model.tome = settings


def remove(model: Any) -> None:
    """Take back everything :func:`apply` did, whichever of the two modules it was given."""
    base = _base(model)
    patch: Patch | None = base.__dict__.pop("fastast", None)
    if patch is None:
        return
    for handle in patch.handles:
        handle.remove()
    del patch.owner.r, patch.owner.tome
    for layer in base.layers:
        layer.attention.config = layer.attention.__dict__.pop("fastast").config
        before = layer.__dict__.pop("forward").instance_forward
        if before is not None:
            layer.forward = before


def current(model: nn.Module) -> tuple[Schedule, MergeSettings] | None:
    """``r`` and settings, or None while unpatched."""
    patch: Patch | None = _base(model).__dict__.get("fastast")
    return None if patch is None else (patch.owner.r, patch.tome)
