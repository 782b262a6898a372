"""Triton's kernels without a GPU: the tests of the ops again, in its interpreter, in a process of
their own, because Triton decides at import whether it compiles or interprets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastast_kernels as fk
from fastast_kernels.backends import INTERPRETED, OPS

ROOT = Path(__file__).parent.parent
OP_TESTS = ("test_shapes", "test_merge", "test_match", "test_attention", "test_registration")

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="this process is the one that such a test starts"),
    pytest.mark.timeout(900),
]


def interpreted(*arguments: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("triton")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "FASTAST_BACKEND": "triton",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", OP_TESTS)
def test_in_the_interpreter(name: str) -> None:
    # What needs CPU kernels says so by its name.
    options = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    options += ["-k", "not cpu_kernels"]
    done = interpreted(*options, f"tests/{name}.py")
    assert done.returncode == 0, done.stdout[-3000:]
    # Without the interpreter these would pass too, on other kernels.
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout[-3000:]


def test_the_interpreter_runs_the_kernels() -> None:
    """Triton's are behind every op there, and a broken one shows."""
    code = """
import torch, fastast_kernels as fk
from fastast_kernels import backends, triton_kernels
from fastast_kernels.triton_kernels import merge
assert set(fk.backends().default["cpu"].values()) == {"triton"}, fk.backends()
x, rows = torch.randn(1, 4, 8), torch.tensor([[0, 1, 1, 2]], dtype=torch.int32)
assert torch.allclose(fk.merge(x, rows, 3)[0][0, 1], x[0, 1:3].mean(0))
triton_kernels.merge = lambda x, *_: (x[:, :3] * 2, x[:, :3, 0] * 0)
print(torch.equal(fk.merge(x, rows, 3)[0], x[:, :3] * 2))
"""
    done = interpreted("-c", code)
    assert done.stdout.strip() == "True", done.stderr[-2000:]


def test_a_model_in_the_interpreter() -> None:
    """A merging AST, forward and backward, on the kernels and on the reference."""
    code = """
import torch, fastast, fastast_kernels as fk
config = dict(embed_dim=32, depth=2, num_heads=2, num_mel_bins=32, target_length=48, num_classes=3)
model = fastast.patch(fastast.AST(fastast.ASTConfig(**config)), r=2)
x = torch.randn(2, 48, 32)
def run():
    model.zero_grad()
    logits = model(x)
    logits.square().sum().backward()
    return [logits.detach()] + [p.grad.clone() for p in model.parameters()]
fused = run()
with fk.use_backend("reference"):
    plain = run()
for a, b in zip(fused, plain, strict=True):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
print("same")
"""
    done = interpreted("-c", code)
    assert done.stdout.strip() == "same", done.stderr[-2000:]


def test_what_runs_on_a_gpu_is_triton() -> None:
    from fastast_kernels.backends import default, select, why_not

    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is one: the tests of the ops run there")
    assert {default(op, "cuda") for op in OPS} == {"triton"}
    assert select("attention", "cuda", torch.float64, 64) == "reference"
    assert select("attention", "cuda", torch.bfloat16, 256) == "reference"
    assert select("merge", "cuda", torch.float64, 768) == "triton"
    assert "float64" in str(why_not("bipartite_match", "triton", "cuda", torch.float64))
    assert "at most 128, not 160" in str(why_not("attention", "triton", "cuda", None, 160))


def test_an_old_gpu_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = sys.modules["fastast_kernels.backends"]
    if backends._triton_error is not None:
        pytest.skip(backends._triton_error)
    monkeypatch.setattr(backends, "_capability", (7, 5))
    assert backends.default("merge", "cuda") == "reference"
    reason = str(backends.why_not("merge", "triton", "cuda"))
    assert reason == "triton kernels need a GPU of compute capability 8.0 or newer"
    monkeypatch.setattr(backends, "_capability", (12, 0))
    assert backends.default("merge", "cuda") == "triton"


def test_fake_tensors_on_a_gpu() -> None:
    """What torch.compile and torch.export see of a GPU: shapes and layouts, no kernel."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        qkv = torch.empty(2, 30, 3, 4, 16, device="cuda", dtype=torch.bfloat16)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = torch.empty(2, 30, 64, device="cuda", dtype=torch.bfloat16)
        weight = torch.empty(64, device="cuda")
        rows = fk.bipartite_match(fk.key_metric(k), 5)
        h, size, log_size, y = fk.merge_add_layer_norm(
            x, x, rows, 25, None, weight, weight, return_log_size=True
        )
        out, lse = fk.attention_with_lse(q, k, v)
        assert rows.shape == (2, 30) and h.shape == y.shape == (2, 25, 64)
        assert size.shape == log_size.shape == (2, 25) and str(size.device) == "cuda:0"
        assert out.transpose(1, 2).is_contiguous() and lse.dtype == torch.float32
        assert fk.attention_column_sums(q, k, lse).shape == (2, 4, 30)


def test_without_triton() -> None:
    """Where it is not installed a GPU runs CUDA C++ if that was built, else the reference."""
    code = """
import sys
sys.modules["triton"] = None
import torch, fastast, fastast_kernels as fk
from fastast_kernels.backends import OPS, default, select, why_not
for op in OPS:
    assert default(op, "cuda") == ("reference" if why_not(op, "cuda", "cuda") else "cuda"), op
assert select("merge", "cuda", torch.float64, 768) == "reference"
assert select("merge", "cuda", torch.float32, 12) == "reference"
assert default("attention", "cuda") == "reference"
print(why_not("merge", "triton", "cuda"))
"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.stdout.strip() == "triton is not installed", done.stderr[-2000:]
