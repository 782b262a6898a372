"""The benchmark's gates refuse, its clocks take turns, its tables say what was measured."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fastast_kernels
from fastast.benchmark import case as cases
from fastast.benchmark import kernels, machine, models, plots, rows, run, timing
from fastast.benchmark.case import Case, Entry, GateError, check, measure, relative_error

CPU = torch.device("cpu")
BENCH = Path(__file__).parent.parent / "bench"
CONTEXT = {"device": "a chip, 2 cores, avx2", "versions": "v", "commit": "c", "date": "2026-01-01"}
CEILINGS = {"copy": 10e9, "float32": 100e9, "bfloat16": 400e9}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def doubling(wrong: float = 0.0, tolerance: float | None = 1e-5) -> Case:
    """Two ways to double a tensor, ours off by ``wrong``."""
    entries = [
        Entry("reference", lambda x: x + x, tolerance=tolerance),
        Entry("fused", lambda x: 2 * x + wrong, tolerance=tolerance),
    ]
    config: cases.Config = {"N": 8, "dtype": "float32", "threads": 1}
    inputs = [(torch.rand(8) + 1,) for _ in range(3)]
    return Case(
        "doubling", "forward", "N", config, CPU, inputs, entries, lambda x: 2 * x.double(),
        seconds=0.01,
    )  # fmt: skip


# ------------------------------------------------------------------------------------- clocks


def test_ratio() -> None:
    middle, low, high = timing.ratio([2.0 * i for i in range(1, 42)], list(range(1, 42)))
    assert (middle, low, high) == (2, 2, 2)
    slow = [float(i) for i in range(1, 42)]
    middle, low, high = timing.ratio(slow, [1.0] * 41)
    assert middle == 21 and low == 14 and high == 28  # 21 -+ 1.96 sqrt(41) / 2, rounded outwards


def test_ratio_is_of_pairs_not_of_medians() -> None:
    assert timing.ratio([2.0, 40.0, 6.0], [1.0, 10.0, 6.0])[0] == 2


def test_interleaved_takes_turns() -> None:
    calls: list[str] = []
    times = timing.interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3
    )
    assert calls == ["a", "b"] * 3
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}


def test_rounds_are_enough_for_an_interval() -> None:
    assert timing.rounds_for(100.0, 1.0) == 7
    assert timing.rounds_for(0.001, 1.0) == 40
    assert timing.rounds_for(0.1, 1.0) == 10


def test_noise_is_the_distance_of_the_quartiles() -> None:
    assert timing.noise([10, 10, 10, 10, 10]) == 0
    assert timing.noise([8, 9, 10, 11, 12]) == pytest.approx(0.2)
    assert timing.quartiles([8, 9, 10, 11, 12]) == (10, 9, 11)


# ------------------------------------------------------------------------------------- the gate


def test_a_right_case_is_measured() -> None:
    found = {m.entry.provider: m for m in measure(doubling())}
    assert set(found) == {"reference", "fused"}
    assert all(m.ms > 0 and m.error < 1e-6 and len(m.times) >= 7 for m in found.values())
    assert found["fused"].best_other == "reference" and found["fused"].against_best is not None
    assert found["reference"].best_other is None
    assert found["reference"].speedup == (1, 1, 1)


@pytest.mark.parametrize("wrong", [1e-3, math.nan, math.inf])
def test_a_wrong_result_is_not_timed(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("timed before the check")

    monkeypatch.setattr(cases, "interleaved", refuse)
    with pytest.raises(GateError, match=r"doubling .* fused is off by .* no speed to report"):
        measure(doubling(wrong))
    with pytest.raises(RuntimeError, match="timed before"):  # the right one gets that far
        measure(doubling())


def test_nan_is_refused_without_a_tolerance_too() -> None:
    assert check(doubling(1e-3, tolerance=None))["fused"] > 1e-4
    with pytest.raises(GateError):
        check(doubling(math.nan, tolerance=None))


def test_a_rival_that_fails_is_left_out_and_named() -> None:
    case = doubling()
    case.entries += [
        Entry("rival", lambda x: 3 * x),
        Entry("broken", lambda x: x.no_such_thing()),
        Entry("right", lambda x: x * 2),
    ]
    assert set(check(case, drop_rivals=True)) == {"reference", "fused", "right"}
    assert [entry.provider for entry in case.entries] == ["reference", "fused", "right"]
    assert "rival: GateError" in case.left_out[0] and "AttributeError" in case.left_out[1]
    for wrong in (0, 1):  # the baseline and ours have to be right
        case = doubling()
        case.entries[wrong].call = lambda x: 3 * x
        with pytest.raises(GateError):
            check(case, drop_rivals=True)


def test_the_last_set_of_inputs_is_checked() -> None:
    case = doubling()
    case.entries[1].call = lambda x: 2 * x if x is case.inputs[0][0] else 3 * x
    with pytest.raises(GateError):
        check(case)


def test_relative_error() -> None:
    truth = torch.tensor([3.0, 4.0]).double()
    assert relative_error(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert relative_error(torch.tensor([3.0]), truth) == math.inf
    assert math.isnan(relative_error((torch.ones(2), torch.tensor([math.nan, 1])), (truth, truth)))


# ------------------------------------------------------------------------------------- cases

SHAPES: dict[str, cases.Config] = {
    "match": {"B": 2, "N": 65, "C": 16, "r": 9},
    "merge": {"B": 2, "N": 65, "D": 24, "r": 9},
    "merge_add_layer_norm": {"B": 2, "N": 65, "D": 24, "r": 9},
    "attention": {"B": 1, "N": 34},
    "tome_step": {"B": 2, "N": 65, "D": 24, "C": 16, "r": 9},
}
FORWARD = [(kernel, "forward") for kernel in SHAPES]
BACKWARD = [(kernel, "backward") for kernel in ("merge", "merge_add_layer_norm", "attention")]


def small(kernel: str, mode: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(kernels, "MOST_SETS", 2)
    config: cases.Config = {**SHAPES[kernel], "dtype": dtype, "threads": 1}
    case = kernels.CASES[kernel](config, CPU, False, mode)
    case.seconds = 0.01
    return case


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kernel", "mode"), FORWARD + BACKWARD)
def test_kernel_cases(kernel: str, mode: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = small(kernel, mode, dtype, monkeypatch)
    measurements = measure(case)
    by = [m.entry.provider for m in measurements]
    assert by[0] in ("reference", "published") and "fused" in by
    table = rows.rows_of(case, measurements, CONTEXT, CEILINGS)
    ours = {row.metric: row for row in table if row.provider == "fused"}
    assert {"ms", "speedup", "vs_best", "error", "GB/s", "GFLOP/s", "share"} <= set(ours)
    assert ours["ms"].low <= ours["ms"].value <= ours["ms"].high
    assert ours["share"].value > 0
    assert ours["error"].value <= cases.TOLERANCE[getattr(torch, dtype)]


WRONG: dict[str, tuple[str, Callable[..., Any]]] = {
    "match": (
        "bipartite_match",
        lambda metric, r: fastast_kernels.bipartite_match(metric[..., 1:], r),
    ),
    "merge": ("merge", lambda x, a, n, s: fastast_kernels.merge(x, a, n, None)),
    "attention": ("attention", lambda q, k, v, s: fastast_kernels.attention(q, k, v, None)),
    "tome_step": ("merge", lambda x, a, n, s: fastast_kernels.merge(x * 1.001, a, n, s)),
}


@pytest.mark.parametrize("kernel", list(WRONG))
def test_a_wrong_kernel_is_refused(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Similar, not equal: a channel not looked at, forgotten sizes, no bias, a part in 1000."""
    name, wrong = WRONG[kernel]
    right = fastast_kernels
    monkeypatch.setattr(kernels, "kernels", type("Wrong", (), {**vars(right), name: wrong}))
    case = small(kernel, "forward", "float32", monkeypatch)
    with pytest.raises(AssertionError):
        check(case)


def test_published_step_in_bf16_has_to_keep_the_total(monkeypatch: pytest.MonkeyPatch) -> None:
    case = small("tome_step", "forward", "bfloat16", monkeypatch)
    check(case)
    published = case.entries[0].call

    def lossy(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, size = published(*inputs)
        return x, size * (1 + (torch.arange(size.shape[1]) == 5))  # one token counted twice

    case.entries[0].call = lossy
    with pytest.raises(GateError, match="published"):
        check(case)


def test_fbank_case() -> None:
    config: cases.Config = {"B": 2, "seconds": 1, "dtype": "float32", "threads": 1}
    case = kernels.fbank(config, CPU, False, "forward")
    assert check(case)["fused"] < 1e-5


def test_sweep_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "FRAMES", {1: 64})
    case = models.sweep("tiny", 1, 2, torch.float32, 1, CPU, (3, 8), budget=0.01)
    measurements = measure(case)
    assert [m.entry.config["r"] for m in measurements] == [0, 3, 8]
    table = rows.rows_of(case, measurements, CONTEXT, CEILINGS)
    ratios = {row.x: row.value for row in table if row.metric == "mac_ratio"}
    speedups = {row.x: row.value for row in table if row.metric == "speedup"}
    efficiency = {row.x: row.value for row in table if row.metric == "efficiency"}
    assert 1 < ratios[3] < ratios[8]
    assert efficiency[8] == pytest.approx(speedups[8] / ratios[8], rel=1e-3)
    # one clip's weights wrong, at one r: refused
    broken = case.entries[2].call
    case.entries[2].call = lambda x: broken(x) * torch.tensor([[1.0], [1.0001]])
    with pytest.raises(GateError, match="r=8"):
        check(case)


def test_features_end_as_they_begin() -> None:
    x = models.features(models.random_model("tiny", 1).config, 3)
    assert torch.equal(x[0], x[2]) and not torch.equal(x[0], x[1])


# ------------------------------------------------------------------------------------- tables


def row(metric: str, value: float, low: float, high: float, **config: Any) -> rows.Row:
    config = {
        "model": "base", "seconds": 10, "B": 1, "dtype": "float32", "threads": 2, "r": 0, **config,
    }  # fmt: skip
    return rows.Row(
        "ast", "fused", "forward", metric, "r", float(config["r"]), value, low, high,
        rows.dumps(config), **CONTEXT,
    )  # fmt: skip


def sweep_rows() -> list[rows.Row]:
    against = {"against": "fused r=0"}
    return [
        row("ms", 100, 99, 101),
        row("ms", 80, 79, 81, r=20),
        row("speedup", 1.25, 1.2, 1.3, r=20, **against),
        row("mac_ratio", 1.3, 1.3, 1.3, r=20),
        row("efficiency", 0.96, 0.9, 1.0, r=20),
        row("ms", 110, 90, 150, r=5),
        row("speedup", 0.9, 0.85, 0.95, r=5, **against),
        row("mac_ratio", 1.02, 1.02, 1.02, r=5),
        row("efficiency", 0.88, 0.8, 0.9, r=5),
        row("speedup", 1.01, 0.97, 1.04, r=10, **against),
        row("mac_ratio", 1.1, 1.1, 1.1, r=10),
        row("efficiency", 0.92, 0.9, 0.95, r=10),
    ]


def test_csv_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "table.csv"
    rows.append_csv(file, sweep_rows()[:2])
    rows.append_csv(file, sweep_rows()[2:])
    assert rows.read_csv(file) == sweep_rows()
    file.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not a results table"):
        rows.read_csv(file)


def test_newest_row_of_a_number_wins() -> None:
    old = row("ms", 100, 99, 101)
    new = replace(old, value=90.0, date="2026-02-01")
    other = replace(old, device="another chip")
    assert set(rows.newest([new, old, other])) == {new, other}


def test_break_even_says_where_merging_does_not_pay() -> None:
    (line,) = run.break_even(sweep_rows())
    assert line == (
        "AST-base, 10-second clips (N=1214), batch 1: slower at r=5; "
        "no difference that shows at r=10; pays from r=20"
    )


def test_noisy_times_are_marked() -> None:
    assert not run.is_noisy(row("ms", 100, 96, 104))
    assert run.is_noisy(row("ms", 100, 94, 106))


def test_pictures(tmp_path: Path) -> None:
    saved = plots.speedup_against_r(sweep_rows(), tmp_path / "speedup")
    saved += plots.break_even(sweep_rows(), tmp_path / "even")
    assert [file.name for file in saved] == [
        "speedup.svg", "speedup.png", "even.svg", "even.png",
    ]  # fmt: skip
    assert all(file.stat().st_size > 1000 for file in saved)
    before = saved[0].read_bytes()
    plots.speedup_against_r(sweep_rows(), tmp_path / "speedup")
    assert saved[0].read_bytes() == before  # or every run would change the repository
    assert not plots.time_against_n(sweep_rows(), tmp_path / "time")


def test_report_writes_between_the_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = load("report")
    ceiling = rows.ceiling_rows(CEILINGS, 2, CONTEXT)
    result = tmp_path / "run.json"
    every = [vars(r) for r in (*ceiling, *sweep_rows())]
    result.write_text(json.dumps({"fastast": {"rows": every}}))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    arguments = ["report", str(result), "--table", str(tmp_path / "t.csv"), "--readme", str(readme)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--assets", str(tmp_path)])
    report.main()
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "1.25x [1.20, 1.30] |" in text and "0.90x [0.85, 0.95] slower" in text
    assert "1.01x [0.97, 1.04] ~" in text and "matmul bf16 400 GFLOP/s" in text
    assert len(rows.read_csv(tmp_path / "t.csv")) == len(every)
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="bench:begin"):
        report.main()
    result.write_text("{}")
    with pytest.raises(ValueError, match="has no rows"):
        report.main()


def test_readme_shows_the_newest_of_a_machine() -> None:
    report = load("report")
    names = ["CPU, 2 cores, avx512", "GPU X", "CPU, 2 cores, amx", "CPU, 8 cores, avx2"]
    made = [dataclasses.replace(sweep_rows()[0], device=name) for name in names]
    assert report.shown(made) == [names[3], names[2], names[1]]


def test_ceilings() -> None:
    found = machine.ceilings("cpu", 1, rounds=2)
    assert set(found) == {"copy", "float32", "bfloat16"}
    assert found["copy"] > 1e8 and found["float32"] > 1e9  # a tenth of any machine's


def test_machine() -> None:
    context = machine.context("cpu")
    assert set(context) == {"device", "versions", "commit", "date"}
    assert f"torch {torch.__version__}" in context["versions"] and "cores" in context["device"]
    assert machine.others_busy(0.05) >= 0


# ------------------------------------------------------------------------------------- command


def bench(*options: str) -> Any:
    from typer.testing import CliRunner

    from fastast.cli import app

    small = ("--model", "tiny", "--clips", "1", "--batch", "1", "--seconds", "1")
    return CliRunner().invoke(app, ["bench", *small, *options])


@pytest.fixture
def short_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (models, kernels, run):
        monkeypatch.setattr(module, "FRAMES", {1: 64})
    monkeypatch.setattr(kernels, "MOST_SETS", 2)
    monkeypatch.setattr(machine, "ceilings", lambda *_: CEILINGS)


@pytest.mark.usefixtures("short_clips")
def test_bench_prints_tables_and_the_break_even(tmp_path: Path) -> None:
    result = bench("--r", "4,8", "--threads", "1", "--plot", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "ToMe step" in result.output and "AST-tiny, 1-second clips" in result.output
    assert {file.name for file in tmp_path.iterdir()} == {
        "speedup.svg", "speedup.png", "break_even.svg", "break_even.png",
    }  # fmt: skip


@pytest.mark.usefixtures("short_clips")
def test_bench_as_json() -> None:
    result = bench("--r", "4", "--no-ops", "--json", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    speedups = [r for r in found["rows"] if r["metric"] == "speedup"]
    assert [(r["config"]["r"], r["config"]["against"]) for r in speedups] == [(4, "fused r=0")]
    assert len(found["break_even"]) == 1


@pytest.mark.usefixtures("short_clips")
def test_bench_reports_no_speed_when_a_result_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(models.Truth):
        def __call__(self, x: torch.Tensor, r: Any = 0) -> torch.Tensor:
            return super().__call__(x, r) * 1.1

    monkeypatch.setattr(models, "truth_of", lambda *_: Wrong(models.random_model("tiny", 1)))
    result = bench("--r", "4", "--no-ops")
    assert isinstance(result.exception, GateError) and "x [" not in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "huge"), "model must be tiny, small or base, not 'huge'"),
        (("--clips", "3"), "clips must be among 10, 5, 1 seconds, not 3"),
        (("--clips", ""), "clips and batch must each name"),
        (("--batch", "0"), "batch must be 1 or more, not 0"),
        (("--batch", "x"), "batch must be whole numbers"),
        (("--dtype", "int4"), "dtype must be auto, float32"),
        (("--r", "5:1"), "r must be a range that ends at or after its start"),
        (("--device", "tpu9"), "device 'tpu9' cannot be used here"),
    ],
)
def test_bench_options_that_cannot_be(options: tuple[str, ...], message: str) -> None:
    result = bench(*options)
    assert isinstance(result.exception, ValueError) and message in str(result.exception)


def test_gpu_script_runs_to_the_end_without_a_gpu(tmp_path: Path) -> None:
    import os
    import subprocess

    if torch.cuda.is_available():
        pytest.skip("there is a GPU: bench/gpu.sh would measure on it")
    command = [
        "bash",
        str(BENCH / "gpu.sh"),
        "tests",
        "memcheck",
        "ops",
        "models",
        "train",
        "report",
    ]
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    stages = dict(line.split()[:2] for line in (tmp_path / "stages.txt").read_text().splitlines())
    assert stages == dict.fromkeys(
        ("tests", "memcheck", "ops", "models", "train", "report"), "absent"
    )
    wrong = subprocess.run([*command[:2], "bensch"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "no stage is called bensch" in wrong.stderr


def pytest_bench(*options: str) -> Any:
    import os
    import subprocess

    # Inside an xdist worker pytest-benchmark would think that it is in one too, and not measure.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "pytest", str(BENCH), "-p", "no:cacheprovider", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(("name", "least"), [("quick", 8), ("cpu", 50), ("gpu", 60), ("full", 100)])
def test_every_set_can_be_collected(name: str, least: int) -> None:
    done = pytest_bench("--set", name, "--collect-only", "-q")
    cases = [line for line in done.stdout.splitlines() if "::test_" in line]
    assert done.returncode == 0 and len(cases) >= least, done.stdout[-2000:] + done.stderr
    assert len(set(cases)) == len(cases)


@pytest.mark.slow
def test_the_suite_writes_what_the_report_reads(tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    done = pytest_bench(
        "--set", "quick", "-k", "tome_step and float32", "--benchmark-only",
        "--benchmark-json", str(out),
    )  # fmt: skip
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-2000:] + done.stderr
    stored = json.loads(out.read_text())
    extra = stored["benchmarks"][0]["extra_info"]
    assert extra["N"] == 1214 and extra["dtype"] == "float32" and extra["threads"] == 1
    assert {"device", "versions", "commit"} <= set(extra)
    report = load("report")
    found = report.load([out])
    by = {(r.provider, r.metric): r for r in found}
    assert by["fused", "speedup"].value > 1 and by["fused", "error"].value < 1e-6
    # x * size alone is 1214 x 768 values; the counter must have seen it.
    assert by["published", "peak_MB"].value > 1214 * 768 * 4 / 1e6 > by["fused", "peak_MB"].value
    assert by["published", "dispatches"].value > 20 > by["fused", "dispatches"].value > 0
    assert {("copy", "GB/s"), ("matmul", "GFLOP/s")} <= set(by)
    assert "ToMe step" in report.results(found, found[0].device)
