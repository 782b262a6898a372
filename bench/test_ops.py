"""Single ops and the ToMe step: fused, unfused, unfused and compiled, PyTorch's own."""

from typing import Any

import sets
from specs import OpSpec

SPECS = sets.op_specs


def test_op(spec: OpSpec, session: Any, benchmark: Any) -> None:
    session.run(spec, benchmark)
