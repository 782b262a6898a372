"""What the design assumes of a GPU, measured: one run corrects the model.

    python bench/unverified.py [--out FILE.json] [--quick] [--stages NAME ...]

Needs torch; triton for one row. Every stage and every row of it stands alone: what fails says why
and the next goes on, and the file is written after each stage. Its ``ceilings`` are what
bench/roofline.py takes. Two to four minutes on an H200, each stage under its own time budget.

Times are medians. ``how`` says of what: ``graph``, replays of a CUDA graph of many calls (whatever
takes less than 100 us); ``events``, device events around batches of calls; ``clock``, the host's
clock on a CPU. ``data`` says where the inputs are: ``rotated``, as many sets in turn as exceed the
L2 cache twice, so each comes from memory; elsewhere it is the same set again, and what fits is in
the cache, as in a model right after the kernel that wrote it. Data is random: zeros are faster.

Without a CUDA device all stages are absent. ``--device cpu --quick`` runs them on tiny shapes.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

from fastast_kernels.reference import published_step

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

SHORT = 100e-6  # seconds; what is faster is replayed as a graph
HEAD_DIM = 64


@dataclass(frozen=True)
class Sizes:
    """How much to measure."""

    tokens: tuple[int, ...] = (146, 602, 734, 1214)
    batches: tuple[int, ...] = (1, 8, 64)
    gemm_batches: tuple[int, ...] = (1, 8, 64, 128)
    dim: int = 768
    square: int = 8192
    copies: tuple[int, ...] = (16 << 20, 64 << 20, 512 << 20, 4 << 30)  # bytes read
    steps: tuple[tuple[int, int], ...] = ((1214, 40), (602, 40), (146, 10))
    flex_tokens: int = 1214
    calls: int = 2000


TINY = Sizes(
    tokens=(26, 35),
    batches=(1, 2),
    gemm_batches=(1,),
    dim=128,
    square=64,
    copies=(1 << 16, 1 << 20),
    steps=((26, 4),),
    flex_tokens=26,
    calls=50,
)
QUICK = Sizes(tokens=(146, 1214), batches=(1, 64), gemm_batches=(1, 64), steps=((1214, 40),))


class DeviceLost(RuntimeError):
    """The device answers nothing any more in this process."""


def words(error: BaseException) -> str:
    """What a traceback would end with, in one line."""
    text = " ".join(str(error).strip().split("\n")[:1])
    return f"{type(error).__name__}: {text}"[:200]


def finite(value: Any) -> Any:
    """``value`` as JSON can hold it: a NaN or infinity becomes a word, floats get five digits."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    return value


class Bench:
    """Rows, clocks and inputs of one run."""

    def __init__(self, device: str, sizes: Sizes) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.sizes = sizes
        self.rows: list[dict[str, Any]] = []
        self.findings: list[dict[str, Any]] = []
        self.ceilings: dict[str, Any] = {}
        self.deadline = math.inf
        # Of a CPU nobody asks for bandwidth here.
        self.l2 = float(torch.cuda.get_device_properties(0).L2_cache_size) if self.cuda else 1e5

    # --- rows -------------------------------------------------------------------------------------

    def case(self, name: str, body: Callable[[], dict[str, Any]], **labels: Any) -> dict[str, Any]:
        """Run ``body`` and keep what it returns as a row, or why there is nothing."""
        row: dict[str, Any] = {"case": name, **labels}
        self.rows.append(row)
        if time.monotonic() > self.deadline:
            row["error"] = "left out: the stage's time is up"
            return row
        try:
            row.update(body())
        except Exception as error:
            row["error"] = words(error)
            if self.cuda:
                try:
                    torch.cuda.synchronize()
                    torch.cuda.empty_cache()
                except Exception as broken:
                    raise DeviceLost(f"after {row}") from broken
        return row

    def finding(self, what: str, assumed: float | str, measured: Any, unit: str = "") -> None:
        """A number that the design assumes, beside what it is."""
        if measured is not None:
            self.findings.append(
                {"what": what, "assumed": assumed, "measured": measured, "unit": unit}
            )

    # --- inputs -----------------------------------------------------------------------------------

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=torch.float32).to(dtype)

    def rotated(self, make: Callable[[], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
        """As many sets of inputs as exceed the L2 cache twice, 64 at most."""
        first = make()
        size = sum(t.numel() * t.element_size() for t in first)
        more = min(64, math.ceil(2 * self.l2 / size)) if self.cuda else 2
        return [first, *(make() for _ in range(more - 1))]

    # --- clocks -----------------------------------------------------------------------------------

    def measure(self, *calls: Callable[[], Any], graph: bool = True) -> dict[str, Any]:
        """Median time of one call, the calls taken in turn: ``us`` and ``how``."""
        if not self.cuda:
            for call in calls:
                call()
            times = []
            for i in range(5):
                start = time.perf_counter()
                calls[i % len(calls)]()
                times.append(time.perf_counter() - start)
            return {"us": statistics.median(times) * 1e6, "how": "clock"}
        for i in range(3):
            calls[i % len(calls)]()
        estimate = self._batches(calls, 5, 1)
        if graph and estimate < SHORT:
            try:
                return {"us": self._replays(calls) * 1e6, "how": "graph"}
            except RuntimeError:  # it cannot be captured
                torch.cuda.set_stream(torch.cuda.default_stream())
                torch.cuda.synchronize()
        number = max(1, min(200, round(1e-3 / estimate)))
        return {"us": self._batches(calls, number, 9) * 1e6, "how": "events"}

    def _batches(self, calls: Sequence[Callable[[], Any]], number: int, rounds: int) -> float:
        """Seconds a call, from events around batches of ``number`` calls."""
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
        torch.cuda.synchronize()
        for start, end in marks:
            start.record()
            for i in range(number):
                calls[i % len(calls)]()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(s.elapsed_time(e) for s, e in marks) / number / 1e3

    def _replays(self, calls: Sequence[Callable[[], Any]]) -> float:
        number = len(calls) * max(1, 20 // len(calls))
        replay = captured(lambda: [calls[i % len(calls)]() for i in range(number)][-1:])
        replay()
        return self._batches([replay], 1, 15) / number

    def kernels(self, call: Callable[[], Any]) -> list[tuple[str, float, float]]:
        """Name, start and end in us of the kernels of one call; of its operators on a CPU."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        call()
        activity = ProfilerActivity.CUDA if self.cuda else ProfilerActivity.CPU
        self.synchronize()
        with profile(activities=[activity]) as profiler:
            call()
            self.synchronize()
        wanted = DeviceType.CUDA if self.cuda else DeviceType.CPU
        return sorted(
            (
                (e.name, float(e.time_range.start), float(e.time_range.end))
                for e in profiler.events()
                if e.device_type == wanted and e.time_range.end > e.time_range.start
                and (self.cuda or e.name.startswith("aten::"))
            ),
            key=lambda kernel: kernel[1],
        )  # fmt: skip

    def host(self, call: Callable[[], Any], number: int | None = None) -> float:
        """Microseconds of the host for one call, the device left to catch up by itself."""
        number = number or self.sizes.calls
        for _ in range(20):
            call()
        times = []
        for _ in range(5):
            self.synchronize()
            start = time.perf_counter()
            for _ in range(number // 5):
                call()
            times.append((time.perf_counter() - start) / (number // 5))
        self.synchronize()
        return statistics.median(times) * 1e6

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """``call`` as a CUDA graph; its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graph.kept = call()  # results live as long as the graph
    return graph.replay


def bound(call: Callable[..., Any], sets: Sequence[tuple[Tensor, ...]]) -> list[Callable[[], Any]]:
    """One call without arguments a set of inputs."""
    return [lambda s=s: call(*s) for s in sets]


def rel_err(out: Tensor, truth: Tensor) -> float:
    """Relative error by norm."""
    return float((out.float() - truth).norm() / truth.norm())


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- stages ---------------------------------------------------------------------------------------


def ceilings(bench: Bench) -> None:
    """Copy and elementwise bandwidth, rates of one large matrix product a dtype."""
    best = 0.0
    for size in bench.sizes.copies:
        fits = 2 * size < bench.l2

        def copy(size: int = size, fits: bool = fits) -> dict[str, Any]:
            numel = size // 2

            def make() -> tuple[Tensor, ...]:
                return bench.random(numel), torch.empty(
                    numel, dtype=torch.bfloat16, device=bench.device
                )

            sets = [make()] if fits or size > 1 << 30 else bench.rotated(make)
            t = bench.measure(*bound(lambda a, b: b.copy_(a), sets))
            return {**t, "TB/s": 2 * size / t["us"] / 1e6, "data": "one set" if fits else "rotated"}

        row = bench.case("copy", copy, MiB=size / 2**20)
        if not fits or not bench.cuda:
            best = max(best, row.get("TB/s", 0.0))
    if best:
        bench.ceilings["copy"] = best * 1e12
        bench.finding("device copy", 4.3, best, "TB/s")

    def add() -> dict[str, Any]:
        numel = bench.sizes.copies[-2] // 2
        sets = bench.rotated(lambda: tuple(bench.random(numel) for _ in range(3)))
        t = bench.measure(*bound(lambda a, b, c: torch.add(a, b, out=c), sets))
        return {**t, "TB/s": 3 * numel * 2 / t["us"] / 1e6, "data": "rotated"}

    bench.case("add", add)

    n = bench.sizes.square
    rates: dict[str, float] = {}

    def multiply(dtype: torch.dtype, precision: str) -> dict[str, Any]:
        a, b = bench.random(n, n, dtype=dtype), bench.random(n, n, dtype=dtype)
        torch.set_float32_matmul_precision(precision)
        try:
            t = bench.measure(lambda: a @ b)
        finally:
            torch.set_float32_matmul_precision("highest")
        return {**t, "TFLOP/s": 2 * n**3 / t["us"] / 1e6}

    kinds = [(name_of(d), d, "highest") for d in (torch.bfloat16, torch.float16, torch.float32)]
    for name, dtype, precision in [*kinds, ("tf32", torch.float32, "high")]:
        row = bench.case("matmul", lambda d=dtype, p=precision: multiply(d, p), dtype=name, n=n)
        rates[name] = row.get("TFLOP/s", 0.0)

    def fp8() -> dict[str, Any]:
        t = bench.measure(scaled_mm(bench, n, n, n))
        return {**t, "TFLOP/s": 2 * n**3 / t["us"] / 1e6}

    rates["float8_e4m3fn"] = bench.case("matmul", fp8, dtype="float8_e4m3fn", n=n).get(
        "TFLOP/s", 0.0
    )
    bench.ceilings["matmul"] = {name: rate * 1e12 for name, rate in rates.items() if rate}
    bench.finding("bf16 matmul", 790, rates["bfloat16"] or None, "TFLOP/s")
    bench.finding("tf32 matmul", 400, rates["tf32"] or None, "TFLOP/s")


def scaled_mm(bench: Bench, m: int, n: int, k: int) -> Callable[[], Tensor]:
    """An fp8 product with one scale a tensor and a bf16 result."""
    fp8 = torch.float8_e4m3fn
    x, w = bench.random(m, k, dtype=fp8), bench.random(n, k, dtype=fp8)
    one = torch.ones((), device=bench.device)
    return lambda: torch._scaled_mm(
        x, w.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=bench.cuda
    )


def gemm(bench: Bench) -> None:
    """The products of an AST block: bf16 and, for larger batches, fp8."""
    d = bench.sizes.dim
    shapes = {
        "qkv": (3 * d, d),
        "qkv+metric": (3 * d + HEAD_DIM, d),
        "proj": (d, d),
        "fc1": (4 * d, d),
        "fc2": (d, 4 * d),
    }
    peak = bench.ceilings.get("matmul", {}).get("bfloat16")
    shares: list[float] = []
    gains: list[float] = []
    for tokens in bench.sizes.tokens:
        for batch in bench.sizes.gemm_batches:
            for name, (n, k) in shapes.items():
                m = batch * tokens

                def bf16(m: int = m, n: int = n, k: int = k) -> dict[str, Any]:
                    sets = bench.rotated(lambda: (bench.random(m, k), bench.random(n, k)))
                    t = bench.measure(*bound(F.linear, sets))
                    rate = 2 * m * n * k / t["us"] * 1e6
                    share = {"share": rate / peak} if peak else {}
                    return {**t, "TFLOP/s": rate / 1e12, **share, "data": "rotated"}

                def fp8(m: int = m, n: int = n, k: int = k) -> dict[str, Any]:
                    calls = [scaled_mm(bench, m, n, k) for _ in range(2)]
                    t = bench.measure(*calls)
                    return {**t, "TFLOP/s": 2 * m * n * k / t["us"] / 1e6, "data": "2 sets"}

                labels = {"N": tokens, "B": batch, "m": m, "n": n, "k": k}
                row = bench.case(name, bf16, dtype="bfloat16", **labels)
                if batch == 64 and tokens >= 602 and name != "qkv+metric":
                    shares.append(row.get("share", math.nan))
                if batch >= 8 or not bench.cuda:
                    half = bench.case(name, fp8, dtype="float8_e4m3fn", **labels)
                    if batch == 64 and "us" in row and "us" in half:
                        gains.append(row["us"] / half["us"])

    def dft() -> dict[str, Any]:
        rows, clips = (998, 64) if bench.cuda else (10, 2)
        x, w = (bench.random(r, 512, dtype=torch.float32) for r in (rows * clips, 514))
        torch.set_float32_matmul_precision("high")
        try:
            t = bench.measure(lambda: F.linear(x, w))
        finally:
            torch.set_float32_matmul_precision("highest")
        return {**t, "TFLOP/s": 2 * x.shape[0] * 512 * 514 / t["us"] / 1e6}

    bench.case("DFT of 64 clips as a product", dft, dtype="tf32")
    if shares:
        share = statistics.mean(shares)
        bench.finding("share of the matmul peak at B=64, N>=602", "1, expect .75-.9", share)
    if gains:
        bench.finding("fp8 over bf16 products at B=64", 1.6, statistics.median(gains), "x")


def attention(bench: Bench) -> None:
    """Fused attention with and without a size bias: time, rate and error of every backend.

    q, k and v are views of one packed buffer, as a model's qkv product leaves them. ``rel_error``
    is against fp32 attention with the exact fp32 log sizes, rounding of the bias included.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads = max(1, bench.sizes.dim // HEAD_DIM)
    backends = {
        "default": None,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    trapped: list[str] = []
    rates: dict[int, float] = {}
    defaults: dict[str, dict[str, Any]] = {}  # of the largest shape, by bias
    # The largest first: should time run out, they are the ones to have.
    for n in reversed(bench.sizes.tokens):
        for batch in reversed(bench.sizes.batches):
            qkv = bench.random(batch, n, 3, heads, HEAD_DIM)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            size = torch.randint(1, 9, (batch, n), device=bench.device)
            log_size = size.float().log()
            truths = {False: exact(q, k, v, None), True: exact(q, k, v, log_size)}
            row_bias = log_size.to(q.dtype)[:, None, None]
            full = row_bias.expand(batch, 1, n, n)
            biases = {
                "none": None,
                "[B,1,1,N] bf16": row_bias,
                "[B,1,1,N] fp32": log_size[:, None, None],
                "[B,1,N,N] stride 0": full,
                "[B,1,N,N] materialised": full.contiguous(),
            }
            flops = 4.0 * batch * heads * n * n * HEAD_DIM

            def timed(
                call: Callable[[], Tensor], truth: Tensor, flops: float = flops
            ) -> dict[str, Any]:
                error = rel_err(call(), truth)
                t = bench.measure(call)
                return {**t, "TFLOP/s": flops / t["us"] / 1e6, "rel_error": error}

            for bias_name, bias in biases.items():
                truth = truths[bias is not None]

                def call(
                    q: Tensor = q, k: Tensor = k, v: Tensor = v, bias: Tensor | None = bias
                ) -> Tensor:
                    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

                for backend_name, backend in backends.items():
                    if "N,N" in bias_name and backend_name in ("flash", "math"):
                        continue  # one takes no mask, the other is no contender

                    def body(
                        backend: SDPBackend | None = backend,
                        call: Callable[[], Tensor] = call,
                        truth: Tensor = truth,
                        bias: Tensor | None = bias,
                        timed: Callable[..., dict[str, Any]] = timed,
                        operands: tuple[Tensor, ...] = (q, k, v),
                    ) -> dict[str, Any]:
                        if backend is not None:
                            with sdpa_kernel([backend]):
                                return timed(call, truth)
                        picked = torch._fused_sdp_choice(*operands, bias, 0.0, False)
                        found = {"picked": SDPBackend(int(picked)).name.lower()}
                        kernels = bench.kernels(call) if bench.cuda else []
                        if kernels:
                            longest = max(kernels, key=lambda kernel: kernel[2] - kernel[1])
                            found["kernel"] = longest[0][:60]
                        return {**timed(call, truth), **found}

                    labels = {"N": n, "B": batch, "bias": bias_name, "backend": backend_name}
                    row = bench.case("sdpa", body, **labels)
                    if backend_name == "default":
                        defaults.setdefault(bias_name, row)
                    wrong = "us" in row and not row["rel_error"] <= 1e-2
                    if wrong and bias_name == "[B,1,1,N] fp32":
                        trapped.append(f"{backend_name} N={n} B={batch}")
                    if bias_name == "none" and batch == max(bench.sizes.batches):
                        rates[n] = max(rates.get(n, 0.0), row.get("TFLOP/s", 0.0))

            plain = [t.contiguous() for t in (q, k, v)]
            contiguous_row = {"N": n, "B": batch, "bias": "none", "backend": "default"}
            bench.case(
                "sdpa contiguous",
                lambda p=plain, t=truths[False], timed=timed: timed(
                    lambda: F.scaled_dot_product_attention(*p), t
                ),
                **contiguous_row,
            )
            variants(bench, q, k, v, size.float(), truths[True], flops)
    for n, rate in rates.items():
        if rate:
            bench.ceilings.setdefault("attention", {})[n] = rate * 1e12
    if 1214 in rates:
        bench.finding("fused attention, N=1214, no bias", 390, rates[1214], "TFLOP/s")
    plain_us = defaults["none"].get("us")
    for bias_name, row in defaults.items():
        if plain_us and "us" in row and bias_name != "none":
            what = f"SDPA with a bias {bias_name} over none"
            bench.finding(what, "at most 1.05", row["us"] / plain_us, f"x, {row['picked']}")
    answer = "no" if not trapped else "YES: " + ", ".join(dict.fromkeys(trapped))
    bench.finding("an fp32 bias beside bf16 q is silently misread", "yes, by cuDNN", answer)

    bench.case("flex", lambda: flex(bench, heads), N=bench.sizes.flex_tokens)
    for kv in (129, 130):
        for width in (64, 512):
            body = lambda kv=kv, width=width: broadcast_keys(bench, kv, width)  # noqa: E731
            bench.case("stride-0 k and v, mem-efficient", body, N=kv, Dh=width)
    body = lambda: bool_mask_gradient(bench)  # noqa: E731
    bench.case("gradient under a mask, N % 128 == 64", body, N=704)


def exact(q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None) -> Tensor:
    """fp32 attention, eight clips at a time: all logits of a batch are gigabytes."""
    out = []
    for i in range(0, q.shape[0], 8):
        part = slice(i, i + 8)
        logits = q[part].float() @ k[part].float().transpose(-1, -2) * q.shape[-1] ** -0.5
        if log_size is not None:
            logits += log_size[part, None, None]
        out.append(logits.softmax(-1) @ v[part].float())
    return torch.cat(out)


def variants(
    bench: Bench, q: Tensor, k: Tensor, v: Tensor, size: Tensor, truth: Tensor, flops: float
) -> None:
    """The size bias without a mask: in 8 more channels of q and k, or in v.

    Timed twice, once with the concatenations and once without.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    batch, heads, n, d = q.shape
    scale = d**-0.5
    log_size = size.log()

    def channels(*columns: Tensor) -> Tensor:
        """Columns ``[B, N]`` and zeros, eight in all, for every head."""
        block = q.new_zeros(batch, 1, n, 8)
        for i, column in enumerate(columns):
            block[..., i] = column[:, None]
        return block.expand(-1, heads, -1, -1)

    high = log_size.to(q.dtype)
    low = (log_size - high.float()).to(q.dtype)
    factor = torch.full_like(high, 1 / scale)
    nothing = channels()

    def augment() -> tuple[Tensor, Tensor, Tensor]:
        return (
            torch.cat([q, channels(factor, factor)], -1),
            torch.cat([k, channels(high, low)], -1),
            torch.cat([v, nothing], -1),
        )

    def in_v() -> tuple[Tensor, Tensor, Tensor]:
        weight = size.to(v.dtype)
        scaled = v * weight[:, None, :, None]
        return q, k, torch.cat([scaled, channels(weight)], -1)

    def finish_augmented(out: Tensor) -> Tensor:
        return out[..., :d]

    def finish_in_v(out: Tensor) -> Tensor:
        return out[..., :d] / out[..., d : d + 1]

    backends = {"default": None, "cudnn": SDPBackend.CUDNN_ATTENTION}
    backends["flash"] = SDPBackend.FLASH_ATTENTION
    for name, prepare, finish in (
        ("(a) bias in head dim 72", augment, finish_augmented),
        ("(e) size in v", in_v, finish_in_v),
    ):
        for backend_name, backend in backends.items():

            def body(
                backend: SDPBackend | None = backend,
                prepare: Callable[[], tuple[Tensor, ...]] = prepare,
                finish: Callable[[Tensor], Tensor] = finish,
            ) -> dict[str, Any]:
                operands = prepare()

                def attend(*qkv: Tensor) -> Tensor:
                    return finish(F.scaled_dot_product_attention(*qkv, scale=scale))

                def run() -> dict[str, Any]:
                    error = rel_err(attend(*operands), truth)
                    t = bench.measure(lambda: attend(*operands))
                    whole = bench.measure(lambda: attend(*prepare()))
                    rate = flops / t["us"] / 1e6
                    found = {"TFLOP/s": rate, "rel_error": error, "with_copies_us": whole["us"]}
                    return {**t, **found}

                if backend is None:
                    return run()
                with sdpa_kernel([backend]):
                    return run()

            bench.case(name, body, N=n, B=batch, backend=backend_name)


def flex(bench: Bench, heads: int) -> dict[str, Any]:
    """FlexAttention, the bias in its score_mod, compiled for one shape."""
    from torch.nn.attention.flex_attention import flex_attention

    n, batch = bench.sizes.flex_tokens, max(bench.sizes.batches)
    q, k, v = (bench.random(batch, heads, n, HEAD_DIM) for _ in range(3))
    log_size = torch.randint(1, 9, (batch, n), device=bench.device).float().log()

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + log_size[b, j]

    # On a CPU the compiler would take longer than this whole run.
    attend = torch.compile(flex_attention, dynamic=False) if bench.cuda else flex_attention
    start = time.perf_counter()
    out = attend(q, k, v, score_mod=biased)
    bench.synchronize()
    compile_s = time.perf_counter() - start
    error = rel_err(out, exact(q, k, v, log_size))
    t = bench.measure(lambda: attend(q, k, v, score_mod=biased))
    flops = 4.0 * batch * heads * n * n * HEAD_DIM
    rate = flops / t["us"] / 1e6
    return {**t, "B": batch, "TFLOP/s": rate, "rel_error": error, "compile_s": compile_s}


def broadcast_keys(bench: Bench, n: int, d: int) -> dict[str, Any]:
    """pytorch#191937: k and v shared by all heads without a copy, one key more than 32s."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = bench.random(1, 8, n, d)
    k, v = (bench.random(1, 1, n, d).expand(1, 8, n, d) for _ in range(2))
    mask = (torch.rand(1, 1, n, n, device=bench.device) < 0.9) | torch.eye(
        n, dtype=torch.bool, device=bench.device
    )
    logits = q.float() @ k.float().transpose(-1, -2) * d**-0.5
    truth = logits.masked_fill(~mask, -math.inf).softmax(-1) @ v.float()
    backend = SDPBackend.EFFICIENT_ATTENTION if bench.cuda else SDPBackend.MATH
    with sdpa_kernel([backend]):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    error = rel_err(out, truth)
    return {"rel_error": error, "wrong": not error <= 2e-2}


def bool_mask_gradient(bench: Bench) -> dict[str, Any]:
    """pytorch#196678: cuDNN's gradient of q under a mask, where all logits are very negative."""
    n, d = 704, 64
    q, k, v = (bench.random(1, 1, n, d) * f for f in (0.1, 0.1, 1.0))
    q[..., 0], k[..., 0] = 1.0, -120 * d**0.5
    mask = torch.ones(n, n, dtype=torch.bool, device=bench.device)
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = F.scaled_dot_product_attention(*leaves, attn_mask=mask)
        gradients = torch.autograd.grad(out.sum(), leaves)
    bad = sum(int((~g.isfinite()).sum()) for g in gradients)
    return {"not_finite": bad, "wrong": bad > 0}


def step(bench: Bench) -> None:
    """The unfused ToMe step: launches, device time, host time, a graph, a compiler, memory."""
    for n, r in bench.sizes.steps:
        for batch in bench.sizes.batches:
            x, metric = bench.random(batch, n, bench.sizes.dim), bench.random(batch, n, HEAD_DIM)
            size = torch.randint(1, 4, (batch, n), device=bench.device).to(x.dtype)

            def call(
                x: Tensor = x, metric: Tensor = metric, size: Tensor = size, r: int = r
            ) -> Any:
                return published_step(x, metric, r, size)

            def launches(call: Callable[[], Any] = call) -> dict[str, Any]:
                kernels = bench.kernels(call)
                found: dict[str, Any] = {"launches": len(kernels)}
                if bench.cuda and kernels:
                    gaps = [b[1] - a[2] for a, b in itertools.pairwise(kernels)]
                    durations = [end - start for _, start, end in kernels]
                    found["device_us"] = sum(durations)
                    found["shortest_us"] = min(durations)
                    found["gap_us"] = statistics.median(gaps) if gaps else 0.0
                    found["span_us"] = kernels[-1][2] - kernels[0][1]
                return found

            def wall(call: Callable[[], Any] = call) -> dict[str, Any]:
                eager = bench.measure(call, graph=False)
                return {**eager, "host_us": bench.host(call, 50), "data": "one set"}

            def replayed(call: Callable[[], Any] = call) -> dict[str, Any]:
                if not bench.cuda:
                    return {"absent": "graphs need a CUDA device"}
                replay = captured(call)
                replay()
                return {"us": bench._batches([replay], 1, 15) * 1e6, "how": "graph of one step"}

            def compiled(
                x: Tensor = x, metric: Tensor = metric, size: Tensor = size, r: int = r
            ) -> dict[str, Any]:
                torch._dynamo.reset()
                backend = "inductor" if bench.cuda else "eager"
                function = torch.compile(published_step, dynamic=False, backend=backend)
                start = time.perf_counter()
                function(x, metric, r, size)
                bench.synchronize()
                took = time.perf_counter() - start
                again = lambda: function(x, metric, r, size)  # noqa: E731
                kernels = bench.kernels(again)
                device = sum(end - start for _, start, end in kernels)
                t = bench.measure(again, graph=False)
                return {**t, "compile_s": took, "launches": len(kernels), "device_us": device}

            def memory(call: Callable[[], Any] = call) -> dict[str, Any]:
                if not bench.cuda:
                    return {"absent": "memory is counted on a CUDA device"}
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                out = call()
                torch.cuda.synchronize()
                results = sum(t.numel() * t.element_size() for t in out)
                extra = torch.cuda.max_memory_allocated() - before - results
                return {"extra_MB": extra / 1e6}

            labels = {"N": n, "r": r, "B": batch}
            counted = bench.case("launches", launches, **labels)
            eager = bench.case("eager", wall, **labels)
            graph = bench.case("graph", replayed, **labels)
            longest, most = n == bench.sizes.steps[0][0], batch == max(bench.sizes.batches)
            if (longest and (batch == 1 or most)) or (n == bench.sizes.steps[-1][0] and most):
                bench.case("compiled", compiled, **labels)
            bench.case("memory", memory, **labels)
            if (n, batch) == (1214, 1):
                bench.finding("kernels of the unfused step", 30, counted.get("launches"))
                bench.finding("its host time, B=1", 150, eager.get("host_us"), "us")
                bench.finding("its device time, B=1, as a graph", 75, graph.get("us"), "us")
            if (n, batch) == (1214, 64):
                bench.finding("its device time, B=64", 284, counted.get("device_us"), "us")


if triton is not None:

    @triton.jit
    def _increment(x):  # type: ignore[no-untyped-def]
        tl.store(x, tl.load(x) + 1)


def launch(bench: Bench) -> None:
    """What a kernel costs that does next to nothing."""
    x = torch.zeros(1, device=bench.device)
    y = torch.zeros(1, device=bench.device)
    one = torch.ones(1, device=bench.device)

    row = bench.case("host, x.add_(1)", lambda: {"us": bench.host(lambda: x.add_(one))})
    bench.case(
        "host, torch.add(out=)", lambda: {"us": bench.host(lambda: torch.add(x, one, out=y))}
    )
    bench.case("host, x + 1, allocated", lambda: {"us": bench.host(lambda: x + one)})
    if "us" in row:
        bench.ceilings["host"] = row["us"] / 1e6
        bench.finding("host time of an operation", 5, row["us"], "us")

    def synchronised() -> dict[str, Any]:
        def call() -> None:
            x.add_(one)
            bench.synchronize()

        return {"us": bench.host(call, 200)}

    bench.case("host, x.add_(1) and wait", synchronised)
    bench.case("host, x.item()", lambda: {"us": bench.host(lambda: x.item(), 200)})
    if not bench.cuda:
        return
    bench.case("host, wait for nothing", lambda: {"us": bench.host(torch.cuda.synchronize, 500)})
    bench.case("host, empty kernel", lambda: {"us": bench.host(lambda: torch.cuda._sleep(0))})

    def graph() -> dict[str, Any]:
        replay = captured(lambda: [x.add_(one) for _ in range(100)])
        replay()
        each = bench._batches([replay], 1, 25) * 1e4  # us a kernel
        found = {"us": each, "host_us": bench.host(replay, 50)}
        kernels = bench.kernels(replay)
        if kernels:
            duration = statistics.median(end - start for _, start, end in kernels)
            gaps = [b[1] - a[2] for a, b in itertools.pairwise(kernels)]
            found["kernel_us"], found["gap_us"] = duration, each - duration
            found["profiler_gap_us"] = statistics.median(gaps)
        return found

    row = bench.case("graph of 100 dependent kernels, each", graph)
    if "gap_us" in row:
        gap = max(row["gap_us"], 0.0)
        bench.ceilings.update(gap=gap / 1e6, shortest=row["kernel_us"] / 1e6)
        bench.finding("gap between kernels of a graph", 1.2, gap, "us")
        bench.finding("shortest kernel", 2.5, row["kernel_us"], "us")

    def triton_launch() -> dict[str, Any]:
        if triton is None:
            return {"absent": "no triton"}
        start = time.perf_counter()
        _increment[(1,)](x)
        torch.cuda.synchronize()
        took = time.perf_counter() - start
        us = bench.host(lambda: _increment[(1,)](x))
        replay = captured(lambda: [_increment[(1,)](x) for _ in range(100)])
        replay()
        each = bench._batches([replay], 1, 25) * 1e4
        return {"us": us, "compile_s": took, "in_graph_us": each}

    bench.case("host, Triton kernel", triton_launch)


def elementwise(bench: Bench) -> None:
    """Bandwidth of what surrounds the products, eager: bytes that one pass would need."""
    batch, n, d = max(bench.sizes.batches), max(bench.sizes.tokens), bench.sizes.dim
    weight, bias = bench.random(d), bench.random(d)

    def tokens(number: int, width: int = d) -> list[tuple[Tensor, ...]]:
        return bench.rotated(lambda: tuple(bench.random(batch, n, width) for _ in range(number)))

    def norm(h: Tensor) -> Tensor:
        return F.layer_norm(h, (d,), weight, bias, 1e-6)

    def add_norm(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        h = x + y
        return h, norm(h)

    def body(call: Callable[..., Any], number: int, width: int, passes: int) -> dict[str, Any]:
        t = bench.measure(*bound(call, tokens(number, width)))
        moved = passes * batch * n * width * 2
        return {**t, "TB/s": moved / t["us"] / 1e6, "data": "rotated"}

    labels = {"N": n, "B": batch}
    bench.case("layer_norm", lambda: body(norm, 1, d, 2), **labels)
    bench.case("add and layer_norm", lambda: body(add_norm, 2, d, 4), **labels)
    bench.case("gelu", lambda: body(F.gelu, 1, 4 * d, 2), **labels)
    bench.case("clone", lambda: body(torch.clone, 1, d, 2), **labels)


def ties(bench: Bench) -> None:
    """Which of several equal values max and argsort take, and whether they always do."""

    def maximum() -> dict[str, Any]:
        scores = torch.randint(0, 4, (64, 607, 607), device=bench.device).to(torch.bfloat16)
        values, index = scores.max(-1)
        place = torch.arange(607, device=bench.device).where(scores == values[..., None], 607)
        first = place.amin(-1)
        same = torch.equal(scores.max(-1).indices, index)
        return {"lowest_index": float((index == first).float().mean()), "repeatable": same}

    def order() -> dict[str, Any]:
        keys = torch.randint(0, 4, (64, 607), device=bench.device).to(torch.bfloat16)
        stable = keys.argsort(dim=-1, descending=True, stable=True)
        plain = keys.argsort(dim=-1, descending=True)
        same = torch.equal(keys.argsort(dim=-1, descending=True), plain)
        return {"lowest_index": float((plain == stable).float().mean()), "repeatable": same}

    def scatter(dtype: torch.dtype) -> dict[str, Any]:
        into = bench.random(4, 587, 64, dtype=dtype)
        rows = bench.random(4, 40, 64, dtype=dtype)
        index = torch.zeros(4, 40, 64, dtype=torch.int64, device=bench.device)

        def call() -> Tensor:
            return into.scatter_reduce(1, index, rows, reduce="sum")

        results = [call() for _ in range(5)]
        return {**bench.measure(call), "repeatable": all(results[0].equal(t) for t in results)}

    row = bench.case("max", maximum)
    bench.finding(
        "max of equal values takes the lowest index", "unspecified", row.get("lowest_index")
    )
    bench.case("argsort", order)
    for dtype in (torch.bfloat16, torch.float32):
        bench.case("scatter, all into one row", lambda d=dtype: scatter(d), dtype=name_of(dtype))


# Stages in order, each with the seconds after which it starts no new row.
STAGES: dict[str, tuple[Callable[[Bench], None], float]] = {
    "ceilings": (ceilings, 20),
    "launch": (launch, 15),
    "gemm": (gemm, 30),
    "attention": (attention, 80),
    "step": (step, 50),
    "elementwise": (elementwise, 10),
    "ties": (ties, 10),
}


# --- the run --------------------------------------------------------------------------------------


def print_rows(stage: str, rows: Sequence[dict[str, Any]]) -> None:
    """A stage's rows as one table; what a row does not have is blank, errors come last."""
    print(f"\n== {stage}")
    columns = list(dict.fromkeys(k for row in rows for k in row if k != "error"))
    table = [columns]
    for row in rows:
        cells = (row.get(k, "") for k in columns)
        table.append([f"{v:.4g}" if isinstance(v, float) else str(v) for v in cells])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    errors = ["", *(row.get("error", "")[:90] for row in rows)]
    for cells, error in zip(table, errors, strict=True):
        line = "  ".join(cell.ljust(w) for cell, w in zip(cells, widths, strict=True))
        print(f"{line}  {error}".rstrip())
    sys.stdout.flush()


def print_findings(findings: Sequence[dict[str, Any]]) -> None:
    """Assumption and measurement, line by line."""
    if findings:
        print(f"\n{'what the design assumes':<52}{'assumed':>18}  measured")
    for f in findings:
        measured = f"{f['measured']:.4g}" if isinstance(f["measured"], float) else f["measured"]
        print(f"{f['what']:<52}{f['assumed']!s:>18}  {measured} {f['unit']}".rstrip())


def run_stage(bench: Bench, name: str, result: dict[str, Any]) -> bool:
    """Run one stage and enter it in ``result``; whether the device is still there."""
    function, limit = STAGES[name]
    bench.rows, bench.findings = [], []
    start = time.monotonic()
    bench.deadline = start + limit
    entry: dict[str, Any] = {"status": "ok"}
    alive = True
    try:
        with torch.no_grad():
            function(bench)
    except Exception as error:
        entry = {"status": "failed", "error": words(error)}
        alive = not isinstance(error, DeviceLost)
    entry["seconds"] = time.monotonic() - start
    entry["rows"] = bench.rows
    result["stages"][name] = entry
    result["findings"] += bench.findings
    result["ceilings"] = bench.ceilings
    print_rows(name, bench.rows)
    print(
        f"-- {name}: {entry['status']} {entry.get('error', '')} {entry['seconds']:.1f} s",
        flush=True,
    )
    return alive


def write(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        text = json.dumps(finite(result), indent=1, allow_nan=False)
        fresh = path.with_name(path.name + ".new")
        fresh.write_text(text + "\n")
        fresh.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file, written after each stage")
    parser.add_argument("--quick", action="store_true", help="fewer shapes; tiny ones on a CPU")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--resume", action="store_true", help="keep the other stages of --out")
    options = parser.parse_args()
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu needs --quick: a CPU has its own benchmarks")
    warnings.filterwarnings("ignore")  # backends say at length why they will not run

    present = options.device == "cpu" or torch.cuda.is_available()
    cuda = options.device == "cuda" and present
    cudnn = torch.backends.cudnn.version() if cuda else None
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "versions": {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": cudnn,
            "triton": getattr(triton, "__version__", None),
            "python": platform.python_version(),
        },
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "quick": options.quick,
        "stages": {},
        "findings": [],
        "ceilings": {},
    }
    if options.resume and options.out is not None and options.out.exists():
        before = json.loads(options.out.read_text())
        result.update({k: before[k] for k in ("stages", "findings", "ceilings")})
    print(f"{result['device']}, {result['versions']}", flush=True)
    if not present:
        for name in options.stages:
            result["stages"][name] = {"status": "absent", "error": "torch finds no CUDA device"}
        print(f"absent, torch finds no CUDA device: {', '.join(options.stages)}")
        write(options.out, result)
        return 0

    sizes = (QUICK if options.quick else Sizes()) if cuda else TINY
    bench = Bench(options.device, sizes)
    bench.ceilings = result["ceilings"]
    bench.ceilings["name"] = result["device"]
    if cuda:
        count = torch.cuda.get_device_properties(0).multi_processor_count
        bench.ceilings["multiprocessors"] = count
    torch.manual_seed(0)
    for i, name in enumerate(options.stages):
        alive = run_stage(bench, name, result)
        write(options.out, result)
        rest = options.stages[i + 1 :]
        if not alive and rest and options.out is not None:
            # A fault on the device ends this process's use of it; a new one starts clean.
            print(
                f"the device is lost to this process; going on in a new one with {rest}", flush=True
            )
            again = ["--out", str(options.out), "--resume", "--stages", *rest]
            quick = ["--quick"] if options.quick else []
            os.execv(sys.executable, [sys.executable, __file__, *again, *quick])
    print_findings(result["findings"])
    failed = [name for name, entry in result["stages"].items() if entry["status"] == "failed"]
    print(f"\n{len(result['stages']) - len(failed)} stage(s) ran, failed: {failed or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
