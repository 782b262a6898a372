"""Single ops and the ToMe step: fused, unfused, unfused and compiled, PyTorch's own."""

from typing import Any

import sets

SPECS = sets.kernel_specs


def test_op(spec: sets.Spec, session: Any, benchmark: Any) -> None:
    session.run(spec, benchmark)
