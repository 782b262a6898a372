from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import fastast
from fastast.audio import AudioError
from fastast.classify import Classifier, default_model, pick_device

RATE = 16000
CONFIG = fastast.ASTConfig(
    num_classes=4,
    embed_dim=64,
    depth=2,
    num_heads=1,
    target_length=48,
    labels=("a", "b", "c", "d"),
)
WINDOW = 47 * 160 + 400


@pytest.fixture
def model() -> fastast.AST:
    torch.manual_seed(1)
    model = fastast.AST(CONFIG)
    torch.nn.init.normal_(model.head.linear.weight, std=2.0)  # answers that differ
    return model.eval()


def tone(samples: int, frequency: float, rate: int = RATE) -> np.ndarray:
    return (0.4 * np.sin(2 * math.pi * frequency * np.arange(samples) / rate)).astype(np.float32)


def write(path: Path, wave: np.ndarray, rate: int = RATE) -> Path:
    soundfile.write(path, wave, rate, subtype="FLOAT")
    return path


def probabilities(model: fastast.AST, wave: np.ndarray) -> torch.Tensor:
    """What the model says, computed step by step."""
    fbank = fastast.Fbank(target_length=48)
    with torch.inference_mode():
        return model(fbank(torch.from_numpy(wave)[None])).softmax(-1)[0]


def test_short_clip(model: fastast.AST, tmp_path: Path) -> None:
    wave = tone(5000, 700)
    expected = probabilities(model, wave)
    (scores,) = Classifier(model, top_k=9)([write(tmp_path / "x.wav", wave)])
    assert scores.file == str(tmp_path / "x.wav")
    assert scores.seconds == pytest.approx(5000 / RATE)
    assert scores.windows == ()
    assert [p.label for p in scores.predictions] == [
        CONFIG.labels[i] for i in expected.argsort(descending=True)
    ]
    for best, p in zip(scores.predictions, expected.sort(descending=True).values, strict=True):
        assert best.probability == pytest.approx(p.item(), abs=1e-5)


def test_long_recording_is_the_mean_of_its_windows(model: fastast.AST, tmp_path: Path) -> None:
    pieces = [tone(WINDOW, 300), tone(WINDOW, 3000), tone(WINDOW // 2, 1000)]
    rows = [probabilities(model, piece) for piece in pieces]
    mean = torch.stack(rows).mean(0)
    path = write(tmp_path / "long.wav", np.concatenate(pieces))
    (scores,) = Classifier(model, top_k=4, batch_size=2)([path])
    got = {p.label: p.probability for p in scores.predictions}
    for label, p in zip(CONFIG.labels, mean.tolist(), strict=True):
        assert got[label] == pytest.approx(p, abs=1e-5)
    assert [w.start for w in scores.windows] == pytest.approx([0, WINDOW / RATE, 2 * WINDOW / RATE])
    assert scores.windows[-1].end == pytest.approx(2.5 * WINDOW / RATE, abs=1e-3)
    for piece, row in zip(scores.windows, rows, strict=True):
        assert piece.predictions[0].label == CONFIG.labels[int(row.argmax())]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batches_of_many_files_keep_order(
    model: fastast.AST, tmp_path: Path, batch_size: int
) -> None:
    lengths = [4000, 2 * WINDOW, 900, WINDOW, 5 * WINDOW, 3000, 400]
    waves = [tone(n, 200 + 300 * i) for i, n in enumerate(lengths)]
    files = [write(tmp_path / f"{9 - i}.wav", wave) for i, wave in enumerate(waves)]
    alone = [next(iter(Classifier(model)([file]))) for file in files]
    together = list(Classifier(model, batch_size=batch_size)(files))
    assert [s.file for s in together] == [str(file) for file in files]
    for a, b in zip(alone, together, strict=True):
        assert [p.label for p in a.predictions] == [p.label for p in b.predictions]
        assert a.predictions[0].probability == pytest.approx(b.predictions[0].probability, abs=1e-5)
        assert len(a.windows) == len(b.windows)


def test_any_rate_and_channels(model: fastast.AST, tmp_path: Path) -> None:
    reference = next(iter(Classifier(model)([write(tmp_path / "16.wav", tone(WINDOW, 500))])))
    high = tone(3 * WINDOW, 500, 3 * RATE)
    stereo = np.stack([1.5 * high, 0.5 * high], axis=1)
    other = next(iter(Classifier(model)([write(tmp_path / "48.wav", stereo, 3 * RATE)])))
    assert other.seconds == pytest.approx(reference.seconds)
    assert other.predictions[0].label == reference.predictions[0].label
    assert other.predictions[0].probability == pytest.approx(
        reference.predictions[0].probability, abs=0.05
    )


def test_merging_and_sigmoid(model: fastast.AST, tmp_path: Path) -> None:
    file = write(tmp_path / "x.wav", tone(5000, 700))
    expected = probabilities(model, tone(5000, 700))
    plain = next(iter(Classifier(model, r=0)([file])))
    assert plain.predictions[0].probability == pytest.approx(expected.max().item(), abs=1e-6)
    merged = next(iter(Classifier(model, r=8)([file])))
    assert model.r == 8
    assert merged.predictions[0].probability != plain.predictions[0].probability
    own = next(iter(Classifier(model, r=0, multi_label=True, top_k=4)([file])))
    logits = expected.log() - expected.log().mean()
    total = sum(p.probability for p in own.predictions)
    assert total != pytest.approx(1.0, abs=1e-3)
    assert own.predictions[0].label == CONFIG.labels[int(logits.argmax())]


def test_bad_files(model: fastast.AST, tmp_path: Path) -> None:
    good = write(tmp_path / "good.wav", tone(4000, 500))
    (tmp_path / "text.wav").write_text("hello")
    (tmp_path / "empty.wav").touch()
    bad = [
        tmp_path / "missing.wav",
        tmp_path / "text.wav",
        tmp_path / "empty.wav",
        write(tmp_path / "ten_ms.wav", tone(160, 500)),
        write(tmp_path / "none.wav", tone(0, 500)),
        write(tmp_path / "nan.wav", np.full(4000, np.nan, np.float32)),
    ]
    errors: list[AudioError] = []
    results = list(Classifier(model)([bad[0], good, *bad[1:]], on_error=errors.append))
    assert [s.file for s in results] == [str(good)]
    assert len(errors) == len(bad)
    for file, error in zip(bad, errors, strict=True):
        assert str(error).startswith(str(file))
        assert "\n" not in str(error)
    assert "10 ms long" in str(errors[3])
    with pytest.raises(AudioError, match=r"text\.wav"):
        list(Classifier(model)([good, bad[1]]))


def test_arguments(model: fastast.AST, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        Classifier(model, top_k=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        Classifier(model, batch_size=0)
    with pytest.raises(ValueError, match="device 'toaster' cannot be used"):
        pick_device("toaster")
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr("fastast.classify.__file__", str(tmp_path / "fastast" / "classify.py"))
    with pytest.raises(FileNotFoundError, match="name a model with --model"):
        default_model()


def test_labels_without_names(tmp_path: Path) -> None:
    config = fastast.ASTConfig(num_classes=3, embed_dim=64, depth=1, num_heads=1, target_length=48)
    scores = next(iter(Classifier(fastast.AST(config))([write(tmp_path / "x.wav", tone(999, 9))])))
    assert {p.label for p in scores.predictions} == {"0", "1", "2"}


def test_in_another_dtype(model: fastast.AST, tmp_path: Path) -> None:
    wave = tone(5000, 700)
    expected = probabilities(model, wave)
    file = write(tmp_path / "x.wav", wave)
    (scores,) = Classifier(model, top_k=1, dtype=torch.bfloat16)([file])
    assert next(model.parameters()).dtype == torch.bfloat16
    assert scores.predictions[0].label == CONFIG.labels[int(expected.argmax())]
    assert scores.predictions[0].probability == pytest.approx(expected.max().item(), abs=0.05)
    with pytest.raises(ValueError, match=r"dtype must be a floating .* got 'int4'"):
        Classifier(model, dtype="int4")  # type: ignore[arg-type]
