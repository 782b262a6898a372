"""What every teacher network has besides its layers: a config, a head, weights on disk."""

from __future__ import annotations

import json
import logging
import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastast.formats import (
    CONFIG,
    FORMAT_VERSION,
    WEIGHTS,
    CheckpointError,
    State,
    read_folder_weights,
    read_weights,
)

__all__ = ["MODEL_TYPE", "N_MELS", "Network", "NetworkConfig"]

MODEL_TYPE = "fastast_network"
N_MELS = 128  # of every front end here

logger = logging.getLogger("fastast")


@dataclass(frozen=True)
class NetworkConfig:
    """What a network is, and the features and labels it was made for.

    Attributes:
        arch: Name of the architecture; see `fastast.teachers.build`.
        num_classes: Size of the output.
        labels: Class names, `num_classes` of them or none.
        target_length: Frames of the features, 10 ms each.
        mean: Subtracted from the log-mel features in normalisation.
        std: Normalisation divides by twice this, whatever the network's paper does.
        head: The form of the head, one of the network's `heads`.
        sample_rate: Samples per second of the waveform that the front end takes.

    Raises:
        TypeError: A field has another type.
        ValueError: A field is out of its range.
    """

    arch: str
    num_classes: int
    labels: tuple[str, ...] = ()
    target_length: int = 1024
    mean: float = -4.5
    std: float = 2.5
    head: str = "linear"
    sample_rate: int = 16000

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))
        for name in ("arch", "head"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a string, got {getattr(self, name)!r}")
        for name in ("num_classes", "target_length"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not math.isfinite(value) or (name == "std" and value <= 0):
                wanted = "finite" if name == "mean" else "finite and more than 0"
                raise ValueError(f"{name} must be {wanted}, got {value}")
        if self.sample_rate != 16000:
            raise ValueError(f"sample_rate must be 16000, got {self.sample_rate!r}")
        if not all(isinstance(label, str) for label in self.labels):
            raise TypeError("labels must be strings")
        if self.labels and len(self.labels) != self.num_classes:
            raise ValueError(
                f"labels must be num_classes, {self.num_classes}, names or none, "
                f"got {len(self.labels)}"
            )


class Network(nn.Module):
    """A network over log-mel features that can teach: the base of all in this package.

    Subclasses define `embed`, `forward`, `front_end`, `_install`, and the attributes.

    Attributes:
        config: What the network is.
        heads: Forms of head it can have; the one that `set_linear_head` leaves comes first.
        head_prefix: What the names of the class-dependent parameters begin with.
        embedding_dim: Width of the embedding.
    """

    heads: ClassVar[tuple[str, ...]] = ("linear",)
    head_prefix: str = "head."
    embedding_dim: int

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        if config.head not in self.heads:
            raise ValueError(
                f"head of {config.arch!r} must be one of {', '.join(self.heads)}, "
                f"got {config.head!r}"
            )
        self.config = config

    def embed(self, features: Tensor) -> Tensor:
        """What the linear head reads, `[B, D]`, of normalised features `[B, T, n_mels]`."""
        raise NotImplementedError

    def front_end(self) -> Any:
        """The front end that makes this network's features, on the CPU."""
        raise NotImplementedError

    def _install(self, linear: nn.Linear) -> None:
        raise NotImplementedError

    def _adapted(self, state: State) -> State:
        """Weights from elsewhere under this network's names and in its shapes."""
        return state

    def _image(self, features: Tensor) -> Tensor:
        """Features `[B, T, n_mels]` as an image `[B, 1, n_mels, T]` of the weights' dtype."""
        wanted = (self.config.target_length, N_MELS)
        if not isinstance(features, Tensor) or not features.is_floating_point():
            kind = getattr(features, "dtype", type(features).__name__)
            raise TypeError(f"features must be a floating tensor, got {kind}")
        if features.dim() != 3 or tuple(features.shape[1:]) != wanted:
            raise ValueError(
                f"features must be [batch, target_length={wanted[0]}, n_mels={wanted[1]}], "
                f"got {list(features.shape)}"
            )
        return features.to(next(self.parameters()).dtype).transpose(1, 2)[:, None]

    def set_linear_head(self, weight: Tensor, bias: Tensor, labels: tuple[str, ...] = ()) -> None:
        """Replace the head by a linear layer on `embed`, such as `probe.fit_linear` gives.

        Args:
            weight: `[num_classes, D]`.
            bias: `[num_classes]`.
            labels: Class names, or none.

        Raises:
            ValueError: The shapes do not fit each other, the embedding or the labels.
        """
        width = self.embedding_dim
        if weight.dim() != 2 or weight.shape[1] != width:
            raise ValueError(
                f"weight must be [classes, {width}], the width of this network's embedding, "
                f"got {list(weight.shape)}"
            )
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be [{len(weight)}] as weight, got {list(bias.shape)}")
        config = replace(
            self.config, num_classes=len(weight), labels=tuple(labels), head=self.heads[0]
        )
        like = next(self.parameters())
        linear = nn.Linear(width, len(weight), device=like.device, dtype=like.dtype)
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        linear.train(self.training)
        self._install(linear)
        self.config = config

    def load_weights(self, path: str | os.PathLike[str]) -> None:
        """Read weights of this architecture from a file or folder.

        Where only the head has another number of classes, or is not there, it keeps its random
        weights (logged). BatchNorm's counters may be left out.

        Args:
            path: A `.safetensors` file, a `.pt` or `.pth` state dict (read with
                `weights_only=True`), or a folder with one.

        Raises:
            CheckpointError: Nothing is there, it cannot be read, or it is of another network.
        """
        place = Path(path).expanduser()
        if place.is_dir():
            state = read_folder_weights(place)
        elif place.is_file():
            state = read_weights(place)
        else:
            raise CheckpointError(f"{path} does not exist: expected a file or folder of weights")
        state = {name.removeprefix("module."): value for name, value in state.items()}
        self._load(self._adapted(state), path, fresh_head=True)

    def _load(self, state: State, path: object, fresh_head: bool) -> None:
        wanted = self.state_dict()
        needed = {name for name in wanted if not name.endswith("num_batches_tracked")}
        misfits = {
            name for name in needed if name not in state or state[name].shape != wanted[name].shape
        }
        unexpected = state.keys() - wanted.keys()
        head = {name for name in misfits if name.startswith(self.head_prefix)}
        if fresh_head and head:
            misfits -= head
            state = {name: value for name, value in state.items() if name not in head}
        if misfits or unexpected:
            raise CheckpointError(
                f"{path} does not hold the weights of {self.config.arch!r}: "
                f"{_differences(misfits, unexpected, state, wanted)}"
            )
        if head:
            classes = self.config.num_classes
            logger.warning("%s: new head with random weights, %d classes", path, classes)
        self.load_state_dict(state, strict=False)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `model.safetensors` and `config.json` (both replaced at once) into `folder`.

        Args:
            folder: Made if it does not exist; `fastast.teachers.load` reads it.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        values: dict[str, Any] = {"model_type": MODEL_TYPE, "format_version": FORMAT_VERSION}
        values |= asdict(self.config)
        state = {
            name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()
        }
        # A killed process leaves the old files or the new ones, never half of one.
        save_file(state, folder / f".{WEIGHTS}", metadata={"format": "pt"})
        text = json.dumps(values, indent=2) + "\n"
        (folder / f".{CONFIG}").write_text(text, encoding="utf-8")
        for name in (WEIGHTS, CONFIG):
            os.replace(folder / f".{name}", folder / name)


def _differences(misfits: set[str], unexpected: set[str], state: State, wanted: State) -> str:
    missing = misfits - state.keys()
    shapes = [
        f"{name} {list(state[name].shape)} for {list(wanted[name].shape)}"
        for name in misfits & state.keys()
    ]
    parts = (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes))
    return "; ".join(f"{what} {_listed(list(names))}" for what, names in parts if names)


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + rest
