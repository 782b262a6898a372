"""Linear layers in AMX tiles (csrc/linear.h), bf16 and int8: against fp64, and which they are."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from tiny_models import relative
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastast import linear
from fastast.linear import Int8Linear, PackedLinear

needs_int8 = pytest.mark.skipif(linear.why_no_int8() is not None, reason="needs int8 products")


def needs_tiles() -> None:
    if linear.cpu_isa() != "amx":
        pytest.skip("needs AMX")


@pytest.mark.parametrize("rows", [1, 16, 17, 33, 47, 49, 146, 400])
@pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
@pytest.mark.parametrize("inputs, outputs", [(32, 32), (96, 96), (2080, 96), (768, 800)])
@torch.no_grad()
def test_in_tiles(rows: int, gelu: bool, inputs: int, outputs: int) -> None:
    """The kernel of our own, where there is AMX, is as accurate, and its packing can be undone."""
    needs_tiles()
    plain = nn.Linear(inputs, outputs).bfloat16()
    plain.weight.mul_(4)
    x = torch.randn(2, rows, inputs).bfloat16()
    tiles = linear.to_tiles(plain.weight)
    assert torch.equal(linear.from_tiles(tiles), plain.weight)
    theirs, truth = plain(x), copy.deepcopy(plain).double()(x.double())
    if gelu:
        theirs, truth = F.gelu(theirs), F.gelu(truth)
    bias = plain.bias.float()
    got = torch.ops.fastast.linear(x, tiles, bias, gelu)
    assert got.shape == truth.shape
    assert relative(got, truth) < min(1.2 * relative(theirs, truth), 2.5e-3)
    assert relative(torch.ops.fastast.linear(x, tiles, None, False), plain(x) - plain.bias) < 0.01
    # A row's result does not depend on the others, on how far apart they are, or on threads.
    assert torch.equal(torch.ops.fastast.linear(x[1:, :20], tiles, bias, gelu), got[1:, :20])
    apart = torch.randn(2, rows, inputs + 8).bfloat16()
    apart[..., :inputs] = x
    for again in (apart[..., :inputs], x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert not again.is_contiguous() or rows == 1
        assert torch.equal(torch.ops.fastast.linear(again, tiles, bias, gelu), got)
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        again = torch.ops.fastast.linear(x, tiles, bias, gelu)
        torch.set_num_threads(threads)
        assert torch.equal(again, got)


@pytest.mark.parametrize("rows", [1, 17, 33, 49, 146])
@pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
@pytest.mark.parametrize("inputs, outputs", [(64, 32), (192, 96), (2048, 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_int8_in_tiles(
    rows: int, gelu: bool, inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    """One scale a row: exact but for the rounding of the result, and no row knows of the others."""
    needs_tiles()
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    tiles = linear.to_tiles(weight)
    assert torch.equal(linear.from_tiles(tiles, torch.int8), weight)
    scale, bias = torch.rand(outputs) / 127, torch.randn(outputs)
    x = (torch.randn(2, rows, inputs) * torch.logspace(-2, 2, rows)[:, None]).to(dtype)
    x[0, rows // 2] = 0
    step = x.double().abs().amax(-1, keepdim=True) / 127
    values = torch.where(step > 0, x.double() / step, 0).round()
    truth = values @ weight.double().T * step * scale.double() + bias.double()
    truth = F.gelu(truth) if gelu else truth
    op = torch.ops.fastast.linear_int8
    got = op(x, tiles, scale, bias, gelu)
    assert got.shape == truth.shape and got.dtype == torch.bfloat16
    # A tie may round the other way in fp32: one step of one input in a few thousand.
    assert relative(got, truth) < 3e-3
    assert torch.equal(
        op(x[1:, : rows // 2 + 1], tiles, scale, bias, gelu), got[1:, : rows // 2 + 1]
    )
    apart = torch.randn(2, rows, inputs + 8).to(dtype)
    apart[..., :inputs] = x
    assert torch.equal(op(apart[..., :inputs], tiles, scale, bias, gelu), got)
    x[1, 0, 3], x[1, -1, 0] = math.nan, math.inf
    spoilt = op(x, tiles, scale, bias, gelu)
    assert spoilt[1, [0, -1]].isnan().all() and torch.equal(spoilt[0], got[0])
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert op(x, tiles, scale, bias, gelu).stride() == got.stride()


@pytest.mark.parametrize("rows", [700, 1000, 1214])
@torch.no_grad()
def test_rows_that_do_not_fit_the_cache(rows: int) -> None:
    """Threads then have rows of their own: the same bits on any number of them, and as truth."""
    needs_tiles()
    inputs, outputs = 3072, 64
    weight, bias = torch.randn(outputs, inputs), torch.randn(outputs)
    x = torch.randn(rows, inputs)
    tiles = linear.to_tiles(weight.bfloat16())
    int8_weight = linear.to_tiles(weight.mul(30).clamp(-127, 127).round().to(torch.int8))
    scale = torch.full((outputs,), 1 / 30)

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        return (
            torch.ops.fastast.linear(x.bfloat16(), tiles, bias, False),
            torch.ops.fastast.linear_int8(x.bfloat16(), int8_weight, scale, bias, False),
        )

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = both()
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            assert all(map(torch.equal, both(), expected))
    finally:
        torch.set_num_threads(threads)
    truth = F.linear(x.bfloat16().double(), weight.bfloat16().double(), bias.double())
    assert relative(expected[0], truth) < 2.5e-3
    assert relative(expected[1], truth) < 3e-2


def test_the_int8_op_refuses() -> None:
    needs_tiles()
    tiles = linear.to_tiles(torch.ones(64, 128, dtype=torch.int8))
    x, scale = torch.randn(3, 128), torch.ones(64)
    with pytest.raises(RuntimeError, match="another number of inputs"):
        torch.ops.fastast.linear_int8(x[:, :96], tiles, scale, None, False)
    with pytest.raises(RuntimeError, match="scale must be float32"):
        torch.ops.fastast.linear_int8(x, tiles, scale[:32], None, False)
    with pytest.raises(RuntimeError, match="bias must be float32"):
        torch.ops.fastast.linear_int8(x, tiles, scale, scale[:32], False)
    assert torch.ops.fastast.linear_int8(x[:0], tiles, scale, None, False).shape == (0, 64)


@needs_int8
def test_which_int8_layers_run_in_tiles() -> None:
    needs_tiles()
    for inputs, outputs, dtype, expected in (
        (192, 96, torch.bfloat16, True),
        (192, 96, torch.float32, False),
        (96, 96, torch.bfloat16, False),
        (192, 50, torch.bfloat16, False),
    ):
        layer = Int8Linear.of(nn.Linear(inputs, outputs), dtype)
        assert layer._in_tiles is expected
        x = torch.randn(5, inputs, dtype=dtype)
        assert relative(layer(x), x.double() @ layer.weight.double().T + layer.bias) < 0.02
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


@torch.no_grad()
def test_which_layers_run_in_tiles() -> None:
    needs_tiles()
    for outputs, inputs, expected in (
        (96, 96, True),
        (64, 96, True),
        (96, 32, True),
        (50, 96, False),
        (96, 50, False),
    ):
        plain = nn.Linear(inputs, outputs).bfloat16()
        packed = PackedLinear(plain.weight, plain.bias)
        assert packed._in_tiles is expected, (inputs, outputs)
        assert torch.equal(packed.weight, plain.weight)
        x = torch.randn(3, 7, inputs).bfloat16()
        fused = packed.with_gelu()
        assert torch.equal(fused.weight, plain.weight)
        truth = F.gelu(copy.deepcopy(plain).double()(x.double()))
        assert relative(fused(x), truth) < 4e-3
        assert torch.equal(pickle.loads(pickle.dumps(packed))(x), packed(x))
    packed = PackedLinear(torch.randn(64, 96), None)
    assert not packed._in_tiles  # fp32


@torch.no_grad()
def test_the_gelu_in_tiles() -> None:
    """All of bf16: as good as rounding alone down to where the answer is 1e-6, small below."""
    needs_tiles()
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()]
    inputs = torch.zeros(len(x), 32).bfloat16()
    inputs[:, 3] = x
    tiles = linear.to_tiles(torch.eye(32).bfloat16())
    got = torch.ops.fastast.linear(inputs, tiles, None, True)[:, 3].double()
    exact = x.double() * torch.special.ndtr(x.double())
    ordinary = (x > -5) & (exact.abs() > 1e-36)
    assert ((got - exact).abs() <= 0.004 * exact.abs())[ordinary].all()
    assert ((got - exact).abs() <= 1e-8)[~ordinary].all()


@pytest.mark.parametrize("width, row", [(1024, 1056), (768, 800), (192, 192), (96, 96)])
def test_rows_of_a_hidden_layer_do_not_share_sets_of_the_cache(width: int, row: int) -> None:
    needs_tiles()
    tiles = linear.to_tiles(torch.ones(width, 32).bfloat16())
    x = torch.ones(2, 3, 32).bfloat16()
    for mode in (contextlib.nullcontext(), FakeTensorMode(allow_non_fake_inputs=True)):
        with mode:
            hidden = torch.ops.fastast.linear(x, tiles, None, True)
            assert hidden.shape == (2, 3, width) and hidden.stride() == (3 * row, row, 1)
            assert torch.ops.fastast.linear(x, tiles, None, False).is_contiguous()


def test_tiles_read_nothing_beyond_the_last_row() -> None:
    """In a process of its own: behind the rows lies a page that may not be read."""
    needs_tiles()
    code = """
import ctypes, mmap, torch
from fastast import linear
pages = mmap.mmap(-1, 9 * mmap.PAGESIZE)
start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
guard = ctypes.c_void_p(start + 8 * mmap.PAGESIZE)
assert ctypes.CDLL(None).mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
whole = torch.frombuffer(pages, dtype=torch.bfloat16, count=4 * mmap.PAGESIZE)
x = whole[-3 * 2080 :].view(3, 2080).fill_(1)
tiles = linear.to_tiles(torch.ones(32, 2080).bfloat16())
assert (torch.ops.fastast.linear(x, tiles, None, False) == 2080).all()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_op_refuses_what_is_packed_otherwise() -> None:
    needs_tiles()
    tiles = linear.to_tiles(torch.randn(64, 96).bfloat16())
    with pytest.raises(RuntimeError, match="another number of inputs"):
        torch.ops.fastast.linear(torch.randn(3, 64).bfloat16(), tiles, None, False)
    with pytest.raises(RuntimeError, match="bias must be float32"):
        torch.ops.fastast.linear(torch.randn(3, 96).bfloat16(), tiles, torch.randn(63), False)
    with pytest.raises(RuntimeError, match="x must be bfloat16"):
        torch.ops.fastast.linear(torch.randn(3, 96), tiles, None, False)
