"""CNNs and ViTs of timm as teachers: CMKD's mean-pooled CNN, PSLA's attention head, any ViT."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fastast.features import Fbank
from fastast.formats import CheckpointError, State
from fastast.teachers.network import N_MELS, Network, NetworkConfig

__all__ = ["PSLAHead", "TimmNetwork"]

PSLA_HEADS = 4
PROBABILITY_EPS = 1e-7


class PSLAHead(nn.Module):
    """PSLA's attention pooling over time (arXiv 2102.01243), as logits.

    Each head gives every moment a probability of every class and a weight,

        p = sum_h w_h sum_t a_ht c_ht / sum_t a_ht,   a = sigmoid(att_h(x)), c = sigmoid(cla_h(x)),

    and the network's output is `p` itself, which is a probability, though not kept below 1: `w`
    is learnt. Losses here take logits, so `logit(p)` is returned, of `p` clamped to
    `[1e-7, 1 - 1e-7]`: its sigmoid is PSLA's output.

    Args:
        channels: Of the feature map.
        num_classes: Size of the output.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.att = nn.ModuleList(nn.Conv2d(channels, num_classes, 1) for _ in range(PSLA_HEADS))
        self.cla = nn.ModuleList(nn.Conv2d(channels, num_classes, 1) for _ in range(PSLA_HEADS))
        self.head_weight = nn.Parameter(torch.full((PSLA_HEADS,), 1 / PSLA_HEADS))

    def forward(self, feature_map: Tensor) -> Tensor:
        """`[B, C, f, t]` to logits `[B, num_classes]`, float32 or wider."""
        x = feature_map.mean(2, keepdim=True)
        probability: Any = 0
        for att, cla, weight in zip(self.att, self.cla, self.head_weight, strict=True):
            # In half precision the clamps below would change nothing.
            attention, classes = (_at_least_float(layer(x)[:, :, 0]) for layer in (att, cla))
            attention = attention.sigmoid().clamp(PROBABILITY_EPS, 1 - PROBABILITY_EPS)
            attention = attention / attention.sum(2, keepdim=True)
            probability = probability + weight * (attention * classes.sigmoid()).sum(2)
        return torch.logit(probability, eps=PROBABILITY_EPS)


def _at_least_float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class TimmNetwork(Network):
    """A timm model on one channel of AST's log-mel features, with a head for audio.

    The head `"mean"` is a linear layer on timm's own pooling: for a CNN the mean over frequency
    and time, which is CMKD's, for a ViT the token or mean it was made for. `"psla"` is
    `PSLAHead` on the feature map of a CNN.

    Args:
        config: `arch` is `"timm:NAME"`, or `"efficientnet_b2"`, perhaps with `"_psla"` after it.
        pretrained: Have timm fetch its weights. The three colours of the first convolution are
            averaged, as CMKD does.

    Raises:
        CheckpointError: timm did not get the weights.
        ImportError: timm is not installed.
        ValueError: timm has no such model, or `"psla"` is asked of one without a feature map.
    """

    heads: ClassVar[tuple[str, ...]] = ("mean", "psla")

    def __init__(self, config: NetworkConfig, pretrained: bool = False) -> None:
        super().__init__(config)
        self.backbone = _create(config, pretrained)
        backbone = cast(Any, self.backbone)
        classes = config.num_classes
        self.embedding_dim = int(getattr(backbone, "head_hidden_size", backbone.num_features))
        self.head: nn.Module = nn.Linear(self.embedding_dim, classes)
        if config.head == "psla":
            self.embedding_dim = int(backbone.num_features)
            self._check_feature_map()
            self.head = PSLAHead(self.embedding_dim, classes)

    @torch.no_grad()
    def _check_feature_map(self) -> None:
        image = torch.zeros(1, 1, N_MELS, self.config.target_length)
        self.backbone.eval()
        shape = tuple(self._feature_map(image).shape)
        self.backbone.train()
        if len(shape) != 4 or shape[1] != self.embedding_dim:
            raise ValueError(
                f"arch {self.config.arch!r} cannot have the head 'psla', which needs a CNN's "
                f"feature map [B, C, f, t]: its features are {list(shape)}"
            )

    def _feature_map(self, image: Tensor) -> Tensor:
        return cast(Any, self.backbone).forward_features(image)

    def front_end(self) -> Fbank:
        """AST's filterbank with this config's length and normalisation."""
        config = self.config
        return Fbank(
            n_mels=N_MELS, target_length=config.target_length, mean=config.mean, std=config.std
        )

    def embed(self, features: Tensor) -> Tensor:
        """timm's pooled features; with PSLA's head, the feature map's mean.

        Args:
            features: Normalised log-mel `[B, target_length, 128]`, any floating dtype.

        Returns:
            `[B, D]`, of the weights' dtype.

        Raises:
            TypeError: `features` is not a floating tensor.
            ValueError: `features` has another shape.
        """
        image = self._image(features)
        if self.config.head == "psla":
            return self._feature_map(image).mean((2, 3))
        return self.backbone(image)

    def forward(self, features: Tensor) -> Tensor:
        """Logits `[B, num_classes]` of features `[B, target_length, 128]`; see `embed`."""
        if self.config.head == "psla":
            return self.head(self._feature_map(self._image(features)))
        return self.head(self.embed(features))

    def _install(self, linear: nn.Linear) -> None:
        self.head = linear

    def _adapted(self, state: State) -> State:
        """Also a file of timm's: no prefix, its own classifier, three colours."""
        if any(name.startswith("backbone.") for name in state):
            return state
        unused = tuple(f"{name}." for name in _names(self.backbone, "classifier"))
        state = {f"backbone.{k}": v for k, v in state.items() if not k.startswith(unused)}
        for name in _names(self.backbone, "first_conv"):
            weight = state.get(f"backbone.{name}.weight")
            if weight is not None and weight.dim() == 4 and weight.shape[1] == 3:
                state[f"backbone.{name}.weight"] = weight.mean(1, keepdim=True)
        return state


def _names(backbone: nn.Module, what: str) -> tuple[str, ...]:
    """Module names of timm's default config: of the classifier or of the first convolution."""
    value = cast(Any, backbone).pretrained_cfg.get(what) or ()
    return (value,) if isinstance(value, str) else tuple(value)


def _create(config: NetworkConfig, pretrained: bool) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise ImportError(f'arch {config.arch!r} needs timm: pip install "fastast[timm]"') from None
    name = config.arch.removeprefix("timm:").removesuffix("_psla")
    if not timm.is_model(name.split(".")[0]):
        raise ValueError(
            f"arch {config.arch!r} is no model of timm {timm.__version__}: see timm.list_models()"
        )

    def create(**options: Any) -> nn.Module:
        return timm.create_model(name, pretrained=pretrained, in_chans=1, num_classes=0, **options)

    try:
        try:
            backbone = create(img_size=(N_MELS, config.target_length))
        except TypeError:  # a CNN, which takes images of any size
            backbone = create()
    except Exception as error:
        if not pretrained:
            raise
        raise CheckpointError(
            f"timm did not get the weights of {name!r}: {type(error).__name__}: {error}"
        ) from error
    if pretrained:
        for conv in _names(backbone, "first_conv"):  # timm added the colours up
            cast(Any, backbone.get_submodule(conv)).weight.data.div_(3)
    return backbone
