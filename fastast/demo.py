"""What `make demo` runs: the shipped model on the shipped clips, and what merging gains.

A speed-up is reported only for a model that merging leaves as it was: with r=0 the patched model
must give the logits of the unpatched one, bit for bit.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fastast
from fastast.audio import find_audio, load_audio
from fastast.classify import asset, default_model
from fastast.env import environment
from fastast.evaluate import ParityError, front_end, measure, window
from fastast.features import Fbank
from fastast.model import AST, ASTConfig
from fastast.plot import throughput_vs_r, visualize

__all__ = ["ParityError", "demo", "measure"]

TINY_R = (0, 2, 5, 10, 15, 20)
BASE_R = (0, 10, 20, 40, 80)


def _features(fbank: Fbank, waveforms: Sequence[Tensor]) -> Tensor:
    """Features of clips of different lengths, as one batch."""
    samples = window(fbank)
    cut = [w[:samples] for w in waveforms]
    lengths = torch.tensor([len(w) for w in cut])
    batch = torch.stack([torch.nn.functional.pad(w, (0, samples - len(w))) for w in cut])
    return fbank(batch, lengths)


def _true_label(path: Path, labels: Sequence[str]) -> str:
    """Shipped clips are called `label_speaker_number.suffix`."""
    label = path.stem.split("_")[0]
    if label not in labels:
        raise ValueError(f"{path.name}: {label!r} is not a class of the model")
    return label


@torch.inference_mode()
def _predictions(
    model: AST, features: Tensor, files: Sequence[Path], rs: Sequence[int], console: Console
) -> dict[int, float]:
    """Print what the model makes of each clip at each r; returns the accuracy at each r."""
    labels = model.config.labels
    truth = [_true_label(path, labels) for path in files]
    answers: dict[int, list[str]] = {}
    with fastast.patched(model.eval(), r=0):
        for r in rs:
            model.r = r
            answers[r] = [labels[i] for i in model(features).argmax(1).tolist()]
    table = Table("clip", "spoken", *(f"r={r}" for r in rs), title="Predictions")
    for i, path in enumerate(files):
        said = [answers[r][i] for r in rs]
        cells = [word if word == truth[i] else f"[bold red]{word}[/]" for word in said]
        table.add_row(path.name, truth[i], *cells)
    console.print(table)
    return {r: sum(a == t for a, t in zip(answers[r], truth, strict=True)) / len(truth) for r in rs}


def _speed_table(
    title: str,
    speeds: Mapping[int, float],
    console: Console,
    accuracy: Mapping[int, float] | None = None,
) -> None:
    table = Table("r", "clips/s", "speed-up", title=title)
    if accuracy is not None:
        table.add_column("accuracy")
    for r, speed in speeds.items():
        row = [str(r), f"{speed:.4g}", f"{speed / speeds[0]:.2f}x"]
        if accuracy is not None:
            row.append(f"{100 * accuracy[r]:.0f} %")
        table.add_row(*row)
    console.print(table)


def fastest_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """bf16 on a GPU, and where the processor multiplies it faster than fp32; else fp32."""
    if torch.device(device).type == "cuda":
        return torch.bfloat16
    sets = environment()["cpu"]["instruction_sets"]
    return torch.bfloat16 if {"avx512_bf16", "amx_bf16"} & set(sets) else torch.float32


def demo(out: str = "demo_output", seconds: float = 60.0) -> dict[str, dict[int, float]]:
    """Classify the shipped clips at several r, measure two models, and save two pictures.

    Args:
        out: Folder for the pictures.
        seconds: About how long to measure AST-base; the tiny model takes a few seconds.

    Returns:
        Clips per second at each r, for each model.

    Raises:
        FileNotFoundError: The shipped model or clips are missing.
        ParityError: A patched model with r=0 differs from the unpatched one.
    """
    console = Console()
    folder = Path(out)
    tiny = AST.from_pretrained(default_model())
    files = find_audio([asset("clips")])
    waveforms = [load_audio(path, tiny.config.sample_rate) for path in files]
    features = _features(front_end(tiny.config), waveforms)
    cpu, threads = environment()["cpu"]["model"], torch.get_num_threads()
    console.print(f"{cpu}, {threads} threads, torch {torch.__version__}", highlight=False)

    accuracy = _predictions(tiny, features, files, TINY_R, console)
    tiny_speed = measure(tiny, features, TINY_R, rounds=40, seconds=15)
    window_seconds = tiny.config.target_length / 100
    title = f"AST-tiny, {window_seconds:g}-s clips, fp32, batch {len(files)}"
    _speed_table(title, tiny_speed, console, accuracy)

    torch.manual_seed(0)
    dtype = fastest_dtype()
    base = AST(ASTConfig.base()).to(dtype)
    # Ten seconds of the shipped recordings, one after the other: real audio, not noise.
    speech = torch.cat(waveforms)
    base_fbank = front_end(base.config)
    samples = window(base_fbank)
    speech = speech.repeat(-(-samples // len(speech)))[:samples]
    base_features = base_fbank(speech.unsqueeze(0)).to(dtype)
    name = str(dtype).removeprefix("torch.")
    base_speed = measure(base, base_features, BASE_R, rounds=15, seconds=seconds)
    title = f"AST-base (random weights), 10-s clips, {name}, batch 1"
    _speed_table(title, base_speed, console)

    speeds = {"AST-tiny, 1.3 s": tiny_speed, f"AST-base, 10 s, {name}": base_speed}
    throughput_vs_r(speeds, folder / "throughput.png", f"{cpu}, {threads} threads")
    visualize(tiny, files[0], folder / "merged_tokens.png", r=10)
    for picture in ("throughput.png", "merged_tokens.png"):
        console.print(f"saved {folder / picture}", highlight=False)
    return speeds


if __name__ == "__main__":
    try:
        demo()
    except (FileNotFoundError, ParityError) as error:
        sys.exit(f"fastast: {error}")
