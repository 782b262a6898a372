"""The counts are right, and the model says what the design's tables say."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastast import ASTConfig
from fastast.benchmark import counts
from fastast.benchmark.counts import Ceilings, Count
from fastast.schedules import macs

SCRIPT = Path(__file__).parent.parent / "bench" / "roofline.py"
HEAD = "kernel,provider,mode,metric,x_name,x,value,low,high,config,device,versions,commit,date"
COLUMNS = next(csv.reader([HEAD]))
DECREASING = -1.0


@pytest.fixture(scope="module")
def roofline() -> ModuleType:
    spec = importlib.util.spec_from_file_location("roofline", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["roofline"] = module
    spec.loader.exec_module(module)
    return module


# --- counts ---------------------------------------------------------------------------------------


def test_seconds_takes_the_longer_of_arithmetic_and_memory() -> None:
    ceilings = Ceilings(flops=1e9, bandwidth=1e8, launch=0.5)
    assert counts.seconds(Count(2e9, 1e8, 0), ceilings) == 2
    assert counts.seconds(Count(1e9, 3e8, 0), ceilings) == 3
    assert counts.seconds(Count(1e9, 3e8, 2), ceilings) == 4
    assert Count(1, 2, 3) + Count(10, 20, 30) == Count(11, 22, 33)


def test_counts_by_hand() -> None:
    # B=2, N=7 (4 in A, 3 in B), C=5, fp32
    assert counts.match(2, 7, 5, 4) == Count(2 * 2 * 4 * 3 * 5, 2 * 7 * 5 * 4 + 2 * 7 * 4)
    # 7 rows in, 5 out, of 3 bf16; 7 + 7 + 5 numbers of 4 bytes
    assert counts.merge(1, 7, 3, 2, 2) == Count(0, (7 + 5) * 3 * 2 + (7 + 7 + 5) * 4)
    # weight and bias, and 7 rows read twice and written twice
    assert counts.add_layer_norm(1, 7, 3, 2) == Count(0, (4 * 7 + 2) * 3 * 2)
    assert counts.add_layer_norm(1, 7, 3, 2, residual=False) == Count(0, (2 * 7 + 2) * 3 * 2)
    fused = counts.merge_add_layer_norm(1, 7, 3, 2, 2)
    assert fused == Count(0, (2 * 7 + 2 * 5 + 2) * 3 * 2 + (7 + 7 + 5) * 4)
    assert counts.attention(2, 3, 7, 4, 2) == Count(4 * 2 * 3 * 49 * 4, 4 * 2 * 3 * 7 * 4 * 2 + 56)
    two = counts.attention(2, 3, 7, 4, 2, queries=2)
    assert two == Count(4 * 2 * 3 * 2 * 7 * 4, 2 * (2 + 7) * 2 * 3 * 4 * 2 + 56)
    assert counts.key_metric(2, 3, 7, 4, 2) == Count(0, 2 * 7 * 4 * (3 * 2 + 4))
    assert counts.unmerge(1, 7, 3, 2, 2) == Count(0, (7 + 5) * 3 * 2 + 7 * 4)
    assert counts.linear(7, 5, 3, 2) == Count(2 * 7 * 5 * 3, (21 + 15 + 5 + 35) * 2)
    # one frame of 400 samples: FFT of 512, and each of 257 bins in two filters
    assert counts.fbank(1, 559, 4, n_mels=8) == Count(2.5 * 512 * 9 + 4 * 257, 4 * (559 + 4 * 8))
    assert counts.fbank(3, 160000, 1024).flops == 3 * 998 * (2.5 * 512 * 9 + 4 * 257)


def test_r_is_clamped() -> None:
    assert counts.merge(1, 7, 3, 99, 2) == counts.merge(1, 7, 3, 2, 2)
    assert counts.published_step(1, 26, 8, 4, 99, 2) == counts.published_step(1, 26, 8, 4, 12, 2)


@pytest.mark.parametrize("make", [ASTConfig.tiny, ASTConfig.small, ASTConfig.base])
@pytest.mark.parametrize("r", [0, 8, (40, DECREASING), [3] * 11 + [5]])
@pytest.mark.parametrize("trimmed", [True, False])
def test_a_model_has_two_flops_a_mac(make: Any, r: Any, trimmed: bool) -> None:
    config = make(target_length=512, num_classes=50)
    kernels = counts.ast_kernels(config, r, 3, 2, trimmed)
    flops = sum(count.flops for name, count in kernels if name != "match")
    assert flops == 2 * 3 * macs(config, r, trimmed=trimmed)
    total = counts.ast(config, r, 3, 2, trimmed)
    assert total.flops - flops == sum(count.flops for name, count in kernels if name == "match")
    assert total.bytes == pytest.approx(sum(count.bytes for _, count in kernels))
    assert total.launches == len(kernels)
    blocks = config.depth - 1 if trimmed else config.depth
    merges = [name for name, _ in kernels].count("merge_add_layer_norm")
    assert merges == (0 if r == 0 else 11 if r == (40, DECREASING) else blocks)


def test_a_model_reads_its_weights_once() -> None:
    """Of one clip with no tokens to speak of, the bytes are those of the parameters."""
    config = ASTConfig.base(num_mel_bins=16, target_length=16)
    kernels = counts.ast_kernels(config, 0, 1, 2, trimmed=False)
    products = sum(c.bytes for name, c in kernels if name in ("qkv", "proj", "fc1", "fc2"))
    d = 768
    weights = 12 * (12 * d * d + (3 + 1 + 4 + 1) * d) * 2
    assert weights < products < 1.01 * weights


# --- the numbers of the design --------------------------------------------------------------------


def test_bytes_of_the_design() -> None:
    published = counts.published_step(1, 1214, 768, 64, 40, 2)
    assert published.bytes == pytest.approx(19.05e6, rel=0.01)
    match, merge = counts.match(1, 1214, 64, 2), counts.merge(1, 1214, 768, 40, 2)
    assert match.flops == pytest.approx(47e6, rel=0.01)
    assert match.bytes == pytest.approx(160e3, rel=0.01)
    assert merge.bytes == pytest.approx(3.67e6, rel=0.01)
    assert published.bytes / (match + merge).bytes == pytest.approx(5.0, rel=0.02)
    assert counts.add_layer_norm(1, 1214, 768, 2).bytes == pytest.approx(7.46e6, rel=0.01)
    fused = counts.merge_add_layer_norm(1, 1214, 768, 40, 2)
    assert fused.bytes == pytest.approx(7.34e6, rel=0.01)
    assert counts.fbank(1, 160000, 1024).bytes == pytest.approx(1.2e6, rel=0.04)


def test_arithmetic_of_a_block() -> None:
    kernels = counts.ast_kernels(ASTConfig.base(), 0, 1, 2, trimmed=False)
    block = [c.flops / 1e9 for name, c in kernels if name in ("qkv", "attention", "proj")][:3]
    assert block == pytest.approx([4.30, 4.53, 1.43], abs=0.006)
    blocks = sum(c.flops for name, c in kernels if name not in ("embed", "head")) / 12
    assert blocks / 1e9 == pytest.approx(21.71, rel=0.001)
    assert 790e12 / (12 * blocks) == pytest.approx(3032, rel=0.001)


def parts(roofline: ModuleType, batch: int, provider: str = "plain") -> dict[str, float]:
    config = ASTConfig.base()
    seconds = roofline.block(roofline.H200, config, batch, 1214, 0, "bfloat16", provider)
    return {name: value * 1e6 for name, value in seconds.items()}


def test_block_of_the_design(roofline: ModuleType) -> None:
    us = parts(roofline, 64)
    expected = {"qkv": 353, "proj": 118, "fc1": 471, "fc2": 471, "attention": 712, "gelu": 222}
    for name, value in expected.items():
        assert us[name] == pytest.approx(value, rel=0.01), name
    assert us["norm1"] + us["norm2"] == pytest.approx(222, rel=0.01)
    assert parts(roofline, 64, "published")["attention"] == pytest.approx(4578, rel=0.01)
    for batch, value in {1: 58, 8: 346, 64: 2577, 128: 5129}.items():
        assert sum(parts(roofline, batch).values()) == pytest.approx(value, rel=0.02), batch


def test_steps_of_the_design(roofline: ModuleType) -> None:
    for batch, value in {1: 7.5, 8: 11.8, 64: 62, 128: 125}.items():
        fused = roofline.step_seconds(roofline.H200, batch, 1214, ASTConfig.base(), 40, "bfloat16")
        assert fused * 1e6 == pytest.approx(value, rel=0.05), batch


SPEEDUPS = [  # clip, r, batch, published / compiled / fused: cells of the design's table
    (10, 0, 64, (0.40, 1.00, 1.09)),
    (10, 20, 64, (0.44, 1.04, 1.23)),
    (10, 40, 1, (0.26, 0.60, 1.12)),
    (10, 40, 8, (0.47, 1.06, 1.31)),
    (10, 40, 64, (0.52, 1.18, 1.40)),
    (10, 80, 64, (0.74, 1.60, 1.90)),
    (5, 40, 8, (0.57, 1.07, 1.59)),
    (5, 40, 64, (0.92, 1.51, 1.84)),
    (1, 5, 64, (0.72, 1.00, 1.29)),
    (1, 40, 64, (1.42, 2.74, 3.94)),
]


@pytest.mark.parametrize("clip, r, batch, expected", SPEEDUPS)
def test_speedups_of_the_design(
    roofline: ModuleType, clip: float, r: int, batch: int, expected: tuple[float, ...]
) -> None:
    config = ASTConfig.base(target_length=roofline.frames_of(clip))
    plain = roofline.blocks(roofline.H200, config, 0, batch, "bfloat16", "plain")
    for provider, value in zip(("published", "compiled", "fused"), expected, strict=True):
        time = roofline.blocks(roofline.H200, config, r, batch, "bfloat16", provider)
        assert plain / time == pytest.approx(value, rel=0.1), provider


@pytest.mark.parametrize(
    "clip, r, batch, expected",
    [
        (10, 0, 64, 2265),
        (10, 40, 64, 2905),
        (10, 40, 128, 2937),
        (10, (40, DECREASING), 64, 3223),
        (5, 40, 64, 8582),
        (5, (40, DECREASING), 64, 11170),
        (10, 40, 1, 1596),
    ],
)
def test_clips_a_second_of_the_design(
    roofline: ModuleType, clip: float, r: Any, batch: int, expected: float
) -> None:
    config = ASTConfig.base(target_length=roofline.frames_of(clip))
    time = roofline.blocks(roofline.H200, config, r, batch, "bfloat16", "fused")
    assert batch / time == pytest.approx(expected, rel=0.05)


def test_frames_of_a_clip(roofline: ModuleType) -> None:
    assert [roofline.frames_of(s) for s in (10, 5, 1, 0.2, 10.24)] == [1024, 512, 128, 128, 1024]


def test_attention_rate(roofline: ModuleType) -> None:
    machine = roofline.H200
    assert machine.attention_rate(1024, "bfloat16") == 392e12
    assert 340e12 < machine.attention_rate(700, "bfloat16") < 392e12
    assert 0 < machine.attention_rate(16, "bfloat16") < machine.attention_rate(512, "bfloat16")
    assert machine.attention_rate(10**9, "bfloat16") <= 790e12
    one = roofline.Machine("x", 1.0, {"float32": 2.0}, {100: 1.5})
    assert one.attention_rate(7, "float32") == 1.5
    assert roofline.Machine("x", 1.0, {"float32": 2.0}).attention_rate(7, "float32") == 2.0


# --- predicted against measured -------------------------------------------------------------------


def row(kernel: str, provider: str, metric: str, value: float, config: Any, **other: Any) -> dict:
    values = dict.fromkeys(COLUMNS, "")
    values.update(
        kernel=kernel, provider=provider, metric=metric, value=str(value), mode="forward",
        config=json.dumps(config), device="a CPU", date="2026-01-01 00:00",
    )  # fmt: skip
    values.update(other)
    return values


CEILINGS = [
    row("ceiling", "copy", "GB/s", 9, {"threads": 1}, date="2025-01-01 00:00"),
    row("ceiling", "copy", "GB/s", 20, {"threads": 1}),
    row("ceiling", "copy", "GB/s", 77, {"threads": 2}),
    row("ceiling", "copy", "GB/s", 88, {"threads": 1}, device="another"),
    row("ceiling", "matmul", "GFLOP/s", 100, {"threads": 1, "dtype": "float32"}),
    row("ceiling", "matmul", "GFLOP/s", 400, {"threads": 1, "dtype": "bfloat16"}),
]
SHAPE = {"B": 1, "N": 1214, "D": 768, "C": 64, "r": 40, "dtype": "float32", "threads": 1}


def write(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_from_a_results_table_and_back(roofline: ModuleType, tmp_path: Path) -> None:
    model = {"model": "base", "seconds": 10, "B": 1, "r": 40, "inflect": 0, "threads": 1}
    plain = row("merge_add_layer_norm", "fused", "ms", 1.0, {**SHAPE, "r": 0})
    measured = [
        row("merge", "fused", "ms", 5.0, SHAPE, date="2025-01-01 00:00"),
        row("merge", "fused", "ms", 0.8, SHAPE),
        row("merge", "fused", "speedup", 3.0, SHAPE),
        row("merge", "fused", "ms", 2.0, SHAPE, mode="backward"),
        plain,
        row("tome_step", "published", "ms", 2.0, SHAPE),
        row("tome_step", "fused", "ms", 1.0, SHAPE),
        row("match", "fused", "ms", 1.0, {**SHAPE, "dtype": "bfloat16"}),
        row("attention", "sdpa", "ms", 50.0, {"B": 1, "N": 146, "dtype": "bfloat16", "threads": 1}),
        row("fbank", "fused", "ms", 3.0, {"B": 1, "seconds": 10, "threads": 1}),
        row("ast", "fused", "ms", 900.0, {**model, "dtype": "bfloat16"}),
        row("ast", "published", "ms", 900.0, {**model, "dtype": "float32"}),
        row("ast", "fused", "ms", 900.0, {**model, "dtype": "int8"}),
        row("merge", "fused", "ms", 0.8, {**SHAPE, "threads": 2}),  # no product measured there
        row("no such kernel", "fused", "ms", 0.8, SHAPE),
    ]
    path = write(tmp_path / "cpu.csv", CEILINGS + measured)
    rows = roofline.read(path)
    compared, left_out = roofline.comparisons(rows, rows, None)
    assert left_out == 3
    found = [(r["kernel"], r["provider"], predicted, ms) for r, predicted, ms in compared]
    merge = counts.merge(1, 1214, 768, 40, 4).bytes / 20e9 * 1e3
    assert found[0] == ("merge", "fused", pytest.approx(merge), 0.8)  # the newest
    norm = counts.add_layer_norm(1, 1214, 768, 4).bytes / 20e9 * 1e3
    assert found[1] == ("merge_add_layer_norm", "fused", pytest.approx(norm), 1.0)
    assert found[2][2] > 3 * found[3][2]  # the unfused step has more to move
    match = counts.match(1, 1214, 64, 2)
    assert found[4][2] == pytest.approx(max(match.flops / 400e9, match.bytes / 20e9) * 1e3)
    flops = counts.attention(1, 12, 146, 64, 2).flops
    assert found[5][2] == pytest.approx(flops / 400e9 * 1e3)
    fbank = counts.fbank(1, 160000, 1024)
    assert found[6][2] == pytest.approx(max(fbank.flops / 100e9, fbank.bytes / 20e9) * 1e3)
    least = 2 * macs(ASTConfig.base(), 40) / 400e9 * 1e3
    assert least < found[7][2] < 1.3 * least  # ours skips what nobody reads of the last block
    assert found[8][2] > 2 * macs(ASTConfig.base(), 40, trimmed=False) / 100e9 * 1e3
    assert len(found) == 9

    done = subprocess.run(
        [sys.executable, SCRIPT, "--measured", path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == [
        "kernel", "config", "provider", "predicted", "ms", "measured", "ms", "measured/predicted"
    ]  # fmt: skip
    assert len(lines) == 1 + 9 + 1 and lines[-1].startswith("3 row(s) left out")
    assert lines[1].startswith("merge ") and lines[1].endswith(f"{0.8 / merge:.2f}")


def test_from_the_suite_s_own_tables(roofline: ModuleType, tmp_path: Path) -> None:
    """The columns here are the ones that the suite writes."""
    rows = pytest.importorskip("fastast.benchmark.rows")
    assert tuple(COLUMNS) == rows.COLUMNS
    one = rows.Row(
        "merge", "fused", "forward", "ms", "N", 1214.0, 0.8, 0.7, 0.9, rows.dumps(SHAPE),
        "a CPU", "", "", "2026-01-01 00:00",
    )  # fmt: skip
    path = write(tmp_path / "all.csv", CEILINGS)
    rows.append_csv(path, [one])
    table = roofline.read(path)
    ((_, predicted, measured),) = roofline.comparisons(table, table, None)[0]
    assert predicted > 0 and measured == 0.8


def test_ceilings_from_json(roofline: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "ceilings.json"
    own = {"name": "mine", "copy": 1e12, "matmul": {"float32": 1e13}, "attention": {"602": 5e12}}
    path.write_text(json.dumps({"stages": {}, "ceilings": {**own, "unknown": 1}}))
    machine = roofline.Machine.load(path)
    assert machine.attention == {602: 5e12} and machine.gap == 0
    table = [row("merge", "fused", "ms", 0.8, SHAPE)]
    ((_, predicted, _),) = roofline.comparisons(table, [], machine)[0]
    assert predicted == pytest.approx(counts.merge(1, 1214, 768, 40, 4).bytes / 1e12 * 1e3)
    path.write_text(json.dumps({"ceilings": {"name": "mine"}}))
    with pytest.raises(SystemExit, match="copy, matmul missing"):
        roofline.Machine.load(path)
    with pytest.raises(SystemExit, match="no matmul ceiling for float16"):
        machine.ceilings("float16")


def test_predictions_are_printed() -> None:
    command = [sys.executable, SCRIPT, "--model", "small", "--seconds", "3", "--batch", "1", "16"]
    done = subprocess.run([*command, "--r", "0", "20"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "AST-small" in done.stdout
    assert [line.split()[:3] for line in done.stdout.splitlines()[-2:]] == [
        ["3", "s", "0"],
        ["3", "s", "20"],
    ]


def test_stride_16_is_the_smaller_model(roofline: ModuleType) -> None:
    config = {"model": "base", "seconds": 10, "B": 1, "r": 0, "dtype": "float32"}
    flops = {
        provider: sum(count.flops for _, count in roofline.work("ast", provider, config))
        for provider in ("hf_sdpa", "stride16 hf_sdpa")
    }
    # performance.md, finding 10: 2.68 times fewer operations
    assert 2.6 < flops["hf_sdpa"] / flops["stride16 hf_sdpa"] < 2.75
