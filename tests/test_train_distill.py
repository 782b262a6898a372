"""Training with a teacher, training a teacher, and what can go wrong with either."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import assert_same, losses, quiet, small, weights, write_tones

import fastast
from fastast import distill
from fastast.augment import Augment, Draws
from fastast.data import AudioDataset, list_clips
from fastast.recipe import TrainConfig
from fastast.train import CHECKPOINT, train

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

OFF = {
    **dict.fromkeys(("speed", "gain", "noise", "mixup"), 0.0),
    **dict.fromkeys(("shift", "frequency_mask", "time_mask"), 0),
}


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tones(tmp_path_factory.mktemp("tones"))


@pytest.fixture(scope="module")
def teacher(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An AST of another shape that knows the tones."""
    out = tmp_path_factory.mktemp("teacher")
    config = small(tones, out, epochs=20, lr=2e-3, depth=1, target_length=64, r_choices=(), **OFF)
    metrics = train(replace(config, average_epochs=0, eval_r=(0,), final_r=(0,)), quiet)
    assert metrics["model"][0]["accuracy"] == 1.0
    return str(out / "model")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def student(tones: Path, out: Path, teacher: str, **options: object) -> TrainConfig:
    values = {"teacher": teacher, "average_epochs": 0, "mixup": 0.5, "noise": 0.5, **options}
    return small(tones, out, **values)


def test_a_student_learns_from_the_teacher_alone(tones: Path, tmp_path: Path, teacher: str) -> None:
    """With lam 0 no label is ever looked at."""
    config = student(
        tones, tmp_path, teacher, lam=0.0, epochs=25, lr=2e-3, dropout=0.0, drop_path=0.0, **OFF
    )
    metrics = train(config, quiet)
    assert metrics["model"][0]["accuracy"] == 1.0
    history = losses(tmp_path)
    assert history[-1] < 0.3 * history[0]


def test_the_loss_is_cmkd(tones: Path, tmp_path: Path, teacher: str) -> None:
    """The first step's loss, computed again from the model, the teacher and what was drawn."""
    seen: list[tuple[torch.Tensor, ...]] = []

    def recorded(*arguments: torch.Tensor) -> torch.Tensor:
        loss = distill.cmkd_loss(*arguments)
        seen.append((*arguments[:3], loss.detach()))
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastast.run.cmkd_loss", recorded)
        train(student(tones, tmp_path, teacher, epochs=1, lam=0.25, tau=2.0), quiet)
    for student_logits, teacher_logits, target, loss in seen:
        log_p = student_logits.detach().log_softmax(1)
        soft = (teacher_logits / 2).softmax(1)
        ground = -(target * log_p).sum(1).mean()
        divergence = (soft * (soft.log() - log_p)).sum(1).mean()
        assert loss.item() == pytest.approx((0.25 * ground + 0.75 * divergence).item(), rel=1e-5)
        assert not teacher_logits.requires_grad
    assert len(seen) == 3


def test_teacher_and_student_hear_the_same(tones: Path, tmp_path: Path, teacher: str) -> None:
    heard: list[tuple[object, ...]] = []
    features = Augment.features

    def spy(
        self: Augment,
        waveform: torch.Tensor,
        lengths: torch.Tensor,
        draws: Draws,
        *front_ends: object,
    ) -> torch.Tensor:
        heard.append((waveform, lengths, draws.band, front_ends))
        return features(self, waveform, lengths, draws, *front_ends)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Augment, "features", spy)
        train(student(tones, tmp_path, teacher, epochs=1), quiet)
    assert len(heard) == 6
    for mine, its in zip(heard[::2], heard[1::2], strict=True):
        assert mine[0] is its[0] and mine[1] is its[1]
        assert torch.equal(mine[2], its[2])  # type: ignore[arg-type]
        ((own,), (front_end, reference)) = mine[3], its[3]  # type: ignore[misc]
        assert reference is own and front_end is not own
        assert (own.target_length, front_end.target_length) == (48, 64)


def test_logits_are_kept_where_nothing_is_augmented(
    tones: Path, tmp_path: Path, teacher: str
) -> None:
    calls = []
    forward = fastast.AST.forward

    def counted(self: fastast.AST, features: torch.Tensor) -> torch.Tensor:
        if self.config.target_length == 64:
            calls.append((len(features), self.training, torch.is_grad_enabled()))
        return forward(self, features)  # type: ignore[return-value]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastast.AST, "forward", counted)
        train(student(tones, tmp_path / "off", teacher, **OFF), quiet)
        assert calls == [(8, False, False)] * 3  # one epoch of three, frozen, in eval mode
        calls.clear()
        train(student(tones, tmp_path / "on", teacher), quiet)
        assert len(calls) == 9
    # What is kept is what would be computed.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Augment, "off", False)
        train(student(tones, tmp_path / "again", teacher, **OFF), quiet)
    assert losses(tmp_path / "off") == pytest.approx(losses(tmp_path / "again"), rel=1e-5)


def test_classes_in_another_order(tones: Path, tmp_path: Path, teacher: str) -> None:
    model = fastast.AST.from_pretrained(teacher)
    with torch.no_grad():
        for parameter in (model.head.linear.weight, model.head.linear.bias):
            parameter.copy_(parameter.flip(0))
    values = json.loads((Path(teacher) / "config.json").read_text())
    model.save_pretrained(tmp_path / "flipped")
    values["labels"] = values["labels"][::-1]
    (tmp_path / "flipped" / "config.json").write_text(json.dumps(values))
    train(student(tones, tmp_path / "a", teacher, epochs=1), quiet)
    train(student(tones, tmp_path / "b", str(tmp_path / "flipped"), epochs=1), quiet)
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_teachers_that_cannot_teach(tones: Path, tmp_path: Path, teacher: str) -> None:
    model = fastast.AST.from_pretrained(teacher)
    model.save_pretrained(tmp_path / "other")
    values = json.loads((tmp_path / "other" / "config.json").read_text())
    for labels, message in (
        (["high", "deep"], "it does not know low and also knows deep"),
        ([], "does not name its classes"),
    ):
        (tmp_path / "other" / "config.json").write_text(json.dumps({**values, "labels": labels}))
        with pytest.raises(ValueError, match=message):
            train(student(tones, tmp_path / "out", str(tmp_path / "other")), quiet)
    with pytest.raises(ValueError, match="nowhere"):
        train(student(tones, tmp_path / "out", str(tmp_path / "nowhere")), quiet)


@pytest.mark.parametrize("option", [{"lam": -0.1}, {"lam": 2.0}, {"tau": 0.0}])
def test_bad_options(option: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        TrainConfig(**option)  # type: ignore[arg-type]


def test_resumed_with_a_teacher(tones: Path, tmp_path: Path, teacher: str) -> None:
    from test_train import train_until

    whole = student(tones, tmp_path / "whole", teacher, save_every=2)
    train(whole, quiet)
    killed = replace(whole, out=str(tmp_path / "killed"))
    with pytest.MonkeyPatch.context() as patch:
        train_until(killed, 5, patch)
    train(killed, quiet)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


def test_a_full_disk_keeps_the_last_checkpoint(tones: Path, tmp_path: Path) -> None:
    config = small(tones, tmp_path, average_epochs=0)
    save = torch.save

    def full(state: dict[str, object], path: Path) -> None:
        if state["step"] == 6:
            path.write_bytes(b"half a checkpoint")
            raise RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed")
        save(state, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"step 6 could not be saved .*of step 3 is whole"):
            train(config, quiet)
    assert not list(tmp_path.glob("*.part"))
    assert torch.load(tmp_path / CHECKPOINT, weights_only=True)["step"] == 3
    lines: list[str] = []
    train(config, lines.append)
    assert lines[0] == "resuming at step 3 of 9"


def test_another_network_is_trained_and_teaches(tones: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    cnn = small(
        tones,
        tmp_path / "cnn",
        arch="timm:mobilenetv3_small_050",
        epochs=2,
        average_epochs=1,
        r_choices=(),
        final_r=(0,),
    )
    lines: list[str] = []
    metrics = train(cnn, lines.append)
    assert metrics["model"][0]["r"] is None
    assert math.isfinite(metrics["model_averaged"][0]["accuracy"])
    assert "r=0" in lines[-1]
    taught = train(student(tones, tmp_path / "b", str(tmp_path / "cnn" / "model"), epochs=1), quiet)
    assert math.isfinite(taught["history"][0]["loss"])


def test_a_class_without_training_clips_is_reported(tmp_path: Path) -> None:
    data = write_tones(tmp_path / "data", 4, 2)
    for file in (data / "train" / "low").iterdir():
        file.unlink()
    lines: list[str] = []
    train(small(data, tmp_path / "out", epochs=1, batch_size=4, average_epochs=0), lines.append)
    assert lines[0] == "no training clip of 1 test classes: low"


def test_a_clip_that_breaks_in_the_middle(tmp_path: Path) -> None:
    """Decoded when asked for: the broken clip is reported once, and the run goes on."""
    data = write_tones(tmp_path / "data")
    broken = data / "train" / "low" / "3.wav"
    broken.write_bytes(broken.read_bytes()[:2000])
    config = small(data, tmp_path / "out", epochs=2, cache="none", average_epochs=0)
    with pytest.warns(UserWarning, match=r"low/3\.wav") as caught:
        metrics = train(config, quiet)
    assert sum("3.wav" in str(w.message) for w in caught) == 1
    assert metrics["steps"] == 6


def test_caches_train_alike(tones: Path, tmp_path: Path) -> None:
    runs = {}
    for cache in ("memory", "disk", "none"):
        config = small(tones, tmp_path / cache, epochs=1, cache=cache, average_epochs=0)
        train(config, quiet)
        runs[cache] = weights(tmp_path / cache)
    assert (tmp_path / "disk" / "cache").is_dir()
    assert_same(runs["memory"], runs["disk"])
    assert_same(runs["memory"], runs["none"])


def test_balanced_sampling(tmp_path: Path) -> None:
    data = write_tones(tmp_path / "data", 12, 2)
    for i in range(10):
        (data / "train" / "low" / f"{i}.wav").unlink()
    from fastast.run import Run

    config = small(data, tmp_path / "out", sampler="balanced", batch_size=7, epochs=40)
    listing = list_clips(data)
    run = Run(config, AudioDataset.load(listing, "train"), AudioDataset.load(listing, "test"))
    drawn = torch.cat([run.train_set.targets[run._plan(step)[0]] for step in range(run.steps)])
    assert drawn.bincount().tolist() == pytest.approx([len(drawn) / 2] * 2, rel=0.2)


def test_clips_are_mixed_with_those_drawn(tones: Path, tmp_path: Path) -> None:
    from fastast.run import Run

    config = small(tones, tmp_path, **{**OFF, "mixup": 0.7})
    listing = list_clips(tones)
    run = Run(config, AudioDataset.load(listing, "train"), AudioDataset.load(listing, "test"))
    clips, draws = run._plan(0)
    rows = torch.tensor([1, 3, 4, 6])
    mixed = run._augmented(clips, draws, rows)
    own, weight = run._clips(clips[rows], draws[rows]), draws.weight[rows].float().unsqueeze(1)
    other = run._clips(clips[draws.partner[rows]], draws[draws.partner[rows]])
    torch.testing.assert_close(mixed.target, weight * own.target + (1 - weight) * other.target)
    for i, share in enumerate(weight.flatten().tolist()):
        length = int(own.lengths[i])
        centred = [b.waveform[i] - b.waveform[i].sum() / b.lengths[i] for b in (own, other)]
        inside = min(length, int(other.lengths[i]))
        wanted = (share * centred[0] + (1 - share) * centred[1])[:inside]
        wanted = own.waveform[i][:inside] if share == 1 else wanted
        torch.testing.assert_close(mixed.waveform[i][:inside], wanted, atol=1e-5, rtol=1e-4)
    assert (weight < 1).any()
