"""What tests and benchmarks share: shapes, tolerances, and checks that know about ties.

Two correct matchings may differ where scores tie within rounding, so a matching is checked for
being *valid* (:func:`assert_valid_match`) and not for equal indices. A kernel's error is held
against the error that plain PyTorch makes in the same dtype (:func:`assert_as_accurate`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .checks import effective_r

# Rounding of one score between implementations that sum in another order: a few units in the last
# place of fp32 (fp64 for fp64) at a cosine near 1.
SCORE_TOLERANCE = {torch.float64: 1e-13}
FP32_SCORE_TOLERANCE = 4e-6

# Floors under the "twice PyTorch's error" rule, for results where PyTorch happens to be exact:
# one unit in the last place at magnitude 1. In fp64 the truth itself is rounded along the way.
UNIT = {
    torch.float64: 3e-14,
    torch.float32: 1.2e-7,
    torch.bfloat16: 7.9e-3,
    torch.float16: 9.8e-4,
}

DTYPES = tuple(UNIT)


def devices() -> list[str]:
    """Device types to test on: the CPU, and CUDA where there is one."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def assert_valid_match(
    metric: Tensor, assignment: Tensor, r: int, class_token: bool, distill_token: bool
) -> None:
    """Check that an assignment is a correct bipartite soft matching of ``metric``, ties aside.

    Args:
        metric: ``[B, N, C]``, the input of the match.
        assignment: int32 ``[B, N]``, its output.
        r: tokens asked to be merged.
        class_token: whether token 0 was protected.
        distill_token: whether token 1 was protected.

    Raises:
        AssertionError: a merged token is not with its best partner, an unmerged one scores higher
            than a merged one, a protected token moved, or rows are not in the published order.
    """
    batch, n, _ = metric.shape
    r = effective_r(n, r, class_token, distill_token)
    assert assignment.dtype == torch.int32 and assignment.shape == (batch, n)
    if r == 0:
        assert (assignment == torch.arange(n, device=assignment.device)).all()
        return
    tolerance = SCORE_TOLERANCE.get(metric.dtype, FP32_SCORE_TOLERANCE)
    scores = reference.match_scores(metric.double(), class_token, distill_token).cpu()
    rows = assignment.cpu().long()
    n_a, n_b = (n + 1) // 2, n // 2
    n_kept = n_a - r

    row_of_b = n_kept + torch.arange(n_b, device="cpu")
    row_of_kept = torch.arange(n_kept, device="cpu")
    if distill_token:
        row_of_b[0] = 1
        row_of_kept[1:] += 1
    for b in range(batch):
        of_a, of_b = rows[b, ::2], rows[b, 1::2]
        assert torch.equal(of_b, row_of_b), "tokens of B are not in their rows"
        is_merged = torch.isin(of_a, row_of_b)
        assert int(is_merged.sum()) == r, f"{int(is_merged.sum())} tokens merged, not {r}"
        assert torch.equal(of_a[~is_merged].sort().values, row_of_kept), "unmerged rows not a range"

        best = scores[b].max(dim=-1).values
        partner = torch.empty(n_a, dtype=torch.long, device="cpu")
        partner[is_merged] = (of_a[is_merged].unsqueeze(-1) == row_of_b).long().argmax(-1)
        chosen = scores[b][is_merged, :].gather(1, partner[is_merged, None]).squeeze(-1)
        assert (chosen >= best[is_merged] - tolerance).all(), "a token is not with its best partner"
        if n_kept:
            highest_kept = best[~is_merged].max()
            assert (chosen >= highest_kept - tolerance).all(), "a better pair was left unmerged"
        if class_token:
            assert rows[b, 0] == 0, "CLS is not in row 0"
            assert torch.equal(of_a[~is_merged], row_of_kept), "unmerged tokens are not ascending"
        else:
            by_row = best[~is_merged][of_a[~is_merged].argsort()]
            assert (by_row.diff() <= tolerance).all(), "unmerged tokens are not by falling score"


def assert_as_accurate(
    actual: Tensor, truth: Tensor, pytorch: Tensor, what: str = "result", factor: float = 2.0
) -> None:
    """Check that the error of ``actual`` is at most ``factor`` times plain PyTorch's.

    Args:
        actual: the kernel's result.
        truth: the same in fp64.
        pytorch: the same from unfused PyTorch in the dtype of ``actual``.
        what: name for the message.
        factor: allowed ratio of the largest errors.

    Raises:
        AssertionError: with both errors, if it is not.
    """
    assert actual.shape == truth.shape, f"{what}: shape {actual.shape}, not {truth.shape}"
    assert actual.dtype == pytorch.dtype, f"{what}: dtype {actual.dtype}, not {pytorch.dtype}"
    if truth.numel() == 0:
        return
    error = float((actual.double() - truth).abs().max())
    baseline = float((pytorch.double() - truth).abs().max())
    floor = UNIT[actual.dtype] * max(1.0, float(truth.abs().max()))
    limit = factor * baseline + floor
    assert error <= limit, f"{what}: error {error:.3g} over {limit:.3g} (PyTorch's {baseline:.3g})"


def materialised_attention(
    q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """What the published ToMe computes, every intermediate in the dtype of ``q``."""
    logits = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if log_size is not None:
        logits = logits + log_size[:, None, None, :].to(q.dtype)
    return logits.softmax(-1) @ v
