"""Every Triton kernel, compiled ahead of time with the parameters that ship: nothing spills, shared
memory fits, products run on tensor cores, rows are read 16 bytes at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fastast_kernels.backends import INTERPRETED, OPS
from fastast_kernels.triton_kernels import parameters

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from fastast_kernels.triton_kernels import resources as res

ROOT = Path(__file__).parent.parent
PRODUCTS = {"best_partner", "attention", "column_sums", "grad_q", "grad_kv"}
ROWS = {"reduce_rows", "gather_rows", "add_layer_norm", "norm_backward"}


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("architecture", parameters.ARCHITECTURES)
def test_resources(architecture: str, dtype: torch.dtype, dim: int) -> None:
    kernels = set()
    for variant, launch in res.launches(dtype, dim, architecture):
        found = res.resources(launch, architecture, variant)
        kernels.add(found.kernel)
        assert found.stack == 0, f"registers spilled: {found}"
        limit = res.SHARED_MEMORY_LIMIT[architecture]
        assert found.shared <= limit, f"more than {limit} bytes of shared memory: {found}"
        assert found.registers <= 255
        if found.kernel in PRODUCTS:
            assert found.mma > 0, f"no tensor cores: {found}"
        if found.kernel in ROWS | PRODUCTS:
            assert found.wide > 0, f"no 16-byte loads: {found}"
    assert kernels == PRODUCTS | ROWS | {"key_metric", "rank", "assign"}


def test_a_spill_is_seen() -> None:
    """The tile that the design notes warn of spills with 4 warps: the check can fail."""
    tile = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
    with parameters.trying("attention", tile), parameters.target("sm_80"):
        call = dict(res.calls(torch.bfloat16, 64))["attention"]
        (launch,) = res.recorded(call)
    assert launch.options["BLOCK_M"] == 128
    assert res.resources(launch, "sm_80", "attention").stack > 0


def test_every_op_is_compiled() -> None:
    names = {name.split(",")[0].removesuffix("_backward") for name, _ in res.calls(torch.half, 64)}
    # The match of keys is two of the others.
    of_others = {"match_keys"}
    assert {name.replace("match", "bipartite_match") for name in names} | of_others == set(OPS)


def test_other_lengths_need_no_other_kernel() -> None:
    """What is compiled for one N serves every other: no storm from layer to layer."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from fastast_kernels import triton_kernels as kernels

    backend = make_backend(GPUTarget("cuda", 90, 32))

    def variants(n: int) -> list[str]:
        r = 10

        def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        q, k, v = empty(2, n, 3, 12, 64).permute(2, 0, 3, 1, 4)
        x, weight = empty(2, n, 768), empty(768, dtype=torch.float32)
        rows, size = empty(2, n, dtype=torch.int32), empty(2, n, dtype=torch.float32)
        lse = empty(2, 12, n, dtype=torch.float32)
        h, size_out = x[:, : n - r].contiguous(), size[:, : n - r].contiguous()

        def layer() -> None:
            kernels.bipartite_match(kernels.key_metric(k), r, True, True)
            kernels.merge_add_layer_norm(x, x, rows, n - r, size, weight, weight, 1e-6)
            kernels.add_layer_norm(x, x, weight, weight, 1e-6)
            kernels.merge(x, rows, n - r, size)
            kernels.unmerge(h, rows)
            kernels.unmerge_backward(x, rows, n - r)
            kernels.merge_backward(h, rows, size, size_out)
            kernels.attention(q, k, v, size, 0.125)
            kernels.attention_column_sums(q, k, lse, size, 0.125, False)
            kernels.attention_backward(q, q, k, v, size, q, lse, 0.125)
            statistics = (h, h, h, weight, size_out, size_out)
            kernels.merge_add_layer_norm_backward(*statistics, rows, size, size_out)

        found = []
        with parameters.target("sm_90", 0):
            for launch in res.recorded(layer):
                signature, params = launch.kernel.signature, launch.kernel.params
                bind = create_function_from_signature(signature, params, backend)
                options = {"debug": False, "instrumentation_mode": "", **launch.options}
                _, specialization, chosen = bind(*launch.args, **options)
                found.append(f"{launch.kernel.__name__} {specialization} {chosen}")
        return found

    # Multiples of 16 and of 8, odd ones, and the shortest: what Triton tells apart unless told not.
    for n in (1214, 1200, 1201, 602, 146, 64, 33, 12):
        assert variants(n) == variants(1024), n


def test_tables(tmp_path: Path) -> None:
    table = parameters.read(parameters.SHIPPED)
    assert set(table) == set(parameters.ARCHITECTURES)
    assert set(table["sm_80"]) == set(table["sm_90"])
    for text in ("{", '{"sm_80": {}}', "[]", '{"sm_80": {"rank": 3}, "sm_90": {}}'):
        path = tmp_path / "table.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"table\.json is no table of launch parameters"):
            parameters.read(path)
    with pytest.raises(ValueError, match="attention has no launch parameters for 16-bit values"):
        parameters.entry("attention", "sm_80", 16, 256)


def test_tile_follows_the_work() -> None:
    """Long tiles where they fill the GPU, short ones where few programs would leave it idle."""
    q = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16, device="meta")
    with parameters.target("sm_90"):
        large, tiles = parameters.tiled("attention", q, 64, 64 * 12, 1214, "BLOCK_M")
        assert large["BLOCK_M"] == 128 and tiles == 64 * 12 * 10
        small, tiles = parameters.tiled("attention", q, 64, 12, 146, "BLOCK_M")
        assert small["BLOCK_M"] == 64 and tiles == 12 * 3


def test_documented() -> None:
    """docs/triton-kernels.md has the table of the compiler that is pinned."""
    text = (ROOT / "docs" / "triton-kernels.md").read_text()
    for architecture in parameters.ARCHITECTURES:
        for kernel in PRODUCTS | ROWS | {"key_metric", "rank", "assign"}:
            assert f"| {kernel} (" in text, kernel
        assert f"| {architecture} |" in text
