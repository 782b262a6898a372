"""Wrong arguments: the error names the argument, what it was and what it may be."""

from __future__ import annotations

import re

import pytest
import torch

import fastast_kernels as fk

X = torch.randn(2, 10, 4)
ROWS = torch.zeros(2, 10, dtype=torch.int32)
W = torch.ones(4)
Q = torch.randn(2, 3, 10, 4)

CASES = [
    (lambda: fk.bipartite_match(X, -1), ValueError, "r must be 0 or more, got -1"),
    (lambda: fk.bipartite_match(X, 2.0), TypeError, "r must be an int, got float (2.0)"),
    (lambda: fk.bipartite_match(X, True), TypeError, "r must be an int, got bool (True)"),
    (
        lambda: fk.bipartite_match(X[0], 2),
        ValueError,
        "metric must have shape [B, N, C], got [10, 4]",
    ),
    (
        lambda: fk.bipartite_match(X.int(), 2),
        TypeError,
        "metric must be float64, float32, bfloat16 or float16, got torch.int32",
    ),
    (lambda: fk.bipartite_match([1], 2), TypeError, "metric must be a tensor [B, N, C], got list"),
    (lambda: fk.key_metric(X), ValueError, "k must have shape [B, H, N, Dh], got [2, 10, 4]"),
    (lambda: fk.match_keys(X, 2), ValueError, "k must have shape [B, H, N, Dh], got [2, 10, 4]"),
    (lambda: fk.match_keys(X[None], -1), ValueError, "r must be 0 or more, got -1"),
    (
        lambda: fk.merge(X, ROWS.long(), 5),
        TypeError,
        "assignment must be an int32 tensor [B, N], got torch.int64",
    ),
    (
        lambda: fk.merge(X, ROWS[:, :9], 5),
        ValueError,
        "assignment must have shape [2, 10], got [2, 9]",
    ),
    (
        lambda: fk.merge(X, ROWS, 11),
        ValueError,
        "n_out must be between 1 and the number of tokens, 10, got 11",
    ),
    (
        lambda: fk.merge(X, ROWS, 0),
        ValueError,
        "n_out must be between 1 and the number of tokens, 10, got 0",
    ),
    (lambda: fk.merge(X, ROWS, 5.0), TypeError, "n_out must be an int, got float"),
    (
        lambda: fk.merge(X, ROWS, 5, torch.ones(2, 10).double()),
        TypeError,
        "size must be a float32 tensor or None, got torch.float64",
    ),
    (
        lambda: fk.merge(X, ROWS, 5, torch.ones(2, 9)),
        ValueError,
        "size must have shape [2, 10], got [2, 9]",
    ),
    (
        lambda: fk.merge(X, ROWS.to("meta"), 5),
        ValueError,
        "assignment must be on the device of x, cpu, got meta",
    ),
    (lambda: fk.unmerge(X[0], ROWS), ValueError, "x must have shape [B, n_out, D], got [10, 4]"),
    (lambda: fk.unmerge(X, ROWS[:1]), ValueError, "assignment must have shape [2, N], got [1, 10]"),
    (
        lambda: fk.add_layer_norm(X, X.double(), W, W),
        TypeError,
        "residual must have the dtype of x, torch.float32, got torch.float64",
    ),
    (
        lambda: fk.add_layer_norm(X, X[:1], W, W),
        ValueError,
        "residual must have the shape of x, [2, 10, 4], got [1, 10, 4]",
    ),
    (lambda: fk.add_layer_norm(X, X, W[:3], W), ValueError, "weight must have shape [4], got [3]"),
    (
        lambda: fk.merge_add_layer_norm(X, X, ROWS, 5, None, W, W[:3]),
        ValueError,
        "bias must have shape [4], got [3]",
    ),
    (
        lambda: fk.attention(Q, Q[..., :3], Q[..., :3]),
        ValueError,
        "q must have shape [2, 3, Nq, 3], got [2, 3, 10, 4]",
    ),
    (
        lambda: fk.attention(Q, Q, Q[:, :, :9]),
        ValueError,
        "v must have the shape of k, [2, 3, 10, 4], got [2, 3, 9, 4]",
    ),
    (
        lambda: fk.attention(Q, Q.double(), Q.double()),
        TypeError,
        "k must have the dtype of q, torch.float32, got torch.float64",
    ),
    (
        lambda: fk.attention(Q, Q, Q, torch.ones(2, 9)),
        ValueError,
        "log_size must have shape [2, 10], got [2, 9]",
    ),
    (
        lambda: fk.attention(Q, Q, Q, torch.ones(2, 10).bfloat16()),
        TypeError,
        "log_size must be a float32 tensor or None, got torch.bfloat16",
    ),
]


@pytest.mark.parametrize("call,error,message", CASES, ids=[c[2][:48] for c in CASES])
def test_message(call, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=re.escape(message)):
        call()


@pytest.mark.parametrize("row", [-2, 5])
def test_assignment_out_of_range(row: int) -> None:
    """Values are only looked at where they are used as an index: by the compiled CPU kernels."""
    if fk.backends().default["cpu"]["merge"] != "cpp":
        pytest.skip("plain PyTorch checks indices with messages of its own")
    rows = ROWS.clone()
    rows[1, 3] = row
    message = f"assignment must be between -1 and n_out - 1 = 4, but token 3 of sample 1 has {row}"
    for call in (
        lambda: fk.merge(X, rows, 5),
        lambda: fk.merge_add_layer_norm(X, X, rows, 5, None, W, W),
    ):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            call()
    with pytest.raises(
        RuntimeError, match=f"assignment must be between -1 and the last row, 4, but holds {row}"
    ):
        fk.unmerge(X[:, :5], rows)
