"""What a call costs beside time: dispatches, kernel launches, and on a GPU memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fastast.benchmark.timing import synchronize


def dispatches(call: Callable[[], object], device: torch.device) -> int:
    """Kernel launches of one call on a GPU; on a CPU, operators called, those inside others too."""
    call()
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiled:
        call()
        synchronize(device)
    events = profiled.events() or []
    if device.type == "cuda":
        return sum(event.device_type == DeviceType.CUDA for event in events)
    return sum(event.name.startswith(("aten::", "fastast::")) for event in events)


def cuda_peak(call: Callable[[], object], device: torch.device) -> int:
    """Peak of torch's allocations during one call, beyond what it started with and returns."""
    call()
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    kept = torch.cuda.memory_allocated(device) - before
    del result
    return peak - before - kept
