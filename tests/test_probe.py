"""Embeddings, heads fitted on them, and the commands that do it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import typer
from typer.testing import CliRunner

import fastast
from fastast.augment import Augment
from fastast.cli.teaching import probe, teacher
from fastast.data import AudioDataset
from fastast.evaluate import window
from fastast.probe import accuracy, embeddings, fit_head, fit_linear, linear_probe
from fastast.teachers import build, load

pytest.importorskip("sklearn", reason='scikit-learn (extra "train") is not installed')

RATE = 16000
CONFIG = fastast.ASTConfig(
    num_classes=2, embed_dim=64, depth=2, num_heads=1, target_length=48, mean=-5.0, std=4.0
)


def tones(count: int, first: int = 0) -> list[np.ndarray]:
    """Low and high tones in turn, of different lengths."""
    return [
        0.3
        * np.sin(
            2 * math.pi * ((300, 3000)[i % 2] + 9 * i) * np.arange(4000 + 311 * (i % 5)) / RATE
        ).astype(np.float32)
        for i in range(first, first + count)
    ]


def tone_data(
    count: int, first: int = 0, labels: tuple[str, ...] = ("low", "high")
) -> AudioDataset:
    targets = [(i % 2,) for i in range(count)]
    return AudioDataset(tones(count, first), targets, labels, [str(i) for i in range(count)])


@pytest.fixture
def network() -> Any:
    return build("mn04", 5, target_length=30)


def blobs(classes: int, n: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clouds in seven dimensions of different scale, one of them constant."""
    generator = torch.Generator().manual_seed(3)
    y = torch.arange(n) % classes
    centres = torch.randn(classes, 7, generator=generator)
    x = centres[y] + torch.randn(n, 7, generator=generator)
    x = x * torch.tensor([1e-3, 1.0, 50.0, 1.0, 1.0, 0.1, 0.0])
    return x + torch.tensor([0.0, 5.0, -200.0, 0.0, 1.0, 0.0, 3.0]), y


def sklearn_probability(x: torch.Tensor, y: torch.Tensor, c: float) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000))
    return model.fit(x.numpy(), y.numpy()).predict_proba(x.numpy())


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_layer_is_the_pipeline_folded(classes: int) -> None:
    x, y = blobs(classes)
    weight, bias = fit_linear(x, y, classes, c=0.1)
    assert weight.dtype == bias.dtype == torch.float32
    got = (x @ weight.t() + bias).softmax(1)
    np.testing.assert_allclose(got.numpy(), sklearn_probability(x, y, 0.1), atol=2e-4)
    assert 0.5 < accuracy(x, y, weight, bias) <= 1


def test_regularisation_is_heard() -> None:
    x, y = blobs(3)
    norms = [fit_linear(x, y, 3, c=c)[0][:, 1].norm() for c in (0.01, 0.05, 1.0)]
    assert norms[0] < norms[1] < norms[2]
    assert torch.equal(fit_linear(x, y, 3)[0], fit_linear(x, y, 3, c=0.05)[0])


def test_a_class_without_clips_is_never_chosen() -> None:
    x, y = blobs(2)
    weight, bias = fit_linear(x, y * 2, 4)
    assert weight.shape == (4, 7)
    probability = (x @ weight.t() + bias).softmax(1)
    assert probability[:, [1, 3]].max() < 1e-12
    np.testing.assert_allclose(probability[:, [0, 2]], sklearn_probability(x, y, 0.05), atol=2e-4)


def test_several_classes_a_clip() -> None:
    x, y = blobs(3)
    targets = torch.stack([y == 0, y != 1, y < 0, y >= 0], 1).float()
    weight, bias = fit_linear(x, targets, 4, c=0.1)
    probability = (x @ weight.t() + bias).sigmoid()
    for i in (0, 1):
        expected = sklearn_probability(x, targets[:, i], 0.1)[:, 1]
        np.testing.assert_allclose(probability[:, i], expected, atol=2e-4)
    assert probability[:, 2].max() < 1e-12
    assert probability[:, 3].min() == 1.0


def test_accuracy_by_hand() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 2.0], [0.0, 0.2]])
    weight, bias = torch.eye(2), torch.tensor([0.0, -0.5])  # best: 0, 1, 0, 0
    assert accuracy(x, torch.tensor([0, 1, 1, 1]), weight, bias) == 0.5
    several = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    assert accuracy(x, several, weight, bias) == 0.75


@pytest.mark.parametrize(
    ("x", "y", "classes", "c", "message"),
    [
        (torch.zeros(3), torch.zeros(3).long(), 2, 1.0, r"embeddings must be \[n, D\] for n"),
        (torch.zeros(3, 2), torch.zeros(2).long(), 2, 1.0, r"got \[3, 2\] for 2"),
        (torch.full((2, 2), math.nan), torch.arange(2), 2, 1.0, "embeddings must be finite"),
        (torch.zeros(2, 2), torch.arange(2), 2, 0.0, "c must be more than 0, got 0"),
        (
            torch.zeros(2, 2),
            torch.tensor([0, 2]),
            2,
            1.0,
            "targets must be from 0 to 1, got 0 to 2",
        ),
        (torch.zeros(2, 2), torch.ones(2).long(), 2, 1.0, "of two classes or more, all are 1"),
        (torch.zeros(2, 2), torch.zeros(2, 3), 2, 1.0, r"targets must be \[n, 2\], got \[2, 3\]"),
        (torch.zeros(2, 2), torch.ones(2, 2), 2, 1.0, "some clips have and others do not"),
    ],
)
def test_bad_fits(x: torch.Tensor, y: torch.Tensor, classes: int, c: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_linear(x, y, classes, c)


def test_embeddings_of_an_ast() -> None:
    model = fastast.AST(CONFIG).train()
    data = tone_data(5)
    got, targets = embeddings(model, data, batch_size=2)
    assert model.training
    assert targets.tolist() == [0, 1, 0, 1, 0]
    assert got.shape == (5, 64)
    front = fastast.Fbank(16000, 128, 48, -5.0, 4.0)
    for row, wave in zip(got, data.waveforms, strict=True):
        with torch.no_grad():
            hidden = model.eval()(front(torch.from_numpy(wave)[None]), return_hidden_states=True)
            tokens = model.norm(hidden.hidden_states[-1])[0]  # type: ignore[union-attr]
        torch.testing.assert_close(row, (tokens[0] + tokens[1]) / 2, rtol=1e-4, atol=1e-5)


def test_embeddings_of_a_network(network: Any) -> None:
    data = tone_data(3)
    got, _ = embeddings(network, data, batch_size=2)
    front = network.front_end()
    for row, wave in zip(got, data.waveforms, strict=True):
        with torch.no_grad():
            alone = network.embed(front(torch.from_numpy(wave)[None]))[0]
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)
    assert embeddings(network.bfloat16(), data)[0].dtype == torch.float32


def test_bad_data_for_embeddings(network: Any) -> None:
    with pytest.raises(ValueError, match="dataset has no clips"):
        embeddings(network, AudioDataset([], [], ["a"], []))
    slow = AudioDataset(tones(2), [(0,), (1,)], ["a", "b"], ["x", "y"], sample_rate=8000)
    with pytest.raises(ValueError, match="sample rate, 16000 Hz, got 8000"):
        embeddings(network, slow)
    with pytest.raises(TypeError, match="model must be an AST or a teacher network"):
        embeddings(torch.nn.Linear(1, 1), tone_data(2))


def test_fit_head_puts_the_layer_in(network: Any) -> None:
    data = tone_data(12)
    x, y = embeddings(network, data)
    weight, bias = fit_linear(x, y, 2, c=0.1)
    assert fit_head(network, data, c=0.1) is network
    assert network.config.labels == ("low", "high")
    assert not network.training
    (batch,) = data.batches(12, 47 * 160)
    with torch.no_grad():
        logits = network(network.front_end()(batch.waveform, batch.lengths))
    torch.testing.assert_close(logits, x @ weight.t() + bias, rtol=1e-3, atol=1e-4)
    assert logits.argmax(1).tolist() == y.tolist()
    assert fit_head(network, data, ("a", "b")).config.labels == ("a", "b")
    with pytest.raises(ValueError, match="labels must be 2 names, got 1"):
        fit_head(network, data, ("a",))
    with pytest.raises(TypeError, match="network must be a teacher network, got AST"):
        fit_head(fastast.AST(CONFIG), data)  # type: ignore[arg-type]


def test_embeddings_of_augmented_clips(network: Any) -> None:
    data = tone_data(8)
    clean, _ = embeddings(network, data)
    assert torch.equal(embeddings(network, data, augment=Augment())[0], clean)
    augment = Augment(gain=6.0, frequency_mask=40, time_mask=10, mixup=1.0)
    first, targets = embeddings(network, data, augment=augment, seed=1)
    assert torch.equal(targets, data.targets)  # clips are not mixed: their classes stay theirs
    assert not torch.equal(first, clean)
    assert torch.equal(embeddings(network, data, augment=augment, seed=1)[0], first)
    assert not torch.equal(embeddings(network, data, augment=augment, seed=2)[0], first)


def test_fit_head_on_augmented_copies(network: Any) -> None:
    data, augment = tone_data(12), Augment(gain=6.0, frequency_mask=40, time_mask=10)
    fit_head(network, data, augment=augment, copies=2)
    parts = [embeddings(network, data)]
    parts += [embeddings(network, data, augment=augment, seed=seed) for seed in (0, 1)]
    x, y = (torch.cat(column) for column in zip(*parts, strict=True))
    weight, bias = fit_linear(x, y, 2)
    front_end = network.front_end()
    batch = next(data.batches(12, window(front_end)))
    with torch.inference_mode():
        logits = network(front_end(batch.waveform, batch.lengths))
    torch.testing.assert_close(logits, parts[0][0] @ weight.t() + bias, rtol=1e-4, atol=1e-4)


def test_linear_probe_tells_tones_apart() -> None:
    model = fastast.AST(CONFIG)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train = tone_data(24)
    assert linear_probe(model, train, tone_data(6, first=24), c=1.0) == 1.0
    swapped = tone_data(6, first=25)  # every tone under the other's name
    assert linear_probe(model, train, swapped, c=1.0) == 0.0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="test must have the classes of train"):
        linear_probe(model, tone_data(4), tone_data(4, labels=("high", "low")))


# ---------------------------------------------------------------------------------- commands


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for split, count in (("train", 6), ("test", 4)):
        for i, wave in enumerate(tones(count)):
            folder = tmp_path / "data" / split / ("low", "high")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            soundfile.write(folder / f"{i}.wav", wave, RATE)
    return tmp_path / "data"


def run(*arguments: object) -> Any:
    app = typer.Typer()
    app.command()(teacher)
    app.command()(probe)
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def test_commands(folders: Path, tmp_path: Path) -> None:
    build("mn04", 7, target_length=30).save_pretrained(tmp_path / "weights")
    out = tmp_path / "teacher"
    common = ("--data", folders, "--target-length", 30)
    done = run("teacher", *common, "--weights", tmp_path / "weights", "--out", out, "--json")
    assert done.exit_code == 0
    result = json.loads(done.stdout)
    assert (result["train_clips"], result["test_clips"]) == (6, 4)
    assert result["train_accuracy"] == result["test_accuracy"] == 1.0
    network = load(out)
    assert (network.config.labels, network.config.target_length) == (("high", "low"), 30)
    assert network.config.num_classes == 2

    text = run("teacher", *common, "--weights", tmp_path / "weights", "--out", out).stdout
    assert "mn04, 2 classes: accuracy 100.00 % on 6 training clips, 100.00 % on 4 test" in text
    done = run("probe", *common, "--model", out, "--json")
    assert json.loads(done.stdout)["test_accuracy"] == 1.0
    text = run("probe", *common, "--model", out, "--train-split", "test", "--c", "1").stdout
    assert "linear probe 100.00 % on 4 test clips (fitted on 4)" in text


def test_filters_of_the_data_are_passed_on(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fastast.data

    listing, asked = fastast.data.list_clips, []

    def recorded(data: str, *rest: Any, **chosen: str) -> Any:
        asked.append(chosen)
        return listing(data, *rest)

    monkeypatch.setattr(fastast.data, "list_clips", recorded)
    fastast.AST(CONFIG).save_pretrained(tmp_path / "ast")
    common = ("probe", "--data", folders, "--model", tmp_path / "ast")
    run(*common, "--subset", "esc10", "--where", "take=A")
    run(*common)
    assert asked == [{"where": "take=A", "subset": "esc10"}, {}]
