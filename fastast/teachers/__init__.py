"""Teacher networks for cross-model knowledge distillation (CMKD), each with its own front end.

A *network* has a frozen `config`, `forward(features) -> logits`, `embed(features) -> [B, D]`,
`front_end()` and `save_pretrained(folder)`; an AST is as good a teacher. Architectures:

- `mnNN`: EfficientAT's MobileNets at 32 kHz, `mn04` (1 M parameters) to `mn40`.
- `passt`: PaSST-S at 32 kHz; needs hear21passt.
- `efficientnet_b2`: CMKD's CNN, with mean pooling; `efficientnet_b2_psla`: PSLA's, with attention.
- `timm:NAME`: any CNN or ViT of timm; `timm:NAME_psla` for a CNN with PSLA's attention.
"""

from __future__ import annotations

import os
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from fastast.evaluate import front_end
from fastast.features import FrontEnd
from fastast.formats import (
    CONFIG,
    FORMAT_VERSION,
    CheckpointError,
    read_folder_weights,
    read_json,
    read_weights,
)
from fastast.model import AST
from fastast.teachers.mel32k import Mel32k
from fastast.teachers.mobilenet import MobileNet
from fastast.teachers.network import MODEL_TYPE, Network, NetworkConfig
from fastast.teachers.passt import PaSST
from fastast.teachers.timm_network import TimmNetwork

__all__ = [
    "FrontEnd",
    "Mel32k",
    "MobileNet",
    "Network",
    "NetworkConfig",
    "PaSST",
    "TimmNetwork",
    "build",
    "front_end_of",
    "load",
]

# By a pattern of the name: the class, and what its paper or models take by default.
# PSLA divides by its std of 4.5699, a front end by twice what it is given.
ARCHITECTURES: tuple[tuple[str, type[Network], dict[str, Any]], ...] = (
    (r"mn\d\d", MobileNet, {"target_length": 1000, "head": "mlp"}),
    (r"passt", PaSST, {"target_length": 998}),
    (
        r"efficientnet_b2(_psla)?",
        TimmNetwork,
        {"target_length": 1056, "mean": -4.6476, "std": 4.5699 / 2},
    ),
    (
        r"timm:.+",
        TimmNetwork,
        {"target_length": 1024, "mean": -4.2677393, "std": 4.5689974},
    ),
)
PRETRAINED = "pretrained"


def _architecture(arch: str) -> tuple[type[Network], dict[str, Any]]:
    for pattern, network, defaults in ARCHITECTURES:
        if re.fullmatch(pattern, arch):
            if network is TimmNetwork:
                head = "psla" if arch.endswith("_psla") else "mean"
                return network, {**defaults, "head": head}
            return network, defaults
    raise ValueError(
        "arch must be mn04 (or another width: mn10, ...), passt, efficientnet_b2, "
        f"efficientnet_b2_psla, timm:NAME or timm:NAME_psla, got {arch!r}"
    )


def build(
    arch: str,
    num_classes: int,
    labels: tuple[str, ...] = (),
    target_length: int | None = None,
    mean: float | None = None,
    std: float | None = None,
    weights: str | os.PathLike[str] = "",
) -> Network:
    """A teacher network in eval mode, with random weights or those of a file.

    Args:
        arch: Name of the architecture; see the package.
        num_classes: Size of the output. With other weights than of so many classes, the last
            layer keeps its random weights (logged); `fastast.probe.fit_head` fits one.
        labels: Class names, `num_classes` of them or none.
        target_length: Frames of the features, 10 ms each; by default what the network was
            published with: 1000 for mnNN, 998 for passt (its most), 1056 for efficientnet_b2,
            1024 for others.
        mean: Subtracted in normalisation; by default the published one.
        std: Normalisation divides by twice this; by default the published one, for
            efficientnet_b2 half of PSLA's 4.5699, which divides by it once.
        weights: A file or folder with the weights of this architecture (`Network.load_weights`);
            `"pretrained"` has timm fetch its own, ImageNet's; empty for random ones.

    Raises:
        CheckpointError: The weights cannot be read, or are of another network.
        ImportError: The architecture needs a package that is not installed; says which.
        TypeError: An argument has another type.
        ValueError: No such architecture, or an argument is out of its range.
    """
    kind, values = _architecture(arch)
    asked = {"target_length": target_length, "mean": mean, "std": std}
    values = values | {name: value for name, value in asked.items() if value is not None}
    config = NetworkConfig(arch, num_classes, tuple(labels), **values)
    if str(weights) == PRETRAINED:
        if kind is not TimmNetwork:
            raise ValueError(f"weights must be a file or folder for {arch!r}, got {weights!r}")
        return TimmNetwork(config, pretrained=True).eval()
    network = kind(config)
    if str(weights):
        network.load_weights(weights)
    return network.eval()


def load(path: str | os.PathLike[str], target_length: int | None = None) -> Network | AST:
    """A trained network or AST, in eval mode.

    Args:
        path: A folder of `save_pretrained` (or its `model.safetensors`) of a network, or anything
            that `AST.from_pretrained` takes.
        target_length: Frames of the features, where not what it was saved with: CNNs take any,
            an AST's position embeddings are adapted.

    Raises:
        CheckpointError: Nothing is there, it cannot be read, or it is of neither.
        ImportError: The architecture needs a package that is not installed; says which.
    """
    place = Path(path).expanduser()
    folder = place if place.is_dir() else place.parent
    if not (place.exists() and (folder / CONFIG).is_file()):
        return AST.from_pretrained(path, target_length=target_length)
    values = read_json(folder / CONFIG)
    if values.pop("model_type", None) != MODEL_TYPE:
        return AST.from_pretrained(path, target_length=target_length)
    version = values.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / CONFIG} has format_version {version!r}; this FastAST reads {FORMAT_VERSION}"
        )
    if unknown := values.keys() - {field.name for field in fields(NetworkConfig)}:
        raise CheckpointError(f"{folder / CONFIG} has unknown fields: {', '.join(sorted(unknown))}")
    try:
        config = NetworkConfig(**values)
        if target_length is not None:
            config = replace(config, target_length=target_length)
        network = _architecture(config.arch)[0](config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    state = read_folder_weights(place) if place.is_dir() else read_weights(place)
    network._load(state, path, fresh_head=False)
    return network.eval()


def front_end_of(model: nn.Module) -> FrontEnd:
    """The front end that makes a network's or an AST's features, on the CPU.

    Raises:
        TypeError: `model` is neither.
    """
    if isinstance(model, AST):
        return front_end(model.config)
    if isinstance(model, Network):
        return model.front_end()
    raise TypeError(f"model must be an AST or a teacher network, got {type(model).__name__}")
