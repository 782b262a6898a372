"""What nvcc's assembler says of the CUDA kernels: no spills and no stack, on every architecture."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90a")


def nvcc() -> str:
    found = shutil.which("nvcc")
    if found is None:
        pytest.skip("needs nvcc")
    if torch.version.cuda is None:
        pytest.skip("this torch is a CPU build: its headers are not for nvcc")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_spills_and_no_stack(source: Path, tmp_path: Path) -> None:
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

    command = [nvcc(), "-std=c++17", "-O3", "-Xptxas=-v", *COMMON_NVCC_FLAGS, "-c", str(source)]
    command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    includes = [*include_paths(), sysconfig.get_paths()["include"]]
    command += [f"-I{folder}" for folder in includes]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA", "-o"]
    done = subprocess.run([*command, str(tmp_path / "x.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    log = done.stdout + done.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log)
    kernels = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", log)
    assert kernels and len(frames) == len(kernels)
    assert {architecture for _, architecture in kernels} == set(ARCHITECTURES)
    for (kernel, architecture), (stack, spilled) in zip(kernels, frames, strict=True):
        assert (stack, spilled) == ("0", "0"), f"{kernel} for sm_{architecture}"
