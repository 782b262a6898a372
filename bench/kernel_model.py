"""What each kernel should take on a GPU, predicted from what it computes and moves.

    python bench/kernel_model.py [--batch 1 8 64] [--tokens 1214] [--r 40] [--ceilings FILE.json]

Where roofline.py asks for the least that any implementation must do, this counts what these kernels
do: operands that are read again, products in three parts, comparisons, scans. A time is the longest
of arithmetic, memory and instructions, on as many multiprocessors as there are programs for, and
never less than the shortest kernel. To be held against the first run on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from roofline import H200, Machine

from fastast_kernels.triton_kernels.parameters import target, tiled

# A warp instruction a cycle and scheduler, four schedulers a multiprocessor, at 1.7 GHz.
WARP_INSTRUCTIONS = 4 * 1.7e9
# tf32 runs at half the rate of bf16, and fp32 to fp32 accuracy takes three of its products.
TF32X3 = 6.0
# Cycles from a multiprocessor to the L2 cache and back.
ROUND_TRIP = 270
# Programs that share a multiprocessor where they are small, and what one reaches alone.
RESIDENT = 8


@dataclass(frozen=True)
class Work:
    """What one launch does.

    Attributes:
        kernel: its name.
        flops: of products, at bf16's rate.
        bytes: read and written in memory.
        instructions: of a warp, where neither of the two is the limit.
        programs: blocks.
        attention: whether products run at the rate of fused attention.
        trips: times that one block waits for the L2 cache when all others are done.
    """

    kernel: str
    flops: float
    bytes: float
    instructions: float
    programs: int
    attention: bool = False
    trips: int = 0


def kernels(B: int, N: int, r: int, D: int = 768, C: int = 64, itemsize: int = 2) -> list[Work]:
    """The launches of one block in half precision, forward and then backward."""
    heads, out, na, nb = D // C, N - r, (N + 1) // 2, N // 2
    rows, statistic = 4.0 * N, 8.0 * out

    def tiles(length: int, tile: int) -> int:
        return -(-length // tile)

    def shipped(op: str, bits: int, groups: int, length: int, block: str) -> int:
        """Programs of an op whose tile follows the work, with the parameters that ship."""
        dtype = torch.float32 if bits == 32 else torch.bfloat16
        with target("sm_90"):
            like = torch.empty(0, dtype=dtype, device="meta")
            return tiled(op, like, C, groups, length, block)[1]

    # A scan of the assignment by the warp of every output row: load, compare and minimum of a lane.
    scan = B * out * tiles(N, 256) * (8 * 3 + 2 * 5)
    row = D * itemsize / 512  # 16-byte accesses of a warp to a row
    # With the sources (csrc/cuda/sources.h): two offsets, and a token for each.
    listed, lists = B * (out * 8 + N * 6), 4.0 * (N + out)
    turns = tiles(r, 128)  # of the merged tokens: each compared with those of its turn before it
    in_turns = B * turns * 4 * (64 * 3 + 40)
    attention = 4.0 * B * heads * N * N * C
    return [
        Work("key_metric", 0, B * N * (D * itemsize + 4 * C), 0, B * tiles(N, 16)),
        Work(
            "best_partner", TF32X3 * 2.0 * B * na * nb * C, B * N * 4 * C, 0,
            shipped("best_partner", 32, B, na, "BLOCK_A"),
        ),
        Work("rank", 0, B * na * 8, B * na * na / 32 * 4, B * tiles(na, 32)),
        # The three above in one launch, in CUDA C++ (csrc/cuda/match_cluster.h): each warp of a
        # block splits what it multiplies into two tf32 parts, and every score is compared with all.
        Work(
            "match_keys (cuda, cluster)", TF32X3 * 2.0 * B * na * nb * C,
            B * N * (D * itemsize + 4),
            B * (tiles(na, 64) * tiles(nb, 64) * (4 * C * 64 / 32 * 4) + na * na / 32 * 4),
            B * tiles(na, 64),
        ),
        Work(
            "match_keys (cuda, cluster), sources", TF32X3 * 2.0 * B * na * nb * C,
            B * N * (D * itemsize + 4) + B * lists,
            B * (tiles(na, 64) * tiles(nb, 64) * (4 * C * 64 / 32 * 4) + na * na / 32 * 4)
            + in_turns + B * (out / 32 * 30),
            B * tiles(na, 64), trips=5 + turns,
        ),
        Work("assign", 0, B * (na * 8 + N * 4), 0, B * tiles(na, 256)),
        Work(
            "reduce_rows (merge)", 0, B * ((N + out) * D * itemsize + rows + 4 * N + 4 * out),
            scan + B * (N + out) * row * 20, B * out,
        ),
        Work(
            "reduce_rows (merge_add_layer_norm)", 0,
            B * (2 * (N + out) * D * itemsize + rows + 4 * N + statistic + 8 * out),
            scan + B * (2 * N + 2 * out) * row * 25, B * out,
        ),
        Work(
            "reduce_listed_rows (merge)", 0,
            B * ((N + out) * D * itemsize + lists + 4 * N + 4 * out),
            listed + B * (N + out) * row * 20, B * out,
        ),
        Work(
            "reduce_listed_rows (merge_add_layer_norm)", 0,
            B * (2 * (N + out) * D * itemsize + lists + 4 * N + statistic + 8 * out),
            listed + B * (2 * N + 2 * out) * row * 25, B * out,
        ),
        Work(
            "add_layer_norm", 0, B * N * (4 * D * itemsize + 8), B * 4 * N * row * 25, B * N,
        ),
        Work("gather_rows (unmerge)", 0, B * ((N + out) * D * itemsize + rows), 0, B * N),
        Work(
            "attention", attention, B * N * (4 * D * itemsize + 4 + 4 * heads), 0,
            shipped("attention", 16, B * heads, N, "BLOCK_M"), attention=True,
        ),
        Work(
            "column_sums", attention / 2, B * N * (2 * D * itemsize + 4 + 8 * heads), 0,
            B * heads * tiles(N, 64), attention=True,
        ),
        Work(
            "gather_rows (merge_backward)", 0, B * ((N + out) * D * itemsize + rows + 4 * N), 0,
            B * N,
        ),
        Work(
            "norm_backward (merge_add_layer_norm)", 0,
            B * ((3 * out + N) * D * itemsize + rows + 4 * N + statistic) + 2 * 1024 * D * 4 * 2,
            B * 4 * N * row * 40, min(B * N, 1024),
        ),
        Work(
            "grad_q", attention * 1.5, B * N * (6 * D * itemsize + 12 * heads), 0,
            B * heads * tiles(N, 64), attention=True,
        ),
        Work(
            "grad_kv", attention * 2, B * N * (6 * D * itemsize + 8 * heads), 0,
            B * heads * tiles(N, 64), attention=True,
        ),
    ]  # fmt: skip


def seconds(work: Work, machine: Machine, tokens: int) -> tuple[float, str]:
    """Predicted time of a launch, and what limits it."""
    processors = machine.multiprocessors
    used = min(1.0, work.programs / processors)
    rate = (
        machine.attention_rate(tokens, "bfloat16") if work.attention else machine.rate("bfloat16")
    )
    waves = -(-work.programs // processors) * processors / max(work.programs, 1)
    resident = work.programs >= processors * RESIDENT
    limits = {
        "arithmetic": work.flops / (rate * used) * (1.0 if resident else min(waves, 2.0)),
        "memory": work.bytes / (machine.copy * min(1.0, used * 2)),
        "instructions": work.instructions / (WARP_INSTRUCTIONS * processors * used),
        "launch": machine.shortest,
    }
    limit = max(limits, key=lambda name: limits[name])
    return limits[limit] + work.trips * ROUND_TRIP / 1.7e9, limit


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--tokens", type=int, default=1214)
    parser.add_argument("--r", type=int, default=40)
    parser.add_argument(
        "--ceilings", type=Path, help="JSON of ceilings; an H200 as assumed without"
    )
    options = parser.parse_args()
    machine = Machine.load(options.ceilings) if options.ceilings else H200
    print(
        f"{machine.name}: AST-base, bf16, N={options.tokens}, r={options.r}; us and what limits it"
    )
    print("| kernel | " + " | ".join(f"B={b}" for b in options.batch) + " | MB a clip | GFLOP |")
    print("|---|" + "--:|" * (len(options.batch) + 2))
    columns = [kernels(b, options.tokens, options.r) for b in options.batch]
    one = kernels(1, options.tokens, options.r)
    for i, work in enumerate(one):
        cells = []
        for column in columns:
            time, limit = seconds(column[i], machine, options.tokens)
            cells.append(f"{time * 1e6:.1f} {limit}")
        cells += [f"{work.bytes / 1e6:.2f}", f"{work.flops / 1e9:.2f}"]
        print(f"| {work.kernel} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
