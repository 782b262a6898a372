"""setup.py: what it decides to build, where nothing can be built, and what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def setup_name(**environment: str) -> subprocess.CompletedProcess[str]:
    """``python setup.py --name``: decides on the extension, and builds nothing."""
    return subprocess.run(
        [sys.executable, "setup.py", "--name"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "CUDA_HOME": "", "CUDA_PATH": "", **environment},
    )


def fake_toolkit(folder: Path, release: str) -> Path:
    """A toolkit, and a wrapper called nvcc in a folder of its own; returns the wrapper's folder."""
    toolkit = folder / "toolkit"
    (toolkit / "bin").mkdir(parents=True)
    wrapper = folder / "wrapper" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(
        "#!/bin/sh\n"
        f"if [ \"$1\" = --version ]; then echo 'Cuda compilation tools, release {release}, V0';\n"
        f"else echo '#$ TOP={toolkit}/bin/..' >&2; fi\n"
    )
    wrapper.chmod(0o755)
    return wrapper.parent


def test_none() -> None:
    done = setup_name(FASTAST_BUILD="none", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "FASTAST_BUILD=none: pure Python, nothing is compiled" in done.stdout


def test_no_compiler() -> None:
    done = setup_name(FASTAST_BUILD="auto", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler (no-such-compiler not found; set CXX); building nothing" in done.stdout
    insisted = setup_name(FASTAST_BUILD="cpu", CXX="no-such-compiler")
    assert insisted.returncode != 0
    assert "FASTAST_BUILD=cpu, but no C++ compiler" in insisted.stderr


def test_unknown_choice() -> None:
    done = setup_name(FASTAST_BUILD="gpu")
    assert done.returncode != 0
    assert "FASTAST_BUILD must be auto, cpu, cuda or none, got 'gpu'" in done.stderr


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is a CPU build")
def test_toolkit_behind_a_wrapper(tmp_path: Path) -> None:
    version = str(torch.version.cuda)
    path = f"{fake_toolkit(tmp_path, version)}:{os.environ['PATH']}"
    done = setup_name(FASTAST_BUILD="cuda", CXX="cat", PATH=path)
    assert done.returncode == 0, done.stderr
    assert f"building C++ and CUDA (8.0+PTX;9.0a, {tmp_path / 'toolkit'})" in done.stdout


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is a CPU build")
def test_toolkit_of_another_version(tmp_path: Path) -> None:
    path = f"{fake_toolkit(tmp_path, '9.2')}:{os.environ['PATH']}"
    done = setup_name(FASTAST_BUILD="auto", CXX="cat", PATH=path)
    assert done.returncode == 0, done.stderr
    assert f"nvcc is CUDA 9.2 and torch is CUDA {torch.version.cuda}" in done.stdout
    assert "building C++ only" in done.stdout
