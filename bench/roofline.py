"""How fast things could be: predicted from counted work and measured ceilings.

    python bench/roofline.py                                        predictions for an H200
    python bench/roofline.py --ceilings unverified.json             the same, from its ceilings
    python bench/roofline.py --measured bench/results/results.csv       predicted against measured

Two things are computed here. The *floor* of a kernel or a model is the time of the least work it
can do (fastast/benchmark/counts.py) at the machine's ceilings: no provider beats it, and measured /
predicted is how far a provider is from it. The *model* of an AST block on a GPU adds what a good
implementation cannot avoid today: whole tiles on whole waves of multiprocessors, attention at the
rate that fused attention reaches, a gap between kernels. Its assumptions are in H200 below; what
bench/unverified.py measures replaces them.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastast.benchmark import counts
from fastast.benchmark.counts import Ceilings, Count, seconds
from fastast.config import ASTConfig
from fastast.schedules import Schedule, macs, parse_schedule
from fastast_kernels import effective_r

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
SIZES = {"tiny": ASTConfig.tiny, "small": ASTConfig.small, "base": ASTConfig.base}

# Output tiles that a matrix product may be cut into, and the share of the peak each reaches.
TILES = ((128, 256, 1.0), (128, 128, 0.9), (64, 128, 0.75))
STEP_LAUNCHES = 30  # kernels of the unfused step, and how many and how much of its traffic
COMPILED_LAUNCHES, COMPILED_TRAFFIC = 18, 0.7  # a compiler may leave of them
EAGER_LAUNCHES = 15  # kernels of an uncompiled block without the step
MATERIALISED_PASSES = 8  # over the logits: write; scale, bias, softmax in and out; read


@dataclass(frozen=True)
class Machine:
    """Ceilings of a machine, in bytes, FLOPs and seconds.

    Attributes:
        name: what it is.
        copy: bytes a second of a copy, read and written together.
        matmul: FLOP/s of large products, by dtype.
        attention: FLOP/s of fused attention by number of tokens; empty: that of products.
        multiprocessors: for whole waves of tiles; 0 for none.
        gap: between two kernels of a graph.
        shortest: time of the smallest kernel.
        host: of one operation called from Python.
    """

    name: str
    copy: float
    matmul: dict[str, float]
    attention: dict[int, float] = field(default_factory=dict)
    multiprocessors: int = 0
    gap: float = 0.0
    shortest: float = 0.0
    host: float = 0.0

    @classmethod
    def load(cls, path: Path) -> Machine:
        """From a JSON file of these fields, or one of bench/unverified.py."""
        data = json.loads(path.read_text())
        data = data.get("ceilings", data)
        known = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        if missing := {"name", "copy", "matmul"} - known.keys():
            raise SystemExit(f"{path}: no ceilings in it, {', '.join(sorted(missing))} missing")
        known["attention"] = {int(n): v for n, v in known.get("attention", {}).items()}
        return cls(**known)

    def rate(self, dtype: str) -> float:
        if dtype not in self.matmul:
            raise SystemExit(f"{self.name}: no matmul ceiling for {dtype}")
        return self.matmul[dtype]

    def ceilings(self, dtype: str) -> Ceilings:
        return Ceilings(self.rate(dtype), self.copy, self.gap)

    def attention_rate(self, tokens: int, dtype: str) -> float:
        """Between the measured numbers of tokens, and beyond them, in a line over log2(tokens)."""
        points = sorted((math.log2(n), rate) for n, rate in self.attention.items())
        if not points:
            return self.rate(dtype)
        if len(points) == 1:
            return points[0][1]
        x = math.log2(max(tokens, 16))
        after = next((i for i, (at, _) in enumerate(points) if at > x), len(points))
        (x0, y0), (x1, y1) = points[max(0, min(after - 1, len(points) - 2)) :][:2]
        line = y0 + (y1 - y0) * (x - x0) / (x1 - x0)
        return min(max(line, 0.1 * y0), self.rate(dtype))


H200 = Machine(
    "NVIDIA H200, assumed (performance.md)",
    copy=4.3e12,
    matmul={"bfloat16": 790e12, "float16": 790e12, "float32": 50e12},
    attention={512: 340e12, 1024: 392e12, 2048: 460e12},
    multiprocessors=132,
    gap=1.2e-6,
    shortest=2.5e-6,
    host=5e-6,
)


# --- the model of an AST on a GPU -----------------------------------------------------------------


def frames_of(clip_seconds: float) -> int:
    """Frames of a clip as the AST recipes pad it: 10 ms each, to a multiple of 128."""
    return max(1, math.ceil(100 * clip_seconds / 128)) * 128


def product(machine: Machine, M: int, N: int, K: int, dtype: str) -> float:
    """Seconds of a matrix product in whole tiles, in whole waves of them."""
    rate, slots = machine.rate(dtype), machine.multiprocessors
    size = counts.linear(M, N, K, ITEMSIZE[dtype])
    work = size.flops / rate
    if slots:
        work = min(
            math.ceil(math.ceil(M / m) * math.ceil(N / n) / slots)
            * (slots * m * n * K * 2 / rate / share)
            for m, n, share in TILES
        )
    return max(work, size.bytes / machine.copy, machine.shortest)


def block(
    machine: Machine, config: ASTConfig, B: int, n: int, r: int, dtype: str, provider: str
) -> dict[str, float]:
    """Seconds of a block's parts; their sum is the block's.

    Providers: ``plain`` (no merging, compiled, fused attention, one graph), ``fused`` (FastAST:
    also GELU in the product and the merge in the LayerNorm), ``published`` (ToMe's code: eager,
    materialised attention) and ``compiled`` (the same compiled, with fused attention).
    """
    d, hidden, size = config.embed_dim, config.mlp_dim, ITEMSIZE[dtype]
    heads, dh = config.num_heads, config.embed_dim // config.num_heads
    r = effective_r(n, r)
    out = n - r

    def memory(count: Count) -> float:
        return max(count.bytes / machine.copy, machine.shortest)

    flops = counts.attention(B, heads, n, dh, size).flops
    parts = {
        "qkv": product(machine, B * n, 3 * d, d, dtype),
        "attention": max(flops / machine.attention_rate(n, dtype), machine.shortest),
        "proj": product(machine, B * n, d, d, dtype),
        "norm1": memory(counts.add_layer_norm(B, n, d, size)),
        "norm2": memory(counts.add_layer_norm(B, out, d, size)),
        "fc1": product(machine, B * out, hidden, d, dtype),
        "fc2": product(machine, B * out, d, hidden, dtype),
    }
    gelu = memory(Count(0, 2.0 * B * out * hidden * size))
    unfused = counts.published_step(B, n, d, dh, max(r, 1), size).bytes / machine.copy
    if provider == "fused":
        gaps = 6
        if r:
            parts["norm2"] = memory(counts.merge_add_layer_norm(B, n, d, r, size))
            match = counts.match(B, n, dh, size)
            parts["match"] = max(seconds(match, machine.ceilings(dtype)), machine.shortest)
            gaps = 7
    else:
        gaps = 7
        parts["gelu"] = gelu
    if provider == "published":
        gaps = EAGER_LAUNCHES
        passes = MATERIALISED_PASSES * B * heads * n * n * size / machine.copy
        parts["attention"] = flops / machine.rate(dtype) + passes
    if r and provider in ("published", "compiled"):
        launches = STEP_LAUNCHES if provider == "published" else COMPILED_LAUNCHES
        traffic = unfused if provider == "published" else COMPILED_TRAFFIC * unfused
        parts["step"] = max(launches * machine.shortest, traffic)
    parts["gaps"] = gaps * machine.gap
    if provider == "published":  # eager: the host may be slower than the device
        calls = EAGER_LAUNCHES + (STEP_LAUNCHES if r else 0)
        parts["host"] = max(0.0, calls * machine.host - sum(parts.values()))
    return parts


def blocks(
    machine: Machine, config: ASTConfig, r: Schedule, B: int, dtype: str, provider: str
) -> float:
    """Seconds of all blocks of an AST, the last one untrimmed."""
    n, total = config.num_tokens, 0.0
    for merged in parse_schedule(config.depth, r):
        merged = effective_r(n, merged)
        total += sum(block(machine, config, B, n, merged, dtype, provider).values())
        n -= merged
    return total


def step_seconds(machine: Machine, B: int, n: int, config: ASTConfig, r: int, dtype: str) -> float:
    """The fused step on its own, in three kernels: match, selection, merge."""
    d, dh, size = config.embed_dim, config.embed_dim // config.num_heads, ITEMSIZE[dtype]
    match, merge = counts.match(B, n, dh, size), counts.merge(B, n, d, r, size)
    ceilings = Ceilings(machine.rate(dtype), machine.copy)
    return machine.shortest + sum(
        max(seconds(count, ceilings), machine.shortest) for count in (match, merge)
    )


def print_predictions(machine: Machine, options: argparse.Namespace) -> None:
    """The tables of the design, for any model, clip, batch and r."""
    dtype, make = options.dtype, SIZES[options.model]
    rate = machine.rate(dtype)
    print(f"{machine.name}: {rate / 1e12:.4g} TFLOP/s {dtype}, {machine.copy / 1e12:.3g} TB/s")
    print(f"AST-{options.model}, all {dtype}; x: speed-up over r=0 compiled, as one graph\n")
    longest = make(target_length=frames_of(max(options.seconds)))
    n, d = longest.num_tokens, longest.embed_dim
    print(f"one step, N={n} r=40; one block, r=0                                    [us]")
    table = [("B", "unfused step", "(host)", "fused step", "block r=0", "unfused share")]
    for B in options.batch:
        count = counts.published_step(B, n, d, d // longest.num_heads, 40, ITEMSIZE[dtype])
        unfused = max(STEP_LAUNCHES * machine.shortest, count.bytes / machine.copy)
        whole = sum(block(machine, longest, B, n, 0, dtype, "plain").values())
        host = STEP_LAUNCHES * machine.host
        fused = step_seconds(machine, B, n, longest, 40, dtype)
        share = f"{unfused / whole:.0%}"
        table.append((B, *(f"{t * 1e6:.4g}" for t in (unfused, host, fused, whole)), share))
    print_table(table)

    head = ["clip", "r", "end N", "MACs saved", *(f"B={B} x" for B in options.batch)]
    largest = options.batch[-1]
    print("\nspeed-up: published eager / published compiled / fused; clips/s at the largest batch")
    table = [(*head, f"clips/s B={largest}", "floor clips/s")]
    for clip in options.seconds:
        config = make(target_length=frames_of(clip))
        for r in options.r:
            schedule: Schedule = (r, options.inflect) if options.inflect else r
            saved = macs(config, trimmed=False) / macs(config, schedule, trimmed=False)
            end = config.num_tokens
            for merged in parse_schedule(config.depth, schedule):
                end -= effective_r(end, merged)
            speedups = []
            for B in options.batch:
                plain = blocks(machine, config, 0, B, dtype, "plain")
                speedups.append(
                    "/".join(
                        f"{plain / blocks(machine, config, schedule, B, dtype, provider):.2f}"
                        for provider in ("published", "compiled", "fused")
                    )
                )
            clips = largest / blocks(machine, config, schedule, largest, dtype, "fused")
            floor = rate / 2 / macs(config, schedule, trimmed=False)
            table.append(
                (f"{clip:g} s", r, end, f"{saved:.2f}", *speedups, f"{clips:,.0f}", f"{floor:,.0f}")
            )
    print_table(table)


# --- predicted against measured -------------------------------------------------------------------


def work(kernel: str, provider: str, config: dict) -> counts.Kernels | None:
    """The kernels that a measured row stands for; None where that is not known."""
    size = ITEMSIZE.get(str(config.get("dtype", "float32")))
    if size is None:
        return None
    B, n, r = (int(config.get(name, default)) for name, default in (("B", 1), ("N", 0), ("r", 0)))
    d, channels = int(config.get("D", 768)), int(config.get("C", 64))
    dh = int(config.get("Dh", 64))
    heads = int(config.get("H", d // dh))
    if kernel == "ast":
        model = SIZES.get(str(config.get("model")))
        if model is None:
            return None
        # AST with its patches side by side is another model, and says so in its provider's name.
        stride = 16 if provider.startswith("stride16") else 10
        ast = model(
            target_length=frames_of(float(config["seconds"])),
            frequency_stride=stride,
            time_stride=stride,
        )
        inflect = float(config.get("inflect", 0))
        ours = provider.startswith(("fused", "fastast"))
        return counts.ast_kernels(ast, (r, inflect) if inflect else r, B, size, trimmed=ours)
    if kernel == "fbank":
        samples = round(16000 * float(config["seconds"]))
        count = counts.fbank(B, samples, frames_of(float(config["seconds"])))
    elif kernel == "match":
        count = counts.match(B, n, channels, size)
    elif kernel == "match_keys":
        count = counts.match_keys(B, heads, n, channels, size)
    elif kernel == "merge":
        count = counts.merge(B, n, d, r, size)
    elif kernel == "unmerge":
        count = counts.unmerge(B, n, d, r, size)
    elif kernel == "add_layer_norm" or (kernel == "merge_add_layer_norm" and r == 0):
        count = counts.add_layer_norm(B, n, d, size)
    elif kernel == "merge_add_layer_norm":
        count = counts.merge_add_layer_norm(B, n, d, r, size)
    elif kernel == "attention":
        count = counts.attention(B, heads, n, dh, size, config.get("queries"))
    elif kernel == "key_metric":
        count = counts.key_metric(B, heads, n, dh, size)
    elif kernel == "tome_step" and provider in ("published", "published+graph"):
        count = counts.published_step(B, n, d, channels, r, size, from_keys=False)
    elif kernel == "tome_step":
        count = counts.tome_step(B, n, d, channels, r, size, size)
    else:
        return None
    return [(kernel, count)]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def ceilings_for(row: dict[str, str], rows: Iterable[dict[str, str]]) -> Ceilings | None:
    """The newest ceilings of a row's device, threads and dtype; None without both of them."""
    config = json.loads(row["config"])
    found: dict[str, float] = {}
    for other in sorted(rows, key=lambda other: other["date"]):  # stable: later lines are newer
        if other["kernel"] != "ceiling" or other["device"] != row["device"]:
            continue
        of = json.loads(other["config"])
        dtype_differs = other["provider"] == "matmul" and of.get("dtype") != config.get(
            "dtype", "float32"
        )
        if of.get("threads") == config.get("threads", of.get("threads")) and not dtype_differs:
            found[other["provider"]] = float(other["value"]) * 1e9
    if "copy" not in found or "matmul" not in found:
        return None
    return Ceilings(found["matmul"], found["copy"])


def comparisons(
    rows: Sequence[dict[str, str]], ceiling_rows: Sequence[dict[str, str]], machine: Machine | None
) -> tuple[list[tuple[dict[str, str], float, float]], int]:
    """Rows with predicted and measured milliseconds; and how many could not be predicted."""
    newest: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        if row["metric"] != "ms" or row["mode"] not in ("", "forward"):
            continue
        key = tuple(row[k] for k in ("kernel", "provider", "mode", "config", "device"))
        if key not in newest or newest[key]["date"] <= row["date"]:
            newest[key] = row
    compared, left_out = [], 0
    for row in newest.values():
        config = json.loads(row["config"])
        kernels = work(row["kernel"], row["provider"], config)
        if machine is None:
            ceilings = ceilings_for(row, ceiling_rows)
        else:
            ceilings = machine.ceilings(config.get("dtype", "float32"))
        if kernels is None or ceilings is None:
            left_out += 1
            continue
        predicted = sum(seconds(count, ceilings) for _, count in kernels)
        compared.append((row, predicted * 1e3, float(row["value"])))
    return compared, left_out


def print_comparison(
    rows: Sequence[dict[str, str]], ceiling_rows: Sequence[dict[str, str]], machine: Machine | None
) -> None:
    """Table of predicted against measured times."""
    compared, left_out = comparisons(rows, ceiling_rows, machine)
    table: list[tuple] = [
        ("kernel", "config", "provider", "predicted ms", "measured ms", "measured/predicted")
    ]
    for row, predicted, measured in compared:
        config = " ".join(f"{k}={v}" for k, v in json.loads(row["config"]).items())
        times = f"{predicted:.4g}", f"{measured:.4g}", f"{measured / predicted:.2f}"
        table.append((row["kernel"], config, row["provider"], *times))
    print_table(table)
    if left_out:
        print(f"{left_out} row(s) left out: kernel not known here, or no ceilings of its machine")


def print_table(table: Sequence[Sequence[object]]) -> None:
    """Columns as wide as they need to be; the first row is the head."""
    text = [[str(cell) for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    for row in text:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ceilings", type=Path, help="JSON of ceilings, or a results CSV")
    parser.add_argument("--measured", type=Path, help="results CSV to compare with")
    parser.add_argument("--model", choices=SIZES, default="base")
    parser.add_argument("--seconds", type=float, nargs="+", default=[10, 5, 1])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 128])
    parser.add_argument("--r", type=int, nargs="+", default=[0, 5, 10, 20, 30, 40, 80, 100])
    parser.add_argument("--inflect", type=float, default=0.0, help="-1: decreasing schedule")
    parser.add_argument("--dtype", choices=ITEMSIZE, default="bfloat16")
    options = parser.parse_args()
    tables = options.ceilings is not None and options.ceilings.suffix == ".csv"
    machine = Machine.load(options.ceilings) if options.ceilings and not tables else None
    if options.measured is None:
        if tables:
            parser.error("predictions take their ceilings from a JSON file")
        print_predictions(machine or H200, options)
        return
    rows = read(options.measured)
    print_comparison(rows, read(options.ceilings) if tables else rows, machine)


if __name__ == "__main__":
    main()
