"""`fastast tune`, on a GPU that is as fast, and as right, as each test says."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from typer.testing import CliRunner

from fastast.cli import app, main
from fastast_kernels import triton_kernels
from fastast_kernels.backends import INTERPRETED
from fastast_kernels.triton_kernels import parameters

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from fastast_kernels.triton_kernels import candidates as cand
from fastast_kernels.triton_kernels import tune as tuning
from fastast_kernels.triton_kernels.resources import Launch, Resources, calls, recorded

BF16 = torch.bfloat16
SPILLING = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}  # head dim 64, sm_80

Rule = Callable[[dict[str, Any]], bool]  # of a launch's options


def never(options: dict[str, Any]) -> bool:
    return False


@dataclass
class Fake:
    """A GPU: what fits a rule takes half the time, spills, or computes something else."""

    fast: Rule = never
    wrong: Rule = never
    spills: Rule = never
    saved: float = 0.5
    memory: float = math.inf  # clips that fit
    timed: int = 0

    def bench(self, architecture: str = "sm_80") -> tuning.Bench:
        return tuning.Bench("meta", architecture, self.timer, self.run)

    def timer(self, call: Callable[[], Any]) -> float:
        self.timed += 1
        return 1 - self.saved * any(self.fast(launch.options) for launch in recorded(call))

    def run(self, call: Callable[[], Any]) -> torch.Tensor:
        launches = recorded(call)
        if launches[0].args[0].shape[0] > self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.tensor([1.0 + any(self.wrong(launch.options) for launch in launches), 2.0])

    def resources(self, launch: Launch, architecture: str, variant: str) -> Resources:
        spilled = 8 * self.spills(launch.options)
        return Resources("kernel", architecture, variant, 128, 1024, spilled, 4, 1, 1)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Compiles nothing; test_a_spill_is_refused does."""
    made = Fake()
    monkeypatch.setattr(cand, "resources", lambda *args: made.resources(*args))
    return made


@pytest.fixture
def fresh_table() -> Iterator[None]:
    """Read the table again, in the test and after it."""
    for cached in (parameters.table, parameters.entry):
        cached.cache_clear()
    yield
    for cached in (parameters.table, parameters.entry):
        cached.cache_clear()


def tune(fake: Fake, *ops: str, quick: bool = True, dtype: torch.dtype = BF16) -> Any:
    return list(tuning.tune(fake.bench(), ops, dtype, quick))


def entry(op: str, index: int = 0) -> parameters.Entry:
    return parameters.table()["sm_80"][op][index]


def other_warps(op: str) -> int:
    return 4 if entry(op)["num_warps"] == 8 else 8


# ------------------------------------------------------------------------------ what is chosen


@pytest.mark.parametrize("saved", [0.0, 0.019, -0.5])
def test_what_ships_wins_ties_and_noise(fake: Fake, saved: float) -> None:
    fake.fast, fake.saved = (lambda o: o["num_warps"] == other_warps("attention")), saved
    outcomes = tune(fake, "attention")
    assert [o.index for o in outcomes] == [0, 1]  # heads of 64 and 128
    for o in outcomes:
        assert o.after == o.before == entry("attention", o.index)
        assert (o.before_ms, o.after_ms, o.speedup) == (1, 1, 1)
        assert o.tried > 3 and not o.refused
    assert tuning.tuned_table("sm_80", outcomes) == parameters.table()


@pytest.mark.parametrize("architecture", parameters.ARCHITECTURES)
def test_a_faster_candidate_replaces_only_its_entry(fake: Fake, architecture: str) -> None:
    before = parameters.table()[architecture]["attention"][0]
    warps = 4 if before["num_warps"] == 8 else 8
    fake.fast = lambda o: o["num_warps"] == warps and o["BLOCK_D"] == 64
    outcomes = list(tuning.tune(fake.bench(architecture), ["attention"], BF16, quick=True))
    assert outcomes[0].after == {**before, "num_warps": warps}
    assert list(outcomes[0].after) == list(before)  # bits and dim first
    assert outcomes[0].speedup == pytest.approx(2)
    expected = json.loads(parameters.SHIPPED.read_text())
    expected[architecture]["attention"][0]["num_warps"] = warps
    assert tuning.tuned_table(architecture, outcomes) == expected
    assert parameters.table() == json.loads(parameters.SHIPPED.read_text())


def test_two_steps_at_once_unless_quick(fake: Fake) -> None:
    was = entry("rank")
    fake.fast = lambda o: (
        "BLOCK_I" in o and o["BLOCK_I"] != was["BLOCK_I"] and o["num_warps"] != was["num_warps"]
    )
    assert tune(fake, "rank")[0].after == was
    found = tune(fake, "rank", quick=False)[0].after
    assert found["BLOCK_I"] != was["BLOCK_I"] and found["num_warps"] != was["num_warps"]
    assert found["BLOCK_J"] == was["BLOCK_J"]


def test_the_luckiest_is_measured_again(fake: Fake) -> None:
    shapes = len(tuning.BATCHES)
    tried = len(cand.candidates("gather_rows", {"num_warps": 1}, steps=1))
    fake.fast = lambda o: fake.timed <= (1 + tried) * shapes and o["num_warps"] == 2
    first, _ = tune(fake, "gather_rows")
    assert first.after == first.before == {"dim": 1024, "num_warps": 1}
    assert first.refused == {"not confirmed": 1}


def test_other_results_are_refused(fake: Fake) -> None:
    fake.fast = fake.wrong = lambda o: o["num_warps"] == other_warps("attention")
    outcome = tune(fake, "attention")[0]
    assert outcome.after == outcome.before
    assert outcome.refused == {"other results": 1}


def test_what_spills_elsewhere_is_refused(fake: Fake) -> None:
    """An entry is for all dtypes and variants that take it, not only for those that are timed."""
    warps = other_warps("attention")
    fake.fast = lambda o: o["num_warps"] == warps
    fake.spills = lambda o: o["num_warps"] == warps and not o["SIZED"]
    outcome = tune(fake, "attention")[0]
    assert outcome.after == outcome.before
    assert outcome.refused == {"spills registers": 1}
    fake.fast = lambda o: o["num_warps"] == 2
    fake.spills = lambda o: o["num_warps"] == 2 and str(o["ACC"]) == "fp64"
    assert tune(fake, "add_layer_norm")[0].refused == {"spills registers": 1}


def test_lengths_of_a_tile_that_spill_are_left_out(fake: Fake) -> None:
    tile = entry("attention")["BLOCK_M"]
    assert tile == [128, 64]
    block, warps = entry("attention")["BLOCK_N"], other_warps("attention")
    fake.fast = lambda o: o["num_warps"] == warps
    fake.spills = lambda o: o["BLOCK_M"] == 64 and o["num_warps"] == warps
    outcome = tune(fake, "attention")[0]
    assert outcome.after["BLOCK_M"] == [128]
    assert (outcome.after["BLOCK_N"], outcome.after["num_warps"]) == (block, warps)
    assert not outcome.refused


def test_the_metric_is_fp32_whatever_the_tokens_are(fake: Fake) -> None:
    tuned = [entry("best_partner", o.index) for o in tune(fake, "best_partner")]
    assert {e["bits"] for e in tuned} == {16, 32}
    assert {o.before.get("bits") for o in tune(fake, "attention", dtype=torch.float32)} == {32}


def test_shapes_that_do_not_fit_are_left_out(fake: Fake) -> None:
    tune(fake, "rank")
    everything, fake.timed, fake.memory = fake.timed, 0, 1
    assert tune(fake, "rank")[0].before_ms == 1
    assert fake.timed == everything // 2
    fake.memory = 0
    with pytest.raises(torch.OutOfMemoryError):
        tune(fake, "rank")


def test_progress_and_wrong_arguments(fake: Fake) -> None:
    seen: list[tuple[str, float]] = []
    bench = fake.bench()
    list(tuning.tune(bench, ["rank", "rank"], quick=True, progress=lambda *a: seen.append(a)))
    shares = [share for _, share in seen]
    assert shares == sorted(shares) and shares[0] == 0 and 0.7 < shares[-1] <= 1
    assert {what for what, _ in seen} == {"rank: compiling", "rank: timing"}
    with pytest.raises(ValueError, match=r"ops must be some of key_metric, .*, not 'assign'"):
        tune(fake, "rank", "assign")
    with pytest.raises(ValueError, match=r"dtype must be one of torch\.bfloat16, .*float64"):
        tune(fake, "rank", dtype=torch.float64)


# ----------------------------------------------------------------------------- what is possible


def test_a_spill_is_refused() -> None:
    """Compiled by the real compiler, for a GPU that is not here."""
    heads_of_64 = [(BF16, 64)]
    with pytest.raises(cand.Refused, match="spills registers"):
        cand.fitting("attention", SPILLING, "sm_80", heads_of_64, "attention")
    with pytest.raises(cand.Refused, match="spills registers"):  # the longest tile
        several = {**SPILLING, "BLOCK_M": [64, 128]}
        cand.fitting("attention", several, "sm_80", heads_of_64, "attention")
    short = {**SPILLING, "BLOCK_M": [64]}
    assert cand.fitting("attention", short, "sm_80", heads_of_64, "attention") == short
    deep = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 4}
    with pytest.raises(cand.Refused, match="too much shared memory"):
        cand.fitting("attention", deep, "sm_80", [(BF16, 128)], "attention")


def test_what_does_not_compile_is_refused(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(launch: Launch, *_: Any) -> Resources:
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(cand, "resources", broken)
    outcome = tune(fake, "rank")[0]
    assert outcome.after == outcome.before
    assert outcome.refused == {"does not compile": outcome.tried}


@pytest.mark.parametrize("op", tuning.TUNABLE)
def test_what_is_tuned_is_there(op: str) -> None:
    """Each parameter is one of every entry, and what is timed launches the op's kernel."""
    tunable = cand.TUNABLE[op]
    for table in parameters.table().values():
        for found in table[op]:
            assert tunable.values.keys() <= found.keys()
            current = {k: v for k, v in found.items() if k not in parameters.CONDITIONS}
            one, two = (cand.candidates(op, current, steps) for steps in (1, 2))
            assert current not in two and all(c in two for c in one) and 0 < len(two) < 50
            assert all(c.keys() == current.keys() for c in two)
    with parameters.trying(op, {**cand.candidates(op, current, 1)[0], "num_warps": 16}):
        launches = recorded(dict(calls(BF16, 64))[tunable.call])
    assert [launch.options["num_warps"] for launch in launches].count(16) == 1


def test_calls_have_inputs_that_can_be_timed() -> None:
    """On a GPU the same calls run; the CPU's kernels say whether their inputs make sense."""
    for name, call in calls(torch.float32, 64, batch=1, n=146, device="cpu"):
        results = getattr(torch.ops.fastast, call.func.__name__)(*call.args)  # type: ignore[attr-defined]
        for result in [results] if isinstance(results, torch.Tensor) else results:
            assert result.double().isfinite().all(), name


def test_agreement() -> None:
    x = torch.randn(50, dtype=BF16)
    rows = torch.arange(50)
    assert tuning.agree(x, x) and tuning.agree((x, rows), (x * 1.002, rows))
    assert not tuning.agree(x, 1.1 * x)
    assert not tuning.agree(x.float(), x.float() * 1.002)
    assert not tuning.agree((x, rows), (x, rows.flip(0)))
    bad = x.clone()
    bad[7] = math.nan
    assert not tuning.agree(bad, x) and not tuning.agree(bad, bad)


# ---------------------------------------------------------------------------------- the file


def test_what_is_written_is_read_back(tmp_path: Path, fake: Fake) -> None:
    path = tmp_path / "tuned.json"
    parameters.write(path, parameters.read(parameters.SHIPPED))
    assert path.read_text() == parameters.SHIPPED.read_text()

    warps = other_warps("attention")
    fake.fast = lambda o: o["num_warps"] == warps
    table = tuning.tuned_table("sm_80", tune(fake, "attention"))
    parameters.write(path, table)
    assert parameters.read(path) == table
    assert [file.name for file in tmp_path.iterdir()] == ["tuned.json"]
    program = (
        "from fastast_kernels.triton_kernels import parameters as p; "
        "print(p.entry('attention', 'sm_80', 16, 64)['num_warps'], p.table() == p.read(p.SHIPPED))"
    )
    environment = {**os.environ, "FASTAST_LAUNCH_PARAMETERS": str(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.stdout.split() == [str(warps), "False"], done.stderr


def test_a_killed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "tuned.json"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        parameters.write(path, parameters.table())
    assert path.read_text() == "old"


@pytest.mark.usefixtures("fresh_table")
@pytest.mark.parametrize(
    "text",
    [
        b'{"sm_80": {"attention": [{"BLOCK_M": 64',
        b"[]",
        b"3",
        b'{"version": 1}',
        b'{"sm_80": {"attention": 3}, "sm_90": {}}',
        b'{"sm_80": {"attention": [3]}, "sm_90": {}}',
        b"\xff\xfe",
    ],
)
def test_another_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes
) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(text)
    monkeypatch.setenv("FASTAST_LAUNCH_PARAMETERS", str(path))
    with pytest.raises(ValueError, match=r"mine\.json is no table of launch parameters"):
        parameters.table()


# ------------------------------------------------------------------------------- the command


def status(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["tune", *map(str, arguments)])
    return int(stop.value.code or 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("--out", tmp_path / "out.json") == 1
    assert capsys.readouterr().err == (
        "fastast: tune measures on a GPU, and torch finds no CUDA device\n"
    )
    assert not list(tmp_path.iterdir())


def test_without_triton(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(triton_kernels, "tune")
    monkeypatch.setitem(sys.modules, "fastast_kernels.triton_kernels.tune", None)
    assert status() == 1
    assert capsys.readouterr().err.startswith("fastast: tune measures Triton's kernels: ")


@pytest.fixture
def command(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.setattr(tuning, "gpu", fake.bench)
    monkeypatch.setenv("COLUMNS", "200")
    return fake


def test_command(command: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.fast = lambda o: o.get("BLOCK_J") == 256
    path = tmp_path / "mine.json"
    assert status("--ops", "rank,gather_rows", "--quick", "--out", path) == 0
    out = capsys.readouterr().out
    assert "2.00x" in out and f"BLOCK_J: {entry('rank')['BLOCK_J']} -> 256" in out
    assert "gather_rows" in out and "1.00x" in out and "dim <= 1024" in out
    assert f"export FASTAST_LAUNCH_PARAMETERS={path}" in out
    changed = parameters.read(path)
    assert changed["sm_80"].pop("rank") == [{**entry("rank"), "BLOCK_J": 256}]
    shipped = parameters.read(parameters.SHIPPED)
    shipped["sm_80"].pop("rank")
    assert changed == shipped


def test_install(
    command: Fake,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shipped = tmp_path / "fastast_kernels" / "triton_kernels" / "launch_parameters.json"
    shipped.parent.mkdir(parents=True)
    monkeypatch.setattr(parameters, "SHIPPED", shipped)
    arguments = ("--ops", "rank", "--quick", "--install")
    assert status(*arguments) == 2
    assert "install must be into an editable checkout" in capsys.readouterr().err
    assert not shipped.exists()
    (tmp_path / "pyproject.toml").touch()
    assert status(*arguments) == 0
    assert parameters.read(shipped) == parameters.table()
    assert "FASTAST_LAUNCH_PARAMETERS" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ops", "matmul"), "ops must be some of"),
        (("--dtype", "int8"), "dtype must be one of float32, bfloat16, float16, not 'int8'"),
        (("--out", "missing/folder/x.json"), "out must be a file in a folder that exists"),
        (("--out", "."), "out must be a file in a folder that exists, not '.'"),
    ],
)
def test_wrong_options(
    command: Fake, capsys: pytest.CaptureFixture[str], arguments: tuple[str, str], message: str
) -> None:
    assert status(*arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_help_teaches() -> None:
    text = CliRunner().invoke(app, ["tune", "--help"], env={"COLUMNS": "200"}).output
    for part in ("--out", "--ops", "--dtype", "--quick", "--install", "FASTAST_LAUNCH_PARAMETERS"):
        assert part in text
    assert "tune" in CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
