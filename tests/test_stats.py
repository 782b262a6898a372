from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import typer
from typer.testing import CliRunner

import fastast
from fastast import data as audio_data
from fastast.audio import load_audio
from fastast.cli.data import stats

SECONDS = (0.2, 0.4, 0.5, 1.0, 1.2)


def write(folder: Path, labels: tuple[str, ...]) -> Path:
    """Noise of known lengths at 8 kHz, and a csv of it: five clips to train on, one to test."""
    generator = np.random.default_rng(0)
    rows = []
    for i, seconds in enumerate((*SECONDS, 0.3)):
        wave = 0.1 * (i + 1) * generator.uniform(-1, 1, round(8000 * seconds))
        soundfile.write(folder / f"{i}.wav", wave, 8000, subtype="FLOAT")
        rows.append(f"{i}.wav,{labels[i]},{'test' if i == 5 else 'train'}")
    (folder / "x.csv").write_text("\n".join(["file,label,split", *rows, ""]))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "two words"  # a name that a shell would take apart
    folder.mkdir()
    return write(folder, ("bee", "ape", "bee", "cat", "bee", "dog"))


def run(*arguments: object) -> str:
    app = typer.Typer()
    app.command()(stats)
    result = CliRunner().invoke(
        app, [str(a) for a in arguments], catch_exceptions=False, env={"COLUMNS": "200"}
    )
    assert result.exit_code == 0, result.output
    return result.stdout


def report(*arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*arguments, "--json"))
    return found


def features(folder: Path, files: range, frames: int) -> np.ndarray:
    """Log-mel features of the clips one by one, zeros where a clip is over."""
    fbank = fastast.Fbank(target_length=frames, mean=None, std=None)
    rows = []
    for i in files:
        wave = load_audio(str(folder / f"{i}.wav"), 16000)[: (frames - 1) * 160 + 400]
        rows.append(fbank(torch.as_tensor(wave)).numpy())
    return np.stack(rows).astype(np.float64)


def test_against_numpy(data: Path) -> None:
    found = report("--data", data, "--target-length", 64)
    assert found["clips"] == 5
    assert found["hours"] == pytest.approx(sum(SECONDS) / 3600)
    assert found["seconds"] == pytest.approx({"min": 0.2, "median": 0.5, "max": 1.2})
    assert found["sample_rate"] == 16000
    assert found["classes"] == {"ape": 1, "bee": 3, "cat": 1, "dog": 0}
    assert found["multi_label"] is False
    assert found["target_length"] == 64
    expected = features(data, range(5), 64)
    assert expected.shape == (5, 64, 128)
    assert found["mean"] == pytest.approx(expected.mean(), rel=1e-5)
    assert found["std"] == pytest.approx(expected.std(), rel=1e-5)
    test = report("--data", data, "--target-length", 64, "--split", "test")
    assert (test["clips"], test["classes"]["dog"]) == (1, 1)
    assert test["mean"] == pytest.approx(features(data, range(5, 6), 64).mean(), rel=1e-5)
    assert "--train-split test" in test["train_command"]


def test_target_length_is_that_of_training(data: Path) -> None:
    found = report("--data", data)
    assert found["target_length"] == 128  # the shortest window over 1.2 seconds
    assert found["mean"] == pytest.approx(features(data, range(5), 128).mean(), rel=1e-5)


def test_command_to_paste(data: Path) -> None:
    """What is printed trains with the numbers that were measured."""
    from fastast.cli.options import options_of
    from fastast.recipe import TrainConfig

    got = []
    app = typer.Typer()
    app.command()(options_of(TrainConfig)(got.append))
    given = ("--data", data / "x.csv", "--roots", data, "--target-column", "label")
    line = run(*given).splitlines()[-1]
    words = shlex.split(line)
    assert words[:2] == ["fastast", "train"]
    assert CliRunner().invoke(app, words[2:], catch_exceptions=False).exit_code == 0
    found = report(*given)
    config = got[0]
    assert line == found["train_command"]
    assert (config.data, config.roots) == (str(data / "x.csv"), (str(data),))
    assert (config.target_column, config.path_column) == ("label", "")
    assert (config.target_length, config.loss) == (128, "ce")
    assert config.mean == pytest.approx(found["mean"], rel=1e-6)
    assert config.std == pytest.approx(found["std"], rel=1e-6)


def test_table(data: Path) -> None:
    text = run("--data", data, "--target-length", 64)
    found = report("--data", data, "--target-length", 64)
    for part in (
        "min 0.20, median 0.50, max 1.20",
        "16000 Hz",
        f"mean {found['mean']:.7g}, std {found['std']:.7g} (over 64 frames a clip)",
        f"--mean {found['mean']:.7g} --std {found['std']:.7g}",
    ):
        assert part in text, part
    assert "could not be read" not in text
    rows = {line.split("  ")[0].strip("│ "): line for line in text.splitlines()}
    assert "bee (3), ape (1)" in rows["most clips"]
    assert "dog (0), cat (1)" in rows["fewest clips"]


def test_unreadable_clips_are_counted(data: Path) -> None:
    (data / "3.wav").write_text("not audio")
    with pytest.warns(UserWarning, match="1 of 5 clips"):
        text = run("--data", data)
    assert "4 (0.000639 hours), 1 could not be read" in text


def test_several_classes_a_clip(tmp_path: Path) -> None:
    write(tmp_path, ("bee;ape", "ape", "bee", "bee", "ape;bee", "ape"))
    found = report("--data", tmp_path)
    assert found["classes"] == {"ape": 3, "bee": 4}
    assert found["multi_label"] is True
    assert "--loss bce" in found["train_command"]
    assert "2, several a clip" in run("--data", tmp_path)


def test_where_and_subset_are_passed_on(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, str]] = []
    original = audio_data.list_clips

    def list_clips(*arguments: Any, **options: str) -> audio_data.Listing:
        given.append(options)
        return original(*arguments)

    monkeypatch.setattr(audio_data, "list_clips", list_clips)
    assert "--where" not in report("--data", data)["train_command"]
    line = report("--data", data, "--where", "a=b c", "--subset", "esc10")["train_command"]
    assert given == [{}, {"where": "a=b c", "subset": "esc10"}]
    assert "--where 'a=b c' --subset esc10" in line


def test_split_that_is_not_there(data: Path) -> None:
    with pytest.raises(ValueError, match="split '1' is not in the data: it has test, train"):
        run("--data", data, "--split", "1")
