"""A benchmark case: several ways to compute one thing, one truth, and no time before the truth.

A case holds inputs and *entries*, the ways to compute the same result from them. Measuring it
runs each entry once and holds its result against the fp64 truth; the first that is too far off is
a :class:`GateError`, and nothing of the case is timed. Then all entries are timed in turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastast.benchmark.counts import Count
from fastast.benchmark.graphs import captured
from fastast.benchmark.timing import interleaved, noise, quartiles, ratio, rounds_for, warm_up

Config: TypeAlias = "dict[str, int | float | str]"

# Largest relative error by norm against fp64 truth: rounding of inputs and results in the dtype.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}


class GateError(AssertionError):
    """A result is not what it should be, so its speed means nothing and is not reported."""


@dataclass
class Entry:
    """One way to compute a case's result.

    Attributes:
        provider: whose it is: ``fused``, ``reference``, ``published``, an engine's name ...
        call: from one set of the case's inputs, or what ``prepare`` made of it, to the result.
        config: what differs from the case's config, such as r in a sweep over r.
        count: arithmetic and bytes that the result takes at least.
        tolerance: largest relative error against the truth; None to report it without a limit.
        prepare: from a set of inputs to what ``call`` takes, run once and not timed.
        truth: this entry's own fp64 truth, where it is not the case's.
        eager: its memory and dispatches can be counted (it is not compiled or a foreign engine).
        grad: runs with autograd on.
        graph: is captured as a CUDA graph, one for all sets of inputs.
        macs: multiply-accumulates of a whole model, for its merge efficiency.
        rival: computes the same function as ours, so that ours is held against it.
    """

    provider: str
    call: Callable[..., Any]
    config: Config = field(default_factory=dict)
    count: Count | None = None
    tolerance: float | None = TOLERANCE[torch.float32]
    prepare: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None
    truth: Callable[..., Any] | None = None
    eager: bool = True
    grad: bool = False
    graph: bool = False
    macs: float | None = None
    rival: bool = True


@dataclass
class Case:
    """Entries that compute the same thing.

    Attributes:
        kernel: what is computed: ``match``, ``tome_step``, ``ast`` ...
        mode: ``forward`` or ``backward`` or ``training``.
        x: the entry of the config that plots put on the x axis.
        config: shape, dtype, r, threads.
        device: where.
        inputs: sets of inputs; one measured turn goes through them all, so that a set is out of
            the cache when it comes round again.
        entries: ways to compute the result.
        truth: from one set of inputs to the result in fp64.
        baseline: provider that speed-ups are against.
        ours: provider that this project answers for.
        error: relative error of a result, from the entry, its result, the truth and the inputs.
        seconds: about how long to measure.
        left_out: who is not among the entries, and why.
    """

    kernel: str
    mode: str
    x: str
    config: Config
    device: torch.device
    inputs: Sequence[tuple[Any, ...]]
    entries: list[Entry]
    truth: Callable[..., Any]
    baseline: str = "reference"
    ours: str = "fused"
    error: Callable[[Entry, Any, Any, tuple[Any, ...]], float] | None = None
    seconds: float = 1.5
    left_out: list[str] = field(default_factory=list)

    def label(self, entry: Entry) -> str:
        """Name of an entry that is unique in the case."""
        extra = "".join(f" {k}={v}" for k, v in entry.config.items())
        return entry.provider + extra

    def __str__(self) -> str:
        config = " ".join(f"{k}={v}" for k, v in self.config.items())
        return f"{self.kernel} {self.mode} {config}"


@dataclass
class Measurement:
    """What was found about one entry.

    Attributes:
        entry: which.
        error: relative error of its result against fp64 truth.
        times: milliseconds of each turn, for one set of inputs.
        speedup: against the baseline: median of the pairwise ratios and its 95 % interval.
        best_other: for our own entry, the fastest of the others that compute the same function in
            the same dtype.
        against_best: speed-up against that one.
    """

    entry: Entry
    error: float
    times: list[float]
    speedup: tuple[float, float, float]
    best_other: str | None = None
    against_best: tuple[float, float, float] | None = None

    @property
    def ms(self) -> float:
        """Median milliseconds."""
        return quartiles(self.times)[0]

    @property
    def noise(self) -> float:
        """Distance of the quartiles as a share of the median."""
        return noise(self.times)


def tensors_of(result: Any) -> Iterator[Tensor]:
    """The tensors of a result, however they are nested."""
    if isinstance(result, Tensor):
        yield result
    else:
        for part in result:
            yield from tensors_of(part)


def relative_error(result: Any, truth: Any) -> float:
    """Largest, over the tensors of a result, of ``|result - truth| / |truth|`` by norm.

    NaN where anything is NaN; infinite where shapes differ.
    """
    worst = 0.0
    for a, t in zip(tensors_of(result), tensors_of(truth), strict=True):
        if a.shape != t.shape:
            return float("inf")
        norm = float(t.double().norm())
        error = float((a.to(t.device).double() - t.double()).norm()) / (norm or 1.0)
        worst = error if error != error else max(worst, error)
        if worst != worst:
            break
    return worst


@contextmanager
def autograd_mode(grad: bool) -> Iterator[None]:
    """Autograd on, or inference mode."""
    with torch.enable_grad() if grad else torch.inference_mode():
        yield


def arguments_of(entry: Entry, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What an entry's call takes, from a set of inputs."""
    return inputs if entry.prepare is None else entry.prepare(inputs)


def _result(entry: Entry, inputs: tuple[Any, ...]) -> Any:
    """An entry's result, computed the way it will be timed."""
    with autograd_mode(entry.grad):
        arguments = arguments_of(entry, inputs)
        if not entry.graph:
            return entry.call(*arguments)
        replay, result = captured(lambda: entry.call(*arguments))
        for tensor in tensors_of(result):
            tensor.fill_(-1)
        replay()
        return result


def check(
    case: Case, which: Sequence[int] = (0, -1), drop_rivals: bool = False
) -> dict[str, float]:
    """Hold every entry's results against the truth, for the first and last set of inputs.

    Args:
        case: what to check.
        which: sets of inputs to check.
        drop_rivals: take a rival that fails out of the case, and say so in ``left_out``, instead of
            raising. Ours and the baseline always raise.

    Returns:
        The error of each entry, by label.

    Raises:
        GateError: an entry is further from the truth than its tolerance, or gives NaN.
    """
    errors: dict[str, float] = {}
    for index in dict.fromkeys(i % len(case.inputs) for i in which):
        inputs = case.inputs[index]
        shared: Any = None
        for entry in list(case.entries):
            label = case.label(entry)
            if entry.truth is not None:
                truth = entry.truth(*inputs)
            else:
                truth = shared = case.truth(*inputs) if shared is None else shared
            try:
                found = _error(case, entry, inputs, truth)
            except Exception as failure:  # a rival may break in any way
                ours = entry.provider == case.baseline or entry.provider.startswith(case.ours)
                if ours or not drop_rivals:
                    raise
                reason = (str(failure).splitlines() or [""])[0]
                case.left_out.append(f"{case}: {label}: {type(failure).__name__}: {reason}")
                case.entries.remove(entry)
                errors.pop(label, None)
            else:
                errors[label] = max(found, errors.get(label, 0.0))
    return errors


def _error(case: Case, entry: Entry, inputs: tuple[Any, ...], truth: Any) -> float:
    """Error of an entry's result; a GateError if it is too large or NaN."""
    result = _result(entry, inputs)
    if case.error is None:
        error = relative_error(result, truth)
    else:
        error = case.error(entry, result, truth, inputs)
    limit = entry.tolerance
    if error != error or (limit is not None and error > limit):
        raise GateError(
            f"{case}: {case.label(entry)} is off by {error:.3g} of the fp64 truth"
            + (f", over {limit:.3g}" if limit is not None else "")
            + ": no speed to report"
        )
    return error


def turns(case: Case) -> dict[str, Callable[[], None]]:
    """For each entry, by label, a call that goes once through all sets of inputs."""

    def turn(entry: Entry) -> Callable[[], None]:
        with autograd_mode(entry.grad):
            arguments = [arguments_of(entry, inputs) for inputs in case.inputs]

        def run() -> None:
            with autograd_mode(entry.grad):
                for a in arguments:
                    entry.call(*a)

        return captured(run)[0] if entry.graph else run

    return {case.label(entry): turn(entry) for entry in case.entries}


def summarise(
    case: Case, errors: Mapping[str, float], times: Mapping[str, Sequence[float]]
) -> list[Measurement]:
    """Times of whole turns, with the errors found before, as one measurement an entry."""
    sets = len(case.inputs)
    entries = {case.label(entry): entry for entry in case.entries}
    ours = {name for name, entry in entries.items() if entry.provider.startswith(case.ours)}
    baseline = next(name for name, entry in entries.items() if entry.provider == case.baseline)
    measurements = []
    for name, entry in entries.items():
        m = Measurement(
            entry,
            errors[name],
            [t / sets for t in times[name]],
            ratio(times[baseline], times[name]),
        )
        rivals = [
            other
            for other, e in entries.items()
            if other not in ours and e.rival and e.config.get("dtype") == entry.config.get("dtype")
        ]
        if name in ours and rivals:
            m.best_other = min(rivals, key=lambda other: quartiles(times[other])[0])
            m.against_best = ratio(times[m.best_other], times[name])
        measurements.append(m)
    return measurements


def measure(case: Case) -> list[Measurement]:
    """Check a case, then time it.

    Raises:
        GateError: a result is wrong; nothing is timed then.
    """
    errors = check(case)
    calls = turns(case)
    turn = warm_up(calls, case.device)
    return summarise(case, errors, interleaved(calls, rounds_for(turn, case.seconds), case.device))
