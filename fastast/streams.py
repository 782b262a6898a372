"""Work that may run beside other work on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

Result = TypeVar("Result")

_side_streams: dict[torch.device, torch.cuda.Stream] = {}


class Beside(Generic[Result]):
    """A call whose result is needed later only.

    While a CUDA graph is captured it becomes a branch of the graph, which the GPU runs beside what
    follows until :meth:`result`. Elsewhere it runs at once: two streams that an eager model feeds
    cost more than they hide. Whatever ``work`` reads must be kept until then, and
    :meth:`result` must be called before the capture ends.

    Args:
        work: the call.
        device: where it runs.
    """

    def __init__(self, work: Callable[[], Result], device: torch.device) -> None:
        self._side = None
        graphs = device.type == "cuda" and not torch.compiler.is_compiling()
        if graphs and torch.cuda.is_current_stream_capturing():
            self._side = _side_stream(device)
        if self._side is None:
            self._result = work()
            return
        self._side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._side):
            self._result = work()

    def result(self) -> Result:
        """What the call returned; what follows on this stream comes after it."""
        if self._side is not None:
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)
            self._side = None
        return self._result


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream(device)
    return _side_streams[device]
