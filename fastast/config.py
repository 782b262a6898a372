"""Dimensions of an Audio Spectrogram Transformer, and the features and labels it was made for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class ASTConfig:
    """Dimensions of an AST, and the features and labels it was made for.

    Attributes:
        num_classes: size of the output.
        embed_dim: width of a token.
        depth: number of blocks.
        num_heads: attention heads; ``embed_dim`` is a multiple of it.
        mlp_ratio: width of the MLP over ``embed_dim``.
        patch_size: side of a patch, in mel bins and in frames.
        frequency_stride: step between patches, in mel bins.
        time_stride: step between patches, in frames.
        num_mel_bins: mel bins of the features.
        target_length: frames of the features, 10 ms each.
        layer_norm_eps: epsilon of the blocks' and the final LayerNorm.
        head_layer_norm_eps: epsilon of the head's LayerNorm.
        dropout: after the attention projection and after the MLP.
        drop_path: stochastic depth of the last block, rising linearly from 0 in the first.
        labels: class names, ``num_classes`` of them or none.
        sample_rate: samples per second of the waveform the features are made from.
        mean: mean of the log-mel features, subtracted in normalisation.
        std: their standard deviation; normalisation divides by twice this.

    Raises:
        TypeError: a field has another type.
        ValueError: a field is out of its range, or the fields do not fit together.
    """

    num_classes: int = 527
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    patch_size: int = 16
    frequency_stride: int = 10
    time_stride: int = 10
    num_mel_bins: int = 128
    target_length: int = 1024
    layer_norm_eps: float = 1e-6
    head_layer_norm_eps: float = 1e-5
    dropout: float = 0.0
    drop_path: float = 0.0
    labels: tuple[str, ...] = ()
    sample_rate: int = 16000
    mean: float = -4.2677393
    std: float = 4.5689974

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == "int":
                if isinstance(value, bool) or not isinstance(value, int):
                    raise TypeError(f"{f.name} must be an int, got {value!r}")
                if value < 1:
                    raise ValueError(f"{f.name} must be 1 or more, got {value}")
            elif f.type == "float":
                if isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise TypeError(f"{f.name} must be a number, got {value!r}")
                if f.name != "mean" and not 0 <= value < float("inf"):
                    raise ValueError(f"{f.name} must be finite and 0 or more, got {value}")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads, got {self.embed_dim} and "
                f"{self.num_heads}"
            )
        if self.mlp_dim < 1:
            raise ValueError(f"mlp_ratio must leave an MLP, got {self.mlp_ratio}")
        for name in ("num_mel_bins", "target_length"):
            if getattr(self, name) < self.patch_size:
                raise ValueError(
                    f"{name} must be at least patch_size, {self.patch_size}, "
                    f"got {getattr(self, name)}"
                )
        for name in ("dropout", "drop_path"):
            if not getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.std == 0:
            raise ValueError("std must be more than 0")
        if not all(isinstance(label, str) for label in self.labels):
            raise TypeError("labels must be strings")
        if self.labels and len(self.labels) != self.num_classes:
            raise ValueError(
                f"labels must be num_classes, {self.num_classes}, names or none, "
                f"got {len(self.labels)}"
            )

    @classmethod
    def tiny(cls, **fields: Any) -> ASTConfig:
        """AST-Tiny: 192 wide, 3 heads; any field may be given."""
        return cls(**{"embed_dim": 192, "num_heads": 3, **fields})

    @classmethod
    def small(cls, **fields: Any) -> ASTConfig:
        """AST-Small: 384 wide, 6 heads; any field may be given."""
        return cls(**{"embed_dim": 384, "num_heads": 6, **fields})

    @classmethod
    def base(cls, **fields: Any) -> ASTConfig:
        """AST-Base, the published size: 768 wide, 12 heads; any field may be given."""
        return cls(**fields)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along frequency and along time, ``(f_dim, t_dim)``."""
        return (
            (self.num_mel_bins - self.patch_size) // self.frequency_stride + 1,
            (self.target_length - self.patch_size) // self.time_stride + 1,
        )

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the patches: CLS and DIST."""
        return 2

    @property
    def num_tokens(self) -> int:
        """Tokens in front of the first block, CLS and DIST included."""
        f_dim, t_dim = self.grid
        return f_dim * t_dim + self.num_prefix_tokens

    @property
    def mlp_dim(self) -> int:
        """Width of the MLP."""
        return round(self.embed_dim * self.mlp_ratio)
