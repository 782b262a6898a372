from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import fastast
from fastast.distill import class_order, cmkd_loss

STUDENT = torch.tensor([[1.0, 0.0, -1.0], [0.5, 0.5, 2.0]], dtype=torch.float64)
TEACHER = torch.tensor([[2.0, 0.0, 0.0], [0.0, -1.0, 1.0]], dtype=torch.float64)


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(v) for v in row]
    return [p / sum(powers) for p in powers]


def sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v))


@pytest.mark.parametrize(("lam", "tau"), [(0.1, 1.0), (0.5, 2.0), (0.0, 1.0), (1.0, 1.0)])
def test_single_label_by_hand(lam: float, tau: float) -> None:
    labels = [0, 2]
    ground = divergence = 0.0
    for s, t, y in zip(STUDENT.tolist(), TEACHER.tolist(), labels, strict=True):
        p_s, p_t = softmax(s), softmax([v / tau for v in t])
        ground -= math.log(p_s[y]) / 2
        divergence += sum(a * math.log(a / b) for a, b in zip(p_t, p_s, strict=True)) / 2
    loss = cmkd_loss(STUDENT, TEACHER, torch.tensor(labels), lam, tau)
    assert loss.item() == pytest.approx(lam * ground + (1 - lam) * divergence, rel=1e-12)
    rows = cmkd_loss(STUDENT, TEACHER, F.one_hot(torch.tensor(labels)).double(), lam, tau)
    assert rows.item() == pytest.approx(loss.item(), rel=1e-12)


@pytest.mark.parametrize(("lam", "tau"), [(0.1, 1.0), (0.5, 2.0)])
def test_multi_label_by_hand(lam: float, tau: float) -> None:
    target = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    ground = divergence = 0.0
    for s, t, y in zip(
        STUDENT.flatten().tolist(),
        TEACHER.flatten().tolist(),
        target.flatten().tolist(),
        strict=True,
    ):
        p, q = sigmoid(s), sigmoid(t / tau)
        ground -= (y * math.log(p) + (1 - y) * math.log(1 - p)) / 6
        divergence += (q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))) / 6
    loss = cmkd_loss(STUDENT, TEACHER, target, lam, tau, multi_label=True)
    assert loss.item() == pytest.approx(lam * ground + (1 - lam) * divergence, rel=1e-12)


def test_gradients_by_hand() -> None:
    """d loss / d Z_s = psi(Z_s) less the mixture of labels and teacher, a share a clip or value."""
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    target = torch.tensor([0, 2])
    cmkd_loss(student, teacher, target, 0.3, 2.0).backward()
    wanted = 0.3 * F.one_hot(target) + 0.7 * (TEACHER / 2).softmax(1)
    torch.testing.assert_close(student.grad, (STUDENT.softmax(1) - wanted) / 2)
    assert teacher.grad is None

    student = STUDENT.clone().requires_grad_()
    rows = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    cmkd_loss(student, teacher, rows, 0.3, 2.0, multi_label=True).backward()
    wanted = 0.3 * rows + 0.7 * (TEACHER / 2).sigmoid()
    torch.testing.assert_close(student.grad, (STUDENT.sigmoid() - wanted) / 6)


def test_a_teacher_that_agrees_leaves_the_labels_alone() -> None:
    target = torch.tensor([0, 2])
    loss = cmkd_loss(STUDENT, STUDENT, target, 0.25)
    assert loss.item() == pytest.approx(0.25 * F.cross_entropy(STUDENT, target).item())


def test_extreme_logits_and_half_precision() -> None:
    far = torch.tensor([[1000.0, -1000.0]])
    for multi_label, target in ((False, torch.tensor([0])), (True, torch.tensor([[1.0, 0.0]]))):
        for student in (far, -far):
            loss = cmkd_loss(student, far, target, 0.5, multi_label=multi_label)
            assert loss.isfinite() and loss >= 0
    half = cmkd_loss(STUDENT.bfloat16(), TEACHER.bfloat16(), torch.tensor([0, 2]))
    assert half.dtype == torch.float32
    exact = cmkd_loss(
        STUDENT.bfloat16().double(), TEACHER.bfloat16().double(), torch.tensor([0, 2])
    )
    assert half.item() == pytest.approx(exact.item(), rel=1e-6)


def test_public_name() -> None:
    assert fastast.cmkd_loss is cmkd_loss


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"teacher_logits": TEACHER[:, :2]},
            r"must both be \[B, classes\], not \[2, 3\] and \[2, 2\]",
        ),
        ({"target": torch.tensor([0])}, r"target must be class indices \[2\] or floating-point"),
        ({"multi_label": True}, r"target must be floating-point \[2, 3\], not torch.int64 \[2\]"),
        ({"lam": 1.5}, r"lam must be in \[0, 1\], not 1.5"),
        ({"tau": 0.0}, "tau must be more than 0, not 0.0"),
    ],
)
def test_bad_arguments(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "student_logits": STUDENT,
        "teacher_logits": TEACHER,
        "target": torch.tensor([0, 2]),
    }
    with pytest.raises(ValueError, match=message):
        cmkd_loss(**{**arguments, **change})  # type: ignore[arg-type]


def test_class_order() -> None:
    assert class_order(("a", "b", "c"), ("c", "a", "b")) == [1, 2, 0]
    with pytest.raises(
        ValueError, match=r"has 2, the data 3; it does not know b, c and also knows d"
    ):
        class_order(("a", "b", "c"), ("a", "d"))
