"""The Audio Spectrogram Transformer (AST, arXiv 2104.01778), with room for token merging.

A log-mel spectrogram is cut into overlapping 16 x 16 patches, two tokens (CLS and DIST) are put in
front, a vision transformer runs over them, and the mean of the two goes through a small head.

Between blocks the tokens travel as a pair ``(x, pending)`` whose sum they are: the residual of one
block is added in the pass that normalises for the next, and merging rides on the pass between
attention and MLP. Whatever a block needs comes in as arguments and goes out as results, so
gradient checkpointing, threads, DDP and ``torch.compile`` see a plain function.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastast.config import ASTConfig
from fastast.linear import InferenceLinear, linear_part
from fastast.schedules import Schedule, parse_schedule
from fastast.streams import Beside
from fastast.tome import MergeSettings, compose
from fastast.whole_block import run_whole
from fastast_kernels import add_layer_norm, attention, merge_add_layer_norm

__all__ = ["AST", "ASTConfig", "ASTOutput"]

PLAIN = MergeSettings()  # what an unpatched model passes to its blocks; never written to


class ASTOutput(NamedTuple):
    """What ``AST.forward`` returns when more than the logits is asked for.

    Attributes:
        logits: ``[B, num_classes]``.
        hidden_states: ``depth + 1`` tensors ``[B, N_i, D]``, before the first block and after each.
        attentions: ``depth`` tensors ``[B, H, N_i, N_i]``, token size included.
    """

    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class Attention(nn.Module):
    """Multi-head self-attention whose keys may stand for several tokens."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def project(self, y: Tensor, num_queries: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q ``[B, H, Nq, Dh]`` of the first ``num_queries`` tokens (None: all) of ``y``, and k, v.

        They are slices of one buffer, in which the heads of a token lie next to each other.
        """
        batch, _, dim = y.shape

        def heads(t: Tensor, parts: int) -> tuple[Tensor, ...]:  # parts x [B, H, N, Dh]
            shape = (batch, t.shape[1], parts, self.num_heads, dim // self.num_heads)
            return t.view(shape).permute(2, 0, 3, 1, 4).unbind(0)

        if num_queries is None:
            q, k, v = heads(self.qkv(y), 3)
        else:
            (q,) = heads(linear_part(self.qkv, y[:, :num_queries], 0, dim), 1)
            k, v = heads(linear_part(self.qkv, y, dim, 3 * dim), 2)
        return q, k, v

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_size: Tensor | None,
        return_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The output ``[B, Nq, D]``, and if asked for the weights ``[B, H, Nq, N]``."""
        weights = None
        if return_weights:
            logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            if log_size is not None:
                logits = logits + log_size[:, None, None, :]
            weights = logits.softmax(dim=-1).to(v.dtype)
            out = weights @ v
        else:
            out = attention(q, k, v, log_size)
        return self.proj(out.transpose(1, 2).flatten(2)), weights


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.activation_fn = nn.GELU()  # a module, which fastast.optimize may fuse with fc1
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, y: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., D]``."""
        return self.fc2(self.activation_fn(self.fc1(y)))


class Residual(nn.Module):
    """Dropout, and stochastic depth by sample, on what a residual branch is about to add."""

    def __init__(self, dropout: float, drop_path: float) -> None:
        super().__init__()
        self.dropout, self.drop_path = dropout, drop_path

    def forward(self, branch: Tensor) -> Tensor:
        """``[B, N, D]`` to ``[B, N, D]``; the identity outside training."""
        if not self.training:
            return branch
        if self.dropout:
            branch = F.dropout(branch, self.dropout)
        if self.drop_path:
            keep = 1 - self.drop_path
            kept = torch.empty(branch.shape[0], 1, 1, device=branch.device).bernoulli_(keep)
            branch = branch * (kept / keep).to(branch.dtype)
        return branch


class Block(nn.Module):
    """One pre-norm transformer block, with the merge between its attention and its MLP."""

    def __init__(self, config: ASTConfig, drop_path: float) -> None:
        super().__init__()
        dim, eps = config.embed_dim, config.layer_norm_eps
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, config.num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, config.mlp_dim)
        self.residual = Residual(config.dropout, drop_path)

    @property
    def packed(self) -> bool:
        """Whether ``fastast.optimize`` packed a block of ours, no module replaced."""
        ours = type(self.attn) is Attention and type(self.mlp) is Mlp
        norms = type(self.norm1) is type(self.norm2) is nn.LayerNorm
        return ours and norms and isinstance(self.attn.qkv, InferenceLinear)

    def forward(
        self,
        x: Tensor,
        pending: Tensor | None,
        size: Tensor | None,
        log_size: Tensor | None,
        source: Tensor | None,
        tome: MergeSettings,
        r: int,
        num_queries: int | None,
        return_weights: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Run the block on the tokens ``x + pending``.

        Args:
            x: ``[B, N, D]``.
            pending: ``[B, N, D]``, what the block before has yet to add; None in the first.
            size: fp32 ``[B, N]``, original tokens behind each token; None while one each.
            log_size: its logarithm, or None.
            source: int32 ``[B, N0]``, where each original token is; None while in its place.
            tome: how to merge.
            r: how many tokens to merge.
            num_queries: only the first so many tokens are wanted of this (last) block; None: all.
            return_weights: also return the attention weights.

        Returns:
            ``x``, ``pending``, ``size``, ``log_size`` and ``source`` for the next block, and the
            weights.
        """
        n = x.shape[1]
        r = tome.merged(n, r)
        if pending is not None and num_queries is None and not return_weights:
            whole = run_whole(self, x, pending, size, log_size, tome, r)
            if whole is not None:
                return *whole, source, None
        x, y = add_layer_norm(x, pending, self.norm1.weight, self.norm1.bias, self.norm1.eps)
        q, k, v = self.attn.project(y, num_queries)
        # The last block's merge shortens the MLP of tokens that nobody reads when it is trimmed:
        # then only the trace wants to know.
        merging = r > 0 and num_queries is None
        matching = None
        if merging or (r > 0 and tome.trace):  # needs the keys only
            matching = Beside(lambda: tome.match_keys_sources(k, r, x), k.device)
        bias = log_size if tome.prop_attn else None
        out, weights = self.attn.attend(q, k, v, bias, return_weights)
        out = self.residual(out)
        norm = self.norm2.weight, self.norm2.bias, self.norm2.eps
        if matching is not None:
            assignment, sources = matching.result()
            source = compose(source, assignment) if tome.trace else None
        if merging:
            x, size, log_size, y = merge_add_layer_norm(
                x, out, assignment, n - r, size, *norm, return_log_size=True, sources=sources
            )
        else:
            x, y = add_layer_norm(x[:, :num_queries], out, *norm)
        return x, self.residual(self.mlp(y)), size, log_size, source, weights


class Head(nn.Module):
    """LayerNorm and linear layer."""

    def __init__(self, dim: int, num_classes: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.linear = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, D]`` to logits ``[B, num_classes]``."""
        return self.linear(self.norm(x))


def sine_positions(f_dim: int, t_dim: int, dim: int) -> Tensor:
    """Sines and cosines of a patch's frequency and time index, ``[f_dim * t_dim, dim]``."""
    quarter = dim // 4
    rates = 100.0 ** (-torch.arange(quarter) / max(quarter, 1))

    def waves(length: int) -> Tensor:
        angles = torch.arange(length)[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    frequency = waves(f_dim)[:, None].expand(-1, t_dim, -1)
    time = waves(t_dim)[None].expand(f_dim, -1, -1)
    positions = torch.cat([frequency, time], dim=-1).flatten(0, 1)
    return F.pad(positions, (0, dim - positions.shape[-1]))


class AST(nn.Module):
    """Audio Spectrogram Transformer: normalised log-mel features to logits.

    Example::

        model = fastast.AST(fastast.ASTConfig.tiny(num_classes=10, target_length=128))
        fastast.patch(model, r=8)                          # merge 8 tokens in every block
        logits = model(torch.randn(2, 128, 128))           # [batch, frames, mel bins] -> [2, 10]

    Attributes:
        config: dimensions, features and labels.
        tome: how a patched model merges; None for an unpatched one.
        gradient_checkpointing: recompute each block in the backward pass instead of keeping it.
    """

    def __init__(self, config: ASTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.tome: MergeSettings | None = None
        self._r: Schedule = 0
        self._schedule = (0,) * config.depth

        dim, patch = config.embed_dim, config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens, dim))
        self.patch_embed = nn.Conv2d(
            1, dim, patch, stride=(config.frequency_stride, config.time_stride)
        )
        rates = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.head = Head(dim, config.num_classes, config.head_layer_norm_eps)
        self._initialise()

    def _initialise(self) -> None:
        """Weights for training from scratch, where a small data set has to do.

        Unit gain in every product and positions that are different from the start. With DeiT's
        0.02 everywhere CLS begins as an average of patches that hardly know where they are, and a
        narrow model stayed near chance for thousands of clips (docs/performance-log.md).
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                fan_in = module.weight[0].numel()
                nn.init.trunc_normal_(module.weight, std=fan_in**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.head.linear.weight, std=0.02)
        for p in (self.cls_token, self.dist_token, self.pos_embed):
            nn.init.trunc_normal_(p, std=0.02)
        with torch.no_grad():
            positions = sine_positions(*self.config.grid, self.config.embed_dim)
            self.pos_embed[0, self.num_prefix_tokens :] = positions

    @staticmethod
    def from_pretrained(
        path: str | os.PathLike[str],
        *,
        num_classes: int | None = None,
        target_length: int | None = None,
        dtype: torch.dtype = torch.float32,
        **overrides: Any,
    ) -> AST:
        """A model in eval mode with weights from a folder, a file or a hub id.

        See :func:`fastast.checkpoints.load` for the formats, the arguments and the errors.
        """
        from fastast.checkpoints import load  # it needs this module

        return load(
            path, num_classes=num_classes, target_length=target_length, dtype=dtype, **overrides
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``model.safetensors`` and ``config.json`` into ``folder``."""
        from fastast.checkpoints import save_pretrained

        save_pretrained(self, folder)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the patches: CLS and DIST."""
        return self.config.num_prefix_tokens

    @property
    def r(self) -> Schedule:
        """Tokens merged in each block: an int, ``(r, inflect)`` or a list of one int a block."""
        return self._r

    @r.setter
    def r(self, value: Schedule) -> None:
        if self.tome is None:
            raise RuntimeError("r can be set on a patched model only: call fastast.patch(model)")
        self._schedule = parse_schedule(self.config.depth, value)
        self._r = list(value) if isinstance(value, list) else value

    def forward_features(self, features: Tensor) -> Tensor:
        """All tokens left after the last block, normalised: ``[B, N', D]``, CLS and DIST first.

        Args:
            features: ``[B, target_length, num_mel_bins]``.
        """
        x, pending, _, _ = self._encode(features, trimmed=False)
        return self._normalised(x, pending)

    def forward(
        self,
        features: Tensor,
        return_hidden_states: bool = False,
        return_attentions: bool = False,
    ) -> Tensor | ASTOutput:
        """Classify log-mel features.

        Args:
            features: normalised log-mel ``[B, target_length, num_mel_bins]``, on the model's
                device, any floating dtype.
            return_hidden_states: also return the tokens around every block.
            return_attentions: also return the attention weights, computed without a fused kernel.

        Returns:
            Logits ``[B, num_classes]``, or an :class:`ASTOutput` when more is asked for. The last
            block then runs on all tokens; otherwise on the two that the head reads.

        Raises:
            TypeError: ``features`` is not a floating tensor.
            ValueError: ``features`` has another shape or is on another device.
        """
        everything = return_hidden_states or return_attentions
        x, pending, hidden, weights = self._encode(
            features, not everything, return_hidden_states, return_attentions
        )
        prefix = self.config.num_prefix_tokens
        y = self._normalised(x[:, :prefix], pending[:, :prefix])
        logits = self.head((y[:, 0] + y[:, 1]) / 2)
        if not everything:
            return logits
        return ASTOutput(
            logits,
            tuple(hidden) if return_hidden_states else None,
            tuple(weights) if return_attentions else None,
        )

    def _normalised(self, x: Tensor, pending: Tensor) -> Tensor:
        return add_layer_norm(x, pending, self.norm.weight, self.norm.bias, self.norm.eps)[1]

    def _encode(
        self,
        features: Tensor,
        trimmed: bool,
        return_hidden_states: bool = False,
        return_attentions: bool = False,
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Embed and run all blocks: ``x``, ``pending``, hidden states and attention weights."""
        tome = PLAIN if self.tome is None else self.tome
        x = self._embed(features)
        batch, n, _ = x.shape
        pending: Any = None  # a tensor from the first block on
        size = log_size = source = None
        hidden: list[Tensor] = []
        weights: list[Tensor] = []
        for i, (block, r) in enumerate(zip(self.blocks, self._schedule, strict=True)):
            if return_hidden_states:
                hidden.append(x if pending is None else x + pending)
            last = trimmed and i == self.config.depth - 1
            queries = self.config.num_prefix_tokens if last else None
            state = x, pending, size, log_size, source, tome, r, queries, return_attentions
            if self.gradient_checkpointing and torch.is_grad_enabled():
                out = checkpoint(block, *state, use_reentrant=False)
            else:
                out = block(*state)
            x, pending, size, log_size, source, attended = out
            if return_attentions:
                weights.append(attended)
        if return_hidden_states:
            hidden.append(x + pending)
        if tome.trace:
            if source is None:
                source = torch.arange(n, dtype=torch.int32, device=x.device).repeat(batch, 1)
            tome.source = source
        return x, pending, hidden, weights

    def _embed(self, features: Tensor) -> Tensor:
        """Features ``[B, T, F]`` to tokens ``[B, 2 + f_dim * t_dim, D]``; patch f * t_dim + t."""
        c = self.config
        if not isinstance(features, Tensor) or not features.is_floating_point():
            kind = getattr(features, "dtype", type(features).__name__)
            raise TypeError(f"features must be a floating tensor, got {kind}")
        if features.dim() != 3 or tuple(features.shape[1:]) != (c.target_length, c.num_mel_bins):
            raise ValueError(
                f"features must be [batch, target_length={c.target_length}, "
                f"num_mel_bins={c.num_mel_bins}], got {list(features.shape)}"
            )
        if features.device != self.pos_embed.device:
            raise ValueError(
                f"features must be on the model's device, {self.pos_embed.device}, "
                f"got {features.device}"
            )
        # The convolution as a matrix product over patches: 2 ms for a ten-second clip in bf16 on a
        # CPU, where torch's takes 2 or 47, depending on where the allocator puts its operands.
        image = features.to(self.pos_embed.dtype).transpose(1, 2)  # [B, F, T]
        patches = image.unfold(1, c.patch_size, c.frequency_stride)
        patches = patches.unfold(2, c.patch_size, c.time_stride).flatten(3).flatten(1, 2)
        patches = F.linear(patches, self.patch_embed.weight.flatten(1), self.patch_embed.bias)
        batch = features.shape[0]
        prefix = (t.expand(batch, -1, -1) for t in (self.cls_token, self.dist_token))
        return torch.cat((*prefix, patches), dim=1) + self.pos_embed
