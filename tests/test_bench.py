"""The benchmarks run, check their outputs first, and their statistics are right."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parent.parent / "bench"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_ratio() -> None:
    timing = load("timing")
    middle, low, high = timing.ratio([2.0 * i for i in range(1, 42)], list(range(1, 42)))
    assert (middle, low, high) == (2, 2, 2)
    slow = [float(i) for i in range(1, 42)]
    middle, low, high = timing.ratio(slow, [1.0] * 41)
    assert middle == 21 and low == 14 and high == 28  # 21 -+ 1.96 sqrt(41) / 2, rounded outwards


def test_interleaved() -> None:
    timing = load("timing")
    calls: list[str] = []
    times = timing.interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, 1
    )
    assert calls == ["a", "b"] * 4
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}


def test_tome_step(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, BENCH / "tome_step.py", "--rounds", "3", "--json", out],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [(r["batch"], r["dtype"]) for r in rows[:2]] == [(1, "float32"), (1, "bfloat16")]
    assert all(row["speedup"] > 0 for row in rows[:4])
    peaks = rows[-1]["peak_extra_bytes"]
    # x * size alone is 1214 x 768 bf16 values; the counter must have seen it.
    assert peaks["published"] > 1214 * 768 * 2 > peaks["fused"] > 0


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    load("timing")
    step = load("tome_step")
    x, metric, size = step.inputs(1, step.torch.float32)
    step.check(x, metric, size, 40)
    monkeypatch.setattr(step, "merge", lambda x, *_: (x[:, :1174] * 1.001, size[:, :1174]))
    with pytest.raises(AssertionError, match="merged tokens: error"):
        step.check(x, metric, size, 40)
