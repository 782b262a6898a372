"""EfficientAT's MobileNets (Schmid, Koutini, Widmer, ICASSP 2023): MobileNetV3-Large on audio."""

from __future__ import annotations

import re
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from fastast.teachers.mel32k import Mel32k
from fastast.teachers.network import Network, NetworkConfig

__all__ = ["MobileNet"]

# MobileNetV3-Large (arXiv 1905.02244, table 1) at width 1: kernel, expanded and output channels,
# squeeze-and-excitation, hardswish, stride.
BLOCKS = (
    (3, 16, 16, False, False, 1),
    (3, 64, 24, False, False, 2),
    (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2),
    (5, 120, 40, True, False, 1),
    (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2),
    (3, 200, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 480, 112, True, True, 1),
    (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2),
    (5, 960, 160, True, True, 1),
    (5, 960, 160, True, True, 1),
)
STEM, HIDDEN = 16, 1280
DROPOUT = 0.2


def round_channels(channels: float) -> int:
    """The multiple of 8 nearest to `channels`, but never less than nine tenths of it."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def conv(
    channels: int, out: int, kernel: int, stride: int, groups: int, act: type[nn.Module] | None
) -> nn.Sequential:
    """Convolution without bias, BatchNorm and activation."""
    return nn.Sequential(
        nn.Conv2d(channels, out, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out, eps=1e-3, momentum=0.01),
        *([] if act is None else [act()]),
    )


class ChannelGate(nn.Module):
    """Squeeze and excitation: each channel scaled by a number in [0, 1] from all their means."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, f, t]` to `[B, C, f, t]`."""
        scale = self.fc2(F.relu(self.fc1(x.mean((2, 3))))).sigmoid()
        return x * scale[..., None, None]


class SqueezeExcitation(nn.Module):
    """EfficientAT's list of gates, of which its published models have one, over channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        gate = ChannelGate(channels, round_channels(channels / 4))
        self.conc_se_layers = nn.ModuleList([gate])

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, f, t]` to `[B, C, f, t]`."""
        return self.conc_se_layers[0](x)


class InvertedResidual(nn.Module):
    """Expand, filter each channel, gate, project; added to the input where shapes agree."""

    def __init__(
        self, channels: int, expanded: int, out: int, kernel: int, stride: int, gated: bool,
        act: type[nn.Module],
    ) -> None:  # fmt: skip
        super().__init__()
        self.skip = stride == 1 and channels == out
        layers: list[nn.Module] = []
        if expanded != channels:
            layers.append(conv(channels, expanded, 1, 1, 1, act))
        layers.append(conv(expanded, expanded, kernel, stride, expanded, act))
        if gated:
            layers.append(SqueezeExcitation(expanded))
        layers.append(conv(expanded, out, 1, 1, 1, None))
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, f, t]` to `[B, out, f / stride, t / stride]`."""
        return x + self.block(x) if self.skip else self.block(x)


class MobileNet(Network):
    """EfficientAT's `mnNN`: MobileNetV3-Large of width NN / 10 with one input channel.

    Names of parameters are those of the published checkpoints. Only mn04 was compared with one;
    other widths follow from MobileNetV3's rule of rounding.

    Args:
        config: `arch` is `"mnNN"`; `head` is `"linear"`, on the embedding, or `"mlp"`, the two
            layers with a hardswish between of the published models.

    Raises:
        ValueError: The architecture or its head is none of these.
    """

    heads: ClassVar[tuple[str, ...]] = ("linear", "mlp")

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        match = re.fullmatch(r"mn(\d\d)", config.arch)
        if match is None or match[1] == "00":
            raise ValueError(f"arch must be 'mn04', 'mn10' or alike, got {config.arch!r}")
        width = int(match[1]) / 10

        channels = round_channels(STEM * width)
        features: list[nn.Module] = [conv(1, channels, 3, 2, 1, nn.Hardswish)]
        for kernel, expanded, out, gated, hard, stride in BLOCKS:
            act: type[nn.Module] = nn.Hardswish if hard else nn.ReLU
            sizes = round_channels(expanded * width), round_channels(out * width)
            features.append(InvertedResidual(channels, *sizes, kernel, stride, gated, act))
            channels = sizes[1]
        features.append(conv(channels, 6 * channels, 1, 1, 1, nn.Hardswish))
        self.features = nn.Sequential(*features)
        self.embedding_dim = 6 * channels
        self.head_prefix = "classifier."
        self.classifier: nn.Module = nn.Linear(self.embedding_dim, config.num_classes)
        if config.head == "mlp":
            hidden = round_channels(HIDDEN * width)
            self.head_prefix = "classifier.5."
            self.classifier = nn.Sequential(
                nn.Identity(),  # the published models pool and flatten here
                nn.Identity(),
                nn.Linear(self.embedding_dim, hidden),
                nn.Hardswish(),
                nn.Dropout(DROPOUT),
                nn.Linear(hidden, config.num_classes),
            )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def front_end(self) -> Mel32k:
        """The 32 kHz front end with this config's length and normalisation."""
        return Mel32k(self.config.target_length, self.config.mean, self.config.std)

    def embed(self, features: Tensor) -> Tensor:
        """The last feature map's mean over frequency and time.

        Args:
            features: Normalised log-mel `[B, target_length, 128]`, any floating dtype.

        Returns:
            `[B, D]`, of the weights' dtype.

        Raises:
            TypeError: `features` is not a floating tensor.
            ValueError: `features` has another shape.
        """
        return self.features(self._image(features)).mean((2, 3))

    def forward(self, features: Tensor) -> Tensor:
        """Logits `[B, num_classes]` of features `[B, target_length, 128]`; see `embed`."""
        return self.classifier(self.embed(features))

    def _install(self, linear: nn.Linear) -> None:
        self.classifier, self.head_prefix = linear, "classifier."
