from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from tiny_models import GRID, tiny_ast, tiny_huggingface
from typer.testing import CliRunner

import fastast
from fastast import demo
from fastast import evaluate as evaluation
from fastast import sweep as sweeping
from fastast.classify import asset
from fastast.cli import app, main
from fastast.data import AudioDataset
from fastast.evaluate import evaluate, front_end, measure, time_rounds, window
from fastast.linear import why_no_int8
from fastast.plot import quality_vs_throughput
from fastast.schedules import macs
from fastast.sweep import Sweep, read_csv, read_range, sweep

LABELS = ("ape", "bee", "cat", "dog", "eel")
COUNT = 24


def answers(model: fastast.AST, waves: list[np.ndarray]) -> list[int]:
    fbank = front_end(model.config)
    data = AudioDataset(waves, [(0,)] * len(waves), LABELS, [""] * len(waves))
    batch = data.batch(range(len(waves)), window(fbank))
    with torch.inference_mode():
        return model(fbank(batch.waveform, batch.lengths)).argmax(1).tolist()


@pytest.fixture
def model() -> fastast.AST:
    """Loud enough that merging changes some of its answers."""
    model = tiny_ast(5, labels=LABELS)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


@pytest.fixture
def waves() -> list[np.ndarray]:
    """Chirps in noise."""
    generator = np.random.default_rng(0)
    waves = []
    for _ in range(COUNT):
        n = int(generator.integers(4000, 20000))
        start, end, tone, noise = generator.uniform((100, 100, 0.01, 0), (7000, 7000, 0.5, 0.1))
        phase = 2 * np.pi / 16000 * np.cumsum(np.linspace(start, end, n))
        wave = tone * np.sin(phase) + noise * generator.standard_normal(n)
        waves.append(wave.astype(np.float32))
    return waves


@pytest.fixture
def data(model: fastast.AST, waves: list[np.ndarray]) -> AudioDataset:
    """Clips labelled by the model itself, without merging, but for two: 22 of 24 right at r=0."""
    targets = answers(model, waves)
    targets[:2] = [(target + 1) % len(LABELS) for target in targets[:2]]
    names = [f"{i}.wav" for i in range(COUNT)]
    return AudioDataset(waves, [(target,) for target in targets], LABELS, names)


@pytest.fixture
def several(waves: list[np.ndarray]) -> AudioDataset:
    """The same with two classes a clip."""
    targets = [(i % 5, (i + 1 + i % 3) % 5) for i in range(COUNT)]
    names = [f"{i}.wav" for i in range(COUNT)]
    return AudioDataset(waves, targets, LABELS, names, multi_label=True)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[Any, list[float]]:
    """Replace the speed measurement by known seconds, set by r."""
    times: dict[Any, list[float]] = {}
    monkeypatch.setattr(sweeping, "time_rounds", lambda *arguments: times)
    return times


# --------------------------------------------------------------------------------------- range


@pytest.mark.parametrize(
    ("text", "rs"),
    [
        ("0:40:5", (0, 5, 10, 15, 20, 25, 30, 35, 40)),
        ("0:12:5", (0, 5, 10)),
        ("3:5", (3, 4, 5)),
        ("7:7", (7,)),
        ("0,5,10", (0, 5, 10)),
        ("10, 5,5,", (5, 10)),
        ("0:10:5,40", (0, 5, 10, 40)),
        ("20", (20,)),
    ],
)
def test_ranges(text: str, rs: tuple[int, ...]) -> None:
    assert read_range(text) == rs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "must be a range"),
        ("0:b:5", "must be a range"),
        ("1:2:3:4", "must be a range"),
        ("::", "must be a range"),
        ("1.5", "must be a range"),
        ("5:1", "ends at or after its start"),
        ("0:40:0", "step of 1 or more"),
        ("0:40:-5", "step of 1 or more"),
        ("-5", "must be 0 or more"),
        ("-5:10:5", "must be 0 or more"),
        ("20,-1", "an inflection is given apart"),
        ("", "at least one"),
        (" , ", "at least one"),
    ],
)
def test_bad_ranges_say_what_they_were(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_range(text)
    assert str(caught.value).startswith("r must ")
    assert repr(text) in str(caught.value)


# ------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("inflect", [0.0, -1.0])
def test_quality_is_that_of_evaluate(
    model: fastast.AST, data: AudioDataset, inflect: float
) -> None:
    model.train()
    result = sweep(model, data, [6, 18], inflect, seconds=0.05, batch_size=10)
    assert model.training
    assert model.tome is None
    assert [row.r for row in result.rows] == [0, 6, 18]
    assert result.rows[0].percent == pytest.approx(100 * 22 / 24)
    for row in result.rows:
        expected = evaluate(model.eval(), data, (row.r, inflect), batch_size=10)
        assert row.metric == "accuracy"
        assert row.percent == 100 * expected.accuracy
        assert row.drop == row.percent - result.rows[0].percent
        assert row.inflect == inflect
    assert result.rows[-1].drop < 0  # or none of the above says anything


def test_several_classes_a_clip_are_mean_average_precision(
    model: fastast.AST, several: AudioDataset
) -> None:
    result = sweep(model, several, [9], seconds=0.05)
    assert [row.metric for row in result.rows] == ["mAP", "mAP"]
    expected = [100 * evaluate(model, several, r).mean_average_precision for r in (0, 9)]
    assert [row.percent for row in result.rows] == expected
    assert expected[0] != expected[1]


def test_ratios(model: fastast.AST, data: AudioDataset, clock: dict[Any, list[float]]) -> None:
    clock.update({0: [0.5, 0.4, 9.0], 4: [0.25, 0.2, 0.9], 30: [0.1, 0.1, 0.1]})
    rows = sweep(model, data, [30, 0, 4], seconds=1e9, batch_size=16).rows
    assert [row.r for row in rows] == [0, 4, 30]
    assert [row.clips_per_second for row in rows] == [32.0, 64.0, 160.0]  # the medians
    assert [row.speedup for row in rows] == [1.0, 2.0, 5.0]
    for row in rows:
        assert row.gmacs == macs(model.config, row.r) / 1e9
        assert row.mac_ratio == macs(model.config, 0) / macs(model.config, row.r)
        assert row.merge_efficiency == row.speedup / row.mac_ratio
        with fastast.patched(model, r=row.r), torch.inference_mode():
            left = model.forward_features(torch.zeros(1, 96, 48)).shape[1]
        assert row.tokens == left
    assert rows[0].tokens == model.config.num_tokens
    assert rows[0].mac_ratio == rows[0].merge_efficiency == 1


def test_falling_schedules_are_counted_as_they_run(model: fastast.AST, data: AudioDataset) -> None:
    rows = sweep(model, data, [6], -1, seconds=0.05).rows
    assert rows[1].gmacs == macs(model.config, (6, -1)) / 1e9
    assert rows[1].gmacs < macs(model.config, 6) / 1e9
    assert rows[1].tokens == model.config.num_tokens - 18


def test_hugging_face_models(data: AudioDataset) -> None:
    transformers = pytest.importorskip("transformers", "5.10")
    transformers.utils.logging.disable_progress_bar()
    theirs = tiny_huggingface()
    fbank = fastast.Fbank(n_mels=GRID["num_mel_bins"], target_length=GRID["target_length"])
    with pytest.raises(ValueError, match="fbank must be given for a ASTForAudioClassification"):
        sweep(theirs, data, [6])
    rows = sweep(theirs, data, [6], seconds=0.05, fbank=fbank).rows
    batch = data.batch(range(COUNT), window(fbank))
    with torch.inference_mode(), fastast.patched(theirs, r=6):
        logits = theirs(fbank(batch.waveform, batch.lengths)).logits
    right = (logits.argmax(1) == data.targets).sum()
    assert rows[1].percent == pytest.approx(100 * int(right) / COUNT)
    # The last block of theirs runs on every token, ours on two.
    config = tiny_ast(mlp_ratio=2.0).config
    whole, merged = (macs(config, r, trimmed=False) for r in (0, 6))
    assert (rows[1].gmacs, rows[1].mac_ratio) == (merged / 1e9, whole / merged)
    assert rows[1].tokens == config.num_tokens - 18

    # A model that does not tell its dimensions; the config's own check would not let it.
    object.__setattr__(theirs.config, "max_length", None)
    result = sweep(theirs, data, [6], seconds=0.05, fbank=fbank)
    for row in result.rows:
        assert (row.gmacs, row.mac_ratio, row.merge_efficiency, row.tokens) == (None,) * 4
        assert row.speedup > 0
    assert shown(result).count("x ") == 2  # two speed-ups, no MAC ratio

    half = sweep(theirs.bfloat16(), data, [6], seconds=0.05, fbank=fbank)
    assert half.conditions.dtype == "bfloat16"


# --------------------------------------------------------------------------------------- speed


def test_rounds_are_in_turns(model: fastast.AST, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[Any] = []
    forward = fastast.AST.forward

    def recorded(self: fastast.AST, features: torch.Tensor) -> Any:
        order.append(self.r if self.tome is not None else None)
        return forward(self, features)

    monkeypatch.setattr(fastast.AST, "forward", recorded)
    steps: list[int] = []
    features = torch.randn(2, 96, 48)
    times = time_rounds(model, features, [0, 4, 8], 2, 1e9, lambda: steps.append(len(order)))
    assert order[:2] == [None, 0]  # are they equal?
    assert order[2:] == [0, 4, 8] * 3  # one to warm up, two that count
    assert [len(times[r]) for r in (0, 4, 8)] == [2, 2, 2]
    assert steps == list(range(3, 12))
    times = time_rounds(model, features, [(3, -1.0)], 100, 1e-9)
    assert len(times[3, -1.0]) == 3  # as few as a median needs, however little time there is


def test_demo_and_sweep_share_their_clock() -> None:
    assert demo.measure is measure
    assert demo.ParityError is evaluation.ParityError


@pytest.mark.parametrize(
    ("batch", "seconds", "fits"),
    [(64, 100.0, 64), (64, 48.0, 64), (64, 47.0, 32), (64, 1.0, 1), (24, 10.0, 12), (1, 1e-9, 1)],
)
def test_the_batch_is_halved_until_four_rounds_fit(batch: int, seconds: float, fits: int) -> None:
    # 8 clips a second and 16: 3/16 s a clip and round, so 64 clips four times take 48 s.
    assert sweeping._batch_that_fits(batch, [8.0, 16.0], seconds) == fits


def test_the_result_tells_its_conditions(model: fastast.AST, data: AudioDataset) -> None:
    shares: list[tuple[str, float]] = []
    result = sweep(
        model,
        data,
        [4],
        seconds=0.3,
        batch_size=2,
        names=("runs/m", "set", "test"),
        progress=lambda what, share: shares.append((what, share)),
    )
    c = result.conditions
    assert (c.model, c.data, c.split, c.clips) == ("runs/m", "set", "test", COUNT)
    assert (c.device, c.dtype, c.threads) == ("cpu", "float32", torch.get_num_threads())
    assert (c.torch, c.fastast) == (torch.__version__, fastast.__version__)
    assert c.batch == 2
    assert c.rounds is not None and c.rounds >= 3
    assert shares[:2] == [("accuracy at r=0", 0.0), ("accuracy at r=4", 0.5)]
    speed = [share for what, share in shares if what == "speed"]
    assert len(speed) == 2 * (c.rounds + 1)
    assert speed == sorted(speed)
    assert 0 <= speed[0] <= speed[-1] <= 1


# ----------------------------------------------------------------------------------------- csv


def shown(result: Sweep) -> str:
    console = Console(width=80, file=open("/dev/null", "w"), record=True)  # noqa: SIM115
    console.print(result.table())
    return console.export_text()


def test_csv_round_trip(tmp_path: Path, model: fastast.AST, data: AudioDataset) -> None:
    path = tmp_path / "new" / "sweep.csv"
    names = ('a "model", quoted', "dätä", "!1")
    result = sweep(model, data, [6], 0.5, seconds=0.05, csv_path=path, names=names)
    assert read_csv(path) == result
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["r"] for line in lines] == ["0", "6"]
    assert [line["metric"] for line in lines] == ["accuracy", "accuracy"]
    assert {line["model"] for line in lines} == {names[0]}
    assert float(lines[1]["speedup"]) == result.rows[1].speedup
    assert {p.name for p in path.parent.iterdir()} == {"sweep.csv"}
    assert json.loads(json.dumps(result.to_dict()))["results"][1]["r"] == 6


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "r,inflect\n0,0\n"])
def test_other_csvs_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.csv").write_text(text)
    with pytest.raises(ValueError, match=r"other\.csv is not a sweep"):
        read_csv(tmp_path / "other.csv")


@pytest.mark.parametrize(("stop_at", "done"), [("accuracy at r=8", 2), ("speed", 3)])
def test_an_interrupted_sweep_leaves_what_it_had(
    tmp_path: Path, model: fastast.AST, data: AudioDataset, stop_at: str, done: int
) -> None:
    def progress(what: str, share: float) -> None:
        if what == stop_at:
            raise KeyboardInterrupt

    path = tmp_path / "sweep.csv"
    with pytest.raises(KeyboardInterrupt):
        sweep(model, data, [4, 8], seconds=0.05, csv_path=path, progress=progress)
    assert model.tome is None
    left = read_csv(path)
    assert [row.r for row in left.rows] == [0, 4, 8][:done]
    for row in left.rows:
        assert row.percent == 100 * evaluate(model, data, row.r).accuracy
        assert row.mac_ratio is not None
        assert (row.clips_per_second, row.speedup, row.merge_efficiency) == (None, None, None)
    assert left.conditions.rounds is None
    with pytest.raises(ValueError, match="must have speeds"):
        left.plot(tmp_path / "a.png")


def test_a_csv_is_never_half_written(
    tmp_path: Path, model: fastast.AST, data: AudioDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = sweep(model, data, [4], seconds=0.05, csv_path=tmp_path / "sweep.csv")

    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeping.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        Sweep(result.conditions).save_csv(tmp_path / "sweep.csv")
    assert read_csv(tmp_path / "sweep.csv") == result


# ---------------------------------------------------------------------------- table and picture


def test_table_fits_a_terminal(
    model: fastast.AST, data: AudioDataset, clock: dict[Any, list[float]]
) -> None:
    clock.update({0: [0.5], 18: [0.2]})
    names = ("runs/[m]", "a:end:[set]", "test")
    result = sweep(model, data, [18], seconds=1e9, batch_size=10, names=names)
    text = shown(result)
    for part in ("accuracy", "tokens", "clips/s", "speed-", "GMACs", "merge", "drop"):
        assert part in text
    assert "…" not in text
    assert f"[m] on {COUNT} clips of a:end:[set], split test" in text
    (line,) = [line for line in text.splitlines() if line.startswith("│ 18")]
    values = [cell.strip() for cell in line.strip("│").split("│")]
    row = result.rows[1]
    assert row.drop < 0
    assert values[2:6] == [f"{row.percent:.2f}", f"{row.drop:+.2f}", "50", "2.50x"]
    assert values[6] == f"{row.gmacs:.3f}"
    assert values[7:] == [f"{row.mac_ratio:.2f}x", f"{2.5 / row.mac_ratio:.2f}"]
    flat = " ".join(text.split())
    for part in ("float32", "1 rounds", "batch 10", f"torch {torch.__version__}", "thread"):
        assert part in flat


def test_picture(
    tmp_path: Path,
    model: fastast.AST,
    several: AudioDataset,
    clock: dict[Any, list[float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock.update({0: [1.0], 5: [0.5], 9: [0.25]})
    result = sweep(model, several, [5, 9], seconds=1e9, batch_size=10, names=("$m", "$d", "test"))
    figures: list[Figure] = []
    save = Figure.savefig

    def savefig(self: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    result.plot(tmp_path / "new" / "a.svg")
    result.plot(tmp_path / "a.png")
    assert "<svg" in (tmp_path / "new" / "a.svg").read_text()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    assert axes.get_ylabel() == "mAP (%)"
    assert [t.get_text() for t in axes.texts] == ["r = 0", "5", "9"]
    assert [t.xy for t in axes.texts] == [
        (speed, row.percent) for speed, row in zip((10.0, 20.0, 40.0), result.rows, strict=True)
    ]
    assert "24 clips of $d" in axes.get_title()
    assert max(map(len, axes.get_title().splitlines())) < 100
    assert axes.get_legend() is None
    two = {"constant": [(0, 1.0, 50.0)], "falling": [(0, 1.0, 50.0), (8, 2.0, 50.0)]}
    quality_vs_throughput(two, "accuracy", tmp_path / "b.png")
    (axes,) = figures[-1].axes
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["constant", "falling"]
    low, high = axes.get_ylim()
    assert (low, high) == (49, 51)  # equal values are not spread over the picture
    with pytest.raises(ValueError, match=r"curves\['x'\] must have at least one point"):
        quality_vs_throughput({"x": []}, "accuracy", tmp_path / "c.png")
    with pytest.raises(ValueError, match="path must end in"):
        result.plot(tmp_path / "a.gif")


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rs": [-1]}, ValueError, "r must be 0 or more, got -1"),
        ({"rs": [True]}, TypeError, "r must be an int"),
        ({"inflect": 2.0}, ValueError, r"inflect.*must be in \[-1, 1\]"),
        ({"inflect": float("nan")}, ValueError, "inflect"),
        ({"seconds": 0.0}, ValueError, "seconds must be more than 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
    ],
)
def test_bad_arguments(
    tmp_path: Path,
    model: fastast.AST,
    data: AudioDataset,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        sweep(model, data, **{"rs": [0], "csv_path": tmp_path / "a.csv", **options})
    assert not (tmp_path / "a.csv").exists()


def relabelled(data: AudioDataset, labels: tuple[str, ...]) -> AudioDataset:
    return AudioDataset(data.waveforms, [(0,)] * len(data), labels, data.names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: AudioDataset([], [], LABELS, []), "dataset has no clips"),
        (lambda d: relabelled(d, ("ape", "bee")), "2 classes and the model 5"),
        (lambda d: relabelled(d, tuple("vwxyz")), "other classes than the model: v, w, x"),
        (lambda d: relabelled(d, LABELS[::-1]), "'eel' is class 0 of the data and class 4"),
    ],
)
def test_other_data(
    model: fastast.AST,
    data: AudioDataset,
    change: Callable[[AudioDataset], AudioDataset],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        sweep(model, change(data), [0])


def test_classes_without_names_are_taken_at_their_number(
    model: fastast.AST, data: AudioDataset
) -> None:
    numbered = AudioDataset(
        data.waveforms, [(int(t),) for t in data.targets], tuple("01234"), data.names
    )
    rows = sweep(model, numbered, [0], seconds=0.05).rows
    assert rows[0].percent == pytest.approx(100 * 22 / 24)


def test_patched_models_are_refused(model: fastast.AST, data: AudioDataset) -> None:
    with pytest.raises(ValueError, match="model must be unpatched"):
        sweep(fastast.patch(model, r=3), data, [0])


# -------------------------------------------------------------------------------- command line


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A csv of the shipped clips, which are called `label_speaker_number.opus`."""
    table = tmp_path / "clips.csv"
    names = sorted(path.name for path in asset("clips").glob("*.opus"))
    rows = [f"{name},{name[0]},test" for name in names]
    table.write_text("\n".join(["filename,target,split", *rows, ""]))
    return table


def status(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return int(stop.value.code or 0)


def test_command(tmp_path: Path, clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--data", clips, "--roots", asset("clips"))
    out = tmp_path / "out"
    asked = ("sweep", *where, "--r", "10:30:10", "--seconds", 1, "--out", out)
    assert status(*asked, "--json") == 0
    captured = capsys.readouterr()
    assert captured.err.strip() == "fastast: r=0 is swept too: drop and speed-up are against it"
    report = json.loads(captured.out)
    rows = report["results"]
    assert [row["r"] for row in rows] == [0, 10, 20, 30]
    assert read_csv(out / "sweep.csv").to_dict() == report
    for name in ("sweep.svg", "sweep.png"):
        assert (out / name).stat().st_size > 1000
    config = fastast.AST.from_pretrained(report["conditions"]["model"]).config
    assert [row["gmacs"] for row in rows] == [macs(config, row["r"]) / 1e9 for row in rows]
    assert rows[-1]["speedup"] > 1.2  # three times fewer multiply-adds
    assert report["conditions"]["clips"] == 20
    assert report["conditions"]["data"] == str(clips)

    assert status("evaluate", *where, "--r", "0,10,20,30", "--json") == 0
    expected = json.loads(capsys.readouterr().out)["results"]
    assert [row["percent"] for row in rows] == [100 * row["accuracy"] for row in expected]

    options = ("--r", "0", "--inflect", "-1", "--dtype", "bfloat16", "--split", "!train")
    clips.write_text(clips.read_text() + "0_george_0.opus,0,train\n")
    assert status("sweep", *where, *options, "--seconds", 1, "--out", out) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    text = " ".join(captured.out.split())  # long names are wrapped
    for part in ("accuracy", "MAC", "bfloat16", "split !train", f"saved {out / 'sweep.csv'}"):
        assert part in text, part
    again = read_csv(out / "sweep.csv")
    assert (again.conditions.dtype, again.rows[0].inflect) == ("bfloat16", -1.0)


@pytest.mark.skipif(why_no_int8() is not None, reason="needs int8 products")
def test_command_in_int8(tmp_path: Path, clips: Path) -> None:
    where = ("--data", clips, "--roots", asset("clips"))
    out = tmp_path / "out"
    assert status("sweep", *where, "--r", "0", "--seconds", 1, "--dtype", "int8", "--out", out) == 0
    result = read_csv(out / "sweep.csv")
    assert result.conditions.dtype == "int8"
    assert result.rows[0].percent == 100 and result.rows[0].clips_per_second is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--r", "5:1"), "r must be a range that ends at or after its start, not '5:1'"),
        (("--r", "0:40:0"), "r must be a range with a step of 1 or more"),
        (("--r", "a"), "r must be a range"),
        (("--r", "20,-1"), "r must be 0 or more"),
        (("--inflect", "-3"), "inflect"),
        (("--dtype", "int4"), "dtype must be one of float32, bfloat16, float16, int8, not 'int4'"),
        (("--split", "train"), "split 'train' is not in the data: it has test"),
        (("--device", "toaster"), "toaster"),
    ],
)
def test_bad_options_are_one_line(
    tmp_path: Path,
    clips: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, str],
    message: str,
) -> None:
    out = tmp_path / "out"
    assert status("sweep", "--data", clips, *arguments, "--out", out) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1
    assert err[0].startswith("fastast: ")
    assert message in err[0]
    assert not out.exists()


def test_out_must_be_a_folder(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("sweep", "--data", clips, "--out", clips) == 2
    assert "out must be a folder, not the file" in capsys.readouterr().err


def test_help_teaches() -> None:
    text = CliRunner().invoke(app, ["sweep", "--help"], env={"COLUMNS": "200"}).output
    for part in (
        "--r ",
        "--inflect",
        "--seconds",
        "--dtype",
        "--out",
        "--r 0:40:5",
        "first:last:step",
    ):
        assert part in text, part
    assert "sweep" in CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
