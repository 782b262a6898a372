"""Measuring launch parameters on the GPU at hand: what ``fastast tune`` runs.

No kernel tunes itself. Here every entry of the table that is worth it is held against what is a
step or two away from it. A candidate is refused if the compiler spills its registers, if it takes
too much shared memory, or if its results are not those of the entry in use. The fastest of the
others takes the entry's place if it is faster by more than the noise, and is so again when it is
measured again: the fastest of many is often only the luckiest. ::

    bench = gpu()
    outcomes = list(tune(bench))
    parameters.write("launch_parameters.json", tuned_table(bench.architecture, outcomes))
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias

import torch
from torch import Tensor
from triton.errors import TritonError
from triton.testing import do_bench_cudagraph

from fastast_kernels.backends import BackendError, why_not

from . import parameters
from .candidates import TUNABLE, Kind, Refused, candidates, fitting, takers
from .common import INTERPRETED
from .parameters import Entry, Table
from .resources import calls

NOISE = 0.02  # what a candidate must be faster by
BATCHES = (64, 1)
LENGTHS = (1214, 602, 146)  # tokens of clips of 10, 5 and 1 seconds

# Two right results differ by so much of the largest value, for they sum in another order. Products
# of fp32 that lost its accuracy differ by more.
TOLERANCE = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3, torch.float32: 1e-4}

Progress: TypeAlias = "Callable[[str, float], None]"  # what is done now, and the share done


def _timed(call: Callable[[], Any]) -> float:
    # In a CUDA graph: what the host takes to launch is not the parameters' doing.
    return do_bench_cudagraph(call, rep=10, return_mode="median")


def _run(call: Callable[[], Any]) -> Any:
    results = call()
    torch.cuda.synchronize()  # an error is this call's; the timer has a stream of its own
    return results


@dataclass(frozen=True)
class Bench:
    """Where candidates run, and what times them.

    Attributes:
        device: of the tensors.
        architecture: whose entries are tuned, ``"sm_80"`` or ``"sm_90"``.
        timer: milliseconds of a call.
        run: results of a call.
    """

    device: str
    architecture: str
    timer: Callable[[Callable[[], Any]], float] = _timed
    run: Callable[[Callable[[], Any]], Any] = _run


def gpu() -> Bench:
    """The current CUDA device.

    Raises:
        BackendError: there is none, or Triton's kernels do not run on it.
    """
    if not torch.cuda.is_available():
        raise BackendError("tune measures on a GPU, and torch finds no CUDA device")
    reason = why_not("attention", "triton", "cuda")
    if INTERPRETED:
        reason = "TRITON_INTERPRET=1 runs them in the interpreter"
    if reason is not None:
        raise BackendError(f"tune measures Triton's kernels: {reason}")
    index = torch.cuda.current_device()
    return Bench(f"cuda:{index}", parameters.of_device(index)[0])


@dataclass(frozen=True)
class Outcome:
    """What tuning one entry found.

    Attributes:
        op: its name in the table.
        index: the entry's number there.
        before: the entry in use.
        after: what is to be in its place; the same where nothing was faster.
        before_ms: geometric mean over the shapes of the op's times.
        after_ms: likewise.
        tried: number of candidates.
        refused: how many of them for which reason.
    """

    op: str
    index: int
    before: Entry
    after: Entry
    before_ms: float
    after_ms: float
    tried: int
    refused: dict[str, int]

    @property
    def speedup(self) -> float:
        """Time before over time after."""
        return self.before_ms / self.after_ms


def tuned_table(architecture: str, outcomes: Iterable[Outcome]) -> Table:
    """The table in use, with what was found in the place of the entries that were tuned."""
    table = {a: {op: list(e) for op, e in ops.items()} for a, ops in parameters.table().items()}
    for outcome in outcomes:
        table[architecture][outcome.op][outcome.index] = outcome.after
    return table


def tune(
    bench: Bench,
    ops: Iterable[str] = tuple(TUNABLE),
    dtype: torch.dtype = torch.bfloat16,
    quick: bool = False,
    progress: Progress = lambda what, share: None,
) -> Iterator[Outcome]:
    """Tune the entries that tokens of one dtype take, one after the other.

    Args:
        bench: :func:`gpu` is the GPU at hand.
        ops: names in ``TUNABLE``.
        dtype: of the tokens: bfloat16, float16 or float32.
        quick: only candidates that differ in one parameter, and only the longest clips.
        progress: called with what is done now, and the share that is done.

    Yields:
        What was found, for every entry.

    Raises:
        ValueError: no such op, or another dtype.
    """
    ops = tuple(ops)
    for op in ops:
        if op not in TUNABLE:
            raise ValueError(f"ops must be some of {', '.join(TUNABLE)}, not {op!r}")
    if dtype not in TOLERANCE:
        raise ValueError(f"dtype must be one of {', '.join(map(str, TOLERANCE))}, not {dtype!r}")
    jobs = []
    for op in dict.fromkeys(ops):
        # The metric of a match is fp32, whatever the tokens are, unless a caller makes one.
        dtypes = dict.fromkeys([torch.float32, dtype]) if op == "best_partner" else [dtype]
        for i, kinds in takers(op, bench.architecture, dtypes).items():
            jobs.append(_Job(bench, op, i, kinds, quick))
    for done, job in enumerate(jobs):
        yield job.tuned(_part(progress, done / len(jobs), 1 / len(jobs)))


def _part(progress: Progress, first: float, width: float) -> Progress:
    return lambda what, share: progress(what, first + width * share)


def agree(results: Any, expected: Any) -> bool:
    """Whether results, a tensor or several, are the expected ones but for rounding."""
    if isinstance(expected, Tensor):
        results, expected = (results,), (expected,)
    for got, wanted in zip(results, expected, strict=True):
        if not wanted.is_floating_point():
            if not torch.equal(got, wanted):
                return False
            continue
        difference = (got.float() - wanted.float()).abs().max()
        # A difference of NaN is no agreement either.
        if not difference <= TOLERANCE[wanted.dtype] * wanted.abs().max().float():
            return False
    return True


@dataclass(frozen=True)
class _Job:
    """One entry to tune, and what takes it."""

    bench: Bench
    op: str
    index: int
    kinds: list[Kind]
    quick: bool

    def tuned(self, progress: Progress) -> Outcome:
        architecture = self.bench.architecture
        entry = parameters.table()[architecture][self.op][self.index]
        current = {name: v for name, v in entry.items() if name not in parameters.CONDITIONS}
        near = candidates(self.op, current, steps=1 if self.quick else 2)
        refused: Counter[str] = Counter()
        fit = [current]
        for i, candidate in enumerate(near):
            progress(f"{self.op}: compiling", 0.5 * i / len(near))
            try:
                call = TUNABLE[self.op].call
                fit.append(fitting(self.op, candidate, architecture, self.kinds, call))
            except Refused as reason:
                refused[str(reason)] += 1
        times = self.times(fit, refused, _part(progress, 0.5, 0.5))
        found, before, after = current, times[0], times[0]
        for i in sorted(range(1, len(fit)), key=times.__getitem__):
            if times[i] >= (1 - NOISE) * times[0]:
                break
            try:
                faster = self.confirmed(current, fit[i])
            except Refused as reason:
                refused[str(reason)] += 1
            else:
                found, before, after = faster
                break
        best = {**entry, **found}
        tried = len(near)
        return Outcome(self.op, self.index, entry, best, before, after, tried, dict(refused))

    def confirmed(self, current: Entry, candidate: Entry) -> tuple[Entry, float, float]:
        """A candidate as an entry for everything that takes it, and both times once more."""
        # Other dtypes do, and other variants of the call.
        dtypes = torch.bfloat16, torch.float16, torch.float32, torch.float64
        kinds = takers(self.op, self.bench.architecture, dtypes)[self.index]
        found = fitting(self.op, candidate, self.bench.architecture, kinds)
        before, after = self.times([current, found], Counter(), lambda what, share: None)
        if after >= (1 - NOISE) * before:
            raise Refused("not confirmed")
        return found, before, after

    def times(self, entries: list[Entry], refused: Counter[str], progress: Progress) -> list[float]:
        """Geometric means of the times; infinite for results that are not the first entry's."""
        logs = [0.0] * len(entries)
        shapes = list(product(self.kinds, BATCHES, LENGTHS[:1] if self.quick else LENGTHS))
        measured = 0
        for done, ((dtype, dim), batch, n) in enumerate(shapes):
            progress(f"{self.op}: timing", done / len(shapes))
            alive = [i for i, log in enumerate(logs) if log < math.inf]
            try:
                variants = dict(calls(dtype, dim, batch, n, self.bench.device))
                call = variants[TUNABLE[self.op].call]
                found = self.times_of(call, [entries[i] for i in alive], refused)
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
                continue  # a smaller GPU is tuned for what it can run
            measured += 1
            for i, milliseconds in zip(alive, found, strict=True):
                logs[i] += math.log(milliseconds)
        return [math.exp(log / measured) for log in logs]

    def times_of(
        self, call: Callable[[], Any], entries: list[Entry], refused: Counter[str]
    ) -> list[float]:
        """The same of one call."""
        times: list[float] = []
        expected = None
        for entry in entries:
            with parameters.trying(self.op, entry):
                try:
                    results = self.bench.run(call)
                    if expected is None:
                        expected = results
                    elif not agree(results, expected):
                        raise Refused("other results")
                    times.append(self.bench.timer(call))
                except (Refused, TritonError) as error:
                    if not times:  # the entry in use
                        raise
                    refused[str(error) if isinstance(error, Refused) else "does not run"] += 1
                    times.append(math.inf)
        return times
