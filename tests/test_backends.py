"""Which backend runs, forcing one, and life without the compiled extension."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastast_kernels as fk
from fastast_kernels.backends import INSTRUCTION_SETS, OPS, default, select, why_not

ROOT = Path(__file__).parent.parent


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
    )


def test_report() -> None:
    report = fk.backends()
    assert set(report.default["cpu"]) == set(OPS)
    for op, backend in report.default["cpu"].items():
        assert why_not(op, backend, "cpu") is None
        assert op in str(report)
    assert "CUDA device" in report.unavailable["cpu"]["triton"]["merge"]


def test_the_extension_is_there() -> None:
    """Without the compiled kernels most of this suite would test the reference only."""
    if os.environ.get("FASTAST_TEST_UNCOMPILED"):
        pytest.skip("FASTAST_TEST_UNCOMPILED is set: the suite runs on the reference on purpose")
    assert fk.backends().build["extension"] == "loaded", fk.backends().build
    assert default("merge", "cpu") == "cpp"


def test_force_and_restore() -> None:
    with fk.use_backend("reference"):
        assert select("merge", "cpu") == "reference"
        with pytest.raises(ZeroDivisionError), fk.use_backend("reference"):
            raise ZeroDivisionError
        assert fk.backends().forced == "reference"
    assert fk.backends().forced is None


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_impossible_request_raises(name: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device: the request may be possible")
    with (
        pytest.raises(fk.BackendError, match=f"backend '{name}' cannot run: torch finds no CUDA"),
        fk.use_backend(name),
    ):
        pass


def test_who_writes_and_reads_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA C++, where it is asked for or was faster; never what runs on Triton or on a CPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from fastast_kernels import cuda_ops

    backends = sys.modules["fastast_kernels.backends"]
    assert not cuda_ops.runs_in_cuda("merge", torch.ones(1, 2, 8))
    if why_not("merge", "cuda", "cuda") is not None:
        pytest.skip(str(why_not("merge", "cuda", "cuda")))
    with FakeTensorMode():
        x = torch.empty(2, 30, 64, device="cuda", dtype=torch.bfloat16)
    monkeypatch.setattr(backends, "_capability", (9, 0))
    monkeypatch.setitem(backends._DEFAULT, ("merge", "cuda"), "triton")
    assert not cuda_ops.runs_in_cuda("merge", x)
    monkeypatch.setattr(backends, "_forced", "cuda")
    assert cuda_ops.runs_in_cuda("merge", x)
    monkeypatch.setattr(backends, "_forced", "reference")
    assert not cuda_ops.runs_in_cuda("merge", x)
    monkeypatch.setattr(backends, "_forced", None)
    table = {"9.0": {"merge": {"bfloat16": ((2, 30, 64, "cuda"),)}}}
    monkeypatch.setattr(cuda_ops.winners, "measured", lambda: table)
    monkeypatch.setattr(cuda_ops, "_capability", lambda index: (9, 0))
    cuda_ops.winners.winner.cache_clear()
    assert cuda_ops.runs_in_cuda("merge", x)
    assert not cuda_ops.runs_in_cuda("bipartite_match", x)  # was not measured
    monkeypatch.setattr(cuda_ops.torch.compiler, "is_compiling", lambda: True)
    assert not cuda_ops.runs_in_cuda("merge", x)  # by name only
    cuda_ops.winners.winner.cache_clear()


def test_unknown_names() -> None:
    with (
        pytest.raises(
            ValueError, match="backend must be one of reference, cpp, triton, cuda, got 'gpu'"
        ),
        fk.use_backend("gpu"),
    ):
        pass
    with pytest.raises(ValueError, match="op must be one of"):
        why_not("attend", "cpp", "cpu")


def test_environment_variable() -> None:
    code = "import fastast_kernels as fk; print(fk.backends().forced)"
    assert python(code, FASTAST_BACKEND="reference").stdout.strip() == "reference"
    wrong = python(code, FASTAST_BACKEND="fast")
    assert wrong.returncode != 0 and "FASTAST_BACKEND must be one of" in wrong.stderr
    impossible = python(
        "import torch, fastast_kernels as fk;"
        "fk.merge(torch.ones(1, 2, 3), torch.zeros(1, 2, dtype=torch.int32), 1)",
        FASTAST_BACKEND="triton",
    )
    assert (
        "BackendError: backend 'triton' cannot run merge: triton kernels run on a CUDA"
        in impossible.stderr
    )


def test_without_the_extension() -> None:
    """Everything runs on the reference, and backends() says what is missing."""
    code = """
import sys
sys.modules['fastast_kernels._C'] = None  # as if it had not been built
import torch, fastast_kernels as fk
x = torch.randn(2, 10, 4, requires_grad=True)
rows = fk.bipartite_match(x, 3)
h, size, y = fk.merge_add_layer_norm(x, x, rows, 7, None, torch.ones(4), torch.zeros(4))
y.square().sum().backward()
assert fk.unmerge(h, rows).shape == x.shape and x.grad is not None
try:
    with fk.use_backend('cpp'): pass
except fk.BackendError as error:
    print(error)
print(fk.backends())
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "backend 'cpp' cannot run: the compiled extension was not built" in done.stdout
    assert "merge                  reference" in done.stdout


def test_import_is_light() -> None:
    code = """
import sys, torch, fastast_kernels
heavy = {'transformers', 'timm', 'torchaudio', 'fastast', 'triton', 'soundfile'} & set(sys.modules)
assert not heavy, heavy
assert not torch.cuda.is_initialized()
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_layers_point_one_way() -> None:
    """fastast_kernels knows torch and itself, nothing above."""
    for path in (ROOT / "fastast_kernels").rglob("*.py"):
        text = path.read_text()
        for name in ("fastast.", "fastast ", "transformers", "timm", "torchaudio", "nn.Module"):
            assert f"import {name}" not in text and f"from {name}" not in text, (path, name)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set(isa: str) -> None:
    """The op tests pass on each instruction set that this processor has (own process each)."""
    build = fk.backends().build
    if build.get("extension") != "loaded":
        pytest.skip(str(build["extension"]))
    if INSTRUCTION_SETS.index(isa) > INSTRUCTION_SETS.index(str(build["supported_cpu_isa"])):
        pytest.skip(f"this processor has {build['supported_cpu_isa']}, not {isa}")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            "cpp",
            "tests/test_match.py",
            "tests/test_merge.py",
            "tests/test_attention.py",
            "tests/test_features.py",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "FASTAST_CPU_ISA": isa},
    )
    assert done.returncode == 0, done.stdout[-2000:]
    chosen = python("from fastast_kernels import _C; print(_C.cpu_isa())", FASTAST_CPU_ISA=isa)
    assert chosen.stdout.strip() == isa


def test_unknown_instruction_set() -> None:
    done = python("import fastast_kernels", FASTAST_CPU_ISA="sse9")
    names = "portable, avx2, avx512, avx512_bf16, amx"
    assert f"FASTAST_CPU_ISA must be one of {names}, got 'sse9'" in done.stderr
