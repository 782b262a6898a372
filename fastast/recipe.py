"""The options of a training run, in one place, and the model and optimizer they ask for."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import nn

import fastast
from fastast.augment import Augment
from fastast.data import AudioDataset
from fastast.evaluate import front_end, read_r, window
from fastast.features import Fbank
from fastast.model import AST, ASTConfig

__all__ = ["TrainConfig", "build_model", "build_optimizer", "learning_rate", "mixed_seed"]

WINDOWS = (128, 256, 512, 1024)


def _option(default: Any, text: str, resumable: bool = False) -> Any:
    """A field with its help text; a `resumable` one may differ between a run and its resumption."""
    return field(default=default, metadata={"help": text, "resumable": resumable})


@dataclass(frozen=True)
class TrainConfig:
    """Every option of a training run; saved as JSON beside the model it made."""

    data: str = _option("", "csv, folder with a csv and its archives, or folder of class folders")
    out: str = _option("runs/fastast", "folder for checkpoints, logs and the model", True)
    roots: tuple[str, ...] = _option((), "folders and zips with the csv's audio [beside the csv]")
    path_column: str = _option("", "csv column with the file name [auto]")
    target_column: str = _option("", "csv column with the class [auto]")
    split_column: str = _option("", "csv column with the split or fold [auto]")
    train_split: str = _option("", "split to train on [train, or all but the test split]")
    test_split: str = _option("", "split to test on [test, or the first fold]")
    where: str = _option("", "use only rows of the csv with this value: column=value")
    subset: str = _option("", "esc10 (of ESC-50) or kws12 (of Speech Commands)")
    limit: int = _option(0, "use only so many clips of each split (0: all)")
    cache: str = _option("memory", "where decoded clips are kept: memory, disk or none", True)
    cache_dir: str = _option("", "folder of the disk cache [beside the output]", True)
    cache_dtype: str = _option("float32", "float32 or float16: how decoded clips are kept")
    sampler: str = _option("uniform", "uniform, or balanced: rare classes as often as common ones")

    arch: str = _option("ast", "ast, mn04, efficientnet_b2, efficientnet_b2_psla or timm:NAME")
    init: str = _option("", "start from this checkpoint instead of from scratch")
    size: str = _option("tiny", "tiny, small or base")
    embed_dim: int = _option(0, "width of the model (0: the size's)")
    depth: int = _option(0, "blocks of the model (0: the size's)")
    num_heads: int = _option(0, "attention heads (0: the size's)")
    target_length: int = _option(0, "frames of 10 ms a clip (0: from the data)")
    mean: float | None = _option(None, "mean of the log-mel features [measured]")
    std: float | None = _option(None, "deviation of the log-mel features [measured]")
    dropout: float = _option(0.0, "dropout after attention and MLP")
    drop_path: float = _option(0.0, "chance of a block's branch to be skipped")

    r: str = _option("0", "tokens merged a block: 20, '20,-1' or one number a block")
    r_choices: tuple[int, ...] = _option((), "draw r of each step from these: one model for many r")
    eval_r: tuple[int, ...] = _option((0, 10), "r at which each epoch is evaluated", True)
    final_r: tuple[int, ...] = _option((0, 2, 5, 10, 15, 20), "r of the final evaluation", True)

    epochs: int = _option(45, "passes over the data")
    batch_size: int = _option(32, "clips a step, over all devices")
    accumulate: int = _option(1, "parts a step's clips are computed in, to save memory", True)
    gradient_checkpointing: bool = _option(False, "recompute blocks: less memory, slower", True)
    optimizer: str = _option("adamw", "adamw or adam (AST's)")
    lr: float = _option(4e-4, "highest learning rate; for larger batches, more")
    betas: tuple[float, ...] = _option((0.9, 0.99), "decay rates of the optimizer's moments")
    weight_decay: float = _option(0.05, "on weight matrices (adamw), on everything (adam)")
    schedule: str = _option("cosine", "cosine, or step (AST's)")
    warmup: int = _option(250, "steps of linear warm-up")
    step_start: int = _option(5, "step schedule: first epoch of decay")
    step_every: int = _option(1, "step schedule: epochs between decays")
    step_gamma: float = _option(0.85, "step schedule: factor of a decay")
    clip_norm: float = _option(1.0, "largest gradient norm (0: no clipping)")
    loss: str = _option("ce", "ce (one class a clip) or bce (several)")
    label_smoothing: float = _option(0.05, "share of the label given to the other classes")
    teacher: str = _option("", "checkpoint of a trained model to distil from (CMKD)")
    lam: float = _option(0.1, "weight of the labels against the teacher's (CMKD: 0.5)")
    tau: float = _option(1.0, "temperature of the teacher's logits")
    average_epochs: int = _option(0, "also save the mean of the last so many epochs' weights")

    speed: float = _option(0.05, "change of speed, each way, as a share")
    gain: float = _option(6.0, "gain in dB, each way")
    noise: float = _option(0.2, "chance of white noise, 10 to 40 dB below the clip")
    mixup: float = _option(0.0, "chance of a clip to be mixed with another")
    shift: int = _option(16, "largest shift inside the window, in frames")
    frequency_mask: int = _option(16, "widest SpecAug mask in mel bins")
    time_mask: int = _option(10, "widest SpecAug mask in frames")
    roll: int = _option(0, "largest circular shift in frames, each way (AST: 10)")
    feature_noise: float = _option(0.0, "largest noise added to normalised features (AST: 0.1)")

    save_dtype: str = _option("float32", "of the saved weights; float16 halves the file", True)
    seed: int = _option(0, "of weights, order, augmentation and dropout")
    precision: str = _option("no", "no (fp32), bf16 or fp16")
    device: str = _option("auto", "auto, cpu or cuda")
    save_every: int = _option(200, "steps between checkpoints, besides each epoch's", True)
    resume: bool = _option(True, "continue the run found in the output folder", True)

    def __post_init__(self) -> None:
        for name, allowed in (
            ("size", ("tiny", "small", "base")),
            ("optimizer", ("adamw", "adam")),
            ("schedule", ("cosine", "step")),
            ("loss", ("ce", "bce")),
            ("precision", ("no", "bf16", "fp16")),
            ("device", ("auto", "cpu", "cuda")),
            ("cache", ("memory", "disk", "none")),
            ("cache_dtype", ("float32", "float16")),
            ("sampler", ("uniform", "balanced")),
            ("save_dtype", ("float32", "float16", "bfloat16")),
        ):
            if getattr(self, name) not in allowed:
                value = getattr(self, name)
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
        for name in ("epochs", "batch_size", "lr", "step_every", "save_every", "accumulate", "tau"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if not 0 <= self.average_epochs <= self.epochs:
            raise ValueError(f"average_epochs must be in [0, epochs], not {self.average_epochs}")
        if not 0 <= self.lam <= 1:
            raise ValueError(f"lam must be in [0, 1], not {self.lam}")
        if len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers, not {self.betas}")
        if any(r < 0 for r in (*self.r_choices, *self.eval_r, *self.final_r)):
            raise ValueError("r_choices, eval_r and final_r must not be negative")
        read_r(self.r)
        self.augment()

    def augment(self) -> Augment:
        """The augmentations this configuration asks for."""
        return Augment(**{f.name: getattr(self, f.name) for f in fields(Augment)})

    def to_json(self) -> str:
        """All options, one a line."""
        return json.dumps(asdict(self), indent=2)

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Options that differ from a stored configuration and may not, in words."""
        mine = json.loads(self.to_json())
        compared = [f for f in fields(self) if not f.metadata["resumable"]]
        return [
            f"{f.name} was {other.get(f.name)!r} and is {mine[f.name]!r}"
            for f in compared
            if mine[f.name] != other.get(f.name)
        ]


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step (counted from 0): linear warm-up, then cosine to 0 or AST's decay."""
    scale = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "cosine":
        total = config.epochs * steps_per_epoch
        done = max(0, step - config.warmup) / max(1, total - config.warmup)
        return config.lr * scale * 0.5 * (1 + math.cos(math.pi * done))
    epoch = step // steps_per_epoch
    decays = max(0, (epoch - config.step_start) // config.step_every + 1)
    return config.lr * scale * config.step_gamma**decays


def mixed_seed(*parts: int) -> int:
    """One well-mixed seed from several small numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def usual_length(dataset: AudioDataset) -> int:
    """The shortest usual window that holds nineteen clips of twenty whole."""
    seconds = torch.quantile(dataset.lengths.double() / dataset.sample_rate, 0.95).item()
    return next((frames for frames in WINDOWS if frames / 100 >= seconds), WINDOWS[-1])


@torch.inference_mode()
def feature_statistics(dataset: AudioDataset, target_length: int) -> tuple[float, float]:
    """Mean and deviation of the log-mel features of all clips, padding included, as in AST."""
    raw = Fbank(dataset.sample_rate, target_length=target_length, mean=None, std=None)
    total = square = count = 0.0
    for waveform, lengths, _ in dataset.batches(64, window(raw)):
        features = raw(waveform, lengths).double()
        total += features.sum().item()
        square += features.square().sum().item()
        count += features.numel()
    mean = total / count
    return mean, math.sqrt(max(square / count - mean * mean, 1e-12))


def build_model(config: TrainConfig, dataset: AudioDataset) -> tuple[Any, Any]:
    """The model, an AST with its merging patched in, and its front end.

    From scratch, or from `config.init`.
    """
    target_length = config.target_length or usual_length(dataset)
    torch.manual_seed(mixed_seed(config.seed))
    if config.arch != "ast":
        return _build_network(config, dataset, target_length)
    mean, std = _mean_and_std(config, dataset, target_length)
    options: dict[str, Any] = {
        "num_classes": len(dataset.labels),
        "labels": dataset.labels,
        "target_length": target_length,
        "sample_rate": dataset.sample_rate,
        "mean": mean,
        "std": std,
        "dropout": config.dropout,
        "drop_path": config.drop_path,
    }
    shape = {name: getattr(config, name) for name in ("embed_dim", "depth", "num_heads")}
    if config.init:
        model = AST.from_pretrained(config.init, **options)
    else:
        options.update({name: value for name, value in shape.items() if value})
        model = AST(getattr(ASTConfig, config.size)(**options))
    model.gradient_checkpointing = config.gradient_checkpointing
    return fastast.patch(model, r=read_r(config.r)), front_end(model.config)


def _mean_and_std(
    config: TrainConfig, dataset: AudioDataset, target_length: int
) -> tuple[float, float]:
    mean, std = config.mean, config.std
    if mean is None or std is None:
        measured = feature_statistics(dataset, target_length)
        mean = measured[0] if mean is None else mean
        std = measured[1] if std is None else std
    return mean, std


def _build_network(
    config: TrainConfig, dataset: AudioDataset, target_length: int
) -> tuple[Any, Any]:
    """Another network than AST, as a teacher to be."""
    from fastast import teachers

    network = teachers.build(
        config.arch,
        len(dataset.labels),
        dataset.labels,
        target_length,
        config.mean,
        config.std,
        weights=config.init,
    )
    return network, teachers.front_end_of(network)


def build_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of `config` over all parameters of `model`."""
    if config.optimizer == "adam":
        groups = [{"params": list(model.parameters()), "weight_decay": config.weight_decay}]
        kind: type[torch.optim.Optimizer] = torch.optim.Adam
    else:
        # Norms, biases, tokens and positions are not decayed: they set scales and places.
        matrices = [p for p in model.parameters() if p.ndim in (2, 4)]
        others = [p for p in model.parameters() if p.ndim not in (2, 4)]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        kind = torch.optim.AdamW
    # One pass over all that an update reads and writes; elsewhere torch has none.
    fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
    return kind(groups, lr=config.lr, betas=config.betas, fused=fused)  # type: ignore[call-arg]
