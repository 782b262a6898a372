"""Which models a table of the paper needs, as training runs: one folder each, resumable."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastast import recipes
from fastast.recipe import TrainConfig
from fastast.reproduce.paper import R

__all__ = ["PRESETS", "VARIANTS", "Member", "Plan", "Preset"]


@dataclass(frozen=True)
class Preset:
    """A data set of the experiments.

    Attributes:
        title: What tables call it.
        recipe: For a student from scratch.
        pretrained_recipe: For a student that starts from a pretrained AST.
        subset: What `list_clips` selects of it.
        folds: Test folds of a cross-validation; empty for a data set with a test split.
        train: Split to train on; empty for the usual one.
        test: Split to test on; empty for the usual one.
        paper: The paper's data set to show beside it; empty for none.
        same: It is that data set, not a part of it or another like it.
    """

    title: str
    recipe: str
    pretrained_recipe: str
    subset: str = ""
    folds: tuple[str, ...] = ()
    train: str = ""
    test: str = ""
    paper: str = ""
    same: bool = False


FOLDS = ("1", "2", "3", "4", "5")
PRESETS = {
    "esc50": Preset("ESC-50", "esc10", "esc50", "", FOLDS, paper="ESC-50", same=True),
    "esc10": Preset("ESC-10", "esc10", "esc50", "esc10", FOLDS, paper="ESC-50"),
    "speechcommands": Preset(
        "Speech Commands V2", "kws12", "speechcommands", paper="Speech Commands V2", same=True
    ),
    "kws12": Preset(
        "Speech Commands, 12 classes", "kws12", "speechcommands", paper="Speech Commands V2"
    ),
    "digits": Preset("Free Spoken Digits", "digits", "digits"),
    "audioset": Preset(
        "balanced AudioSet",
        "audioset_balanced",
        "audioset_balanced",
        train="balanced_train_segments",
        test="eval_segments",
        paper="balanced AudioSet",
        same=True,
    ),
}

# The paper's name of each kind of model, and the kinds of each table.
VARIANTS = {
    "plain": "FastAST (Inf)",
    "merged": "FastAST (Train + Inf)",
    "transformer": "FastAST + KD (transformer)",
    "cnn": "FastAST + KD (CNN)",
}
TABLES = {1: ("plain", "merged"), 2: ("merged", "transformer", "cnn")}


@dataclass(frozen=True)
class Member:
    """One model of a table: what it is, and the run that trains it."""

    variant: str
    seed: int
    fold: str
    config: TrainConfig

    @property
    def folder(self) -> Path:
        """Where the run keeps its files."""
        return Path(self.config.out)


@dataclass(frozen=True)
class Plan:
    """Everything that decides about a reproduction.

    Attributes:
        table: 1 (merging) or 2 (distillation).
        data: The data set's folder, archive or csv.
        dataset: A name of `PRESETS`.
        out: Folder for models, tables and plots.
        rs: Amounts of merging to evaluate at.
        train_r: `"mixed"`: one model with merging in training, its r drawn anew each step from
            `mixed_rs`; `"each"`: one model for each of `rs`, as in the paper, with as many
            trainings.
        mixed_rs: See there.
        seeds: One model of each kind a seed.
        folds: Test folds, of those of the data set; empty for all.
        init: Pretrained AST to start from; empty for random weights.
        recipe: Recipes of the students; empty for the data set's.
        cnn: CNN teacher: a saved network, or an architecture to train or fit
            (`fastast.teachers.build`); `"none"` leaves it out.
        cnn_weights: Pretrained weights for that architecture.
        cnn_fit: `"head"`: a linear head on frozen embeddings; `"all"`: train the whole network.
        transformer: Transformer teacher: `"self"` for the model trained without merging, or a
            saved one (an AST, PaSST, ...); `"none"` leaves it out.
        subset: What to select of the data; empty for what the data set is.
        options: Options of `TrainConfig` that overrule the recipe.
    """

    table: int
    data: str
    dataset: str
    out: str
    rs: tuple[int, ...] = R
    train_r: str = "mixed"
    mixed_rs: tuple[int, ...] = R
    seeds: tuple[int, ...] = (0,)
    folds: tuple[str, ...] = ()
    init: str = ""
    recipe: str = ""
    cnn: str = "efficientnet_b2"
    cnn_weights: str = ""
    cnn_fit: str = "all"
    transformer: str = "self"
    subset: str = ""
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in (
            ("table", (1, 2)),
            ("dataset", tuple(PRESETS)),
            ("train_r", ("mixed", "each")),
            ("cnn_fit", ("head", "all")),
        ):
            value = getattr(self, name)
            if value not in allowed:
                listed = ", ".join(map(str, allowed))
                raise ValueError(f"{name} must be one of {listed}, not {value!r}")
        unknown = [fold for fold in self.folds if fold not in self.preset.folds]
        if unknown:
            known = ", ".join(self.preset.folds) or "none"
            raise ValueError(f"folds must be of {self.dataset}'s ({known}), not {unknown[0]!r}")
        if not self.seeds:
            raise ValueError("seeds must name at least one seed")
        if self.rs[0] != 0:
            raise ValueError(f"rs must begin with 0, what drops are counted from, not {self.rs}")

    @property
    def preset(self) -> Preset:
        """The data set."""
        return PRESETS[self.dataset]

    @property
    def multi_label(self) -> bool:
        """Clips have several classes: mAP is what counts."""
        return self.preset.paper == "balanced AudioSet"

    def splits(self) -> tuple[str, ...]:
        """The test folds to run, or one empty name for a fixed test split."""
        return self.folds or self.preset.folds or ("",)

    def _config(self, name: str, seed: int, fold: str, recipe: str, **options: Any) -> TrainConfig:
        preset = self.preset
        values = {
            "data": self.data,
            "subset": self.subset or preset.subset,
            "train_split": preset.train,
            "test_split": fold or preset.test,
            "seed": seed,
            "init": self.init,
            "eval_r": (0, 20) if 20 in self.rs else (0,),
            "final_r": self.rs,
            **recipes.read(*recipe.split(",")),
            **dict(self.options),
            **options,
        }
        place = f"{name}-seed{seed}" + (f"-fold{fold}" if fold else "")
        return TrainConfig(**values, out=str(Path(self.out) / self.dataset / place))

    def student(self, variant: str, seed: int, fold: str, teacher: str = "") -> list[Member]:
        """The runs of one kind of model: one, or with `train_r="each"` one for each r."""
        recipe = self.recipe
        if not recipe:
            recipe = self.preset.pretrained_recipe if self.init else self.preset.recipe
        options: dict[str, Any] = {"teacher": teacher} if teacher else {}
        if variant == "plain":
            return [Member(variant, seed, fold, self._config(variant, seed, fold, recipe))]
        if self.train_r == "mixed":
            config = self._config(variant, seed, fold, recipe, r_choices=self.mixed_rs, **options)
            return [Member(variant, seed, fold, config)]
        found = []
        for r in self.rs:
            config = self._config(
                f"{variant}-r{r}", seed, fold, recipe, r=str(r), eval_r=(r,), **options
            )
            found.append(Member(variant, seed, fold, replace(config, final_r=(r,))))
        return found

    def cnn_member(self, fold: str) -> Member:
        """The run that trains the CNN teacher; one a fold, whatever the student's seed."""
        recipe = "psla_balanced" if self.multi_label else f"{self.preset.recipe},cnn_teacher"
        config = self._config(
            "teacher-cnn",
            0,
            fold,
            recipe,
            arch=self.cnn,
            init=self.cnn_weights,
            eval_r=(0,),
            final_r=(0,),
        )
        return Member("teacher-cnn", 0, fold, config)

    def groups(self) -> Iterator[tuple[str, int, str]]:
        """Every kind, seed and fold that the table needs."""
        left_out = [name for name in ("cnn", "transformer") if getattr(self, name) == "none"]
        for seed in self.seeds:
            for fold in self.splits():
                for variant in TABLES[self.table]:
                    if variant not in left_out:
                        yield variant, seed, fold
