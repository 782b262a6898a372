from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import fastast
from fastast.audio import AudioError
from fastast.plot import (
    group_colours,
    merge_groups,
    throughput_vs_r,
    training_curve,
    visualize,
)


def test_group_colours() -> None:
    source = np.array([0, 1, 5, 5, 5, 2, 7, 7, 3])
    colours = group_colours(source)
    assert colours.shape == (9, 4)
    assert (colours[[0, 1, 5, 8], 3] == 0).all()  # alone
    assert (colours[[2, 3, 4, 6, 7], 3] == 1).all()
    assert (colours[2] == colours[3]).all()
    assert (colours[2] == colours[4]).all()
    assert np.abs(colours[2, :3] - colours[6, :3]).max() > 0.3
    largest = group_colours(np.repeat(np.arange(40), 2))
    assert len({tuple(c) for c in largest.round(3)}) == 40


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_pictures_are_written(tmp_path: Path, suffix: str) -> None:
    curves = {"tiny": {0: 50.0, 10: 100.0}, "base": {0: 2.0, 40: 3.0, 80: 4.0}}
    throughput_vs_r(curves, tmp_path / "new" / f"speed.{suffix}", "a machine")
    history = [{"epoch": e, "loss": 1 / e, "accuracy_r0": 0.1 * e} for e in range(1, 5)]
    history[-1]["accuracy_r10"] = 0.3  # evaluated at another r after resuming
    training_curve(history, tmp_path / f"curve.{suffix}")
    for path in (tmp_path / "new" / f"speed.{suffix}", tmp_path / f"curve.{suffix}"):
        if suffix == "svg":
            assert "<svg" in path.read_text()
        else:
            with Image.open(path) as image:
                assert min(image.size) > 300


def test_groups_are_drawn_where_their_patches_are(tmp_path: Path) -> None:
    f_dim, t_dim = 12, 12
    source = np.arange(2 + f_dim * t_dim)
    # Two patches far apart, at frequency 1, time 2 and at frequency 9, time 10, become one.
    source[2 + 9 * t_dim + 10] = source[2 + 1 * t_dim + 2]
    features = np.zeros((128, 128), np.float32)
    merge_groups(features, source, (f_dim, t_dim), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    colourful = np.abs(pixels - pixels.mean(2, keepdims=True)).max(2) > 40
    rows, columns = np.nonzero(colourful)
    lower, upper = rows > np.median(rows), rows <= np.median(rows)
    # The picture's origin is bottom left: the low-frequency cell is lower and earlier.
    assert columns[lower].mean() < columns[upper].mean()
    assert rows[lower].mean() - rows[upper].mean() > 50
    assert columns[upper].mean() - columns[lower].mean() > 50
    assert len(rows) > 200
    halves = sorted([int(lower.sum()), int(upper.sum())])
    assert halves[0] > 0.7 * halves[1]  # both cells have the same size


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path must end in \.png or \.svg"):
        training_curve([], tmp_path / "a.gif")
    with pytest.raises(ValueError, match=r"curves\['x'\] must have r=0"):
        throughput_vs_r({"x": {10: 1.0}}, tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"source must have 2 \+ 3 \* 4 tokens"):
        merge_groups(np.zeros((48, 40)), np.arange(13), (3, 4), tmp_path / "a.png")
    with pytest.raises(ValueError, match="spectrogram must be"):
        merge_groups(np.zeros(48), np.arange(14), (3, 4), tmp_path / "a.png")


def test_visualize(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = fastast.ASTConfig(
        num_classes=2, embed_dim=64, depth=3, num_heads=1, target_length=48, labels=("no", "yes")
    )
    model = fastast.patch(fastast.AST(config).train(), r=1)
    wave = 0.3 * np.sin(2 * math.pi * 440 * np.arange(8000) / 16000)
    soundfile.write(tmp_path / "a.wav", wave, 16000)
    left = visualize(model, tmp_path / "a.wav", tmp_path / "a.svg", r=5)
    assert left == config.num_tokens - 3 * 5
    assert "<svg" in (tmp_path / "a.svg").read_text()
    assert model.r == 1
    assert model.training
    assert visualize(model, tmp_path / "a.wav", tmp_path / "a.png", r=0) == config.num_tokens
    with pytest.raises(AudioError, match=r"a\.wav: has less than 25 ms after 2 s"):
        visualize(model, tmp_path / "a.wav", tmp_path / "b.png", start=2.0)
