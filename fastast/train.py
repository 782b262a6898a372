"""Training an AST or a teacher: a thin loop on accelerate that survives being killed (`run`).

The recipe of the AST paper is `optimizer="adam"`, `weight_decay=5e-7`, `betas=(0.95, 0.999)`,
`schedule="step"`, `warmup=1000`; the defaults train a small model from scratch, and
`fastast.recipes` has those of the papers.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import fastast
from fastast.data import AudioDataset, list_clips
from fastast.data.sampling import missing_classes
from fastast.evaluate import evaluate_at
from fastast.recipe import TrainConfig, learning_rate
from fastast.run import CHECKPOINT, Run, write_text

__all__ = ["CHECKPOINT", "TrainConfig", "learning_rate", "load_splits", "train"]


def load_splits(
    config: TrainConfig, report: Callable[[str], None]
) -> tuple[AudioDataset, AudioDataset]:
    """The training and the test clips that a configuration asks for.

    Raises:
        ValueError: They cannot be used.
    """
    if not config.data:
        raise ValueError("data must name a csv or a folder")
    columns = config.path_column, config.target_column, config.split_column
    listing = list_clips(config.data, config.roots, *columns, config.where, config.subset)
    if listing.multi_label and config.loss == "ce":
        raise ValueError("the data has several classes a clip: use loss 'bce'")
    folder = config.cache_dir or str(Path(config.out) / "cache")
    train_set, test_set = (
        AudioDataset.load(
            listing,
            split,
            cache_dtype=config.cache_dtype,
            limit=config.limit,
            progress=True,
            cache=config.cache,
            cache_dir=folder,
        )
        for split in listing.split_names(config.train_split, config.test_split)
    )
    if missing := missing_classes(train_set, test_set):
        report(f"no training clip of {len(missing)} test classes: {', '.join(missing[:5])}")
    return train_set, test_set


def _finish(run: Run) -> dict[str, Any]:
    """Save the model (and the averaged one), evaluated as stored: rounded, computed in fp32."""
    config = run.config
    if run.merges:
        fastast.unpatch(run.model)
    run.model.eval()
    dtype = getattr(torch, config.save_dtype)
    last = {name: value.clone() for name, value in run.model.state_dict().items()}
    models = {"model": last}
    if run.averaged:
        models["model_averaged"] = run.average
    metrics: dict[str, Any] = {
        "config": asdict(config),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "train_clips": len(run.train_set),
        "test_clips": len(run.test_set),
        "steps": run.step,
        "train_seconds": run.seconds,
        "processes": run.accelerator.num_processes,
        "history": run.history,
    }
    if not run.accelerator.is_main_process:
        return metrics
    for name, weights in models.items():
        run.model.load_state_dict({key: value.to(dtype) for key, value in weights.items()})
        copy.deepcopy(run.model).to(dtype).save_pretrained(run.out / name)
        write_text(run.out / name / "train_config.json", config.to_json() + "\n")
        rs: Sequence[int | None] = config.final_r if run.merges else (None,)
        results = evaluate_at(run.model, run.test_set, rs, run.front_end, batch_size=50)
        metrics[name] = [result.to_dict() for result in results]
    from fastast.plot import training_curve

    write_text(run.out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    training_curve(run.history, run.out / "history.png")
    return metrics


def train(config: TrainConfig, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Train a model and save it under `config.out`.

    Writes `checkpoint.pt` (each epoch and every `save_every` steps), `model/` (safetensors and
    config), `model_averaged/`, `metrics.json`, `history.csv`, `history.png`, and a TensorBoard log.
    A run that was killed continues when it is started again with the same configuration.

    Args:
        config: What to do.
        report: Called with one line an epoch.

    Returns:
        What `metrics.json` holds: the configuration and the final evaluation at each r.

    Raises:
        ValueError: The data cannot be used, the output folder holds another run, or the loss is not
            finite.
        ImportError: The `train` extra is not installed.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    train_set, test_set = load_splits(config, report)
    run = Run(config, train_set, test_set)
    report_main = report if run.accelerator.is_main_process else lambda _: None
    run.out.mkdir(parents=True, exist_ok=True)
    if config.resume and run.restore():
        report_main(f"resuming at step {run.step} of {run.steps}")
    if run.accelerator.is_main_process:
        write_text(run.out / "train_config.json", config.to_json() + "\n")
    run.accelerator.init_trackers("tensorboard")
    parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
    report_main(
        f"{parameters:.2f} M parameters, {len(run.train_set)} training and {len(run.test_set)} "
        f"test clips of {run.front_end.target_length} frames, {run.steps} steps on {run.device}"
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    console = Console()
    # A log file gets the lines of `report` alone.
    quiet = not (console.is_terminal and run.accelerator.is_main_process)
    with Progress(*columns, console=console, transient=True, disable=quiet) as progress:
        task = progress.add_task("training", total=run.steps, completed=run.step, status="")
        while run.step < run.steps:
            start = time.perf_counter()
            loss = run.train_step()
            run.seconds += time.perf_counter() - start
            speed = run.batch_size * run.step / run.seconds
            lr = run.optimizer.param_groups[0]["lr"]
            status = f"loss {loss:.3f}  lr {lr:.1e}  {speed:.0f} clips/s"
            progress.update(task, completed=run.step, status=status)
            if run.step % run.steps_per_epoch == 0:
                row = run.end_epoch()
                accuracy = "  ".join(
                    f"{name.removeprefix('accuracy_').replace('r', 'r=')} {100 * value:.1f} %"
                    for name, value in row.items()
                    if name.startswith("accuracy")
                )
                report_main(
                    f"epoch {int(row['epoch'])}/{config.epochs}  loss {row['loss']:.4f}  {accuracy}"
                )
            elif run.step % config.save_every == 0:
                run.save()
    metrics = _finish(run)
    run.accelerator.end_training()
    return metrics
