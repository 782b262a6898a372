"""What runs here: versions, processor, GPU, kernels and why not the others. For bug reports.

Also `python -m fastast.env [--json]`. Nothing here raises where a library is missing or broken: the
report says so instead.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

__all__ = ["environment", "format_environment", "hardware"]

PACKAGES = (
    "fastast",
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "huggingface_hub",
    "soundfile",
    "soxr",
    "transformers",
    "timm",
    "accelerate",
    "torchaudio",
)
# The instruction sets that change which CPU kernel is fastest.
INSTRUCTION_SETS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    from fastast import __version__

    found["fastast"] = __version__  # of the code that runs, whatever else is installed
    return found


def _cpu() -> dict[str, Any]:
    model, flags = platform.processor() or platform.machine(), set()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        elif key.strip() == "flags":
            flags = set(value.split())
            break
    return {
        "model": model,
        "cores": os.cpu_count(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
    }


def _torch() -> dict[str, Any]:
    import torch

    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            gpus.append(
                {
                    "name": device.name,
                    "capability": f"{device.major}.{device.minor}",
                    "memory_gib": round(device.total_memory / 2**30, 1),
                }
            )
    return {
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda_build": torch.version.cuda,
        "gpus": gpus,
    }


def _kernels() -> dict[str, Any]:
    from fastast_kernels import backends

    return asdict(backends())


def hardware(device: Any) -> str:
    """The processor or GPU behind a torch device, by name."""
    if device.type == "cuda":
        import torch

        return str(torch.cuda.get_device_name(device))
    return str(_cpu()["model"])


def environment() -> dict[str, Any]:
    """Versions, processor, GPUs, kernels and settings as plain values."""
    report: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": _versions(),
        "cpu": _cpu(),
        "settings": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("FASTAST_", "OMP_", "MKL_NUM", "TRITON_INTERPRET", "CUDA_VISIBLE"))
        },
    }
    for name, probe in (("torch", _torch), ("kernels", _kernels)):
        try:
            report[name] = probe()
        except Exception as error:  # a broken install is what this report is for
            report[name] = {"error": f"{type(error).__name__}: {error}"}
    return report


def format_environment(report: dict[str, Any]) -> str:
    """The report as indented lines."""
    lines: list[str] = []

    def add(name: str, value: Any, depth: int) -> None:
        indent = "  " * depth
        if isinstance(value, dict) and value:
            lines.append(f"{indent}{name}:")
            for key, inner in value.items():
                add(str(key), inner, depth + 1)
        elif isinstance(value, list | tuple):
            lines.append(f"{indent}{name}: {', '.join(str(v) for v in value) or 'none'}")
        else:
            lines.append(f"{indent}{name}: {'none' if value in (None, {}) else value}")

    for key, value in report.items():
        add(key, value, 0)
    return "\n".join(lines)


if __name__ == "__main__":
    found = environment()
    as_json = "--json" in sys.argv[1:]
    print(json.dumps(found, indent=2, default=str) if as_json else format_environment(found))
