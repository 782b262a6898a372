from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner

import fastast
from fastast import demo
from fastast.cli import app, main
from fastast.linear import why_no_int8
from fastast.recipe import TrainConfig

RATE = 16000
CONFIG = fastast.ASTConfig(
    num_classes=2, embed_dim=64, depth=2, num_heads=1, target_length=48, labels=("high", "low")
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    fastast.AST(CONFIG).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Class folders of tones: six clips to train on, two to test."""
    for split, count in (("train", 3), ("test", 1)):
        for label, frequency in (("low", 300), ("high", 3000)):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                wave = 0.3 * np.sin(2 * math.pi * (frequency + 9 * i) * np.arange(5000) / RATE)
                soundfile.write(folder / f"{i}.wav", wave, RATE)
    return tmp_path / "data"


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def status(*arguments: object) -> int:
    """Exit status of the whole command, with its handling of errors."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return int(stop.value.code or 0)


def test_help_names_every_command_and_option() -> None:
    text = subprocess.run(
        [sys.executable, "-m", "fastast", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "200", "PATH": "/usr/bin"},
    ).stdout
    for command in ("classify", "train", "evaluate", "visualize", "demo", "env"):
        assert command in text
    assert "fastast classify clip.wav" in text
    options = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "300"}).output
    for name in TrainConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in options, name
    assert run().exit_code == 2  # no command: help, and not a success


def test_classify_json(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("classify", data, "--model", model, "--json", "--top-k", 1, "--r", "3") == 0
    out = json.loads(capsys.readouterr().out)
    assert len(out["results"]) == 8
    assert out["errors"] == []
    for result in out["results"]:
        assert Path(result["file"]).exists()
        assert len(result["predictions"]) == 1
        assert result["predictions"][0]["label"] in CONFIG.labels
        assert 0.5 <= result["predictions"][0]["probability"] <= 1


@pytest.mark.skipif(why_no_int8() is not None, reason="needs int8 products")
def test_classify_in_int8(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for dtype in ("float32", "int8"):
        assert status("classify", data, "--model", model, "--json", "--dtype", dtype) == 0
        results = json.loads(capsys.readouterr().out)["results"]
        found[dtype] = [result["predictions"][0]["probability"] for result in results]
    assert found["int8"] != found["float32"]
    assert found["int8"] == pytest.approx(found["float32"], abs=0.05)


def test_classify_table(model: Path, data: Path) -> None:
    result = run("classify", data / "test", "--model", model)
    assert result.exit_code == 0
    assert "high" in result.output
    assert "%" in result.output


def test_classify_goes_on_after_a_bad_file(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = data / "test" / "bad.wav"
    bad.write_text("not audio")
    assert status("classify", data / "test", "missing.wav", "--model", model, "--json") == 1
    captured = capsys.readouterr()
    out = json.loads(captured.out)
    assert len(out["results"]) == 2
    assert len(out["errors"]) == 2
    lines = captured.err.strip().splitlines()
    assert len(lines) == 2
    assert str(bad) in lines[0]
    assert "missing.wav" in lines[1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--r", "x"), 2, "r must be a number"),
        (("--dtype", "int4"), 2, "dtype must be one of float32, bfloat16, float16, int8, not"),
        (("--r", "-3"), 2, "r must be 0 or more"),
        (("--r", "1,2,3"), 2, "2 for this model, got 3"),
        (("--device", "toaster"), 2, "toaster"),
    ],
)
def test_bad_options_are_one_line(
    model: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, str],
    code: int,
    message: str,
) -> None:
    assert status("classify", data, "--model", model, *arguments) == code
    err = capsys.readouterr().err.strip()
    assert err.startswith("fastast: ")
    assert message in err
    assert "\n" not in err


def test_bad_checkpoint(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert status("classify", data, "--model", model) == 1
    err = capsys.readouterr().err.strip()
    assert "model.safetensors" in err
    assert "\n" not in err


def test_debug_shows_the_traceback(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTAST_DEBUG", "1")
    with pytest.raises(ValueError, match="r must be a number"):
        main(["classify", str(data), "--model", str(model), "--r", "x"])


def test_train_then_evaluate(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("accelerate")
    out = tmp_path / "run"
    small = ("--embed-dim", 64, "--depth", 2, "--num-heads", 1, "--target-length", 48)
    short = ("--epochs", 1, "--batch-size", 2, "--device", "cpu", "--final-r", "0,3")
    arguments = ("train", "--data", data, "--out", out, *small, *short, "--r-choices", "0,2")
    assert status(*arguments) == 0
    assert "accuracy" in capsys.readouterr().out
    config = json.loads((out / "train_config.json").read_text())
    assert config["r_choices"] == [0, 2]
    assert config["betas"] == [0.9, 0.99]
    assert config["mean"] is None

    assert status(*arguments, "--lr", "0.5") == 2  # another run lives in that folder
    assert "lr was" in capsys.readouterr().err
    asked = ("evaluate", "--data", data, "--model", out / "model", "--r", "0,3")
    assert status(*asked, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["r"] for row in report["results"]] == [0, 3]
    assert report["clips"] == 2
    stored = json.loads((out / "metrics.json").read_text())["model"]
    assert [r["accuracy"] for r in report["results"]] == [r["accuracy"] for r in stored]
    assert status(*asked, "--per-class") == 0
    assert "high" in capsys.readouterr().out
    assert status("train", "--data", data, "--betas", "a,b") == 2
    assert "betas must be numbers" in capsys.readouterr().err


def test_visualize(tmp_path: Path, model: Path, data: Path) -> None:
    picture = tmp_path / "picture.png"
    clip = data / "test" / "low" / "0.wav"
    result = run("visualize", clip, "--out", picture, "--model", model, "--r", 4)
    assert result.exit_code == 0
    assert f"{CONFIG.num_tokens} tokens became {CONFIG.num_tokens - 8}" in result.output
    assert picture.stat().st_size > 1000


def test_env() -> None:
    result = run("env", "--json")
    assert result.exit_code == 0
    assert "kernels" in json.loads(result.output)
    assert "versions:" in run("env").output


def test_demo_measures_only_an_unchanged_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastast.AST(CONFIG)
    features = torch.randn(2, 48, 128)
    speeds = demo.measure(model, features, (0, 4), rounds=3, seconds=0.1)
    assert list(speeds) == [0, 4]
    assert all(speed > 0 for speed in speeds.values())
    assert model.tome is None

    original = fastast.AST.forward

    def changed(self: fastast.AST, features: torch.Tensor) -> torch.Tensor:
        return original(self, features) + (self.tome is not None)

    monkeypatch.setattr(fastast.AST, "forward", changed)
    with pytest.raises(demo.ParityError, match="no speed to report"):
        demo.measure(model, features, (0, 4), rounds=3, seconds=0.1)


def test_demo(tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    for label in ("low", "high"):
        (data / "test" / label / "0.wav").rename(clips / f"{label}_me_0.wav")
    monkeypatch.setattr(demo, "default_model", lambda: model)
    monkeypatch.setattr(demo, "asset", lambda name: tmp_path / name)
    # A small model in place of AST-base, which takes half a minute.
    tiny = fastast.ASTConfig(embed_dim=64, depth=2, num_heads=1)
    monkeypatch.setattr(demo.ASTConfig, "base", lambda: tiny)
    speeds = demo.demo(str(tmp_path / "out"), seconds=0.2)
    assert [list(curve) for curve in speeds.values()] == [list(demo.TINY_R), list(demo.BASE_R)]
    for name in ("throughput.png", "merged_tokens.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000
    (clips / "low_me_0.wav").rename(clips / "nobody_0.wav")
    with pytest.raises(ValueError, match="'nobody' is not a class"):
        demo.demo(str(tmp_path / "out"), seconds=0.2)
