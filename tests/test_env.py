from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import fastast
from fastast.env import environment, format_environment


def test_report_is_complete_and_json() -> None:
    report = json.loads(json.dumps(environment(), default=str))
    assert report["versions"]["torch"].startswith("2.")
    assert report["versions"]["fastast"] == fastast.__version__
    assert report["torch"]["threads"] == torch.get_num_threads()
    assert report["cpu"]["cores"] >= 1
    assert report["cpu"]["model"]
    kernels = report["kernels"]
    assert kernels["default"]["cpu"]["bipartite_match"] in ("cpp", "reference")
    assert kernels["unavailable"]["cpu"]["triton"]["merge"]  # a reason in words
    text = format_environment(report)
    assert "bipartite_match: " in text
    assert f"torch: {report['versions']['torch']}" in text


def test_settings_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTAST_DEBUG", "1")
    monkeypatch.setenv("SECRET_TOKEN", "x")
    settings = environment()["settings"]
    assert settings["FASTAST_DEBUG"] == "1"
    assert "SECRET_TOKEN" not in settings


def test_broken_part_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, object]:
        raise OSError("no such library")

    monkeypatch.setattr("fastast.env._kernels", broken)
    report = environment()
    assert report["kernels"] == {"error": "OSError: no such library"}
    assert "error: OSError: no such library" in format_environment(report)


def test_as_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastast.env", "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["python"].startswith("3.")
