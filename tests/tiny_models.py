"""Models small enough to test with, and whose weights are large enough that tokens matter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fastast

GRID = {"num_mel_bins": 48, "target_length": 96}  # 4 x 9 patches, 38 tokens


def tiny_config(**fields: Any) -> fastast.ASTConfig:
    values = {"num_classes": 5, "embed_dim": 64, "depth": 3, "num_heads": 2, **GRID, **fields}
    return fastast.ASTConfig(**values)


def tiny_ast(seed: int = 0, **fields: Any) -> fastast.AST:
    torch.manual_seed(seed)
    return loud(fastast.AST(tiny_config(**fields))).eval()


def tiny_huggingface(seed: int = 0, with_head: bool = True, **fields: Any) -> Any:
    from transformers import ASTConfig, ASTForAudioClassification, ASTModel

    torch.manual_seed(seed)
    config = ASTConfig(
        **{
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "num_mel_bins": GRID["num_mel_bins"],
            "max_length": GRID["target_length"],
            "num_labels": 5,
            **fields,
        }
    )
    return loud((ASTForAudioClassification if with_head else ASTModel)(config)).eval()


def loud(model: nn.Module) -> nn.Module:
    """Weights and biases far from their small initial values, so that no path can hide."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def features(batch: int = 2, seed: int = 1, **grid: int) -> torch.Tensor:
    size = {**GRID, **grid}
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, size["target_length"], size["num_mel_bins"], generator=generator)


def relative(got: Tensor, truth: Tensor) -> float:
    """The error of ``got`` by norm, against an fp64 ``truth``."""
    return ((got.double() - truth).norm() / truth.norm()).item()
