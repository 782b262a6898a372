"""Peak memory of the eager entries at one ten-second clip; run by conftest.py under a counter.

LD_PRELOAD=peak_alloc.so python bench/peak.py SET OUT.json
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import sets
import torch
from specs import ModelSpec
from torch import Tensor

from fastast.benchmark.case import Case, arguments_of, autograd_mode, tensors_of

CPU = torch.device("cpu")


def peak(call: Callable[[], Any]) -> int:
    """Most bytes allocated during a call beyond what it returns."""
    counter = ctypes.CDLL(None)
    counter.peak_bytes.restype = ctypes.c_long
    call()
    counter.peak_reset()
    result = call()
    most = counter.peak_bytes()
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(result)
    }
    return most - sum(storages.values())


def peaks(case: Case) -> dict[str, int]:
    """Peak of each eager entry, by label."""
    found = {}
    for entry in case.entries:
        if not entry.eager:
            continue
        with autograd_mode(entry.grad):
            arguments = arguments_of(entry, case.inputs[0])

            def call(entry: Any = entry, arguments: Any = arguments) -> Tensor:
                return entry.call(*arguments)

            found[case.label(entry)] = peak(call)
    return found


def main() -> None:
    name, out = sys.argv[1:]
    found = {}
    threads = torch.get_num_threads()
    for spec in sets.op_specs(name):
        if spec.config["B"] == 1 and spec.threads == threads and spec.config.get("N", 1214) == 1214:
            found[str(spec)] = peaks(replace(spec, compiled=False).build(CPU))
    for model in sets.model_specs(name):
        whole = isinstance(model, ModelSpec) and model.kind == "engines" and model.seconds == 10
        if whole and model.batch == 1 and model.threads == threads:
            found[str(model)] = peaks(model.build(CPU, foreign=False))
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
