"""The suite's options, and one run's context: machine, ceilings, and the rows it collects.

    python -m pytest bench --set=quick --benchmark-only --benchmark-json=out.json

(With the equals signs: what looks like a second path makes pytest read another configuration.)

A test is a case: its entries are checked against fp64 truth, then timed in turns. pytest-benchmark
times ours and keeps the statistics; the others run between its rounds, on the same clock.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import sets
import torch

from fastast.benchmark import counters, machine, timing
from fastast.benchmark.case import (
    Case,
    Measurement,
    arguments_of,
    autograd_mode,
    check,
    summarise,
    turns,
)
from fastast.benchmark.rows import Row, ceiling_rows, rows_of

BENCH = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--set", choices=list(sets.SETS), default="quick", help="which cases to run")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "timeout: pytest-timeout's, where it is installed")
    if config.getoption("--set") != "gpu":
        timing.in_measuring_environment()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(str(item.fspath)).parent == BENCH:
            item.add_marker(pytest.mark.timeout(0))


class Session:
    """What the tests of one run share."""

    def __init__(self, name: str) -> None:
        self.set = name
        self.device = torch.device("cuda" if name == "gpu" else "cpu")
        self.context = machine.context(self.device)
        self.busy = machine.others_busy()
        self.rows: list[Row] = []
        self.left_out: list[str] = []
        self.known: dict[int, dict[str, float]] = {}
        self.counted: dict[str, dict[str, float]] | None = None

    def ceilings(self, threads: int) -> dict[str, float]:
        """Copy and matrix products on as many threads, measured when first asked for."""
        if threads not in self.known:
            self.known[threads] = machine.ceilings(self.device, threads)
            self.rows += ceiling_rows(self.known[threads], threads, self.context)
        return self.known[threads]

    def peaks(self, spec: Any, case: Case) -> dict[str, float]:
        """Peak extra bytes of a case's eager entries, by label."""
        if self.device.type == "cuda":
            return {
                case.label(e): counters.cuda_peak(_one_call(case, i), self.device)
                for i, e in enumerate(case.entries)
                if e.eager
            }
        if self.counted is None:
            self.counted = count_peaks(self.set)
        return self.counted.get(str(spec), {})

    def run(self, spec: Any, benchmark: Any) -> list[Measurement]:
        """Check and time the case of a spec, and keep its rows."""
        ceilings = self.ceilings(spec.threads)
        torch.set_num_threads(spec.threads)
        case = spec.build(self.device)
        errors = check(case, drop_rivals=True)
        self.left_out += case.left_out
        calls = turns(case)
        mine = next(
            name
            for name, e in zip(calls, case.entries, strict=True)
            if e.provider.startswith(case.ours)
        )
        times: dict[str, list[float]] = {name: [] for name in calls}

        def others() -> None:
            for name, call in calls.items():
                if name != mine:
                    times[name].append(timing.timed(call, self.device))

        def ours() -> None:
            times[mine].append(timing.timed(calls[mine], self.device))

        turn = timing.warm_up(calls, self.device, least=2 if case.seconds < 5 else 1)
        rounds = timing.rounds_for(turn, case.seconds)
        benchmark.pedantic(ours, setup=others, rounds=rounds, iterations=1)
        measurements = summarise(case, errors, times)

        one_clip = case.config.get("B") == 1
        dispatches = {
            case.label(e): float(counters.dispatches(_one_call(case, i), self.device))
            for i, e in enumerate(case.entries)
            if e.eager and one_clip
        }
        rows = rows_of(
            case, measurements, self.context, ceilings, self.peaks(spec, case), dispatches
        )
        self.rows += rows
        benchmark.group = f"{case.kernel} {case.mode}"
        benchmark.extra_info.update(
            case.config,
            device=self.context["device"],
            versions=self.context["versions"],
            commit=self.context["commit"],
            sets_of_inputs=len(case.inputs),
            noise={m.entry.provider: round(m.noise, 3) for m in measurements},
            rows=len(rows),
        )
        return measurements


def _one_call(case: Case, index: int) -> Any:
    entry = case.entries[index]
    with autograd_mode(entry.grad):
        arguments = arguments_of(entry, case.inputs[0])

    def call() -> object:
        with autograd_mode(entry.grad):
            return entry.call(*arguments)

    return call


def count_peaks(name: str) -> dict[str, dict[str, float]]:
    """Run peak.py, where every allocation is counted, for the cases of a set."""
    with tempfile.TemporaryDirectory() as folder:
        counter = f"{folder}/peak_alloc.so"
        source = BENCH / "peak_alloc.c"
        compiler = os.environ.get("CC", "cc")
        try:
            subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", counter, source], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"peak memory is not counted: {error}", file=sys.stderr)
            return {}
        out = f"{folder}/peaks.json"
        environment = {**os.environ, "LD_PRELOAD": counter}
        command = [sys.executable, str(BENCH / "peak.py"), name, out]
        subprocess.run(command, check=True, env=environment)
        return json.loads(Path(out).read_text())


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    threads = torch.get_num_threads()
    name = request.config.getoption("--set")
    if name == "gpu" and not torch.cuda.is_available():
        pytest.skip("--set gpu needs a CUDA device")
    run = Session(name)
    request.config._fastast_session = run  # type: ignore[attr-defined]
    yield run
    torch.set_num_threads(threads)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "spec" in metafunc.fixturenames:
        specs = metafunc.module.SPECS(metafunc.config.getoption("--set"))
        marked = [pytest.param(s, id=str(s), marks=getattr(pytest.mark, s.marker)) for s in specs]
        metafunc.parametrize("spec", marked)


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    name = config.getoption("--set")
    machine_info["fastast"] = machine.context("cuda" if name == "gpu" else "cpu")


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: object, output_json: dict[str, Any]
) -> None:
    run = getattr(config, "_fastast_session", None)
    if run is not None:
        output_json["fastast"] = {
            "set": run.set,
            "busy_cores": run.busy,
            "left_out": run.left_out,
            "rows": [asdict(row) for row in run.rows],
        }


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    run = getattr(config, "_fastast_session", None)
    for line in getattr(run, "left_out", []):
        terminalreporter.write_line(f"LEFT OUT: {line}", red=True)
    if run is not None and run.busy > machine.BUSY_CORES:
        terminalreporter.write_line(
            f"NOISY: other processes used {run.busy:.1f} cores when this run began", red=True
        )
