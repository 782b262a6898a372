"""Training runs of milliseconds, on tones that tests write."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile
import torch
from safetensors.torch import load_file

from fastast.recipe import TrainConfig

RATE = 16000
TONES = {"low": 300.0, "high": 2000.0}


def write_tones(root: Path, train_clips: int = 12, test_clips: int = 4) -> Path:
    """Two classes of tones, as folders of classes below train and test."""
    random = np.random.default_rng(0)
    for split, count in (("train", train_clips), ("test", test_clips)):
        for label, frequency in TONES.items():
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                seconds = random.uniform(0.2, 0.35)
                clock = np.arange(int(seconds * RATE)) / RATE
                pitch = frequency * random.uniform(0.9, 1.1)
                wave = 0.3 * np.sin(2 * math.pi * pitch * clock)
                wave += 0.01 * random.standard_normal(len(clock))
                soundfile.write(folder / f"{i}.wav", wave, RATE)
    return root


def small(tones: Path, out: Path, **options: object) -> TrainConfig:
    """A run of two steps an epoch of a model that trains in milliseconds."""
    base = TrainConfig(
        data=str(tones),
        out=str(out),
        embed_dim=64,
        depth=2,
        num_heads=1,
        target_length=48,
        epochs=3,
        batch_size=8,
        warmup=2,
        lr=1e-3,
        dropout=0.1,
        drop_path=0.1,
        r_choices=(0, 2, 5),
        eval_r=(0, 2),
        final_r=(0, 2),
        shift=8,
        frequency_mask=8,
        time_mask=8,
        device="cpu",
        average_epochs=2,
    )
    return replace(base, **options)  # type: ignore[arg-type]


def quiet(_: str) -> None:
    pass


def weights(out: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(out / name / "model.safetensors")


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def losses(out: Path) -> list[float]:
    """The training loss of each epoch."""
    with (out / "history.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


RUN = """
import json, sys, torch
torch.set_num_threads(1)
from fastast.recipe import TrainConfig
from fastast.train import train
options = json.loads(sys.argv[1])
options = {n: tuple(v) if isinstance(v, list) else v for n, v in options.items()}
train(TrainConfig(**options))
"""
