"""Heads fitted on frozen embeddings: teachers for a new data set, and linear probes of a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastast.augment import Augment
from fastast.data import AudioDataset, Batch
from fastast.evaluate import window
from fastast.features import Fbank
from fastast.model import AST
from fastast.teachers import Network, front_end_of

__all__ = ["accuracy", "embeddings", "fit_head", "fit_linear", "linear_probe"]

MAX_ITERATIONS = 2000
ABSENT = -30.0  # logit of a class that no clip has: a probability of 1e-13


@torch.inference_mode()
def embeddings(
    model: nn.Module,
    dataset: AudioDataset,
    batch_size: int = 64,
    augment: Augment | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """What a model makes of every clip in front of its head.

    Of an AST that is the mean of its CLS and DIST tokens after the final LayerNorm, of a teacher
    network its `embed`. Longer clips than the model's features are cut at the end.

    Args:
        model: An AST, patched or not, or a teacher network, on any device.
        dataset: The clips.
        batch_size: Clips a forward.
        augment: What is done to the clips first, as a student's would be; mixup is left out.
        seed: Of the augmentation.

    Returns:
        float32 `[n, D]` on the CPU, and the data set's targets: int64 `[n]`, or float32
        `[n, classes]` where a clip has several classes.

    Raises:
        TypeError: `model` is neither.
        ValueError: The data set is empty, or has another sample rate than the model.
    """
    front_end: Any = front_end_of(model)
    if not len(dataset):
        raise ValueError("dataset has no clips")
    if dataset.sample_rate != front_end.sample_rate:
        raise ValueError(
            f"dataset must have the model's sample rate, {front_end.sample_rate} Hz, "
            f"got {dataset.sample_rate}"
        )
    parameter = next(model.parameters())
    front_end.to(parameter.device)
    was_training = model.training
    model.eval()
    rows, targets = [], []
    augment = Augment() if augment is None else replace(augment, mixup=0.0)
    # Masks and shifts are counted in the frames and bins of an AST that hears the same window.
    reference = Fbank(front_end.sample_rate, target_length=front_end.target_length)
    generator = torch.Generator().manual_seed(seed)
    try:
        for batch in dataset.batches(batch_size, window(front_end)):
            draws = augment.draw(len(batch.lengths), generator)
            batch = Batch(*(t.to(parameter.device) for t in batch))
            waveform, lengths, target = augment.waveform(batch, draws)
            features = augment.features(waveform, lengths, draws, front_end, reference)
            rows.append(_embed(model, features.to(parameter.dtype)).float().cpu())
            targets.append(target.cpu())
    finally:
        model.train(was_training)
    return torch.cat(rows), torch.cat(targets)


def _embed(model: nn.Module, features: Tensor) -> Tensor:
    if isinstance(model, AST):
        return model.forward_features(features)[:, : model.num_prefix_tokens].mean(1)
    return cast(Network, model).embed(features)


def fit_linear(
    embeddings: Tensor, targets: Tensor, classes: int, c: float = 0.05
) -> tuple[Tensor, Tensor]:
    """Logistic regression on standardised embeddings, as a linear layer on the embeddings.

    With mean `m` and standard deviation `s` of every dimension, the layer `w z + b` fitted on
    `z = (x - m) / s` is `(w / s) x + (b - (w / s) m)` on `x`. Classes are fitted together
    (multinomial), or one against the rest where a clip has several. A class that no clip has gets
    a logit of -30 whatever the embedding; one that every clip has, among several a clip, 30.

    Args:
        embeddings: `[n, D]`, any floating dtype.
        targets: int64 `[n]`, or floating `[n, classes]` of zeros and ones.
        classes: Number of classes.
        c: Inverse of the L2 regularisation's strength (scikit-learn's `C`).

    Returns:
        Weight `[classes, D]` and bias `[classes]`, float32.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: Shapes do not fit, a target is no class, an embedding is not finite, `c` is not
            positive, or there is nothing to tell apart.
    """
    if embeddings.dim() != 2 or len(embeddings) != len(targets) or not len(targets):
        raise ValueError(
            "embeddings must be [n, D] for n targets, at least one, got "
            f"{list(embeddings.shape)} for {len(targets)}"
        )
    if not embeddings.isfinite().all():
        raise ValueError("embeddings must be finite")
    if not c > 0:
        raise ValueError(f"c must be more than 0, got {c}")
    x = embeddings.double()
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    standardised = (x - mean) / std
    if targets.is_floating_point():
        if targets.dim() != 2 or targets.shape[1] != classes:
            raise ValueError(f"targets must be [n, {classes}], got {list(targets.shape)}")
        weight, bias = _one_against_rest(standardised, targets > 0.5, c)
    else:
        if targets.min() < 0 or targets.max() >= classes:
            raise ValueError(
                f"targets must be from 0 to {classes - 1}, got {int(targets.min())} to "
                f"{int(targets.max())}"
            )
        weight, bias = _multinomial(standardised, targets, classes, c)
    weight = weight / std
    return weight.float(), (bias - weight @ mean).float()


def _fit(x: Tensor, y: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """scikit-learn's weight `[k, D]` and bias `[k]`, of which a pair of classes has one row."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise ImportError('fitting needs scikit-learn: pip install "fastast[train]"') from None
    fitted = LogisticRegression(C=c, max_iter=MAX_ITERATIONS).fit(x.numpy(), y.numpy())
    return torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_)


def _multinomial(x: Tensor, y: Tensor, classes: int, c: float) -> tuple[Tensor, Tensor]:
    present = y.unique()
    if len(present) < 2:
        raise ValueError(f"targets must be of two classes or more, all are {int(present[0])}")
    rows, offsets = _fit(x, y, c)
    if len(present) == 2:  # one row, of the second: the softmax of both halves is its sigmoid
        rows, offsets = torch.cat([-rows, rows]) / 2, torch.cat([-offsets, offsets]) / 2
    weight = x.new_zeros(classes, x.shape[1])
    bias = x.new_full((classes,), ABSENT)
    weight[present], bias[present] = rows, offsets
    return weight, bias


def _one_against_rest(x: Tensor, truth: Tensor, c: float) -> tuple[Tensor, Tensor]:
    weight = x.new_zeros(truth.shape[1], x.shape[1])
    bias = x.new_full((truth.shape[1],), ABSENT)
    bias[truth.all(0)] = -ABSENT
    mixed = (truth.any(0) & ~truth.all(0)).nonzero().flatten().tolist()
    if not mixed:
        raise ValueError("targets must have a class that some clips have and others do not")
    for i in mixed:
        rows, offsets = _fit(x, truth[:, i].long(), c)
        weight[i], bias[i] = rows[0], offsets[0]
    return weight, bias


def accuracy(embeddings: Tensor, targets: Tensor, weight: Tensor, bias: Tensor) -> float:
    """Share of clips whose best class is right (one of them, for several a clip)."""
    best = (embeddings.to(weight.dtype) @ weight.t() + bias).argmax(1)
    if targets.is_floating_point():
        right = targets.gather(1, best[:, None])[:, 0] > 0.5
    else:
        right = best == targets
    return int(right.sum()) / len(targets)


def fit_head(
    network: Network,
    dataset: AudioDataset,
    labels: tuple[str, ...] | None = None,
    batch_size: int = 64,
    c: float = 0.05,
    augment: Augment | None = None,
    copies: int = 3,
) -> Network:
    """Give a network a linear head for a data set, fitted on its frozen embeddings.

    Whatever head it had is replaced: EfficientAT's two layers and PSLA's attention too. A teacher
    hears what its student hears, so it should know augmented clips: a head fitted on clean ones
    alone was right on 99.8 % of 400 of FSDD's training clips, and on 62 % of them augmented.

    Args:
        network: A teacher network; changed in place.
        dataset: The clips to fit on.
        labels: Class names; by default the data set's.
        batch_size: Clips a forward.
        c: Inverse of the regularisation's strength; see `fit_linear`.
        augment: What the student's clips will go through; None for clean clips alone.
        copies: With `augment`, so many augmented copies of each clip are fitted on too.

    Returns:
        The same network.

    Raises:
        TypeError: `network` is none, an AST for example: train it instead.
        ValueError: As `embeddings` and `fit_linear`, or labels are not as many as the classes.
    """
    if not isinstance(network, Network):
        raise TypeError(f"network must be a teacher network, got {type(network).__name__}")
    labels = dataset.labels if labels is None else tuple(labels)
    if len(labels) != len(dataset.labels):
        raise ValueError(f"labels must be {len(dataset.labels)} names, got {len(labels)}")
    parts = [embeddings(network, dataset, batch_size)]
    for seed in range(copies if augment is not None else 0):
        parts.append(embeddings(network, dataset, batch_size, augment, seed))
    x, y = (torch.cat(column) for column in zip(*parts, strict=True))
    weight, bias = fit_linear(x, y, len(labels), c)
    network.set_linear_head(weight, bias, labels)
    return network


def linear_probe(
    model: nn.Module,
    train: AudioDataset,
    test: AudioDataset,
    batch_size: int = 64,
    c: float = 0.05,
) -> float:
    """Accuracy on `test` of a linear layer fitted on a model's frozen embeddings of `train`.

    Args:
        model: An AST or a teacher network; left as it is.
        train: The clips to fit on.
        test: The clips to measure on.
        batch_size: Clips a forward.
        c: Inverse of the regularisation's strength; see `fit_linear`.

    Raises:
        TypeError: `model` is neither.
        ValueError: As `embeddings` and `fit_linear`, or the two have different classes.
    """
    if train.labels != test.labels:
        raise ValueError(
            f"test must have the classes of train, {len(train.labels)}, got {len(test.labels)} "
            "or other names"
        )
    head = fit_linear(*embeddings(model, train, batch_size), len(train.labels), c)
    return accuracy(*embeddings(model, test, batch_size), *head)
