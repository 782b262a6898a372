"""The table of measured winners: lookup, what a GPU call makes of it, and how it is written."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from fastast.benchmark import kernels as cases
from fastast.benchmark import machine, rows
from fastast.benchmark.case import check
from fastast_kernels import cuda_ops, winners

backends = sys.modules["fastast_kernels.backends"]  # the package has a function of that name
BENCH = Path(__file__).parent.parent / "bench"
BF16, FP32 = torch.bfloat16, torch.float32
ABOUT = {"gpu": "NVIDIA H200", "commit": "abc", "date": "d", "torch": "2.11.0", "triton": "3.6.0"}


def table(ops: dict[str, Any], capability: str = "9.0") -> dict[str, Any]:
    return {"version": 1, "measured": {capability: {**ABOUT, "ops": ops}}}


def forget() -> None:
    winners.measured.cache_clear()
    winners.winner.cache_clear()


@pytest.fixture
def ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Have a table of these ops in place of the one that ships."""
    file = tmp_path / "shipped.json"
    monkeypatch.setattr(winners, "SHIPPED", file)

    def put(ops: dict[str, Any] | None = None, capability: str = "9.0") -> None:
        content = {"version": 1, "measured": {}} if ops is None else table(ops, capability)
        file.write_text(json.dumps(content))
        forget()

    yield put
    forget()


# --- lookup ---------------------------------------------------------------------------------------


def test_the_shipped_table_is_one() -> None:
    found = winners.read(winners.SHIPPED)
    assert set(found) == {"version", "measured"}
    project = (BENCH.parent / "pyproject.toml").read_text()
    assert f'"{winners.SHIPPED.name}"' in project  # or an installed package would not have it


def test_the_nearest_shape_decides(ship: Callable[..., None]) -> None:
    ship({"merge": {"bfloat16": [[1, 1214, 768, "triton"], [64, 1214, 768, "cuda"]]}})
    for batch, expected in ((1, "triton"), (7, "triton"), (9, "cuda"), (500, "cuda")):
        assert winners.winner("merge", "9.0", BF16, batch, 1214, 768) == expected
    # 8 is as many factors from 1 as from 64: the smaller shape decides, in whatever order.
    assert winners.winner("merge", "9.0", BF16, 8, 1214, 768) == "triton"
    ship({"merge": {"bfloat16": [[64, 1214, 768, "cuda"], [1, 1214, 768, "triton"]]}})
    assert winners.winner("merge", "9.0", BF16, 8, 1214, 768) == "triton"
    assert winners.winner("merge", "9.0", BF16, 0, 0, 768) == "triton"


def test_factors_of_every_dimension_count(ship: Callable[..., None]) -> None:
    ship({"merge": {"float32": [[8, 1000, 768, "triton"], [8, 100, 96, "cuda"]]}})
    assert winners.winner("merge", "9.0", FP32, 8, 200, 96) == "cuda"
    assert winners.winner("merge", "9.0", FP32, 8, 200, 768) == "triton"
    assert winners.winner("merge", "9.0", FP32, 8, 300, 384) == "triton"


def test_nothing_is_said_of_what_was_not_measured(ship: Callable[..., None]) -> None:
    ship({"merge": {"bfloat16": [[1, 1214, 768, "cuda"]]}})
    assert winners.winner("merge", "9.0", BF16, 1, 1214, 768) == "cuda"
    assert winners.winner("merge", "9.0", FP32, 1, 1214, 768) is None
    assert winners.winner("unmerge", "9.0", BF16, 1, 1214, 768) is None
    assert winners.winner("merge", "8.0", BF16, 1, 1214, 768) is None


def test_a_backward_has_its_own_entries_or_its_forwards(ship: Callable[..., None]) -> None:
    ship({"merge": {"bfloat16": [[1, 64, 64, "cuda"]], "float32": [[1, 64, 64, "cuda"]]},
          "merge_backward": {"bfloat16": [[1, 64, 64, "triton"]]}})  # fmt: skip
    assert winners.winner("merge_backward", "9.0", BF16, 1, 64, 64) == "triton"
    assert winners.winner("merge_backward", "9.0", FP32, 1, 64, 64) == "cuda"


def test_the_report_says_who_wins_how_often(ship: Callable[..., None]) -> None:
    ship({"merge": {"bfloat16": [[1, 9, 8, "cuda"], [2, 9, 8, "cuda"]],
                    "float32": [[1, 9, 8, "triton"]]},
          "merge_backward": {"float32": [[1, 9, 8, "triton"]]}})  # fmt: skip
    said = winners.summary("merge", "9.0")
    backward = "backward triton (1 of 1 measured shapes)"
    assert said == f"cuda (2 of 3 measured shapes), {backward}"
    assert winners.summary("merge", "8.0") is None and winners.summary("unmerge", "9.0") is None
    report = backends.Report(
        devices=("cpu", "cuda"),
        default={"cpu": {"merge": "cpp"}, "cuda": {"merge": "triton", "attention": "triton"}},
        unavailable={"cpu": {}, "cuda": {}}, forced=None, measured={"merge": "cuda (3 of 4)"},
    )  # fmt: skip
    lines = str(report).splitlines()  # the table's word in place of the default
    assert [" ".join(line.split()) for line in lines if "merge" in line] == [
        "merge cpp", "merge cuda (3 of 4)",
    ]  # fmt: skip
    assert "  attention              triton" in lines


# --- dispatch -------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Call what runs behind an op on a GPU of 9.0 with both kernels; says whose it was."""
    called = []

    class Recorder(ModuleType):
        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_: called.append((self.__name__, name))

    monkeypatch.setattr(torch.ops, "fastast_cuda", Recorder("cuda"))
    monkeypatch.setattr(sys.modules["fastast_kernels"], "triton_kernels", Recorder("triton"), False)
    monkeypatch.setattr(backends, "_forced", None)
    monkeypatch.setattr(backends, "_extension_error", None)
    monkeypatch.setattr(backends, "_cuda_architectures", ["8.0+PTX", "9.0a"])
    monkeypatch.setattr(backends, "_triton_error", None)
    monkeypatch.setattr(backends, "_capability", (9, 0))
    gpus = {(op, "cuda"): "triton" for op in backends.OPS}
    monkeypatch.setattr(backends, "_DEFAULT", {**backends._DEFAULT, **gpus})
    monkeypatch.setattr(cuda_ops, "_capability", lambda index: (9, 0))

    def run(name: str, *args: Any) -> str:
        called.clear()
        cuda_ops._on_gpu(name)(*args)
        ((where, what),) = called
        assert what == name
        return where

    return run


def tensor(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_an_empty_table_is_not_looked_into(
    ship: Callable[..., None], gpu: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def looked(*_: Any) -> None:
        raise AssertionError("something was looked up")

    ship()
    monkeypatch.setattr(cuda_ops, "_capability", looked)
    for name in cuda_ops._IMPLEMENTED:
        assert gpu(name, *[None] * 9) == "triton"
    ship({"merge": {"bfloat16": [[1, 1, 8, "cuda"]]}})
    with pytest.raises(AssertionError, match="looked up"):
        gpu("merge", tensor(1, 1, 8))


def test_the_winner_runs(ship: Callable[..., None], gpu: Callable[..., str]) -> None:
    ship({"merge": {"bfloat16": [[1, 1214, 768, "triton"], [64, 1214, 768, "cuda"]]}})
    assert gpu("merge", tensor(64, 734, 768), tensor(64, 734), 700, None) == "cuda"
    assert gpu("merge", tensor(1, 1214, 768), tensor(1, 1214), 700, None) == "triton"
    assert gpu("merge", tensor(64, 734, 768, dtype=FP32), None, 700, None) == "triton"
    assert gpu("attention", tensor(64, 12, 734, 64)) == "triton"  # only one kernel of it


def test_tokens_are_counted_before_merging(
    ship: Callable[..., None], gpu: Callable[..., str]
) -> None:
    """The first tensor of some ops has rows after merging, which the table does not go by."""
    ship({op: {"bfloat16": [[2, 100, 64, "triton"], [2, 1000, 64, "cuda"]]}
          for op in winners.OPS})  # fmt: skip
    rows_, tokens, assignment = tensor(2, 100, 64), tensor(2, 1000, 64), tensor(2, 1000)
    arguments = {
        "merge_backward": (rows_, assignment, None, None),
        "unmerge": (rows_, assignment),
        "unmerge_backward": (tokens, assignment, 100),
        "merge_add_layer_norm": (tokens, tokens, assignment, 100, None, None, None, 1e-6),
        "merge_add_layer_norm_backward": (*[rows_] * 3, *[None] * 3, assignment, None, None),
        "add_layer_norm_backward": (tokens,) * 3,
        "key_metric": (tensor(2, 12, 1000, 64),),
        "match_keys": (tensor(2, 12, 1000, 64), 40, True, True),
        "bipartite_match": (tokens, 40, True, True),
    }
    for name, args in arguments.items():
        assert gpu(name, *args) == "cuda", name
    assert gpu("merge_backward", rows_, tensor(2, 100), None, None) == "triton"


def test_what_cuda_cannot_run_stays_with_triton(
    ship: Callable[..., None], gpu: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ship({"merge": {"bfloat16": [[1, 64, 64, "cuda"]]}})
    assert gpu("merge", tensor(1, 64, 64)) == "cuda"
    assert gpu("merge", tensor(1, 64, 60)) == "triton"
    assert gpu("merge", tensor(1, 64, 8192)) == "triton"
    monkeypatch.setattr(backends, "_cuda_architectures", ["10.0"])
    assert gpu("merge", tensor(1, 64, 64)) == "triton"
    monkeypatch.setattr(backends, "_cuda_architectures", [])
    assert gpu("merge", tensor(1, 64, 64)) == "triton"


def test_a_forced_backend_comes_first(
    ship: Callable[..., None], gpu: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ship({"merge": {"bfloat16": [[1, 64, 64, "cuda"]], "float32": [[1, 64, 64, "triton"]]}})
    assert gpu("merge", tensor(1, 64, 64)) == "cuda"
    monkeypatch.setattr(backends, "_forced", "triton")
    assert gpu("merge", tensor(1, 64, 64)) == "triton"
    monkeypatch.setattr(backends, "_forced", "cuda")
    assert gpu("merge", tensor(1, 64, 64, dtype=FP32)) == "cuda"
    with pytest.raises(backends.BackendError, match="no cuda kernel of attention"):
        gpu("attention", tensor(1, 12, 64, 64))


@pytest.mark.usefixtures("gpu")
def test_the_report_asks_the_table_of_this_gpu(
    ship: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ship({"merge": {"float32": [[1, 9, 8, "cuda"], [2, 9, 8, "triton"], [3, 9, 8, "cuda"]]}})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert backends._measured() == {"merge": "cuda (2 of 3 measured shapes)"}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert backends._measured() == {}
    ship({"merge": {"float32": [[1, 9, 8, "cuda"]]}}, "8.0")
    assert backends._measured() == {"merge": "cuda (1 of 1 measured shapes)"}
    monkeypatch.setattr(backends, "_cuda_architectures", [])
    assert backends._measured() == {}


def test_without_triton_cuda_runs(
    ship: Callable[..., None], gpu: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ship()
    monkeypatch.setattr(backends, "_triton_error", "triton is not installed")
    fastest = {(op, "cuda"): backends._fastest(op, "cuda") for op in backends.OPS}
    monkeypatch.setattr(backends, "_DEFAULT", fastest)
    assert gpu("merge", tensor(1, 64, 64)) == "cuda"
    assert backends.default("attention", "cuda") == "reference"
    assert backends.select("merge", "cuda", BF16, 60) == "reference"
    monkeypatch.setattr(backends, "_cuda_architectures", ["8.0"])
    assert backends.default("merge", "cuda") == "reference"  # a build without code for this GPU


@pytest.mark.parametrize(
    ("built", "runs"),
    [
        (["8.0+PTX"], [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]),
        (["8.6"], [(8, 6), (8, 9)]),
        (["9.0a"], [(9, 0)]),
        (["8.0", "10.0a"], [(8, 0), (8, 6), (8, 9), (10, 0)]),
        ([], []),
    ],
)
def test_gpus_that_a_build_is_for(
    built: list[str], runs: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_cuda_architectures", built)
    there_are = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
    assert [gpu for gpu in there_are if backends.built_for(gpu)] == runs


# --- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "the table must be an object, got []"),
        ({"version": 2, "measured": {}}, "version must be 1, got 2"),
        ({"version": 1}, "measured must be an object, got None"),
        (table({}, "sm_90"), "a compute capability must be like '9.0', got 'sm_90'"),
        ({"version": 1, "measured": {"9.0": {"ops": {}}}}, "gpu of 9.0 must be a string, got None"),
        (table({"mergee": {}}), "an op of 9.0 must be one of .*merge_backward.*, got 'mergee'"),
        (table({"attention": {}}), "must be one of .*, got 'attention'"),
        (table({"merge": {"float64": []}}), "one of float32, bfloat16, float16, got 'float64'"),
        (table({"merge": {"float32": []}}), r"merge in float32 of 9.0 must be a list of \[B, N, D"),
        (table({"merge": {"float32": [[1, 2, "cuda"]]}}), r"must be \[B, N, D, winner\], got \[1,"),
        (table({"merge": {"float32": [[1, 0, 8, "cuda"]]}}), r"positive whole .*, got \[1, 0, 8\]"),
        (table({"merge": {"float32": [[1, 2, 8, "cpp"]]}}), "one of triton, cuda, got 'cpp'"),
        (table({"merge": {"float32": [[1, 2, 8, "cuda"]] * 2}}), r"\[1, 2, 8\] is there twice"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, wrong: Any, message: str) -> None:
    file = tmp_path / "t.json"
    file.write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match=rf"t\.json is no table of winners: .*{message}".replace(
        "[]", r"\[\]"
    )):  # fmt: skip
        winners.read(file)


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(ValueError, match=r"t\.json is no table of winners: Expecting"):
        winners.read(tmp_path / "t.json")


def ops_of(capability: str, file: Path) -> dict[str, Any]:
    return winners.read(file)["measured"][capability]["ops"]


def test_record_keeps_what_is_of_the_same_origin(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    merge = {"merge": {"bfloat16": [(2, 9, 8, "cuda"), (1, 9, 8, "triton")]}}
    winners.record(file, "9.0", ABOUT, merge)
    winners.record(file, "8.0", ABOUT, {"unmerge": {"float32": [(1, 9, 8, "cuda")]}})
    winners.record(file, "9.0", {**ABOUT, "date": "e"}, {"merge": {"float32": [(1, 9, 8, "cuda")]}})
    assert ops_of("9.0", file)["merge"] == {
        "bfloat16": [[1, 9, 8, "triton"], [2, 9, 8, "cuda"]], "float32": [[1, 9, 8, "cuda"]],
    }  # fmt: skip
    assert winners.read(file)["measured"]["9.0"]["date"] == "e"
    assert '        [1, 9, 8, "triton"],\n' in file.read_text().replace("  " * 6, "        ")
    winners.record(file, "9.0", {**ABOUT, "commit": "new"}, {"unmerge": merge["merge"]})
    assert set(ops_of("9.0", file)) == {"unmerge"}  # those of the old commit are of other kernels
    assert set(ops_of("8.0", file)) == {"unmerge"}


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "t.json"
    winners.record(file, "9.0", ABOUT, {"merge": {"float32": [(1, 9, 8, "cuda")]}})
    before = file.read_bytes()
    with pytest.raises(ValueError, match="got 'cpp'"):
        winners.record(file, "9.0", ABOUT, {"merge": {"float32": [(1, 9, 8, "cpp")]}})
    assert file.read_bytes() == before

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(winners.os, "replace", killed)
        winners.record(file, "9.0", ABOUT, {"merge": {"float32": [(1, 9, 8, "triton")]}})
    assert file.read_bytes() == before
    winners.record(file, "9.0", ABOUT, {"merge": {"float32": [(1, 9, 8, "triton")]}})
    assert file.read_bytes() != before and [f.name for f in tmp_path.iterdir()] == ["t.json"]


# --- from a benchmark run -------------------------------------------------------------------------

CONTEXT = {
    "device": "NVIDIA H200", "versions": "fastast 0.1, torch 2.11.0, triton 3.6.0, Python 3.11",
    "commit": "abc", "date": "2026-01-01 10:00",
}  # fmt: skip


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.delitem(sys.modules, "report", raising=False)
    spec = importlib.util.spec_from_file_location("bench_winners", BENCH / "winners.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def time_of(
    kernel: str, provider: str, ms: float, spread: float = 0.01, mode: str = "forward",
    device: str = "NVIDIA H200", **config: Any,
) -> rows.Row:  # fmt: skip
    width = {"C": 64} if kernel == "match" else {"D": 768}
    config = {"B": 64, "N": 1214, **width, "r": 40, "dtype": "bfloat16", "threads": 8, **config}
    low, high = ms * (1 - spread / 2), ms * (1 + spread / 2)
    return rows.Row(
        kernel, provider, mode, "ms", "N", float(config["N"]), ms, low, high, rows.dumps(config),
        **{**CONTEXT, "device": device},
    )  # fmt: skip


def both(kernel: str, triton: float, cuda: float, suffix: str = "", **of: Any) -> list[rows.Row]:
    times = {"fused triton": triton, "fused cuda": cuda}
    return [time_of(kernel, name + suffix, ms, **of) for name, ms in times.items()]


def run_of(file: Path, found: list[rows.Row], context: dict[str, str] | None = None) -> Path:
    about = {**CONTEXT, "capability": "9.0"} if context is None else context
    content = {"fastast": {"rows": [asdict(r) for r in found]}, "machine_info": {"fastast": about}}
    text = json.dumps(content).encode()
    file.write_bytes(gzip.compress(text) if file.suffix == ".gz" else text)
    return file


@pytest.mark.parametrize("name", ["ops.json", "ops.json.gz"])
def test_a_run_becomes_a_table(
    name: str, tmp_path: Path, command: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [
        *both("merge", 1.0, 0.5),
        *both("merge", 1.0, 2.0, "+graph"),  # this is what counts: no launch by the host in it
        *both("merge", 1.0, 0.5, B=1),
        time_of("merge", "fused", 0.1, B=1),
        *both("merge", 1.0, 0.8, mode="backward", dtype="float32"),
        *both("match", 1.0, 0.8, "+graph"),
        *both("merge_add_layer_norm", 1.0, 2.0),
        *both("merge_add_layer_norm", 1.0, 0.5, r=0),
        *both("tome_step", 1.0, 0.5, C=64),
        time_of("attention", "fused", 1.0),
        time_of("merge", "fused triton", 1.0, N=99),
    ]
    out = tmp_path / "winners.json"
    command.main([str(run_of(tmp_path / name, found)), "--out", str(out)])
    measured = winners.read(out)["measured"]["9.0"]
    assert measured["ops"] == {
        "add_layer_norm": {"bfloat16": [[64, 1214, 768, "cuda"]]},
        "bipartite_match": {"bfloat16": [[64, 1214, 64, "cuda"]]},
        "merge": {"bfloat16": [[1, 1214, 768, "cuda"], [64, 1214, 768, "triton"]]},
        "merge_add_layer_norm": {"bfloat16": [[64, 1214, 768, "triton"]]},
        "merge_backward": {"float32": [[64, 1214, 768, "cuda"]]},
    }
    assert {k: measured[k] for k in winners.ABOUT} == {
        "gpu": "NVIDIA H200", "commit": "abc", "date": "2026-01-01 10:00", "torch": "2.11.0",
        "triton": "3.6.0",
    }  # fmt: skip
    assert "CUDA C++ is faster in 4 of 6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cuda", "spread", "expected"),
    [
        (0.985, 0.01, "cuda"),  # quartiles apart
        (0.985, 0.04, "triton"),  # they overlap, and 1.5 % is little
        (0.96, 0.08, "cuda"),  # they overlap, and 4 % is more than noise
        (0.96, 0.2, "triton"),  # of times that are noisy it is not
        (1.0, 0.0, "triton"),
        (1.1, 0.01, "triton"),
    ],
)
def test_a_lead_has_to_show(cuda: float, spread: float, expected: str, command: ModuleType) -> None:
    (duel,) = command.duels(both("merge", 1.0, cuda, spread=spread))
    assert duel.winner == expected


def test_a_shape_measured_twice_has_to_be_won_twice(command: ModuleType) -> None:
    for first, second, expected in ((0.5, 2, "triton"), (2, 0.5, "triton"), (0.5, 0.5, "cuda")):
        found = command.duels([*both("merge", 1, first), *both("merge", 1, second, r=10)])
        assert command.table_of(found) == {"merge": {"bfloat16": [(64, 1214, 768, expected)]}}, (
            first,
            second,
        )


CPU_NAME = "a chip, 2 cores, avx2"


@pytest.mark.parametrize(
    ("found", "context", "message"),
    [
        (both("merge", 1, 2, device=CPU_NAME), {"device": CPU_NAME}, "this run is of a CPU"),
        (both("merge", 1, 2), CONTEXT, "no compute capability of NVIDIA H200"),
        (both("merge", 1, 2), {}, "rows must be of the one GPU that machine_info names, None"),
        (both("merge", 1, 2, device=""), {"device": ""}, "rows must be of the one GPU"),
        ([*both("merge", 1, 2), *both("merge", 1, 2, device="T4")], CONTEXT, "H200', 'T4'"),
        ([], None, "has no rows of this suite"),
        ([time_of("merge", "fused", 1)], None, 'no op was measured as both "fused triton" and'),
    ],
)
def test_runs_that_say_nothing_of_a_gpu_are_refused(
    found: list[rows.Row], context: dict[str, str] | None, message: str, tmp_path: Path,
    command: ModuleType,
) -> None:  # fmt: skip
    out = tmp_path / "winners.json"
    message = rf"no winners in .*ops\.json: .*{message}"
    with pytest.raises(SystemExit, match=message):
        command.main([str(run_of(tmp_path / "ops.json", found, context)), "--out", str(out)])
    assert not out.exists()


def test_a_gpus_context_has_its_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    context = machine.context("cuda")
    assert (context["device"], context["capability"]) == ("NVIDIA H200", "9.0")
    assert "capability" not in machine.context("cpu")


# --- what the benchmark measures ------------------------------------------------------------------


def test_both_are_measured_where_there_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(type="cuda")
    config = {"B": 1, "N": 9, "D": 64, "C": 64, "dtype": "bfloat16"}
    monkeypatch.setattr(cases, "why_not", lambda op, *_: "no" if op == "attention" else None)
    for kernel in ("merge", "match", "tome_step", "merge_add_layer_norm", "add_layer_norm"):
        assert cases._forced_backends(kernel, config, gpu) == ("triton", "cuda")
    assert cases._forced_backends("attention", config, gpu) == ()
    assert cases._forced_backends("fbank", config, gpu) == ()
    assert cases._forced_backends("merge", config, torch.device("cpu")) == ()
    widths = []
    monkeypatch.setattr(cases, "why_not", lambda *args: widths.append(args[3:]))
    cases._forced_backends("tome_step", {**config, "D": 12}, gpu)
    assert set(widths) == {(BF16, 64), (BF16, 12)}


@pytest.mark.parametrize("kernel", ["merge", "merge_add_layer_norm"])
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_a_forced_entry_is_forced_in_both_directions(
    kernel: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU's backends, as there is no GPU: forward and backward run under the same one."""
    monkeypatch.setattr(cases, "_forced_backends", lambda *_: ("reference", "cpp"))
    monkeypatch.setattr(cases, "MOST_SETS", 2)
    if backends.why_not("merge", "cpp", "cpu") is not None:
        pytest.skip(str(backends.why_not("merge", "cpp", "cpu")))
    config = {"B": 2, "N": 33, "D": 24, "r": 5, "dtype": "float32", "threads": 1}
    seen: list[str | None] = []
    for op in ("merge", "merge_add_layer_norm", "add_layer_norm"):
        monkeypatch.setattr(cases.kernels, op, recorded(getattr(cases.kernels, op), seen))
    monkeypatch.setattr(torch.autograd, "grad", recorded(torch.autograd.grad, seen))
    case = cases.CASES[kernel](config, torch.device("cpu"), False, mode)
    check(case)
    by = {case.label(entry): entry for entry in case.entries}
    wanted = ["fused reference", "fused cpp"]
    if kernel == "merge_add_layer_norm" and mode == "forward":
        wanted += ["fused reference r=0", "fused cpp r=0"]
    for label in wanted:
        seen.clear()
        with torch.enable_grad():
            entry, inputs = by[label], case.inputs[0]
            entry.call(*(inputs if entry.prepare is None else entry.prepare(inputs)))
        assert seen == [label.split()[1]] * (2 if mode == "backward" else 1), label
    assert backends.forced() is None


def recorded(call: Callable[..., Any], seen: list[str | None]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        seen.append(backends.forced())
        return call(*args, **kwargs)

    return run
