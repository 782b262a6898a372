"""The CPU's ops that have no backward: schemas and fake kernels (values: where their twins are)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastast_kernels as fk
from fastast_kernels.backends import why_not

pytestmark = pytest.mark.skipif(
    why_not("merge", "cpp", "cpu") is not None, reason=str(why_not("merge", "cpp", "cpu"))
)


def samples() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments with and without the optional ones."""
    rows = fk.bipartite_match(torch.randn(2, 12, 8), 3)
    size = torch.rand(2, 12) + 1
    tokens = *torch.randn(2, 2, 12, 5), rows, 9
    return {
        "add_norm": [(*torch.randn(2, 2, 12, 5), *torch.randn(2, 5), 1e-6)],
        "merge_add_norm": [
            (*tokens, size, *torch.randn(2, 5), 1e-6),
            (*tokens, None, *torch.randn(2, 5), 1e-6),
        ],
        "attend": [
            (*torch.randn(3, 2, 3, 12, 16), size.log(), 0.25),
            (*torch.randn(3, 2, 3, 12, 16), None, 0.25),
        ],
    }


@pytest.mark.parametrize("op", sorted(samples()))
def test_opcheck(op: str) -> None:
    for arguments in samples()[op]:
        result = torch.library.opcheck(getattr(torch.ops.fastast, op), arguments)
        assert set(result.values()) == {"SUCCESS"}, result
