"""Whole models: over r, on every engine, in training, and from the waveform."""

from typing import Any

import sets

SPECS = sets.model_specs


def test_model(spec: Any, session: Any, benchmark: Any) -> None:
    session.run(spec, benchmark)
