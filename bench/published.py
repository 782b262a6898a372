"""Token merging as published: Hugging Face's AST with every layer replaced, and nothing fused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastast_kernels import effective_r
from fastast_kernels.reference import published_step

ATTENTIONS = ("materialised", "sdpa")


class PublishedLayer:
    """The forward of one layer: attention weighted by token sizes, merge, MLP.

    Attributes:
        layer: Hugging Face's layer, whose modules it runs.
        r: tokens to merge.
        attention: one of ``ATTENTIONS``.
        sizes: ``{"size": [B, N] or None}``, shared by the layers of one model.
        first: nothing has been merged yet, so there are no sizes.
        last: nobody needs the sizes any more.
    """

    def __init__(
        self,
        layer: Any,
        r: int,
        attention: str,
        sizes: dict[str, Tensor | None],
        first: bool,
        last: bool,
    ) -> None:
        self.layer, self.r, self.attention = layer, r, attention
        self.sizes, self.first, self.last = sizes, first, last

    def __call__(self, x: Tensor, attention_mask: None = None, **_: Any) -> Tensor:
        """``[B, N, D]`` to ``[B, N - r, D]``."""
        layer, size = self.layer, None if self.first else self.sizes["size"]
        out, k = self.attend(layer.layernorm_before(x), size)
        x = x + out
        r = effective_r(x.shape[1], self.r)
        if r > 0:
            x, size = published_step(x, k.mean(dim=1), r, size)
        self.sizes["size"] = None if self.last else size
        return x + layer.mlp(layer.layernorm_after(x))

    def attend(self, y: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention over ``y`` ``[B, N, D]``: its output, and the keys ``[B, H, N, Dh]``."""
        module = self.layer.attention
        batch, n, dim = y.shape

        def heads(t: Tensor) -> Tensor:
            return t.view(batch, n, module.num_attention_heads, -1).transpose(1, 2)

        q, k, v = (heads(p(y)) for p in (module.q_proj, module.k_proj, module.v_proj))
        # In the dtype of q: cuDNN reads an fp32 mask beside bf16 queries as if it were bf16.
        bias = None if size is None else size.log().to(q.dtype)[:, None, None, :]
        if self.attention == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=module.scaling)
        else:
            weights = (q @ k.transpose(-1, -2)) * module.scaling
            weights = weights if bias is None else weights + bias
            out = weights.softmax(dim=-1) @ v
        return module.o_proj(out.transpose(1, 2).reshape(batch, n, dim)), k


def replace_layers(model: Any, schedule: Sequence[int], attention: str) -> Any:
    """Give every layer of ``model`` (changed in place) a :class:`PublishedLayer` and return it.

    Args:
        model: Hugging Face's ``ASTForAudioClassification``.
        schedule: tokens to merge in each layer; more than there are to merge is clamped.
        attention: ``"materialised"``, as published, or ``"sdpa"`` with the sizes as its mask.
    """
    layers = model.audio_spectrogram_transformer.layers
    if len(schedule) != len(layers):
        raise ValueError(f"schedule must have {len(layers)} entries, got {len(schedule)}")
    if attention not in ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
    sizes: dict[str, Tensor | None] = {"size": None}
    for i, (layer, r) in enumerate(zip(layers, schedule, strict=True)):
        layer.forward = PublishedLayer(layer, r, attention, sizes, i == 0, i == len(layers) - 1)
    return model
