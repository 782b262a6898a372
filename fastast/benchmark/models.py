"""Benchmark cases of a whole Audio Spectrogram Transformer, from features to logits."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

import fastast
from fastast.benchmark.case import Case, Config, Entry
from fastast.benchmark.counts import ast as count_ast
from fastast.benchmark.kernels import FRAMES
from fastast.config import ASTConfig
from fastast.model import AST
from fastast.schedules import Schedule, macs, parse_schedule
from fastast_kernels import use_backend

# Relative error of the logits against fp64. In bf16 twelve blocks add up: plain PyTorch and
# Hugging Face's model are off by 0.8 to 1.3 %, merging or not (docs/performance-log.md).
LOGITS = {torch.float32: 1e-5, torch.bfloat16: 2.5e-2, torch.float16: 5e-3}


def random_model(size: str, seconds: int) -> AST:
    """An AST of a size (tiny, small, base) for clips of so many seconds, random weights."""
    torch.manual_seed(0)
    config = getattr(ASTConfig, size)(target_length=FRAMES[seconds], num_classes=527)
    return AST(config).eval()


def features(config: ASTConfig, batch: int) -> Tensor:
    """``[batch, T, F]`` features, a chirp in noise each; the last clip is the first one again.

    So one clip's truth is enough to see that both ends of a batch are right.
    """
    t = torch.linspace(0, 1, config.target_length)[:, None]
    f = torch.linspace(0, 1, config.num_mel_bins)[None]
    generator = torch.Generator().manual_seed(1)
    clips = []
    for i in range(batch):
        noise = torch.randn(config.target_length, config.num_mel_bins, generator=generator)
        clips.append(0.5 * (torch.sin(40 * (1 + i) * t * f) + 0.3 * noise))
    if batch > 1:
        clips[-1] = clips[0]
    return torch.stack(clips)


class Truth:
    """Logits in fp64 on plain PyTorch, each schedule computed once.

    Args:
        model: an unpatched fp32 model; it is copied.
    """

    def __init__(self, model: AST) -> None:
        self.model = copy.deepcopy(model).double()
        self.known: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, x: Tensor, r: Schedule = 0) -> Tensor:
        """``[B, classes]`` for features ``[B, T, F]`` whose first and last clips are the same.

        Clips in between are left NaN: they are not looked at.
        """
        key = parse_schedule(self.model.config.depth, r)
        if key not in self.known:
            with (
                torch.inference_mode(),
                use_backend("reference"),
                fastast.patched(self.model, r=r),
            ):
                self.known[key] = self.model(x[:1].double())[0]
        logits = torch.full((len(x), self.known[key].numel()), float("nan"), device=x.device)
        logits = logits.double()
        logits[0] = logits[-1] = self.known[key]
        return logits


@functools.lru_cache(maxsize=4)
def truth_of(size: str, seconds: int, device: torch.device) -> Truth:
    """The truth of :func:`random_model`, shared by the cases of a run."""
    return Truth(random_model(size, seconds).to(device))


def logits_error(entry: Entry, result: Tensor, truth: Tensor, inputs: object) -> float:
    """Larger relative error of the first and the last clip's logits; NaN if any logit is."""
    if result.shape != truth.shape or not torch.isfinite(result).all():
        return float("nan")
    ends = [0, -1]
    off = (result[ends].double() - truth[ends]).norm(dim=-1) / truth[ends].norm(dim=-1)
    return float(off.max())


def fused(
    model: AST, dtype: torch.dtype | Literal["int8"], r: Schedule
) -> Callable[[Tensor], Tensor]:
    """A patched copy of a model, fp32 features to fp32 logits.

    On a CPU as ``fastast.optimize`` makes it; on a GPU eagerly, beside which graphs are entries of
    their own.
    """
    patched = fastast.patch(copy.deepcopy(model).eval(), r=r)
    if next(model.parameters()).device.type == "cpu":
        optimized = fastast.optimize(patched, dtype)
        return lambda x: optimized(x).float()
    if dtype == "int8":
        raise ValueError("dtype must be a torch.dtype on a GPU, got 'int8'")
    patched.to(dtype)
    return lambda x: patched(x).float()


def schedule_name(r: int, inflect: float) -> Config:
    """An amount of merging as a case's config says it."""
    return {"r": r, "inflect": inflect} if inflect else {"r": r}


def sweep(
    size: str,
    seconds: int,
    batch: int,
    dtype: torch.dtype,
    threads: int,
    device: torch.device,
    rs: Sequence[int],
    inflect: float = 0,
    budget: float = 10.0,
) -> Case:
    """The fused model at every r, against itself at r=0; on a GPU as CUDA graphs.

    Args:
        size: tiny, small or base.
        seconds: of each clip: 10, 5 or 1.
        batch: clips.
        dtype: of the model.
        threads: of the CPU; it must be torch's setting already.
        device: where.
        rs: tokens merged in each block on average; 0 is put in front unless it is there.
        inflect: 0 the same in each block; -1 falling to none in the last.
        budget: about how many seconds to measure.
    """
    model = random_model(size, seconds).to(device)
    truth = truth_of(size, seconds, device)
    shared = copy.deepcopy(model).to(dtype)
    optimized = fastast.optimize(fastast.patch(shared, r=0), graphs=len(rs) + 1)
    entries = []

    def call(x: Tensor, r: Schedule) -> Tensor:
        optimized.r = r
        return optimized(x).float()

    for r in dict.fromkeys((0, *rs)):
        schedule: Schedule = (r, inflect) if inflect else r
        entries.append(
            Entry(
                "fused",
                functools.partial(call, r=schedule),
                schedule_name(r, inflect),
                count_ast(model.config, schedule, batch, dtype.itemsize),
                LOGITS[dtype],
                truth=functools.partial(truth, r=schedule),
                macs=macs(model.config, schedule),
            )
        )
    config: Config = {
        "model": size,
        "seconds": seconds,
        "B": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
    }
    x = features(model.config, batch).to(device)
    return Case(
        "ast", "forward", "r", config, device, [(x,)], entries, truth,
        baseline="fused", error=logits_error, seconds=budget,
    )  # fmt: skip
