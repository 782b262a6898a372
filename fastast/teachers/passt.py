"""PaSST (Koutini et al., Interspeech 2022, arXiv 2110.05069) through the package hear21passt."""

from __future__ import annotations

import contextlib
import io
from typing import Any, cast

from torch import Tensor, nn

from fastast.formats import State
from fastast.teachers.mel32k import Mel32k
from fastast.teachers.network import N_MELS, Network, NetworkConfig

__all__ = ["PaSST"]

ARCHITECTURE = "passt_s_swa_p16_128_ap476"  # one of several names for the same network
LONGEST = 998  # frames that its positions reach


class PaSST(Network):
    """PaSST-S: patches of 16, strides of 10, ten seconds, no patchout.

    The architecture is hear21passt's, which nothing of ours repeats; its own download of weights
    is not used. `load_weights` takes the state dicts it publishes, all of PaSST-S with stride 10
    (`passt-s-f128-p16-s10-ap.476-swa.pt`, the `kd` one, FSD50K's, ...). Shorter clips use the
    first of the positions in time.

    Args:
        config: `arch` is `"passt"`, `target_length` at most 998.

    Raises:
        ImportError: hear21passt or timm is not installed.
        ValueError: `target_length` is too long or no patch.
    """

    head_prefix = "net.head.1."

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        if not 16 <= config.target_length <= LONGEST:
            raise ValueError(
                f"target_length of 'passt' must be from 16 to {LONGEST}, got {config.target_length}"
            )
        try:
            from hear21passt.models import passt
        except ImportError as error:
            raise ImportError(
                f"arch 'passt' needs hear21passt and timm: pip install hear21passt timm ({error})"
            ) from None
        passt.first_RUN = False  # or its first forward prints every shape
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the whole network
            net: Any = passt.get_model(
                ARCHITECTURE, pretrained=False, n_classes=config.num_classes, input_tdim=LONGEST
            )
        net.head_dist = None  # never read: the head is over the mean of both tokens
        net.patch_embed.img_size = (N_MELS, config.target_length)  # or it warns in every forward
        self.net: nn.Module = net
        self.embedding_dim = int(net.embed_dim)

    def front_end(self) -> Mel32k:
        """The 32 kHz front end with this config's length and normalisation."""
        return Mel32k(self.config.target_length, self.config.mean, self.config.std)

    def embed(self, features: Tensor) -> Tensor:
        """The mean of the CLS and DIST tokens after the head's LayerNorm.

        Args:
            features: Normalised log-mel `[B, target_length, 128]`, any floating dtype.

        Returns:
            `[B, 768]`, of the weights' dtype.

        Raises:
            TypeError: `features` is not a floating tensor.
            ValueError: `features` has another shape.
        """
        net = cast(Any, self.net)
        cls, dist = net.forward_features(self._image(features))
        return net.head[0]((cls + dist) / 2)

    def forward(self, features: Tensor) -> Tensor:
        """Logits `[B, num_classes]` of features `[B, target_length, 128]`; see `embed`."""
        return cast(Any, self.net).head[1](self.embed(features))

    def _install(self, linear: nn.Linear) -> None:
        cast(Any, self.net).head[1] = linear

    def _adapted(self, state: State) -> State:
        """Also hear21passt's own names, without the head that is not read."""
        state = {k if k.startswith("net.") else f"net.{k}": v for k, v in state.items()}
        return {k: v for k, v in state.items() if not k.startswith("net.head_dist.")}
