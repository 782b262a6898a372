"""One training run: its parts, its position, a step, and how all of it is stored and restored.

Nothing random is carried from step to step. The order of an epoch follows from (seed, epoch), and
the augmentation, dropout and choice of r of a step from (seed, step); the learning rate is a
function of the step. So a checkpoint is the weights, the optimizer's moments and the step, and a
run that is killed and resumed ends with the weights of a run that was never killed. What is drawn
for a step is drawn for its whole batch, of which each process computes its rows, so the number of
processes does not show either (but in dropout).
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastast.augment import Draws, one_hot
from fastast.data import AudioDataset, Batch
from fastast.data.sampling import balanced_weights, epoch_order
from fastast.distill import Teacher, cmkd_loss
from fastast.evaluate import Evaluation, evaluate_at, window
from fastast.model import AST
from fastast.recipe import TrainConfig, build_model, build_optimizer, learning_rate, mixed_seed

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["CHECKPOINT", "Run", "write_text"]

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


class Run:
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
        """Steps of the whole run."""
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
