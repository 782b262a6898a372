from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastast_kernels import use_backend
from fastast_kernels.backends import INTERPRETED, default, why_not

torch.set_num_threads(1)  # the suite runs one process a core; tests of threads say so


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: with two workers it would else be the last, and one would wait."""
    items.sort(key=lambda item: item.path.name != "test_triton.py")


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


# What the tests of the ops run on: in a process whose CPU Triton's interpreter has taken over
# (test_triton.py starts one) its kernels, else each implementation of the CPU, and of a GPU.
BACKENDS = ["cpp", "reference"]
if INTERPRETED:
    BACKENDS = ["triton"]
elif torch.cuda.is_available():
    BACKENDS += ["cuda:triton"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each implementation in turn; on a GPU, tensors are made there."""
    name = request.param.removeprefix("cuda:")
    device = "cpu" if name == request.param else "cuda"
    reason = why_not("merge", name, device)
    if reason is not None:
        pytest.skip(reason)
    if device == "cpu":
        with use_backend(name):
            yield name
        return
    # Not forced: what has no kernel, such as fp64 products, takes the reference.
    assert default("merge", device) == name
    torch.set_default_device(device)
    yield name
    torch.cuda.synchronize()
    torch.set_default_device(None)
