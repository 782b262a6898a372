"""From benchmark runs to the committed table, its pictures, and the README's results.

    python bench/report.py [run.json ...]

Appends the rows of pytest-benchmark's JSON files to bench/results/results.csv, draws the pictures
in assets/ from the newest row of each number, and rewrites README.md between its markers.
Without a file it draws and writes what the table has already; with --show it only prints.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastast.benchmark import plots
from fastast.benchmark.plots import select, short
from fastast.benchmark.rows import Row, append_csv, newest, read_csv
from fastast.benchmark.run import is_noisy

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "bench" / "results" / "results.csv"
SWEEPS = ROOT / "bench" / "results"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

OPS = {
    "tome_step": "ToMe step (match, merge)",
    "match": "match",
    "match_keys": "match of keys",
    "merge": "merge",
    "merge_add_layer_norm": "add + merge + LayerNorm",
    "attention": "attention, size bias",
    "fbank": "log-mel filterbank",
}
PROVIDERS = {
    "hf_eager": "Hugging Face, eager attention",
    "hf_sdpa": "Hugging Face (its default)",
    "hf_compile": "Hugging Face, `torch.compile`",
    "hf_compile_max": "Hugging Face, max-autotune",
    "torch_int8": "Hugging Face, dynamic int8",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "stride16 hf_sdpa": "stride 16 (2.7x fewer operations), Hugging Face",
    "stride16 openvino": "stride 16, OpenVINO",
    "published materialised": "published ToMe",
    "published sdpa": "published ToMe, fused attention",
    "published sdpa+compile": "the same, `torch.compile`",
    "fused": "**FastAST**",
    "fused+compile": "**FastAST**, `torch.compile`",
}


def read(file: Path) -> tuple[list[Row], dict[str, str]]:
    """Rows of one of pytest-benchmark's JSON files, gzipped or not, and the machine's context.

    Raises:
        ValueError: it has no rows.
    """
    open_ = gzip.open if file.suffix == ".gz" else open
    with open_(file, "rt", encoding="utf-8") as stream:
        run = json.load(stream)
    found = run.get("fastast", {}).get("rows")
    if not found:
        raise ValueError(f"{file} has no rows of this suite")
    return [Row(**row) for row in found], run.get("machine_info", {}).get("fastast", {})


def load(files: Iterable[Path]) -> list[Row]:
    """Rows of pytest-benchmark's JSON files.

    Raises:
        ValueError: a file holds none.
    """
    return [row for file in files for row in read(file)[0]]


def _find(rows: Sequence[Row], metric: str, **wanted: object) -> Row | None:
    found = select(rows, metric, **wanted)
    return found[0] if found else None


def _times(row: Row | None) -> str:
    return "" if row is None else f"{row.value:.2f}x"


def _interval(row: Row | None) -> str:
    return "" if row is None else f"{row.value:.2f}x [{row.low:.2f}, {row.high:.2f}]"


def _number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _markdown(header: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    out = [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * left + "---:|" * (len(header) - left),
    ]
    return "\n".join(out + ["| " + " | ".join(line) + " |" for line in lines])


def engine_table(rows: Sequence[Row], threads: int) -> str:
    """Milliseconds a clip of AST-base on every engine, without merging and with it."""
    found = select(rows, "ms", kernel="ast", beside="engines", threads=threads)
    shapes = sorted({(r.settings["seconds"], r.settings["B"]) for r in found}, reverse=True)
    merged = {s: max(r.x for r in found if _shape(r) == s) for s in shapes}

    def cell(shape: tuple[object, object], provider: str, dtype: str, r: float) -> Row | None:
        hits = (
            row
            for row in found
            if _shape(row) == shape
            and (row.provider, row.settings["dtype"], row.x) == (provider, dtype, r)
        )
        return next(hits, None)

    lines = []
    for is_merged in (False, True):
        for provider, name in PROVIDERS.items():
            for dtype in ("float32", "bfloat16", "int8"):
                cells = [cell(s, provider, dtype, merged[s] if is_merged else 0) for s in shapes]
                if not any(cells):
                    continue
                ratio = _same(rows, cells[0], "speedup") if cells[0] else None
                error, calls, peak = (
                    _same(rows, cells[0], metric) if cells[0] else None
                    for metric in ("error", "dispatches", "peak_MB")
                )
                lines.append(
                    [
                        name + (", merging" if is_merged else ""),
                        short(dtype),
                        *(
                            f"{'~' if is_noisy(c) else ''}{_number(c.value / float(s[1]))}"
                            if c
                            else ""
                            for c, s in zip(cells, shapes, strict=True)
                        ),
                        _times(ratio) or ("1.00x" if cells[0] else ""),
                        f"{error.value:.1e}" if error else "",
                        f"{calls.value / 12:.0f}" if calls else "",
                        f"{peak.value:.0f}" if peak else "",
                    ]
                )
    header = [
        "AST-base, ms a clip",
        "dtype",
        *(f"{s} s, batch {b}, r={merged[(s, b)]:g}" for s, b in shapes),
        "against the default",
        "error",
        "calls a layer",
        "peak MB",
    ]
    return _markdown(header, lines, left=2)


def _shape(row: Row) -> tuple[object, object]:
    return row.settings["seconds"], row.settings["B"]


def _same(rows: Sequence[Row], like: Row, metric: str) -> Row | None:
    """The row of another metric of the same entry, in the same run."""

    def config(row: Row) -> dict[str, object]:
        return {k: v for k, v in row.settings.items() if k != "against"}

    for row in rows:
        if (
            row.metric == metric
            and (row.kernel, row.provider, row.mode) == (like.kernel, like.provider, like.mode)
            and config(row) == config(like)
        ):
            return row
    return None


def op_table(rows: Sequence[Row]) -> str:
    """Single ops at N=1214 (and the filterbank): ours against the unfused and the best other."""
    lines = []
    ours = [r for r in select(rows, "ms", provider="fused") if r.kernel in OPS]
    ours = [r for r in ours if r.settings.get("r", 1) != 0]
    ours = [r for r in ours if r.x_name == "B" or r.x == 1214]
    order = list(OPS)
    ours.sort(
        key=lambda row: (
            order.index(row.kernel),
            row.mode != "forward",
            row.settings["dtype"] != "float32",
            row.settings["B"],
            -int(row.settings["threads"]),
        )
    )
    for row in ours:
        c = row.settings
        against, best = _same(rows, row, "speedup"), _same(rows, row, "vs_best")
        error, share, peak = (_same(rows, row, m) for m in ("error", "share", "peak_MB"))
        other = None
        if against is not None:
            base = str(against.settings["against"])
            other = _find(
                rows, "peak_MB", kernel=row.kernel, mode=row.mode, provider=base, config=row.config
            )
        lines.append(
            [
                OPS[row.kernel] + ("" if row.mode == "forward" else ", backward"),
                short(c["dtype"]),
                str(c["B"]),
                str(c["threads"]),
                f"{'~' if is_noisy(row) else ''}{row.value:.3g}",
                _interval(against),
                f"{_times(best)} {best.settings['against']}" if best else "",
                f"{100 * share.value:.0f} %" if share else "",
                f"{other.value:.2f} -> {peak.value:.2f}" if peak and other else "",
                f"{error.value:.0e}" if error else "",
            ]
        )
    header = [
        "op, N=1214",
        "dtype",
        "B",
        "threads",
        "ms",
        "against unfused [95 %]",
        "against the best other",
        "of the ceiling",
        "peak MB",
        "error",
    ]
    return _markdown(header, lines, left=2)


def sweep_table(rows: Sequence[Row]) -> str:
    """Speed-up, multiply-adds saved and merge efficiency of every model over r."""
    lines = []
    saved, efficiency = plots.sweeps(rows, "mac_ratio"), plots.sweeps(rows, "efficiency")
    keys = sorted(plots.sweeps(rows, "speedup").items(), key=lambda item: _sweep_order(item[0]))
    for key, line in keys:
        model, seconds, batch, dtype, threads, inflect = key
        for row in line:
            ratio = next(r for r in saved[key] if r.x == row.x)
            merge = next(r for r in efficiency[key] if r.x == row.x)
            lines.append(
                [
                    f"{model}, {seconds} s" + (", decreasing" if inflect else ""),
                    f"{short(dtype)}, B={batch}, {threads} thr.",
                    f"{row.x:g}",
                    f"{ratio.value:.2f}x",
                    _interval(row) + {"no": " slower", "same": " ~", "yes": ""}[plots.verdict(row)],
                    f"{merge.value:.2f}",
                ]
            )
    header = ["model, clip", "", "r", "fewer MACs", "speed-up [95 %]", "efficiency"]
    return _markdown(header, lines, left=2)


def _sweep_order(key: tuple[object, ...]) -> tuple[object, ...]:
    model, seconds, batch, dtype, threads, inflect = key
    return (model, -int(str(seconds)), batch, dtype, -int(str(threads)), inflect != 0)


def whole_table(rows: Sequence[Row], mode: str) -> str:
    """Training steps, or waveform to logits."""
    lines = []
    for row in select(rows, "ms", kernel="ast", mode=mode):
        c = row.settings
        ratio = _same(rows, row, "speedup")
        lines.append(
            [
                f"{PROVIDERS.get(row.provider, row.provider)}",
                f"{c['model']}, {c['seconds']} s, {short(c['dtype'])}, B={c['B']}, r={c['r']}",
                f"{'~' if is_noisy(row) else ''}{_number(row.value)}",
                _interval(ratio) or "1.00x",
            ]
        )
    return _markdown(["by", "what", "ms", "against Hugging Face [95 %]"], lines, left=2)


def results(rows: Sequence[Row], device: str) -> str:
    """Everything that README says of one machine."""
    here = [row for row in rows if row.device == device]
    last = max(here, key=lambda row: row.date)
    threads = max(int(row.settings["threads"]) for row in here)
    ceilings = ", ".join(
        f"{row.provider}{' ' + short(row.settings['dtype']) if 'dtype' in row.settings else ''} "
        f"{row.value:.4g} {row.metric}"
        for row in sorted(here, key=lambda r: r.settings["threads"], reverse=True)
        if row.kernel == "ceiling" and row.settings["threads"] == threads
    )
    head = [
        f"**{device}**, {last.versions}, commit {last.commit}, {last.date} UTC, {threads} threads "
        f"unless said. Ceilings in the same run: {ceilings}.",
        f"![Speed-up against r](assets/{_stem('speedup', device)}.png)",
    ]
    models = _sections(
        "Whole models, features to logits, random weights, all in turns in one process. The last "
        "four columns are of the first clip length. The error is that of the logits against fp64, "
        "relative by norm; calls are PyTorch operators, those inside others too, or kernel "
        "launches on a GPU; peak is what a forward allocates beyond the weights. `~` before a "
        "time: its quartiles are over 10 % apart.",
        engine_table(here, threads),
        "Waveform to logits (Hugging Face's extractor without torchaudio; our filterbank):",
        whole_table(here, "waveform"),
        "A training step, forward and backward, bf16 as autocast:",
        whole_table(here, "training"),
    )
    rest = _sections(
        "Backward passes are timed by themselves. The best other: the fastest of the unfused op, "
        "the same compiled, and PyTorch's own. Of the ceiling: the least time that copying the "
        "operands, or the products, could take here, over the time taken. Peak: of all "
        "allocations beyond inputs and outputs, unfused -> fused.",
        op_table(here),
        "Efficiency: speed-up over the ratio of multiply-adds. `slower`: the whole interval is "
        "under 1; `~`: 1 is inside.",
        sweep_table(here),
    )
    pictures = [
        f"![Where merging pays](assets/{_stem('break_even', device)}.png)",
        f"![Time against N](assets/{_stem('time', device)}.png)",
    ]
    folded = ["<details><summary>Ops, and the whole model at every r</summary>", *rest, *pictures]
    return "\n\n".join([*head, *models, *folded, "</details>"])


def _sections(*parts: str) -> list[str]:
    """Texts and their tables in turns, without those whose table has no line."""
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [part for text, table in pairs if table.count("\n") > 1 for part in (text, table)]


def shown(rows: Sequence[Row]) -> list[str]:
    """The machines that README shows, newest first: of a processor its newest instruction set.

    A version with another kernel is another machine by name ("..., 2 cores, avx512"): its rows stay
    in the table, and out of the pictures.
    """
    of_processor: dict[str, str] = {}
    for row in reversed(rows):
        processor = row.device.rpartition(", ")[0] if "cores" in row.device else row.device
        of_processor.setdefault(processor, row.device)
    return list(of_processor.values())


def _stem(name: str, device: str) -> str:
    kind = "gpu" if "cores" not in device else "cpu"
    return f"{name}_{kind}"


def rewrite(readme: Path, text: str) -> None:
    """Put ``text`` between the markers.

    Raises:
        ValueError: a marker is missing.
    """
    before = readme.read_text(encoding="utf-8")
    head, begin, rest = before.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} has no {BEGIN} ... {END}")
    readme.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}", encoding="utf-8")


def draw_accuracy(folder: Path, assets: Path) -> list[Path]:
    """Accuracy against throughput, from the tables of `fastast sweep` in a folder."""
    from fastast.plot import quality_vs_throughput
    from fastast.sweep import read_csv as read_sweep

    curves, titles = {}, []
    for file in sorted(folder.glob("sweep-*.csv")):
        sweep = read_sweep(file)
        curves[file.stem.removeprefix("sweep-")] = [
            (row.r, row.clips_per_second, row.percent)
            for row in sweep.rows
            if row.clips_per_second is not None
        ]
        titles.append(f"{sweep.title}\n{sweep.conditions}")
    if not curves:
        return []
    files = [assets / "accuracy.svg", assets / "accuracy.png"]
    for file in files:
        quality_vs_throughput(curves, "accuracy", file, "\n".join(titles))
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, help="JSON files of pytest-benchmark")
    parser.add_argument("--table", type=Path, default=TABLE, help="the CSV to append to")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--assets", type=Path, default=ROOT / "assets", help="folder for pictures")
    parser.add_argument("--sweeps", type=Path, default=SWEEPS, help="folder of sweep-*.csv")
    parser.add_argument("--show", action="store_true", help="print the runs' results, write none")
    options = parser.parse_args()
    fresh = load(options.runs)
    if options.show:
        for device in dict.fromkeys(row.device for row in fresh):
            print(results(fresh, device))
        return
    append_csv(options.table, fresh)
    rows = newest(read_csv(options.table))
    devices = shown(rows)
    for device in devices:
        here = [row for row in rows if row.device == device]
        for name, draw in (
            ("speedup", plots.speedup_against_r),
            ("time", plots.time_against_n),
            ("break_even", plots.break_even),
        ):
            for file in draw(here, options.assets / _stem(name, device), device):
                print(f"drew {file}")
    for file in draw_accuracy(options.sweeps, options.assets):
        print(f"drew {file}")
    rewrite(options.readme, "\n\n".join(results(rows, device) for device in devices))
    print(f"{len(fresh)} rows added to {options.table}; {options.readme} rewritten")


if __name__ == "__main__":
    main()
