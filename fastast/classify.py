"""Classifying audio files: any sample rate, any length, many at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import fastast
from fastast.audio import AudioError, load_audio, windows
from fastast.evaluate import front_end
from fastast.features import Fbank
from fastast.model import AST
from fastast.schedules import Schedule

__all__ = ["Classifier", "Prediction", "Scores", "Window", "default_model", "pick_device"]

MODEL = "fastast-tiny-digits"


def asset(name: str) -> Path:
    """A file or folder of `assets/`: inside the installed package, or beside it in a source tree.

    Raises:
        FileNotFoundError: It is in neither place.
    """
    package = Path(__file__).resolve().parent
    for root in (package, package.parent):
        if (root / "assets" / name).exists():
            return root / "assets" / name
    raise FileNotFoundError(f"assets/{name} is neither in the installed package nor beside it")


def default_model() -> Path:
    """Folder of the model that ships with FastAST.

    Raises:
        FileNotFoundError: This copy has none; the message says what to do.
    """
    try:
        return asset(MODEL)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"the shipped model assets/{MODEL} is not here: name a model with --model "
            "(a folder, a checkpoint or a Hugging Face id)"
        ) from None


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; `"auto"` is the first CUDA device if there is one, else the CPU.

    Raises:
        ValueError: The name is no device, or this machine does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here: {reason}") from None
    return device


@dataclass(frozen=True)
class Prediction:
    """A class and its probability."""

    label: str
    probability: float


@dataclass(frozen=True)
class Window:
    """A piece of a long recording, `start` to `end` in seconds, and its best classes."""

    start: float
    end: float
    predictions: tuple[Prediction, ...]


@dataclass(frozen=True)
class Scores:
    """What `Classifier` says about one file.

    Attributes:
        file: The file as it was named.
        seconds: Length of the audio.
        predictions: The best classes, the best first, from the mean over all windows.
        windows: The windows of a recording longer than one; else empty.
    """

    file: str
    seconds: float
    predictions: tuple[Prediction, ...]
    windows: tuple[Window, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values, for JSON."""
        return asdict(self)


@dataclass
class _Pending:
    """A file whose windows are being classified."""

    file: str
    samples: int
    cut: Tensor
    lengths: Tensor
    done: list[Tensor]


class Classifier:
    """Labels audio files with a model, windows of many files in one batch.

    Example::

        classifier = Classifier.from_pretrained(default_model(), r=10)
        for scores in classifier(["seven.wav"]):
            print(scores.predictions[0])

    Args:
        model: An AST; its config tells the features and the labels. It is optimized in place.
        r: Tokens to merge in each block.
        top_k: How many classes to give, at most all.
        batch_size: Windows a forward.
        multi_label: Give each class a probability of its own (a sigmoid) instead of one
            distribution over all (a softmax); right for models of AudioSet.
        dtype: What `fastast.optimize` makes of the model; None leaves its weights' dtype.
    """

    def __init__(
        self,
        model: AST,
        r: Schedule = 0,
        top_k: int = 3,
        batch_size: int = 16,
        multi_label: bool = False,
        dtype: torch.dtype | Literal["int8"] | None = None,
    ) -> None:
        for name, value in (("top_k", top_k), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self.model = fastast.patch(model.eval(), r=r)
        self._run = fastast.optimize(self.model, dtype)
        self.device = next(model.parameters()).device
        self.fbank: Fbank = front_end(model.config).to(self.device)
        # A window holds the model's frames, the last one whole.
        step, size = self.fbank.hop_length, self.fbank.window_length
        self.samples = (model.config.target_length - 1) * step + size
        self.labels = model.config.labels or tuple(map(str, range(model.config.num_classes)))
        self.top_k = min(top_k, len(self.labels))
        self.batch_size = batch_size
        self.multi_label = multi_label

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], device: str = "auto", **options: Any
    ) -> Classifier:
        """A classifier from anything that `AST.from_pretrained` reads."""
        return cls(AST.from_pretrained(path).to(pick_device(device)), **options)

    def _best(self, probabilities: Tensor) -> tuple[Prediction, ...]:
        values, indices = probabilities.topk(self.top_k)
        return tuple(
            Prediction(self.labels[i], value)
            for i, value in zip(indices.tolist(), values.tolist(), strict=True)
        )

    @torch.inference_mode()
    def _probabilities(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        features = self.fbank(waveform.to(self.device), lengths.to(self.device))
        logits = self._run(features).float()
        return (logits.sigmoid() if self.multi_label else logits.softmax(-1)).cpu()

    def _open(self, file: str) -> _Pending:
        waveform = load_audio(file, self.fbank.sample_rate)
        if len(waveform) < self.fbank.window_length:
            milliseconds = 1000 * len(waveform) / self.fbank.sample_rate
            raise AudioError(f"{file}: is {milliseconds:.0f} ms long: at least 25 ms are needed")
        cut, lengths = windows(waveform, self.samples)
        return _Pending(file, len(waveform), cut, lengths, [])

    def _finish(self, pending: _Pending) -> Scores:
        probabilities = torch.stack(pending.done)
        rate = self.fbank.sample_rate
        pieces: tuple[Window, ...] = ()
        if len(probabilities) > 1:
            starts = [i * self.samples / rate for i in range(len(probabilities))]
            pieces = tuple(
                Window(start, min(start + self.samples / rate, pending.samples / rate), best)
                for start, best in zip(starts, map(self._best, probabilities), strict=True)
            )
        mean = probabilities.mean(0)
        return Scores(pending.file, pending.samples / rate, self._best(mean), pieces)

    def __call__(
        self,
        files: Iterable[str | os.PathLike[str]],
        on_error: Callable[[AudioError], None] | None = None,
    ) -> Iterator[Scores]:
        """Classify files, in their order.

        Args:
            files: Paths of audio files.
            on_error: Called for a file that cannot be used, which then has no result; without
                it the error is raised.

        Raises:
            AudioError: A file cannot be used, and there is no `on_error`.
        """
        waiting: list[tuple[_Pending, int]] = []
        order: list[_Pending] = []

        def run(count: int) -> None:
            some = waiting[:count]
            del waiting[:count]
            cut = torch.stack([pending.cut[i] for pending, i in some])
            lengths = torch.stack([pending.lengths[i] for pending, i in some])
            for (pending, _), row in zip(some, self._probabilities(cut, lengths), strict=True):
                pending.done.append(row)

        def finished() -> Iterator[Scores]:
            while order and len(order[0].done) == len(order[0].cut):
                yield self._finish(order.pop(0))

        for file in files:
            try:
                pending = self._open(os.fspath(file))
            except AudioError as error:
                if on_error is None:
                    raise
                on_error(error)
                continue
            order.append(pending)
            waiting.extend((pending, i) for i in range(len(pending.cut)))
            while len(waiting) >= self.batch_size:
                run(self.batch_size)
            yield from finished()
        if waiting:
            run(len(waiting))
        yield from finished()
