from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from sklearn import metrics as sklearn_metrics

import fastast
from fastast import data as audio_data
from fastast import plot
from fastast.cli import main
from fastast.data import AudioDataset
from fastast.evaluate import evaluate, front_end, window
from fastast.metrics import d_prime

LABELS = ("ape", "bee", "cat")
CONFIG = fastast.ASTConfig(
    num_classes=3, embed_dim=64, depth=2, num_heads=1, target_length=48, labels=LABELS
)
COUNT = 20


@pytest.fixture(scope="module")
def model() -> fastast.AST:
    torch.manual_seed(0)
    model = fastast.AST(CONFIG).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


@pytest.fixture(scope="module")
def waves() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    time = np.arange(6000) / 16000
    return [
        (0.3 * np.sin(2 * np.pi * f * time) + a * generator.standard_normal(6000)).astype(
            np.float32
        )
        for f, a in generator.uniform((100, 0), (7000, 0.3), (COUNT, 2))
    ]


def dataset(waves: list[np.ndarray], targets: list[tuple[int, ...]], many: bool) -> AudioDataset:
    names = [f"{i}.wav" for i in range(len(waves))]
    return AudioDataset(waves, targets, LABELS, names, multi_label=many)


def logits_of(model: fastast.AST, data: AudioDataset) -> torch.Tensor:
    fbank = front_end(CONFIG)
    batch = data.batch(range(len(data)), window(fbank))
    with torch.inference_mode():
        return model(fbank(batch.waveform, batch.lengths))


def test_one_class_a_clip(model: fastast.AST, waves: list[np.ndarray]) -> None:
    data = dataset(waves, [(i % 3,) for i in range(COUNT)], many=False)
    result = evaluate(model, data, batch_size=7)
    logits, target = logits_of(model, data), data.targets.numpy()
    matrix = sklearn_metrics.confusion_matrix(target, logits.argmax(1), labels=range(3))
    assert result.confusion == tuple(tuple(row) for row in matrix.tolist())
    assert sum(map(sum, result.confusion)) == COUNT
    assert sum(result.confusion[i][i] for i in range(3)) == round(result.accuracy * COUNT)
    scores = logits.softmax(1).numpy()
    areas = [sklearn_metrics.roc_auc_score(target == i, scores[:, i]) for i in range(3)]
    assert [result.per_class[name].auc for name in LABELS] == pytest.approx(areas, abs=1e-6)
    assert result.mean_auc == pytest.approx(sum(areas) / 3, abs=1e-6)
    assert result.mean_auc is not None
    assert result.d_prime == d_prime(result.mean_auc)
    stored = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert stored["confusion"] == matrix.tolist()
    assert stored["mean_auc"] == result.mean_auc
    assert stored["d_prime"] == result.d_prime
    assert stored["per_class"]["bee"]["auc"] == result.per_class["bee"].auc


def test_several_classes_a_clip(model: fastast.AST, waves: list[np.ndarray]) -> None:
    data = dataset(waves, [(i % 3, (i + 1 + i % 2) % 3) for i in range(COUNT)], many=True)
    result = evaluate(model, data)
    assert result.confusion is None
    scores = logits_of(model, data).sigmoid().numpy()
    expected = sklearn_metrics.roc_auc_score(data.targets.numpy(), scores, average="macro")
    assert result.mean_auc == pytest.approx(expected, abs=1e-6)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["confusion"] is None


def test_one_class_has_no_area(model: fastast.AST, waves: list[np.ndarray]) -> None:
    result = evaluate(model, dataset(waves[:4], [(1,)] * 4, many=False))
    assert result.mean_auc is None
    assert result.d_prime is None
    assert [sum(row) for row in result.confusion or ()] == [0, 4, 0]
    assert result.mean_average_precision == 1


def test_infinite_d_prime_is_not_written_to_json(
    model: fastast.AST, waves: list[np.ndarray]
) -> None:
    measured = evaluate(model, dataset(waves[:3], [(0,), (1,), (2,)], many=False))
    result = replace(measured, mean_auc=1.0, d_prime=math.inf)
    stored = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert stored["mean_auc"] == 1
    assert stored["d_prime"] is None


# --------------------------------------------------------------------------------------- picture


@pytest.mark.parametrize("classes", [2, 10, 50])
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_confusions_are_drawn(tmp_path: Path, classes: int, suffix: str) -> None:
    matrix = np.eye(classes, dtype=int) * 77
    labels = [f"class_{i} of $a$" for i in range(classes)]
    path = tmp_path / "new" / f"confusion.{suffix}"
    plot.confusion_matrix(matrix.tolist(), labels, path, "costs $a$ and $b$")
    if suffix == "svg":
        text = path.read_text()
        # Letters are outlines; each text is a comment beside them.
        assert text.count("<!-- class_1 of $a$ -->") == 2  # below and beside
        for part in ("costs $a$ and $b$", "true class", "class given"):
            assert f"<!-- {part} -->" in text, part
        assert "Oblique" not in text  # dollar signs make no formula
        assert text.count("<!-- 77 -->") == (classes if classes <= 15 else 0)
        return
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert min(pixels.shape[:2]) > 500 and max(pixels.shape[:2]) < 2500
    full = (pixels == (8, 48, 107)).all(2)  # the last colour of the map: a share of 1
    rows, columns = np.nonzero(full[:, : int(pixels.shape[1] * 0.8)])  # without the colour bar
    assert np.corrcoef(rows, columns)[0, 1] > 0.5  # from the top left to the bottom right


def test_colours_are_shares_of_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn = []
    original = Axes.imshow

    def imshow(self: Axes, image: np.ndarray, **options: Any) -> Any:
        drawn.append((image, options["vmin"], options["vmax"]))
        return original(self, image, **options)

    monkeypatch.setattr(Axes, "imshow", imshow)
    matrix = ((1, 3, 0), (0, 0, 0), (5, 0, 5))
    plot.confusion_matrix(matrix, LABELS, tmp_path / "a.png")
    ((image, low, high),) = drawn
    assert image.tolist() == [[0.25, 0.75, 0], [0, 0, 0], [0.5, 0, 0.5]]
    assert (low, high) == (0, 1)


def test_bad_pictures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"each of 3 labels, its rows have \[2, 2\] columns"):
        plot.confusion_matrix(((1, 0), (0, 1)), LABELS, tmp_path / "a.png")
    with pytest.raises(ValueError, match="each of 0 labels"):
        plot.confusion_matrix((), (), tmp_path / "a.png")
    with pytest.raises(ValueError, match="path must end in"):
        plot.confusion_matrix(((1, 0), (0, 1)), LABELS[:2], tmp_path / "a.gif")


# ---------------------------------------------------------------------------------- command line


def status(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return int(stop.value.code or 0)


@pytest.fixture
def asked(tmp_path: Path, model: fastast.AST, waves: list[np.ndarray]) -> tuple[object, ...]:
    """The evaluation of the model on a csv of six clips."""
    model.save_pretrained(tmp_path / "model")
    rows = []
    for i, wave in enumerate(waves[:6]):
        soundfile.write(tmp_path / f"{i}.wav", wave, 16000, subtype="FLOAT")
        rows.append(f"{i}.wav,{LABELS[i % 3]},test")
    (tmp_path / "x.csv").write_text("\n".join(["file,label,split", *rows, ""]))
    where = ("--data", tmp_path / "x.csv", "--model", tmp_path / "model")
    return ("evaluate", *where, "--r", "2,0")


def test_command(
    asked: tuple[object, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = []
    monkeypatch.setattr(plot, "confusion_matrix", lambda *arguments: drawn.append(arguments))
    assert status(*asked, "--json", "--plot", tmp_path / "pictures") == 0
    captured = capsys.readouterr()
    rows = json.loads(captured.out)["results"]
    ((matrix, labels, path, title),) = drawn
    assert [list(row) for row in matrix] == rows[0]["confusion"]
    assert labels == LABELS
    assert path == tmp_path / "pictures" / "confusion.png"
    assert title.endswith("r = 2")
    assert captured.err.strip() == f"saved {path}"

    assert status(*asked) == 0
    table = capsys.readouterr().out
    assert "mAUC" in table and "d'" in table
    for row in rows:
        assert f"{row['mean_auc']:.4f}" in table
        assert f"{d_prime(row['mean_auc']):.3f}" in table


def test_command_draws(
    asked: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(*asked, "--plot", tmp_path / "pictures") == 0
    with Image.open(tmp_path / "pictures" / "confusion.png") as image:
        assert min(image.size) > 300
    assert status(*asked, "--plot", tmp_path / "x.csv") == 2
    assert "plot must be a folder, not the file" in capsys.readouterr().err


def test_no_picture_of_several_classes_a_clip(
    asked: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "x.csv"
    table.write_text(table.read_text().replace("0.wav,ape", "0.wav,ape;bee"))
    assert status(*asked, "--plot", tmp_path / "pictures") == 2
    assert "plot must be left out" in capsys.readouterr().err
    assert status(*asked) == 0


@pytest.mark.parametrize("command", ["evaluate", "sweep"])
def test_where_and_subset_are_passed_on(
    asked: tuple[object, ...],
    tmp_path: Path,
    command: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[dict[str, str]] = []

    def list_clips(*arguments: object, **options: str) -> None:
        given.append(options)
        raise ValueError("stopped here")

    monkeypatch.setattr(audio_data, "list_clips", list_clips)
    asked = (command, *asked[1:5])
    for options in ((), ("--where", "esc10=True"), ("--where", "a=b", "--subset", "esc10")):
        assert status(*asked, *options) == 2
    assert "stopped here" in capsys.readouterr().err
    both = {"where": "a=b", "subset": "esc10"}
    assert given == [{}, {"where": "esc10=True"}, both]
