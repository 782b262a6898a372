"""Training on several processes, and in several parts: the same losses as in one piece."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import RUN, losses, quiet, small, weights, write_tones

from fastast.recipe import TrainConfig
from fastast.train import CHECKPOINT, train

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tones(tmp_path_factory.mktemp("tones"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def without_dropout(tones: Path, out: Path, **options: object) -> TrainConfig:
    """Everything that is drawn for a clip stays on; dropout differs from process to process."""
    values = {"dropout": 0.0, "drop_path": 0.0, "mixup": 0.5, "noise": 0.5, "epochs": 4}
    return small(tones, out, **{**values, **options})


def assert_close(a: Path, b: Path) -> None:
    assert losses(a) == pytest.approx(losses(b), rel=2e-4)
    for name, value in weights(a).items():
        torch.testing.assert_close(weights(b)[name], value, rtol=0, atol=2e-3)


def kill_all(script: Path) -> None:
    """Kill every process that runs a script, and wait until they are gone."""
    for _ in range(500):
        alive = 0
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended meanwhile
                if str(script).encode() in (process / "cmdline").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)
                    alive += 1
        if not alive:
            return
        time.sleep(0.02)
    raise AssertionError(f"{alive} processes of the killed run are alive")


def launch(launcher: list[str], script: Path, config: TrainConfig) -> subprocess.Popen[str]:
    script.write_text(RUN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *launcher, str(script), config.to_json()],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
# Several processes on a CPU need mpirun there; torchrun needs nothing.
ACCELERATE = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1"]
ACCELERATE += ["--mixed_precision=no", "--dynamo_backend=no"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "processes"), [(TORCHRUN, 2), (ACCELERATE, 1)], ids=["torchrun", "accelerate"]
)
def test_launched_processes_train_as_one(
    tones: Path, tmp_path: Path, launcher: list[str], processes: int
) -> None:
    one = without_dropout(tones, tmp_path / "one")
    train(one, quiet)
    several = replace(one, out=str(tmp_path / "several"))
    child = launch(launcher, tmp_path / "run.py", several)
    text, _ = child.communicate(timeout=120)
    assert child.returncode == 0, text[-3000:]
    assert text.count("training and") == 1, text  # one process reports
    stored = json.loads((tmp_path / "several" / "metrics.json").read_text())
    assert stored["processes"] == processes
    assert_close(tmp_path / "one", tmp_path / "several")


@pytest.mark.slow
def test_two_processes_survive_sigkill(tones: Path, tmp_path: Path) -> None:
    whole = without_dropout(tones, tmp_path / "whole", epochs=8, save_every=1)
    train(whole, quiet)
    killed = replace(whole, out=str(tmp_path / "killed"))
    child = launch(TORCHRUN, tmp_path / "run.py", killed)
    checkpoint = tmp_path / "killed" / CHECKPOINT
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        assert child.poll() is None, child.communicate()[0][-3000:]
        time.sleep(0.005)
    kill_all(tmp_path / "run.py")  # the launcher and its workers
    child.wait()
    step = torch.load(checkpoint, weights_only=True)["step"]
    assert step >= 1
    again = launch(TORCHRUN, tmp_path / "run.py", killed)
    text, _ = again.communicate(timeout=120)
    assert again.returncode == 0, text[-3000:]
    assert f"resuming at step {step} of 24" in text
    assert_close(tmp_path / "whole", tmp_path / "killed")


def test_batches_that_processes_cannot_share(
    tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "num_processes", 3)
    with pytest.raises(ValueError, match="multiple of the 3 processes that share it, not 8"):
        train(small(tones, tmp_path), quiet)


def test_a_step_in_parts_is_the_same_step(tones: Path, tmp_path: Path) -> None:
    whole = without_dropout(tones, tmp_path / "whole")
    train(whole, quiet)
    train(replace(whole, out=str(tmp_path / "parts"), accumulate=3), quiet)
    assert_close(tmp_path / "whole", tmp_path / "parts")


def test_gradient_checkpointing_changes_nothing(tones: Path, tmp_path: Path) -> None:
    plain = small(tones, tmp_path / "plain", epochs=2)  # with dropout: its masks are drawn again
    train(plain, quiet)
    train(replace(plain, out=str(tmp_path / "less"), gradient_checkpointing=True), quiet)
    assert losses(tmp_path / "plain") == losses(tmp_path / "less")
    for name, value in weights(tmp_path / "plain").items():
        assert torch.equal(weights(tmp_path / "less")[name], value)
