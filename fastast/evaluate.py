"""Accuracy, mean average precision, AUC and throughput of a model at amounts of merging."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fastast.config import ASTConfig
from fastast.data import AudioDataset
from fastast.features import Fbank, FrontEnd
from fastast.metrics import ClassReport, class_reports, confusion_matrix, d_prime, mean_auc
from fastast.schedules import Schedule

__all__ = [
    "ClassReport",
    "Evaluation",
    "ParityError",
    "evaluate",
    "evaluate_at",
    "front_end",
    "measure",
    "read_r",
    "time_rounds",
    "window",
]

R = TypeVar("R", bound=Hashable)


class ParityError(RuntimeError):
    """A patched model with r=0 is not the unpatched model: its speed would mean nothing."""


def read_r(text: str) -> Schedule:
    """Read an amount of merging: ``"20"``, ``"20,-1"`` (r, inflection) or one number a block.

    Raises:
        ValueError: The text is none of these.
    """
    parts = text.split(",")
    try:
        if len(parts) == 2:
            return int(parts[0]), float(parts[1])
        numbers = [int(part) for part in parts]
    except ValueError:
        raise ValueError(
            f"r must be a number ('20'), a number and an inflection ('20,-1') or one number a "
            f"block ('8,8,8,...'), not {text!r}"
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers


def front_end(config: ASTConfig) -> Fbank:
    """The filterbank that a model's features come from."""
    return Fbank(
        config.sample_rate, config.num_mel_bins, config.target_length, config.mean, config.std
    )


def window(fbank: FrontEnd) -> int:
    """Samples that fill a filterbank's frames exactly."""
    return (fbank.target_length - 1) * fbank.hop_length + fbank.window_length


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`.

    Attributes:
        r: The amount of merging, as asked for.
        accuracy: Share of clips whose best class is right (one of them, for several a clip).
        mean_average_precision: Mean over classes that occur, scikit-learn's definition.
        mean_auc: Mean over classes of the area under the ROC curve. A class that no clip has, or
            every clip, has no such area and is left out; None where all are.
        d_prime: `sqrt(2) * ppf(mean_auc)`, AudioSet's definition; infinite for an AUC of 1.
        clips: Number of clips.
        clips_per_second: Of the model alone, on features that are ready.
        per_class: One report a class name, for classes that occur.
        confusion: Clips of each class (rows) that were given each class (columns), in the order of
            the data's labels; None for several classes a clip.
    """

    r: Schedule | None
    accuracy: float
    mean_average_precision: float
    mean_auc: float | None
    d_prime: float | None
    clips: int
    clips_per_second: float
    per_class: dict[str, ClassReport]
    confusion: tuple[tuple[int, ...], ...] | None

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values, for JSON, which has no infinity: such a d' is None."""
        values = asdict(self)
        if self.d_prime is not None and math.isinf(self.d_prime):
            values["d_prime"] = None
        return values


def _at(model: nn.Module, r: Schedule | None) -> AbstractContextManager[Any]:
    """`model` with `r` for as long as the context lasts; None leaves the model as it is."""
    import fastast

    return nullcontext(model) if r is None else fastast.patched(model, r=r)


def _logits(model: nn.Module, features: Tensor) -> Tensor:
    """`[B, classes]`, also of a model that returns them among other things."""
    output = model(features)
    return cast(Tensor, getattr(output, "logits", output))


def _features(
    dataset: AudioDataset, fbank: FrontEnd, batch_size: int, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    batches, targets = [], []
    device = next(iter(fbank.buffers())).device
    for waveform, lengths, target in dataset.batches(batch_size, window(fbank)):
        batches.append(fbank(waveform.to(device), lengths.to(device)).to(dtype))
        targets.append(target)
    return batches, torch.cat(targets)


@torch.inference_mode()
def _evaluate(
    model: nn.Module,
    batches: Sequence[Tensor],
    target: Tensor,
    labels: Sequence[str],
    r: Schedule | None,
) -> Evaluation:
    was_training = model.training
    model.eval()
    try:
        with _at(model, r):
            model(batches[0])  # the first call pays for allocation: keep it out of the clock
            outputs = []
            _synchronize(batches[0].device)
            start = time.perf_counter()
            for features in batches:
                outputs.append(_logits(model, features))
            _synchronize(batches[0].device)
            seconds = time.perf_counter() - start
    finally:
        model.train(was_training)
    logits = torch.cat(outputs).float().cpu()
    best, confusion = logits.argmax(1), None
    if target.is_floating_point():
        scores = logits.sigmoid()
        right = target.gather(1, best.unsqueeze(1)) > 0.5
    else:
        scores = logits.softmax(1)
        right = best == target
        confusion = confusion_matrix(best, target, len(labels))
    per_class = class_reports(scores, target, labels)
    area = mean_auc(per_class.values())
    return Evaluation(
        r=r,
        accuracy=int(right.sum()) / len(target),
        mean_average_precision=sum(c.average_precision for c in per_class.values())
        / max(len(per_class), 1),
        mean_auc=area,
        d_prime=None if area is None else d_prime(area),
        clips=len(target),
        clips_per_second=len(target) / seconds,
        per_class=per_class,
        confusion=confusion,
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def evaluate_at(
    model: nn.Module,
    dataset: AudioDataset,
    rs: Sequence[Schedule | None],
    fbank: FrontEnd | None = None,
    batch_size: int = 64,
) -> list[Evaluation]:
    """Evaluate a model at each of several amounts of merging; the features are computed once.

    Args:
        model: An AST, or with `fbank` any model that `fastast.patch` knows and that has classes.
        dataset: The clips; its labels must be the model's classes.
        rs: Amounts of merging; None means the model as it is.
        fbank: Front end; by default the one of the model's config, on the model's device.
        batch_size: Clips a forward.

    Raises:
        ValueError: The data set is empty, or has other classes than the model.
    """
    if not len(dataset):
        raise ValueError("dataset has no clips to evaluate on")
    parameter = next(model.parameters())
    if fbank is None:
        fbank = front_end(cast(ASTConfig, model.config))
    fbank = fbank.to(parameter.device)
    batches, target = _features(dataset, fbank, batch_size, parameter.dtype)
    classes = _logits(model, batches[0][:1]).shape[-1]
    if classes != len(dataset.labels):
        raise ValueError(f"the data has {len(dataset.labels)} classes and the model {classes}")
    return [_evaluate(model, batches, target, dataset.labels, r) for r in rs]


def evaluate(
    model: nn.Module,
    dataset: AudioDataset,
    r: Schedule | None = None,
    fbank: FrontEnd | None = None,
    batch_size: int = 64,
) -> Evaluation:
    """Evaluate a model at one amount of merging; see `evaluate_at`."""
    return evaluate_at(model, dataset, [r], fbank, batch_size)[0]


@torch.inference_mode()
def time_rounds(
    model: nn.Module,
    features: Tensor,
    rs: Sequence[R],
    rounds: int,
    seconds: float,
    after_each: Callable[[], None] | None = None,
) -> dict[R, list[float]]:
    """Seconds of a forward at each r, once a round.

    Every round times every r once, so that a slow moment of the machine hits them all. One round
    more is run first and not counted. On a GPU forwards are CUDA graphs, as `fastast.optimize`
    makes them.

    Args:
        model: An unpatched model; a copy of it is measured.
        features: `[B, target_length, num_mel_bins]` on the model's device.
        rs: Amounts of merging.
        rounds: Most rounds to run.
        seconds: No round starts after this time; three always run.
        after_each: Called after every forward, outside the clock.

    Raises:
        ParityError: Patching with r=0 changes the logits.
    """
    import fastast

    model = copy.deepcopy(model).eval()  # on a CPU `optimize` packs the weights of what it gets
    times: dict[R, list[float]] = {r: [] for r in rs}
    expected = _logits(model, features)
    fastast.patch(model, r=0)
    if not torch.equal(_logits(model, features), expected):
        raise ParityError("patched with r=0 the model gives other logits: no speed to report")
    run = fastast.optimize(model, graphs=max(len(rs), 1))
    begin = time.perf_counter()
    for done in range(rounds + 1):
        if done > 3 and time.perf_counter() - begin > seconds:
            break
        for r in rs:
            cast(Any, model).r = r
            if features.is_cuda and not done:  # the second call of an r is captured
                run(features)
            _synchronize(features.device)
            start = time.perf_counter()
            run(features)
            _synchronize(features.device)
            if done:
                times[r].append(time.perf_counter() - start)
            if after_each is not None:
                after_each()
    return times


def measure(
    model: nn.Module, features: Tensor, rs: Sequence[R], rounds: int, seconds: float
) -> dict[R, float]:
    """Clips per second of a model at each r: the median over rounds; see `time_rounds`."""
    times = time_rounds(model, features, rs, rounds, seconds)
    return {r: len(features) / statistics.median(values) for r, values in times.items()}
