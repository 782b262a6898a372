from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from fastast import recipes
from fastast.cli.options import options_of
from fastast.recipe import TrainConfig, learning_rate

ALL = (
    *(
        "audioset_balanced",
        "audioset_full",
        "cmkd",
        "cnn_teacher",
        "digits",
        "efficientat",
        "esc10",
        "esc50",
    ),
    *("esc50_imagenet", "fastast", "kws12", "passt_esc50", "psla_balanced", "psla_full"),
    "speechcommands",
)


def write(folder: Path, text: str) -> Path:
    path = folder / "own.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_names() -> None:
    assert recipes.names() == ALL


@pytest.mark.parametrize("name", ALL)
def test_every_recipe_is_a_configuration(name: str) -> None:
    values = recipes.read(name)
    config = TrainConfig(**values)
    assert {key: getattr(config, key) for key in values} == values
    for field in fields(TrainConfig):  # of the type that the default has
        default, value = field.default, getattr(config, field.name)
        assert type(value) is type(default) or default is None, field.name
    text = (recipes.FOLDER / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    assert max(map(len, text.splitlines())) <= 100
    # A data set's recipe that names no folder, checkpoint or teacher works for everybody.
    assert not {"data", "out", "init", "teacher", "roots", "device"} & set(values)


AST = {
    "optimizer": "adam",
    "betas": (0.95, 0.999),
    "weight_decay": 5e-7,
    "schedule": "step",
    "size": "base",
    **dict.fromkeys(("label_smoothing", "clip_norm", "speed", "gain", "noise"), 0.0),
    "shift": 0,
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("esc50", {"lr": 1e-5}),
        ("esc50_imagenet", {"lr": 1e-4}),
    ],
)
def test_ast_on_esc50(name: str, expected: dict[str, Any]) -> None:
    values = recipes.read(name)
    expected |= AST | {
        **{"epochs": 25, "batch_size": 48, "loss": "ce", "warmup": 0},
        **{"step_start": 5, "step_every": 1, "step_gamma": 0.85},
        **{"frequency_mask": 24, "time_mask": 96, "mixup": 0.0},
        **{"target_length": 512, "mean": -6.6268077, "std": 5.358466},
    }
    assert {key: values[key] for key in expected} == expected
    rates = [learning_rate(TrainConfig(**values), 33 * epoch, 33) for epoch in range(8)]
    decays = [1, 1, 1, 1, 1, 0.85, 0.85**2, 0.85**3]
    assert rates == pytest.approx([expected["lr"] * decay for decay in decays])


def test_ast_on_balanced_audioset() -> None:
    values = recipes.read("audioset_balanced")
    expected = AST | {
        **{"lr": 5e-5, "epochs": 25, "batch_size": 12, "loss": "bce", "warmup": 1000},
        **{"step_start": 10, "step_every": 5, "step_gamma": 0.5, "average_epochs": 20},
        **{"frequency_mask": 48, "time_mask": 192, "mixup": 0.5, "sampler": "uniform"},
        **{"target_length": 1024, "mean": -4.2677393, "std": 4.5689974},
    }
    assert {key: values[key] for key in expected} == expected


def test_recipes_combine_and_later_ones_win(tmp_path: Path) -> None:
    own = write(tmp_path, "lr: 0.5\nlam: 0.25\n")
    both = recipes.read("esc50", "fastast")
    assert both == recipes.read("esc50") | {"lam": 0.1, "tau": 1.0}
    assert recipes.read("fastast", "cmkd")["lam"] == 0.5
    assert recipes.read("cmkd", "fastast")["lam"] == 0.1
    assert recipes.read("esc50", "cmkd", own) == both | {"lr": 0.5, "lam": 0.25}
    assert recipes.read() == {}


def test_values_are_what_they_look_like(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        # The traps of YAML 1.1: 1e-3 would be a text, no and off false.
        lr: 1e-3
        weight_decay: 5E-7
        mixup: 1
        clip_norm: .5
        precision: no
        where: on
        resume: false
        mean: null
        std: -4.5
        betas: [0.95, 1]
        eval_r: [0, 10]
        r_choices: []
        roots: [a b, "c,d"]
        r: "20,-1"
        test_split: "1"
        """,
    )
    values = recipes.read(path)
    assert values == {
        **{"lr": 1e-3, "weight_decay": 5e-7, "mixup": 1.0, "clip_norm": 0.5, "precision": "no"},
        **{"where": "on", "resume": False, "mean": None, "std": -4.5, "betas": (0.95, 1.0)},
        **{"eval_r": (0, 10), "r_choices": (), "roots": ("a b", "c,d"), "r": "20,-1"},
        "test_split": "1",
    }
    assert type(values["mixup"]) is float
    assert recipes.read(str(path)) == values  # a path may be a string
    assert recipes.read(write(tmp_path, "# nothing yet\n")) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1", r"'learning_rate' is not an option .* one of data, out, roots"),
        ("epoch: 1", r"'epoch' is not an option .*\(did you mean 'epochs'\?\)"),
        ("lr: fast", r"lr must be a number, not 'fast'"),
        ("lr: true", r"lr must be a number, not True"),
        ("lr: [1]", r"lr must be a number, not \[1\]"),
        ("lr:", r"lr must be a number, not None"),
        ("mean: low", r"mean must be a number or null, not 'low'"),
        ("epochs: 2.5", r"epochs must be a whole number, not 2\.5"),
        ("epochs: true", r"epochs must be a whole number, not True"),
        ("resume: 1", r"resume must be true or false, not 1"),
        ("resume: no", r"resume must be true or false, not 'no'"),
        ("r: 20", r"r must be text, in quotes if it looks like a number, not 20"),
        ("betas: 0.9", r"betas must be a list, \[\.\.\.\], each of it a number, not 0\.9"),
        ("eval_r: [0, 1.5]", r"eval_r must be a list, .* a whole number, not \[0, 1\.5\]"),
        ("eval_r: '0,10'", r"eval_r must be a list"),
        ("lr: 1\nlr: 2", r"cannot be read: 'lr' is given twice"),
        ("lr: [1", r"cannot be read: .*line 1"),
        ("- lr", r"must be lines of 'option: value', not \['lr'\]"),
        ("{[1]: 2}", r"cannot be read"),
        ("lr: !!python/object/apply:os.getcwd []", r"cannot be read: .*python/object"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as caught:
        recipes.read(path)
    assert str(caught.value).startswith(f"recipe {path}")
    assert "\n" not in str(caught.value)


def test_unknown_recipes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one of audioset_balanced, .* '\.\./esc50'"):
        recipes.read("../esc50")
    with pytest.raises(ValueError, match=r"ends in \.yaml or \.yml, not 'esc51'"):
        recipes.read("esc50", "esc51")
    with pytest.raises(ValueError, match=r"none\.yaml cannot be read"):
        recipes.read(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"bytes\.yaml cannot be read"):
        recipes.read(tmp_path / "bytes.yaml")


# ---------------------------------------------------------------------------------- command line


def parsed(*arguments: str) -> TrainConfig:
    """The configuration that a command with `options_of` gets."""
    got: list[TrainConfig] = []

    @options_of(TrainConfig)
    def command(config: TrainConfig) -> None:
        got.append(config)

    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return got[0]


def test_without_a_recipe_options_are_the_defaults() -> None:
    assert parsed() == TrainConfig()
    assert parsed("--betas", "0.5,0.6", "--no-resume") == TrainConfig(
        betas=(0.5, 0.6), resume=False
    )


def test_recipe_then_options() -> None:
    assert parsed("--recipe", "esc50") == TrainConfig(**recipes.read("esc50"))
    config = parsed("--recipe", "esc50", "--lr", "3e-5", "--mean", "1", "--betas", "0.9,0.99")
    expected = asdict(TrainConfig(**recipes.read("esc50")))
    expected |= {"lr": 3e-5, "mean": 1.0, "betas": (0.9, 0.99)}
    assert asdict(config) == expected


def test_an_option_at_its_default_still_wins() -> None:
    default = TrainConfig()
    assert recipes.read("esc50")["optimizer"] != default.optimizer
    config = parsed("--optimizer", default.optimizer, "--recipe", "esc50", "--lr", str(default.lr))
    assert (config.optimizer, config.lr) == (default.optimizer, default.lr)
    assert config.betas == (0.95, 0.999)


def test_flags_of_a_recipe(tmp_path: Path) -> None:
    own = str(write(tmp_path, "resume: false\ngradient_checkpointing: true\n"))
    config = parsed("--recipe", own)
    assert (config.resume, config.gradient_checkpointing) == (False, True)
    config = parsed("--recipe", own, "--resume", "--no-gradient-checkpointing")
    assert (config.resume, config.gradient_checkpointing) == (True, False)


def test_several_recipes(tmp_path: Path) -> None:
    own = write(tmp_path, "lam: 0.75\n")
    assert parsed("--recipe", "esc50,fastast").lam == 0.1
    assert parsed("--recipe", "cmkd, fastast").lam == 0.1
    assert parsed("--recipe", "fastast,cmkd,").lam == 0.5
    config = parsed("--recipe", f"esc50,fastast,{own}", "--tau", "2")
    assert (config.lr, config.lam, config.tau) == (1e-5, 0.75, 2.0)


def test_bad_recipes_stop_the_command(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="recipe must be one of"):
        parsed("--recipe", "esc51")
    with pytest.raises(ValueError, match="optimizer must be one of adamw, adam, not 'sgd'"):
        parsed("--recipe", str(write(tmp_path, "optimizer: sgd")))


def test_train_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastast import train as training
    from fastast.cli import app

    got: list[TrainConfig] = []

    def train(config: TrainConfig, report: object) -> dict[str, Any]:
        got.append(config)
        history = [
            {"epoch": e, "accuracy_r0": a} for e, a in ((1.0, 0.5), (2.0, 0.75), (3.0, 0.625))
        ]
        return {"model": [], "history": history}

    monkeypatch.setattr(training, "train", train)
    arguments = ["train", "--recipe", "esc50", "--lr", "3e-5", "--data", "esc50/"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    expected = recipes.read("esc50") | {"lr": 3e-5, "data": "esc50/"}
    assert got == [TrainConfig(**expected)]
    assert "accuracy at r=0: 75.00 % in the best epoch (2), 62.50 % in the last" in result.output


def test_help_shows_recipes_and_defaults() -> None:
    from fastast.cli import app

    text = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "400"}).output
    assert "--recipe" in text
    assert "audioset_balanced, audioset_full, cmkd" in text
    assert "[default: 0.0004]" in text  # of lr, and of betas
    assert "[default: 0.9,0.99]" in text
    assert "--context" not in text
