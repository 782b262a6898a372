"""Which cases each set runs: quick (3 minutes), cpu (15, on two cores), gpu, full."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastast.benchmark.case import Case, Config
from fastast.benchmark.kernels import CASES
from fastast.benchmark.models import sweep

SETS = ("quick", "cpu", "gpu", "full")
MODES = {
    "match": ("forward",),
    "merge": ("forward", "backward"),
    "merge_add_layer_norm": ("forward", "backward"),
    "attention": ("forward", "backward"),
    "tome_step": ("forward",),
}
SHAPE: dict[str, Config] = {
    "match": {"C": 64},
    "merge": {"D": 768},
    "merge_add_layer_norm": {"D": 768},
    "attention": {},
    "tome_step": {"D": 768, "C": 64},
}
# Tokens of a clip of 10, 5 and 1 seconds, and what is merged of them in a block.
MERGED = {1214: 40, 734: 40, 602: 40, 146: 10}


@dataclass(frozen=True)
class Spec:
    """What a case is built from, small enough to be a test's parameter."""

    kernel: str
    mode: str
    config: Config
    compiled: bool = False

    @property
    def threads(self) -> int:
        return int(self.config["threads"])

    def build(self, device: torch.device) -> Case:
        """The case, for as many threads as torch has now."""
        return CASES[self.kernel](dict(self.config), device, self.compiled, self.mode)

    def __str__(self) -> str:
        values = "-".join(f"{k}{v}" for k, v in self.config.items())
        return f"{self.kernel}-{self.mode}-{values}"


def kernel_specs(name: str) -> Iterator[Spec]:
    """The cases of single ops and of the ToMe step."""
    gpu = name == "gpu"
    threads = torch.get_num_threads()

    def spec(
        kernel: str, mode: str, n: int, batch: int, dtype: str, t: int, compiled: bool
    ) -> Spec:
        merged: Config = {} if kernel == "attention" else {"r": MERGED[n]}
        config = {"B": batch, "N": n, **SHAPE[kernel], **merged, "dtype": dtype, "threads": t}
        return Spec(kernel, mode, config, compiled)

    dtypes = ("float32", "bfloat16")
    for kernel, modes in MODES.items():
        for mode in modes:
            for dtype in dtypes:
                if name == "quick":
                    if kernel in ("tome_step", "attention") and mode == "forward":
                        yield spec(kernel, mode, 1214, 1, dtype, threads, False)
                    continue
                yield spec(kernel, mode, 1214, 1, dtype, threads, True)
                if gpu or name == "full":
                    for n in (146, 602, 734):
                        for batch in (1, 8, 64) if gpu else (1, 8):
                            yield spec(kernel, mode, n, batch, dtype, threads, False)
                    for batch in (8, 64, 128) if gpu else (2, 8):
                        yield spec(kernel, mode, 1214, batch, dtype, threads, False)
                    continue
                if mode == "forward":
                    for n in (602, 146):
                        yield spec(kernel, mode, n, 1, dtype, threads, False)
                if kernel in ("tome_step", "merge_add_layer_norm"):
                    yield spec(kernel, mode, 1214, 8, dtype, threads, False)
                if threads > 1 and mode == "forward":
                    yield spec(kernel, mode, 1214, 1, dtype, 1, False)
                    if kernel == "tome_step":
                        yield spec(kernel, mode, 1214, 8, dtype, 1, False)
    for batch in {"quick": (), "cpu": (1, 32), "full": (1, 8, 32), "gpu": (1, 64)}[name]:
        for t in (threads,) if gpu or threads == 1 or batch == 1 else (threads, 1):
            yield Spec(
                "fbank", "forward", {"B": batch, "seconds": 10, "dtype": "float32", "threads": t}
            )


@dataclass(frozen=True)
class SweepSpec:
    """A model at many r, against itself at r=0."""

    model: str
    seconds: int
    batch: int
    dtype: str
    threads: int
    rs: tuple[int, ...]
    inflect: float = 0
    budget: float = 10.0

    def build(self, device: torch.device) -> Case:
        """The case, for as many threads as torch has now."""
        dtype = getattr(torch, self.dtype)
        return sweep(
            self.model, self.seconds, self.batch, dtype, self.threads, device, self.rs,
            self.inflect, budget=self.budget,
        )  # fmt: skip

    def __str__(self) -> str:
        slope = {0: "constant", -1: "decreasing"}[int(self.inflect)]
        return (
            f"{self.model}-{self.seconds}s-B{self.batch}-{self.dtype}-{slope}-threads{self.threads}"
        )


PAPER = (5, 10, 15, 20, 25, 30, 35, 40, 80, 100)


def sweep_specs(name: str) -> Iterator[SweepSpec]:
    """Whole models over r, the paper's Table 1 in speed."""
    t = torch.get_num_threads()
    bf16, fp32 = "bfloat16", "float32"
    if name == "quick":
        yield SweepSpec("base", 1, 8, bf16, t, (5, 10, 20, 40), 0, 8)
        return
    if name == "cpu":
        yield SweepSpec("base", 10, 1, bf16, t, PAPER, 0, 25)
        yield SweepSpec("base", 10, 1, bf16, t, (10, 20, 40, 80), -1, 10)
        yield SweepSpec("base", 5, 1, bf16, t, (10, 20, 40, 60), 0, 7)
        yield SweepSpec("base", 5, 8, bf16, t, (10, 40), 0, 15)
        yield SweepSpec("base", 1, 1, bf16, t, (5, 10, 20, 40), 0, 3)
        yield SweepSpec("base", 1, 8, bf16, t, (5, 10, 20, 40), 0, 8)
        yield SweepSpec("base", 1, 8, fp32, t, (5, 10, 20, 40), 0, 12)
        yield SweepSpec("tiny", 1, 1, bf16, t, (5, 10, 20, 40), 0, 2)
        yield SweepSpec("tiny", 1, 8, bf16, t, (5, 10, 20, 40), 0, 3)
        yield SweepSpec("tiny", 10, 1, bf16, t, (10, 20, 40, 80), 0, 5)
        if t > 1:
            yield SweepSpec("base", 5, 1, bf16, 1, (10, 20, 40), 0, 8)
        return
    batches = (1, 8, 64, 128) if name == "gpu" else (1, 2, 8)
    for model in ("base", "tiny"):
        for seconds in (10, 5, 1):
            for batch in batches:
                for dtype in (bf16,) if name == "gpu" else (bf16, fp32):
                    for inflect in (0, -1):
                        yield SweepSpec(
                            model,
                            seconds,
                            batch,
                            dtype,
                            t,
                            PAPER,
                            inflect,
                            3 if name == "gpu" else 40,
                        )


@dataclass(frozen=True)
class ModelSpec:
    """A whole model beside what a user would pick, without merging and with it.

    Attributes:
        kind: ``engines``, ``training`` or ``waveform``.
        engines: ``all``, ``most``, ``some`` or ``few`` of them.
        dtype: of training; the other kinds have several.
    """

    kind: str
    seconds: int
    batch: int
    threads: int
    r: int
    engines: str = "all"
    budget: float = 60.0
    model: str = "base"
    dtype: str = "bfloat16"

    def build(self, device: torch.device, foreign: bool = True) -> Case:
        """The case, for as many threads as torch has now; ``foreign``: with compiled engines."""
        import model_cases  # it needs transformers

        make = {
            "engines": model_cases.engine_case,
            "training": model_cases.training_case,
            "waveform": model_cases.waveform_case,
        }[self.kind]
        return make(self, device, foreign)

    def __str__(self) -> str:
        what = {"engines": self.engines, "training": self.dtype, "waveform": "all"}[self.kind]
        return (
            f"{self.kind}-{self.model}-{self.seconds}s-B{self.batch}-r{self.r}"
            f"-threads{self.threads}-{what}"
        )


def beside_specs(name: str) -> Iterator[ModelSpec]:
    """Hugging Face, ONNX Runtime, OpenVINO, the published patch and ours, side by side."""
    t = torch.get_num_threads()
    if name == "quick":
        yield ModelSpec("engines", 1, 8, t, 10, "few", 15)
        return
    level, other = ("most", "some") if name == "cpu" else ("all", "all")
    yield ModelSpec("engines", 10, 1, t, 40, level, 90)
    yield ModelSpec("engines", 5, 1, t, 40, other, 30)
    yield ModelSpec("engines", 1, 8, t, 10, other, 25)
    if t > 1 and name != "gpu":
        yield ModelSpec("engines", 5, 1, 1, 40, "few", 25)
    if name in ("full", "gpu"):
        for batch in (8, 64) if name == "gpu" else (2, 8):
            for seconds in (10, 5):
                yield ModelSpec("engines", seconds, batch, t, 40, "all", 120)
        yield ModelSpec("engines", 1, 64 if name == "gpu" else 1, t, 10, "all", 60)
    big = 64 if name == "gpu" else 1
    yield ModelSpec("waveform", 10, big, t, 40, budget=20)
    yield ModelSpec("training", 1, 32, t, 10, budget=10, model="tiny", dtype="float32")
    yield ModelSpec("training", 1, 32, t, 10, budget=10, model="tiny")
    yield ModelSpec("training", 5, big, t, 40, budget=20)
    if name in ("full", "gpu"):
        yield ModelSpec("training", 10, 16 if name == "gpu" else 1, t, 40, budget=60)


def model_specs(name: str) -> Iterator[SweepSpec | ModelSpec]:
    """All cases of whole models."""
    yield from beside_specs(name)
    yield from sweep_specs(name)
