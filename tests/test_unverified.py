"""bench/unverified.py measures what it says, and says so where it cannot."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "bench" / "unverified.py"
STAGES = ["ceilings", "launch", "gemm", "attention", "step", "elementwise", "ties"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.fixture(scope="module")
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("unverified", SCRIPT)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["unverified"] = loaded
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("unverified") / "out.json"
    done = run("--device", "cpu", "--quick", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


def test_every_stage_ran(result: dict[str, Any]) -> None:
    assert list(result["stages"]) == STAGES
    for name, stage in result["stages"].items():
        assert stage["status"] == "ok", (name, stage)
        assert stage["rows"] and stage["seconds"] > 0


def test_times_are_finite_and_positive(result: dict[str, Any]) -> None:
    timed = [row for s in result["stages"].values() for row in s["rows"] if "us" in row]
    assert len(timed) > 60
    for row in timed:
        assert math.isfinite(row["us"]) and row["us"] > 0, row
    # Whatever has no time has a reason, or is a check and no measurement.
    for stage in result["stages"].values():
        for row in stage["rows"]:
            assert row.keys() & {"us", "error", "absent", "launches", "wrong", "repeatable"}, row


def test_attention_is_held_against_fp32(result: dict[str, Any]) -> None:
    rows = result["stages"]["attention"]["rows"]
    right = [row for row in rows if "us" in row]
    assert {row["case"] for row in right} == {
        "sdpa",
        "sdpa contiguous",
        "(a) bias in head dim 72",
        "(e) size in v",
        "flex",
    }
    for row in right:
        assert 0 < row["rel_error"] < 1e-2, row
    refused = [row for row in rows if row.get("backend") == "cudnn"]
    assert refused and all(row["error"].startswith("RuntimeError") for row in refused)
    default = [row for row in rows if row["case"] == "sdpa" and row["backend"] == "default"]
    assert {row["bias"] for row in default} == {
        "none",
        "[B,1,1,N] bf16",
        "[B,1,1,N] fp32",
        "[B,1,N,N] stride 0",
        "[B,1,N,N] materialised",
    }
    assert all(row["picked"] for row in default)


def test_findings_and_ceilings(result: dict[str, Any]) -> None:
    findings = {f["what"]: f for f in result["findings"]}
    assert findings["an fp32 bias beside bf16 q is silently misread"]["measured"] == "no"
    assert findings["device copy"]["assumed"] == 4.3
    ceilings = result["ceilings"]
    assert ceilings["copy"] > 0 and ceilings["matmul"]["bfloat16"] > 0 and ceilings["host"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_absent_without_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = run("--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "absent" in done.stdout
    stages = json.loads(out.read_text())["stages"]
    assert list(stages) == STAGES
    assert all(s["status"] == "absent" and s["error"] for s in stages.values())


def test_a_cpu_is_not_measured_in_full() -> None:
    done = run("--device", "cpu")
    assert done.returncode == 2 and "needs --quick" in done.stderr


def test_a_failing_stage_leaves_the_others(module: ModuleType, capsys: Any) -> None:
    bench = module.Bench("cpu", module.TINY)
    result: dict[str, Any] = {"stages": {}, "findings": [], "ceilings": {}}

    def broken(bench: Any) -> None:
        bench.case("first", lambda: {"us": 1.0})
        bench.case("second", lambda: 1 / 0)
        raise ValueError("no such thing\nat all")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module.STAGES, "ties", (broken, 10))
        assert module.run_stage(bench, "ties", result)
    stage = result["stages"]["ties"]
    assert (stage["status"], stage["error"]) == ("failed", "ValueError: no such thing")
    assert stage["rows"] == [
        {"case": "first", "us": 1.0},
        {"case": "second", "error": "ZeroDivisionError: division by zero"},
    ]
    assert "division by zero" in capsys.readouterr().out


def test_no_new_row_when_the_time_is_up(module: ModuleType) -> None:
    bench = module.Bench("cpu", module.TINY)
    bench.deadline = 0.0
    assert "time is up" in bench.case("late", lambda: {"us": 1.0})["error"]


def test_what_json_cannot_hold(module: ModuleType) -> None:
    held = module.finite({"a": [float("nan"), 1.23456789, 3], "b": float("inf")})
    assert held == {"a": ["nan", 1.2346, 3], "b": "inf"}
    assert json.dumps(held, allow_nan=False)


def test_variants_are_exact_where_a_wrong_bias_is_not(module: ModuleType) -> None:
    """The truth really has the bias in it: leaving it out is an error of more than 1e-2."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 40, 64)
    size = torch.randint(1, 9, (1, 40)).float()
    truth = module.exact(q, k, v, size.log())
    assert module.rel_err(module.exact(q, k, v, None), truth) > 1e-2
    mask = size.log()[:, None, None]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert module.rel_err(out, truth) < 1e-5
