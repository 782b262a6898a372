from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)  # the suite runs one process a core; tests of threads say so


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill every uninitialised tensor with NaN, so that an output left unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpp", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each CPU implementation in turn."""
    from fastast_kernels import use_backend
    from fastast_kernels.backends import why_not

    reason = why_not("merge", request.param, "cpu")
    if reason is not None:
        pytest.skip(reason)
    with use_backend(request.param):
        yield request.param
