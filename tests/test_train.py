from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import RUN, assert_same, losses, quiet, small, weights, write_tones

import fastast
from fastast.data import AudioDataset, list_clips
from fastast.evaluate import evaluate, evaluate_at, read_r
from fastast.recipe import TrainConfig, learning_rate
from fastast.train import CHECKPOINT, train

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tones(tmp_path_factory.mktemp("tones"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Killed(BaseException):
    """Not an Exception, so that nothing catches it: the closest to a kill inside a process."""


def train_until(config: TrainConfig, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train and die in the middle of a step."""
    from fastast.run import Run

    original = Run.train_step

    def dying(self: Run) -> float:
        if self.step == step:
            raise Killed
        return original(self)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "train_step", dying)
        train(config, quiet)


def test_learns_two_tones_and_saves_everything(tones: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    config = small(
        tones,
        tmp_path,
        epochs=30,
        lr=2e-3,
        r_choices=(0, 2),
        **dict.fromkeys(("dropout", "drop_path", "speed", "gain", "noise", "label_smoothing"), 0.0),
        **dict.fromkeys(("shift", "frequency_mask", "time_mask"), 0),
    )
    metrics = train(config, lines.append)
    assert [row["r"] for row in metrics["model"]] == [0, 2]
    assert all(row["accuracy"] == 1.0 for row in metrics["model"])
    assert len(lines) == 1 + 30

    model = fastast.AST.from_pretrained(tmp_path / "model")
    assert model.config.labels == ("high", "low")
    assert model.tome is None
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert stored["steps"] == 30 * 3
    assert stored["model_averaged"][0]["clips"] == 8
    assert TrainConfig(**json.loads((tmp_path / "train_config.json").read_text())).epochs == 30
    with (tmp_path / "history.csv").open() as file:
        history = list(csv.DictReader(file))
    assert [float(row["epoch"]) for row in history] == list(range(1, 31))
    assert float(history[-1]["loss"]) < float(history[0]["loss"])
    assert (tmp_path / "history.png").stat().st_size > 1000
    assert list((tmp_path / "tensorboard").rglob("events*"))


def test_half_precision_weights_are_what_is_evaluated(tones: Path, tmp_path: Path) -> None:
    config = small(tones, tmp_path, epochs=1, average_epochs=0)
    train(config, quiet)
    full = weights(tmp_path)
    metrics = train(replace(config, save_dtype="float16"), quiet)  # finished: saves it again
    half = weights(tmp_path)
    assert all(torch.equal(value.half(), half[name]) for name, value in full.items())
    listing = list_clips(tones)
    data = AudioDataset.load(listing, "test")
    model = fastast.AST.from_pretrained(tmp_path / "model")
    again = evaluate_at(model, data, [0, 2])
    assert [row["accuracy"] for row in metrics["model"]] == [r.accuracy for r in again]
    assert metrics["config"]["save_dtype"] == "float16"


@pytest.mark.parametrize("step", [2, 4, 6, 8])
def test_resumed_run_ends_with_the_same_weights(
    tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    whole = small(tones, tmp_path / "whole", save_every=2)
    train(whole, quiet)
    killed = replace(whole, out=str(tmp_path / "killed"))
    train_until(killed, step, monkeypatch)
    stored = torch.load(tmp_path / "killed" / CHECKPOINT, weights_only=True)["step"]
    assert 0 < stored <= step
    lines: list[str] = []
    train(killed, lines.append)
    assert lines[0] == f"resuming at step {stored} of 9"
    for name in ("model", "model_averaged"):
        assert_same(weights(tmp_path / "whole", name), weights(tmp_path / "killed", name))
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")


def test_survives_sigkill(tones: Path, tmp_path: Path) -> None:
    whole = small(tones, tmp_path / "whole", save_every=1, epochs=6)
    train(whole, quiet)
    killed = replace(whole, out=str(tmp_path / "killed"))
    child = subprocess.Popen(
        [sys.executable, "-c", RUN, killed.to_json()],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoint = tmp_path / "killed" / CHECKPOINT
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < deadline:
        assert child.poll() is None, "it ended before its first checkpoint"
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert torch.load(checkpoint, weights_only=True)["step"] >= 1
    train(killed, quiet)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


def test_another_configuration_is_refused(tones: Path, tmp_path: Path) -> None:
    config = small(tones, tmp_path, epochs=1, average_epochs=0)
    train(config, quiet)
    with pytest.raises(ValueError, match=r"lr was 0\.001 and is 0\.002.*--no-resume"):
        train(replace(config, lr=2e-3), quiet)


def test_changed_data_is_refused(tmp_path: Path) -> None:
    data = write_tones(tmp_path / "data")
    config = small(data, tmp_path / "out", epochs=1, average_epochs=0)
    train(config, quiet)
    (data / "train" / "low" / "0.wav").unlink()
    with pytest.raises(ValueError, match="the training data changed"):
        train(config, quiet)
    train(replace(config, resume=False), quiet)  # starting over is allowed


def test_finished_run_and_evaluation_options_may_change(tones: Path, tmp_path: Path) -> None:
    config = small(tones, tmp_path, epochs=1, average_epochs=0)
    train(config, quiet)
    before = weights(tmp_path)
    metrics = train(replace(config, final_r=(5,), save_every=7), quiet)
    assert [row["r"] for row in metrics["model"]] == [5]
    assert_same(before, weights(tmp_path))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"], ids=["empty", "text"])
def test_broken_checkpoint_is_named(tones: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / CHECKPOINT).write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is not a checkpoint of fastast train"):
        train(small(tones, tmp_path), quiet)


def test_fine_tunes_and_other_recipes(tones: Path, tmp_path: Path) -> None:
    first = small(tones, tmp_path / "a", epochs=1, average_epochs=0)
    train(first, quiet)
    second = replace(
        first,
        out=str(tmp_path / "b"),
        init=str(tmp_path / "a" / "model"),
        optimizer="adam",
        schedule="step",
        betas=(0.95, 0.999),
        weight_decay=5e-7,
        loss="bce",
        mixup=0.5,
        r="2,-1",
        r_choices=(),
        precision="bf16",
        target_length=64,
        lr=0.0001,
    )
    metrics = train(second, quiet)
    model = fastast.AST.from_pretrained(tmp_path / "b" / "model")
    assert model.config.target_length == 64
    assert math.isfinite(metrics["model"][0]["accuracy"])
    before, after = weights(tmp_path / "a"), weights(tmp_path / "b")
    name = "blocks.0.attn.qkv.weight"
    name = name if name in before else next(n for n in before if before[n].ndim == 2)
    difference = (after[name] - before[name]).abs().max()
    assert 0 < difference < 1e-2  # it started from the first run's weights


def test_loss_that_is_not_finite_stops(tones: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the loss is .* lower lr"):
        train(small(tones, tmp_path, lr=1e30, warmup=0, clip_norm=0.0), quiet)


def test_learning_rate() -> None:
    config = TrainConfig(lr=1.0, warmup=10, epochs=4)
    assert learning_rate(config, 0, 25) == pytest.approx(0.1)
    assert learning_rate(config, 9, 25) == pytest.approx(1.0)
    assert learning_rate(config, 55, 25) == pytest.approx(0.5)
    assert learning_rate(config, 99, 25) < 0.001
    ast = TrainConfig(lr=1.0, warmup=0, schedule="step", step_start=5, step_every=2, step_gamma=0.5)
    by_epoch = [learning_rate(ast, epoch * 10, 10) for epoch in range(10)]
    # MultiStepLR with milestones 5, 7, 9
    assert by_epoch == [1, 1, 1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.125]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "huge"}, "size must be one of tiny, small, base, not 'huge'"),
        ({"epochs": 0}, "epochs must be positive"),
        ({"betas": (0.9,)}, "betas"),
        ({"r": "1.5"}, "r must be a number"),
        ({"r_choices": (-1,)}, "must not be negative"),
        ({"average_epochs": 99}, "average_epochs"),
        ({"mixup": 2.0}, "mixup"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)  # type: ignore[arg-type]


def test_missing_data_and_device(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data must name"):
        train(TrainConfig(), quiet)
    with pytest.raises(ValueError, match="does not exist"):
        train(TrainConfig(data=str(tmp_path / "nothing")), quiet)


def test_read_r() -> None:
    assert read_r("20") == 20
    assert read_r("20,-1") == (20, -1.0)
    assert read_r("3,2,1") == [3, 2, 1]
    with pytest.raises(ValueError, match="'a'"):
        read_r("a")


def test_evaluate_counts_right() -> None:
    torch.manual_seed(0)
    config = fastast.ASTConfig(num_classes=3, embed_dim=64, depth=2, num_heads=1, target_length=48)
    model = fastast.AST(config).eval()
    waves = [torch.randn(4000 + 200 * i).numpy() * 0.1 * (i + 1) for i in range(7)]
    labels = ("a", "b", "c")
    fake = AudioDataset(waves, [(0,)] * 7, labels, [str(i) for i in range(7)])
    fbank = fastast.Fbank(target_length=48)
    samples = 47 * 160 + 400
    batch = fake.batch(range(7), samples)
    with torch.inference_mode():
        answers = model(fbank(batch.waveform, batch.lengths)).argmax(1)
    targets = answers.clone()
    targets[:2] = (targets[:2] + 1) % 3  # two of seven wrong
    data = AudioDataset(waves, [(int(t),) for t in targets], labels, fake.names)
    result = evaluate(model, data, batch_size=3)
    assert result.accuracy == pytest.approx(5 / 7)
    assert result.clips == 7
    assert result.clips_per_second > 0
    recalled = sum(c.recall * c.clips for c in result.per_class.values())
    assert recalled == pytest.approx(5)

    rows = evaluate_at(model, data, [0, 4])
    assert rows[0].accuracy == result.accuracy
    assert model.tome is None
    with pytest.raises(ValueError, match="2 classes and the model 3"):
        evaluate(model, AudioDataset(waves[:1], [(0,)], ("a", "b"), ("x",)))
