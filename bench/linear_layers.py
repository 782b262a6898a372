"""GFLOP/s of the linear layers of an AST-base by every kernel there is for them: a table.

    python bench/linear_layers.py --tokens 1214,602,146 --dtype bfloat16

Weights and inputs are random numbers, several of each in turn, so that a weight comes from L3 or
memory as it does in a model; every kernel's result is held against fp64 first. Best of the turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastast.benchmark.timing import in_measuring_environment
from fastast.linear import Int8Linear, PackedLinear

LAYERS = {"qkv": (768, 2304), "proj": (768, 768), "fc1, GELU": (768, 3072), "fc2": (3072, 768)}
SETS = 6  # of a weight and an input
TOLERANCE = {"int8": 3e-2, torch.bfloat16: 1e-2, torch.float32: 1e-5}


def onednn(layer: nn.Linear, gelu: bool) -> Callable[[Tensor], Tensor]:
    """The layer packed by oneDNN, whatever fastast.optimize would choose."""
    packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().contiguous(), None)
    attribute, algorithm = ("gelu", "none") if gelu else ("none", "")
    return lambda x: torch.ops.mkldnn._linear_pointwise(
        x, packed, layer.bias, attribute, [], algorithm
    )


def kernels(layer: nn.Linear, gelu: bool) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Names and layers."""
    dtype = layer.weight.dtype
    yield "F.linear", lambda x: F.gelu(layer(x)) if gelu else layer(x)
    yield "oneDNN, packed", onednn(layer, gelu)
    if dtype == torch.bfloat16:
        yield "FastAST", PackedLinear(layer.weight, layer.bias, gelu)
        rounded = Int8Linear.of(layer, dtype)
        yield "FastAST, int8", rounded.with_gelu() if gelu else rounded


def checked(name: str, kernel: Callable[[Tensor], Tensor], x: Tensor, truth: Tensor) -> None:
    """Raise unless the kernel's result is as close to the truth as its products allow."""
    error = float((kernel(x).double() - truth).norm() / truth.norm())
    allowed = TOLERANCE["int8" if "int8" in name else x.dtype]
    if not error <= allowed:
        raise RuntimeError(f"{name} is off by {error:.1e}, allowed is {allowed:.0e}")


def best(calls: list[Callable[[], Tensor]], budget: float) -> float:
    """Seconds a call, of the fastest turn."""
    fastest = float("inf")
    end = time.perf_counter() + budget
    while time.perf_counter() < end:
        start = time.perf_counter()
        for call in calls:
            call()
        fastest = min(fastest, (time.perf_counter() - start) / len(calls))
    return fastest


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", default="1214,602,146")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget", type=float, default=0.5, help="seconds of each number")
    options = parser.parse_args()
    in_measuring_environment()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    print("| GFLOP/s | tokens | " + " | ".join(LAYERS) + " |\n|---|--:|" + "--:|" * len(LAYERS))
    rows: dict[tuple[str, int], list[str]] = {}
    for layer_name, (inputs, outputs) in LAYERS.items():
        gelu = "GELU" in layer_name
        layers = [nn.Linear(inputs, outputs).to(dtype) for _ in range(SETS)]
        packed = [dict(kernels(layer, gelu)) for layer in layers]
        for tokens in map(int, options.tokens.split(",")):
            xs = [torch.randn(1, tokens, inputs).to(dtype) for _ in range(SETS)]
            wide = layers[0].weight.double(), layers[0].bias.double()
            truth = F.linear(xs[0].double(), *wide)
            truth = F.gelu(truth) if gelu else truth
            for name in packed[0]:
                checked(name, packed[0][name], xs[0], truth)
                calls = [
                    lambda kernel=kernels[name], x=x: kernel(x)
                    for kernels, x in zip(packed, xs, strict=True)
                ]
                rate = 2 * tokens * inputs * outputs / best(calls, options.budget) / 1e9
                rows.setdefault((name, tokens), []).append(f"{rate:.0f}")
    for (name, tokens), rates in rows.items():
        print(f"| {name} | {tokens} | " + " | ".join(rates) + " |")


if __name__ == "__main__":
    main()
