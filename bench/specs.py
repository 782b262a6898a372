"""What a case is built from: small enough to be a test's parameter, and to name it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastast.benchmark.case import Case, Config
from fastast.benchmark.kernels import CASES
from fastast.benchmark.models import sweep


@dataclass(frozen=True)
class OpSpec:
    """A single op, or the ToMe step."""

    kernel: str
    mode: str
    config: Config
    compiled: bool = False

    @property
    def threads(self) -> int:
        return int(self.config["threads"])

    @property
    def marker(self) -> str:
        """The pytest marker of its test."""
        return self.mode

    def build(self, device: torch.device) -> Case:
        """The case, for as many threads as torch has now."""
        return CASES[self.kernel](dict(self.config), device, self.compiled, self.mode)

    def __str__(self) -> str:
        values = "-".join(f"{k}{v}" for k, v in self.config.items())
        return f"{self.kernel}-{self.mode}-{values}"


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
    marker = "sweep"

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

    @property
    def marker(self) -> str:
        """The pytest marker of its test."""
        return self.kind

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
