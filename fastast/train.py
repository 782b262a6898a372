"""Training an AST, with merging on if wanted: a thin loop on accelerate that survives being killed.

Nothing random is carried from step to step. The order of an epoch follows from (seed, epoch), and
the augmentation, dropout and choice of r of a step from (seed, step); the learning rate is a
function of the step. So a checkpoint is the weights, the optimizer's moments and the step, and a
run that is killed and resumed ends with the weights of a run that was never killed.

The recipe of the AST paper is `optimizer="adam"`, `weight_decay=5e-7`, `betas=(0.95, 0.999)`,
`schedule="step"`, `warmup=1000`; the defaults here train a small model from scratch.
"""

from __future__ import annotations

import copy
import csv
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import fastast
from fastast.augment import Draws, one_hot
from fastast.data import AudioDataset, Batch, Listing, list_clips
from fastast.data.sampling import balanced_weights, epoch_order, missing_classes
from fastast.distill import Teacher, cmkd_loss
from fastast.evaluate import Evaluation, evaluate_at, window
from fastast.model import AST
from fastast.recipe import TrainConfig, build_model, build_optimizer, learning_rate, mixed_seed

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["TrainConfig", "learning_rate", "train"]

CHECKPOINT = "checkpoint.pt"


def _generator(*parts: int) -> torch.Generator:
    return torch.Generator().manual_seed(mixed_seed(*parts))


class _Objective(nn.Module):
    """The loss of a batch. Accelerate wraps this module, so the model itself stays as it is."""

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config

    def forward(self, features: Tensor, target: Tensor, teacher_logits: Tensor | None) -> Tensor:
        logits, config = self.model(features), self.config
        multi_label, smoothing = config.loss == "bce", config.label_smoothing
        others = 0.5 if multi_label else 1 / target.shape[1]
        target = target * (1 - smoothing) + others * smoothing
        if teacher_logits is not None:
            return cmkd_loss(logits, teacher_logits, target, config.lam, config.tau, multi_label)
        if multi_label:
            return nn.functional.binary_cross_entropy_with_logits(logits, target)
        return nn.functional.cross_entropy(logits, target)


def _splits(config: TrainConfig, listing: Listing) -> tuple[str, str]:
    """Names of the training and the test split."""
    splits = listing.splits
    test = config.test_split or ("test" if "test" in splits else splits[0])
    train = config.train_split or ("train" if "train" in splits else f"!{test}")
    return train, test


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
    train_split, test_split = _splits(config, listing)
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
        for split in (train_split, test_split)
    )
    if missing := missing_classes(train_set, test_set):
        report(f"no training clip of {len(missing)} test classes: {', '.join(missing[:5])}")
    return train_set, test_set


def _accelerator(config: TrainConfig) -> Accelerator:
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError:
        raise ImportError('training needs accelerate: pip install "fastast[train]"') from None
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda' and this machine has no CUDA device: use 'cpu'")
    # Accelerate keeps its state a process; a second run with another precision must start afresh.
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        cpu=config.device == "cpu",
        mixed_precision=config.precision,
        log_with="tensorboard",
        project_dir=config.out,
    )


def write_text(path: Path, text: str) -> None:
    """Write a file that is whole or not there."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


class _Run:
    """One training run: its parts, its position, and how to store and restore both."""

    def __init__(
        self, config: TrainConfig, train_set: AudioDataset, test_set: AudioDataset
    ) -> None:
        self.config = config
        self.train_set, self.test_set = train_set, test_set
        self.out = Path(config.out)
        self.accelerator = _accelerator(config)
        device = self.accelerator.device  # of a second process on a CPU, "cpu:1"
        self.device = torch.device("cpu") if device.type == "cpu" else device
        self.model, front_end = build_model(config, train_set)
        self.front_end = front_end.to(self.device)
        self.objective, self.optimizer = self.accelerator.prepare(
            _Objective(self.model, config), build_optimizer(config, self.model)
        )
        self.augment = config.augment()
        self.teacher = Teacher(config.teacher, train_set, self.device) if config.teacher else None
        self.step = 0
        self.saved_step = 0
        self.loss_sum = 0.0
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []
        self.average: dict[str, Tensor] = {}
        self.averaged = 0
        processes = self.accelerator.num_processes
        if config.batch_size % processes:
            raise ValueError(
                f"batch_size must be a multiple of the {processes} processes that share it, not "
                f"{config.batch_size}"
            )
        self.batch_size = min(config.batch_size, len(train_set) // processes * processes)
        if not self.batch_size:
            raise ValueError(f"{processes} processes cannot share {len(train_set)} training clips")
        self.steps_per_epoch = len(train_set) // self.batch_size
        self._weights = (
            balanced_weights(train_set.targets) if config.sampler == "balanced" else None
        )
        self._order: tuple[int, Tensor] | None = None
        self._planned: tuple[int, tuple[Tensor, Draws]] | None = None

    @property
    def merges(self) -> bool:
        """The model merges tokens: it has an `r`."""
        return isinstance(self.model, AST)

    @property
    def steps(self) -> int:
        return self.config.epochs * self.steps_per_epoch

    def save(self) -> None:
        """Store everything; a kill at any moment leaves the old checkpoint or the new one."""
        if not self.accelerator.is_main_process:
            return
        state = {
            "config": self.config.to_json(),
            "data": self.train_set.fingerprint,
            "step": self.step,
            "loss_sum": self.loss_sum,
            "seconds": self.seconds,
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "averaged": self.averaged,
        }
        part = self.out / (CHECKPOINT + ".part")
        try:
            torch.save(state, part)
        except (OSError, RuntimeError) as error:  # torch's writer gives RuntimeError on a full disk
            part.unlink(missing_ok=True)
            raise OSError(
                f"{self.out / CHECKPOINT}: step {self.step} could not be saved ({error}); the "
                f"checkpoint of step {self.saved_step} is whole: make room and start again"
            ) from None
        os.replace(part, self.out / CHECKPOINT)
        self.saved_step = self.step

    def restore(self) -> bool:
        """Continue from the output folder's checkpoint, if there is one."""
        path = self.out / CHECKPOINT
        if not path.exists():
            return False
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{path} is not a checkpoint of fastast train: {error}") from None
        changed = self.config.differences(json.loads(state["config"]))
        if state["data"] != self.train_set.fingerprint:
            changed.append("the training data changed")
        if changed:
            raise ValueError(
                f"{self.out} holds another run ({'; '.join(changed)}): "
                "choose another output folder, or start over with --no-resume"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("step", "loss_sum", "seconds", "history", "average", "averaged"):
            setattr(self, name, state[name])
        self.average = {name: value.to(self.device) for name, value in self.average.items()}
        self.saved_step = self.step
        return True

    def _plan(self, step: int) -> tuple[Tensor, Draws]:
        """The clips of a step, over all processes, and what is random about them."""
        if self._planned is None or self._planned[0] != step:
            epoch, position = divmod(step, self.steps_per_epoch)
            if self._order is None or self._order[0] != epoch:
                generator = _generator(self.config.seed, 1, epoch)
                order = epoch_order(len(self.train_set), generator, self._weights)
                self._order = epoch, order
            start = position * self.batch_size
            clips = self._order[1][start : start + self.batch_size]
            draws = self.augment.draw(len(clips), _generator(self.config.seed, 2, step))
            self._planned = step, (clips, draws)
        return self._planned[1]

    def _mine(self) -> Tensor:
        """Rows of the batch that are this process's."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        return torch.arange(rank, self.batch_size, processes)

    def _clips(self, clips: Tensor, draws: Draws) -> Batch:
        waveform, lengths, target = self.train_set.batch(clips, window(self.front_end), draws.place)
        target = one_hot(target, len(self.train_set.labels))
        return Batch(waveform.to(self.device), lengths.to(self.device), target.to(self.device))

    def _augmented(self, clips: Tensor, draws: Draws, rows: Tensor) -> Batch:
        """Some rows of a step's batch, their audio augmented."""
        batch, mine = self._clips(clips[rows], draws[rows]), draws[rows]
        partner = batch
        mixed = (mine.weight < 1).nonzero().flatten()
        if len(mixed):
            others = mine.partner[mixed]
            found = self._clips(clips[others], draws[others])
            partner = Batch(*(t.clone() for t in batch))
            for whole, part in zip(partner, found, strict=True):
                whole[mixed.to(self.device)] = part
        return self.augment.waveform(batch, mine, partner)

    def _backward(self, clips: Tensor, draws: Draws, rows: Tensor, share: float) -> Tensor:
        """Forward and backward of some rows; returns their share of the loss."""
        waveform, lengths, target = self._augmented(clips, draws, rows)
        augment, mine = self.augment, draws[rows]
        features = augment.features(waveform, lengths, mine, self.front_end)
        teacher_logits = None
        if self.teacher is not None:
            with self.accelerator.autocast():
                teacher_logits = self.teacher(
                    clips[rows], waveform, lengths, mine, augment, self.front_end
                )
        loss = self.objective(features, target, teacher_logits) * share
        self.accelerator.backward(loss)
        return loss.detach()

    def train_step(self) -> float:
        """One step; returns its loss."""
        config, step = self.config, self.step
        clips, draws = self._plan(step)
        if config.r_choices:
            generator = _generator(config.seed, 3, step)
            pick = torch.randint(len(config.r_choices), (1,), generator=generator)
            self.model.r = config.r_choices[int(pick)]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, step, self.steps_per_epoch)
        torch.manual_seed(mixed_seed(config.seed, 4, step, self.accelerator.process_index))
        self.model.train()
        mine = self._mine()
        parts = mine.tensor_split(min(config.accumulate, len(mine)))
        loss = torch.zeros((), device=self.device)
        for i, rows in enumerate(parts):
            last = i == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.objective):
                loss += self._backward(clips, draws, rows, len(rows) / len(mine))
            if not i and step + 1 < self.steps:  # its audio is decoded while this step computes
                self.train_set.prefetch(self._plan(step + 1)[0][mine])
        if config.clip_norm:
            self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        value = float(self.accelerator.reduce(loss, "mean"))
        if not math.isfinite(value):
            raise ValueError(f"the loss is {value} at step {step}: lower lr or use precision 'no'")
        self.step += 1
        self.loss_sum += value
        return value

    def evaluate(self, model: nn.Module, rs: tuple[int, ...]) -> list[Evaluation]:
        """Test the model at each r, in the training's precision; what does not merge, as it is."""
        found: Sequence[int | None] = rs if self.merges else (None,)
        with self.accelerator.autocast():
            return evaluate_at(model, self.test_set, found, self.front_end, batch_size=50)

    def end_epoch(self) -> dict[str, float]:
        """Evaluate, average, log and store; returns the epoch's row of the history."""
        config, epoch = self.config, self.step // self.steps_per_epoch
        row = {
            "epoch": float(epoch),
            "step": float(self.step),
            "lr": learning_rate(config, self.step - 1, self.steps_per_epoch),
            "loss": self.loss_sum / self.steps_per_epoch,
            "clips_per_second": self.step * self.batch_size / max(self.seconds, 1e-9),
        }
        if self.accelerator.is_main_process:
            for result in self.evaluate(self.model, config.eval_r):
                row[f"accuracy_r{result.r or 0}"] = result.accuracy
                row[f"map_r{result.r or 0}"] = result.mean_average_precision
        self.accelerator.wait_for_everyone()
        self.history.append(row)
        self.loss_sum = 0.0
        if epoch > config.epochs - config.average_epochs:
            self.averaged += 1
            for name, value in self.model.state_dict().items():
                old = self.average.get(name)
                new = value.detach().clone()
                self.average[name] = new if old is None else old.lerp(new, 1 / self.averaged)
        self.accelerator.log(row, step=self.step)
        if self.accelerator.is_main_process:
            with (self.out / "history.csv").open("w", newline="", encoding="utf-8") as file:
                # A resumed run may evaluate at other r than before.
                names = dict.fromkeys(name for old in self.history for name in old)
                writer = csv.DictWriter(file, fieldnames=list(names))
                writer.writeheader()
                writer.writerows(self.history)
        self.save()
        return row


def _finish(run: _Run) -> dict[str, Any]:
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
    run = _Run(config, train_set, test_set)
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
