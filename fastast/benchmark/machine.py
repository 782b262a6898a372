"""The machine that a number was measured on: its name, its ceilings, and who else is using it."""

from __future__ import annotations

import datetime
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastast
from fastast.benchmark.timing import interleaved, quartiles, synchronize, warm_up

# Other processes that take more cores than this make every number here worth less.
BUSY_CORES = 0.2


def device_name(device: torch.device | str) -> str:
    """The GPU's name, or the processor's with its cores and the kernels' instruction set."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    from fastast.env import environment
    from fastast_kernels.backends import build_information

    cpu = environment()["cpu"]
    name = " ".join(cpu["model"].replace("(R)", "").replace("(TM)", "").split())
    return f"{name}, {cpu['cores']} cores, {build_information().get('cpu_isa', 'no extension')}"


def versions() -> str:
    """FastAST, torch, Triton and Python in a few words."""
    try:
        import triton

        compiler = f", triton {triton.__version__}"
    except ImportError:
        compiler = ""
    return (
        f"fastast {fastast.__version__}, torch {torch.__version__}{compiler}, "
        f"Python {platform.python_version()}"
    )


def commit() -> str:
    """The commit of the source tree that runs, ``-dirty`` with uncommitted changes; or ``""``.

    The tables and pictures that a benchmark run itself writes do not make a tree dirty.
    """
    folder = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short", "HEAD")
    written = (
        ":!bench/results", ":!assets", ":!README.md", ":!docs", ":!fastast_kernels/winners.json",
    )  # fmt: skip
    return f"{head}-dirty" if head and git("status", "--porcelain", "--", ".", *written) else head


def context(device: torch.device | str) -> dict[str, str]:
    """What every row of a table says of where it comes from, and a GPU's compute capability."""
    now = datetime.datetime.now(datetime.timezone.utc)
    gpu: dict[str, str] = {}
    if torch.device(device).type == "cuda":
        gpu["capability"] = "{}.{}".format(*torch.cuda.get_device_capability(device))
    return {
        "device": device_name(device),
        "versions": versions(),
        "commit": commit(),
        "date": now.strftime("%Y-%m-%d %H:%M"),
        **gpu,
    }


def _busy_seconds() -> float | None:
    """Core-seconds that all processes have used since boot; None where /proc does not say."""
    try:
        line = Path("/proc/stat").read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, line.split()[1:9])
    return (user + nice + system + irq + softirq + steal) / 100


def others_busy(seconds: float = 0.5) -> float:
    """Cores that are in use while this process sleeps: 0 on a quiet machine."""
    before = _busy_seconds()
    time.sleep(seconds)
    after = _busy_seconds()
    return 0.0 if before is None or after is None else (after - before) / seconds


def _copy(device: torch.device) -> tuple[Any, float]:
    numel = 1 << (30 if device.type == "cuda" else 26)
    source = torch.empty(numel, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2.0 * numel * source.element_size()


def _matmul(device: torch.device, dtype: torch.dtype, m: int, n: int, k: int) -> tuple[Any, float]:
    # Random data: a GPU multiplies zeros faster than anything a model has.
    x = torch.randn(m, k, device=device).to(dtype)
    weight = torch.randn(n, k, device=device).to(dtype)

    def multiply() -> Tensor:
        return torch.nn.functional.linear(x, weight)

    return multiply, 2.0 * m * n * k


@torch.inference_mode()
def ceilings(device: torch.device | str, threads: int, rounds: int = 9) -> dict[str, float]:
    """What this machine reaches on a large copy and on large matrix products, now.

    Args:
        device: where.
        threads: CPU threads, set for the measurement and put back.
        rounds: calls of each; the best quartile counts, for a ceiling is what can be reached.

    Returns:
        ``{"copy": bytes read and written a second, "float32": FLOP/s, "bfloat16": FLOP/s}``.
    """
    device = torch.device(device)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        work = {"copy": _copy(device)}
        edge = 8192 if device.type == "cuda" else 2048
        # A cube, and the widest product of AST-base: which is faster differs from chip to chip.
        for m, n, k in ((edge, edge, edge), (edge, 3072, 768)):
            for dtype in (torch.float32, torch.bfloat16):
                name = str(dtype).removeprefix("torch.")
                work[f"{name} {m}x{n}x{k}"] = _matmul(device, dtype, m, n, k)
        calls = {name: call for name, (call, _) in work.items()}
        warm_up(calls, device)
        times = interleaved(calls, rounds, device)
        synchronize(device)
        best: dict[str, float] = {}
        for name, t in times.items():
            what = name.split()[0]
            best[what] = max(best.get(what, 0.0), work[name][1] / (quartiles(t)[1] / 1e3))
        return best
    finally:
        torch.set_num_threads(before)
