"""Cross-model knowledge distillation: the loss of CMKD (arXiv 2203.06760) and FastAST, equation 1.

A student learns from the labels and from the answers of a frozen teacher of another kind, a CNN or
another transformer, that hears the same augmented clip (`fastast.augment`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from fastast.augment import Augment, Draws
    from fastast.data import AudioDataset
    from fastast.features import FrontEnd

__all__ = ["Teacher", "class_order", "cmkd_loss"]


def cmkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    lam: float = 0.1,
    tau: float = 1.0,
    multi_label: bool = False,
) -> Tensor:
    """`lam * Loss_g(psi(Z_s), y) + (1 - lam) * Loss_d(psi(Z_s), psi(Z_t / tau))`, equation 1.

    One class a clip: psi is softmax, Loss_g the cross-entropy and Loss_d the Kullback-Leibler
    divergence `sum_c p_t log(p_t / p_s)`, both averaged over clips. Several: psi is sigmoid, Loss_g
    the binary cross-entropy and Loss_d the divergence of Bernoulli distributions, both averaged
    over clips and classes. `lam` weighs the labels (FastAST's best is 0.1, CMKD's 0.5); `tau` makes
    the teacher's answers softer, and neither the student's nor, by `tau**2`, the loss larger. The
    teacher gets no gradient.

    Args:
        student_logits: `[B, classes]`, any floating dtype; computed in fp32, fp64 for fp64.
        teacher_logits: `[B, classes]`.
        target: int64 class indices `[B]`, or floating-point rows `[B, classes]`: probabilities
            that add up to 1 (mixup) for one class a clip, each in [0, 1] for several.
        lam: Weight of the labels in [0, 1].
        tau: Temperature of the teacher's logits, more than 0.
        multi_label: Several classes a clip.

    Returns:
        A scalar.

    Raises:
        ValueError: Shapes do not fit, or `lam` or `tau` is out of its range.
    """
    if student_logits.dim() != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "student_logits and teacher_logits must both be [B, classes], not "
            f"{list(student_logits.shape)} and {list(teacher_logits.shape)}"
        )
    batch, classes = student_logits.shape
    rows = target.is_floating_point()
    if target.shape != ((batch, classes) if rows else (batch,)) or (multi_label and not rows):
        allowed = f"floating-point [{batch}, {classes}]"
        if not multi_label:
            allowed = f"class indices [{batch}] or {allowed}"
        raise ValueError(f"target must be {allowed}, not {target.dtype} {list(target.shape)}")
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must be in [0, 1], not {lam}")
    if not tau > 0:
        raise ValueError(f"tau must be more than 0, not {tau}")
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student = student_logits.to(dtype)
    teacher = teacher_logits.detach().to(dtype) / tau
    if rows:
        target = target.to(dtype)
    if multi_label:
        ground = F.binary_cross_entropy_with_logits(student, target)
        share = teacher.sigmoid()
        divergence = (
            share * (F.logsigmoid(teacher) - F.logsigmoid(student))
            + (1 - share) * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
        ).mean()
    else:
        ground = F.cross_entropy(student, target)
        divergence = F.kl_div(
            student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True
        )
    return lam * ground + (1 - lam) * divergence


def class_order(student: Sequence[str], teacher: Sequence[str]) -> list[int]:
    """Where each of the student's classes is among the teacher's.

    Raises:
        ValueError: The teacher knows other classes.
    """
    places = {name: i for i, name in enumerate(teacher)}
    missing = [name for name in student if name not in places]
    extra = [name for name in teacher if name not in set(student)]
    if missing or extra:

        def listed(names: list[str]) -> str:
            return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")

        what = [f"does not know {listed(missing)}"] * bool(missing)
        what += [f"also knows {listed(extra)}"] * bool(extra)
        raise ValueError(
            f"teacher and student must have the same classes: the teacher has {len(teacher)}, the "
            f"data {len(student)}; it {' and '.join(what)}"
        )
    return [places[name] for name in student]


class Teacher:
    """A frozen network that answers for the clips of a batch, through its own front end.

    It is in eval mode and computes no gradients. Where nothing is augmented a clip's logits are
    computed once and kept.

    Args:
        path: What `fastast.teachers.load` takes: a saved network or an AST.
        dataset: The clips of the training; its labels must be the teacher's classes, in any order.
        device: Where to compute.

    Raises:
        CheckpointError: There is no network at `path`.
        ValueError: It has other classes than the data, or no names for them.
    """

    def __init__(self, path: str, dataset: AudioDataset, device: torch.device) -> None:
        from fastast import teachers

        self.network = teachers.load(path).to(device).eval().requires_grad_(False)
        self.front_end = teachers.front_end_of(self.network).to(device)
        config: Any = self.network.config
        if not config.labels:
            raise ValueError(f"teacher {path} does not name its classes: it cannot be told apart")
        self.order = class_order(dataset.labels, config.labels)
        self.known = torch.zeros(len(dataset), dtype=torch.bool)
        self.logits = torch.zeros(len(dataset), len(self.order))

    @torch.no_grad()
    def __call__(
        self,
        clips: Tensor,
        waveform: Tensor,
        lengths: Tensor,
        draws: Draws,
        augment: Augment,
        reference: FrontEnd,
    ) -> Tensor:
        """Logits fp32 `[B, classes]` in the order of the data's labels.

        Args:
            clips: Indices in the data set, `[B]`.
            waveform: Their audio as the student hears it, `[B, S]`.
            lengths: Valid samples, `[B]`.
            draws: What was drawn for them.
            augment: What else is done to the student's features.
            reference: The student's front end.
        """
        if augment.off and self.known[clips].all():
            return self.logits[clips].to(waveform.device)
        features = augment.features(waveform, lengths, draws, self.front_end, reference)
        logits: Tensor = self.network(features).float()[:, self.order]
        if augment.off:
            self.logits[clips] = logits.cpu()
            self.known[clips] = True
        return logits
