from __future__ import annotations

import csv
import io
import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_runs import write_tones
from typer.testing import CliRunner

from fastast.cli.reproducing import _guess
from fastast.reproduce import PRESETS, Plan, _epochs, reproduce
from fastast.reproduce.paper import TABLE1, TABLE2, R, published
from fastast.reproduce.plan import VARIANTS, Member
from fastast.reproduce.results import Result, markdown, rich_tables, summarise

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

TINY = {
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 1,
    "target_length": 48,
    "epochs": 2,
    "batch_size": 8,
    "precision": "no",
    "warmup": 2,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tones(tmp_path_factory.mktemp("tones"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def plan(tones: Path, out: Path, table: int = 1, **options: object) -> Plan:
    values = {"rs": (0, 2, 5), "options": tuple(TINY.items()), **options}
    return Plan(table, str(tones), "digits", str(out), **values)  # type: ignore[arg-type]


def result(variant: str, seed: int, fold: str, r: int, accuracy: float) -> Result:
    return Result("esc10", variant, seed, fold, r, accuracy, accuracy / 2, None, 80, 30, 1.0)


def test_table1(tones: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    wanted = plan(tones, tmp_path, seeds=(0, 1))
    outcome = reproduce(wanted, lines.append, seconds=0.5)
    assert {(x.variant, x.seed, x.r) for x in outcome.results} == {
        (v, s, r) for v in ("plain", "merged") for s in (0, 1) for r in (0, 2, 5)
    }
    folder = tmp_path / "digits"
    trained = [line for line in lines if line.startswith("training ")]
    assert trained == [
        f"training {folder / name}"
        for name in ("plain-seed0", "merged-seed0", "plain-seed1", "merged-seed1")
    ]
    stored = json.loads((folder / "plain-seed0" / "metrics.json").read_text())
    assert stored["config"]["r_choices"] == []
    mixed = json.loads((folder / "merged-seed1" / "metrics.json").read_text())
    assert (mixed["config"]["r_choices"], mixed["config"]["seed"]) == ([*R], 1)
    first = next(x for x in outcome.results if (x.variant, x.seed, x.r) == ("plain", 0, 2))
    assert first.accuracy == 100 * stored["model"][1]["accuracy"]
    assert first.mean_average_precision == 100 * stored["model"][1]["mean_average_precision"]

    assert [file.name for file in outcome.files] == [
        "table1.md",
        "table1.csv",
        "table1.json",
        "table1_accuracy.png",
        "table1_speed.png",
    ]
    assert all(file.stat().st_size > 300 for file in outcome.files)
    with (folder / "table1.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and float(rows[0]["accuracy"]) == outcome.results[0].accuracy
    about = json.loads((folder / "table1.json").read_text())
    assert about["speeds"].keys() == {"0", "2", "5"}
    assert about["plan"]["seeds"] == [0, 1] and about["hardware"] and about["date"]

    # Nothing is trained twice: fewer r or seeds are read from what there is, others evaluated.
    again: list[str] = []
    less = reproduce(replace(wanted, seeds=(1,), rs=(0, 5)), again.append, seconds=0)
    assert again == []
    assert [x.r for x in less.results] == [0, 5, 0, 5]
    more = reproduce(replace(wanted, seeds=(1,), rs=(0, 3)), again.append, seconds=0)
    assert [line.split()[0] for line in again] == ["evaluating", "resuming", "0.12"] * 2
    assert [x.r for x in more.results] == [0, 3, 0, 3]
    assert more.results[0] == less.results[0]
    again.clear()
    reproduce(wanted, again.append, seconds=0)
    assert again == []


def test_one_model_for_each_r(tones: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    wanted = plan(tones, tmp_path, rs=(0, 3), train_r="each")
    outcome = reproduce(wanted, lines.append, seconds=0)
    assert [(x.variant, x.r) for x in outcome.results] == [
        ("plain", 0),
        ("plain", 3),
        ("merged", 0),
        ("merged", 3),
    ]
    stored = json.loads((tmp_path / "digits" / "merged-r3-seed0" / "metrics.json").read_text())
    assert stored["config"]["r"] == "3" and stored["config"]["r_choices"] == []


def test_table2(tones: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    lines: list[str] = []
    wanted = plan(tones, tmp_path, 2, rs=(0, 2), cnn="timm:mobilenetv3_small_050")
    outcome = reproduce(wanted, lines.append, seconds=0)
    assert [x.variant for x in outcome.results[::2]] == ["merged", "transformer", "cnn"]
    trained = [line.rpartition("/")[2] for line in lines if line.startswith("training ")]
    assert trained == [
        "merged-seed0",
        "plain-seed0",
        "transformer-seed0",
        "teacher-cnn-seed0",
        "cnn-seed0",
    ]
    folder = tmp_path / "digits"
    for name, teacher in (("transformer", "plain-seed0"), ("cnn", "teacher-cnn-seed0")):
        stored = json.loads((folder / f"{name}-seed0" / "metrics.json").read_text())
        assert stored["config"]["teacher"] == str(folder / teacher / "model")
    text = (folder / "table2.md").read_text()
    assert "FastAST + KD (CNN): accuracy" in text and "FastAST + KD (CNN): mAP" in text
    assert "paper (balanced AudioSet, mAP)" not in text  # no such data set there
    again: list[str] = []
    reproduce(wanted, again.append, seconds=0)
    assert again == []


def test_a_head_on_a_frozen_teacher(tones: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    lines: list[str] = []
    wanted = plan(tones, tmp_path, 2, rs=(0,), cnn="timm:mobilenetv3_small_050", cnn_fit="head")
    reproduce(wanted, lines.append, seconds=0)
    (fitted,) = [line for line in lines if line.startswith("teacher: ")]
    assert fitted.endswith("% of 8 test clips")
    folder = tmp_path / "digits" / "teacher-cnn-seed0" / "model"
    assert json.loads((folder / "config.json").read_text())["labels"] == ["high", "low"]


def test_a_killed_reproduction_goes_on(tones: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(line: str) -> None:
        if "merged-seed0" in line:
            raise Killed

    with pytest.raises(Killed):
        reproduce(plan(tones, tmp_path), kill, seconds=0)
    partial = (tmp_path / "digits" / "table1.md").read_text()
    assert "FastAST (Inf)" in partial and "Train + Inf" not in partial
    lines: list[str] = []
    reproduce(plan(tones, tmp_path), lines.append, seconds=0)
    assert [line for line in lines if "training /" in line] == [
        f"training {tmp_path / 'digits' / 'merged-seed0'}"
    ]


def test_folds_are_averaged_before_seeds() -> None:
    found = [
        result("plain", seed, fold, r, value)
        for seed, fold, r, value in [
            (0, "1", 0, 90.0),
            (0, "2", 0, 80.0),
            (1, "1", 0, 88.0),
            (1, "2", 0, 88.0),
            (0, "1", 5, 70.0),
            (0, "2", 5, 80.0),
            (1, "1", 5, 75.0),
            (1, "2", 5, 81.0),
        ]
    ]
    summary = summarise(found, "accuracy")["plain"]
    assert summary[0].percent == pytest.approx(86.5)
    assert summary[0].spread == pytest.approx(statistics.stdev([85, 88]))
    assert summary[5].percent == pytest.approx(76.5)
    assert summary[5].drop == pytest.approx(-10)
    assert summarise(found, "mAP")["plain"][0].percent == pytest.approx(43.25)
    assert summarise(found[:1], "accuracy")["plain"][0].spread is None


def test_best_and_last_epoch(tmp_path: Path) -> None:
    """The best epoch is picked on the mean over folds, not in each fold."""
    config = plan(tmp_path, tmp_path).student("plain", 0, "")[0].config

    def history(*values: float) -> list[dict[str, float]]:
        return [{"accuracy_r0": value} for value in values]

    found = _epochs(
        [
            (Member("plain", 0, "1", config), history(0.5, 0.9, 0.6)),
            (Member("plain", 0, "2", config), history(0.9, 0.5, 0.7)),
            (Member("plain", 1, "1", config), history(0.1, 0.2, 0.3)),
        ]
    )
    assert found["plain"] == pytest.approx((100 * (0.7 + 0.3) / 2, 100 * (0.65 + 0.3) / 2))


def test_markdown_shows_the_papers_numbers(tmp_path: Path) -> None:
    wanted = Plan(1, "data", "esc10", str(tmp_path), rs=(0, 5, 7))
    found = [result(v, 0, "1", r, 90.0 - r) for v in ("plain", "merged") for r in (0, 5, 7)]
    lines = markdown(wanted, found, {0: 10.0, 5: 15.0, 7: 20.0}).splitlines()
    assert "FastAST (Inf): paper (ESC-50)" in lines[0]
    assert lines[2] == "| 0 | 10.0 | 1.00 | 1.00 | 90.0 | +0.0 | 95.6 | 90.0 | +0.0 | 94.7 |"
    assert lines[3] == "| 5 | 15.0 | 1.50 | 1.15 | 85.0 | -5.0 | 95.2 | 85.0 | -5.0 | 94.5 |"
    # r = 7 is not in the paper
    assert lines[4] == "| 7 | 20.0 | 2.00 |  | 83.0 | -7.0 |  | 83.0 | -7.0 |  |"


def test_tables_fit_a_terminal(tmp_path: Path) -> None:
    wanted = Plan(2, "data", "esc10", str(tmp_path), rs=(0, 5))
    found = [
        result(variant, seed, "1", r, 90.0 - r - seed)
        for variant in ("merged", "transformer", "cnn")
        for seed in (0, 1)
        for r in (0, 5)
    ]
    tables = rich_tables(wanted, found, {0: 10.0, 5: 15.0})
    assert len(tables) == 3
    console = Console(width=80, file=io.StringIO())
    for table in tables:
        assert console.measure(table).minimum <= 80
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "FastAST + KD (CNN)" in text and "89.5 ± 0.7" in text and "1.50" in text


def test_the_papers_numbers_are_whole() -> None:
    for values in (*(v for table in TABLE1.values() for v in table.values()), *TABLE2.values()):
        assert len(values) == len(R)
    assert published(1, "ESC-50", "plain")[40] == 90.2
    assert published(1, "Speech Commands V2", "merged")[25] == 97.1
    assert published(2, "balanced AudioSet", "cnn")[5] == 44.6
    assert published(1, "", "plain") == {}
    assert set(VARIANTS) >= {"plain", "merged", "cnn", "transformer"}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("table", [1, 2])
def test_every_data_set_has_runs(name: str, table: int, tmp_path: Path) -> None:
    for init in ("", "checkpoint"):
        wanted = Plan(table, "data", name, str(tmp_path), init=init)
        groups = list(wanted.groups())
        assert len(groups) == (2 if table == 1 else 3) * max(1, len(PRESETS[name].folds))
        places = set()
        for variant, seed, fold in groups:
            (member,) = wanted.student(variant, seed, fold)
            assert member.config.test_split == (fold or PRESETS[name].test)
            assert member.config.init == init
            places.add(member.folder)
        assert len(places) == len(groups)
        assert wanted.cnn_member("1").config.arch == "efficientnet_b2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "birds"}, "dataset must be one of esc50, esc10, .*'birds'"),
        ({"table": 3}, "table must be one of 1, 2, not 3"),
        ({"train_r": "all"}, "train_r must be one of mixed, each"),
        ({"folds": ("6",)}, r"folds must be of digits's \(none\), not '6'"),
        ({"seeds": ()}, "seeds must name"),
        ({"rs": (5, 10)}, "rs must begin with 0"),
    ],
)
def test_bad_plans(change: dict[str, object], message: str, tmp_path: Path) -> None:
    values = {"table": 1, "data": "d", "dataset": "digits", "out": str(tmp_path), **change}
    with pytest.raises(ValueError, match=message):
        Plan(**values)  # type: ignore[arg-type]


def test_command(tones: Path, tmp_path: Path) -> None:
    from fastast.cli import app

    arguments = ["reproduce", "table1", "--data", str(tones), "--dataset", "digits", "--limit", "8"]
    arguments += ["--out", str(tmp_path), "--r", "0,5", "--epochs", "1", "--seconds", "0"]
    arguments += ["--batch-size", "4", "--precision", "no", "--device", "cpu"]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "Table 1 on Free Spoken Digits" in done.output
    assert f"saved {tmp_path / 'digits' / 'table1.md'}" in done.output.replace("\n", "")
    wrong = CliRunner().invoke(app, ["reproduce", "table3", "--data", str(tones)])
    assert "table must be table1 or table2, not 'table3'" in str(wrong.exception)


def test_teachers_may_be_left_out(tmp_path: Path) -> None:
    for teachers, kinds in (
        ({"transformer": "none"}, ["merged", "cnn"]),
        ({"cnn": "none"}, ["merged", "transformer"]),
    ):
        wanted = Plan(2, "data", "digits", str(tmp_path), **teachers)
        assert [variant for variant, _, _ in wanted.groups()] == kinds


def test_guesses_the_data_set() -> None:
    assert _guess("../shared/data/fsdd") == "digits"
    assert _guess("ESC-50-master") == "esc50"
    assert _guess("data/speech_commands_v2_kws12") == "kws12"
    assert _guess("speech_commands_v0.02.tar.gz") == "speechcommands"
    with pytest.raises(ValueError, match=r"dataset must be given.*one of esc50"):
        _guess("stuff")
