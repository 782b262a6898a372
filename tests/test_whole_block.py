"""Blocks of an optimised model as one op (csrc/block.h): the same bits, and when it is taken."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastast
from fastast import linear, model
from fastast_kernels import use_backend

pytestmark = pytest.mark.skipif(linear.cpu_isa() != "amx", reason="needs AMX")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Of every block that was asked: whether it was one op."""
    found: list[bool] = []

    def run(*args: Any) -> Any:
        result = real(*args)
        found.append(result is not None)
        return result

    real = model.run_whole
    monkeypatch.setattr(model, "run_whole", run)
    return found


def small(r: int, dtype: Any, heads: int = 3) -> fastast.Optimized:
    torch.manual_seed(0)
    config = fastast.ASTConfig.tiny(
        num_classes=7, target_length=64, depth=5, embed_dim=192, num_heads=heads
    )
    plain = fastast.AST(config).eval()
    for parameter in plain.parameters():  # norms and biases that are not 1 and 0
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return fastast.optimize(fastast.patch(plain, r=r), dtype=dtype)


def features(batch: int = 2) -> Tensor:
    return torch.randn(batch, 64, 128, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, "int8"], ids=str)
@pytest.mark.parametrize("heads", [3, 4])  # of 64, and of 48
@pytest.mark.parametrize("r, prop_attn", [(0, True), (5, True), (5, False), (1000, True)])
def test_the_same_bits(taken: list[bool], r: int, prop_attn: bool, heads: int, dtype: Any) -> None:
    fast = small(r, dtype, heads)
    fast.tome.prop_attn = prop_attn
    whole = fast(features())
    # Not the first block, whose tokens are no sum, and not the last, of which two are wanted.
    assert taken == [True] * 3
    with use_backend("cpp"):
        assert torch.equal(fast(features()), whole)
    assert taken[3:] == [False] * 3
    assert whole.isfinite().all() and whole.std() > 0


def test_sizes_go_from_block_to_block(taken: list[bool]) -> None:
    """Schedules with and without merging in turns."""
    fast = small(0, torch.bfloat16)
    fast.r = [3, 0, 4, 0, 2]
    whole = fast(features())
    assert taken == [True] * 3
    with use_backend("cpp"):
        assert torch.equal(fast(features()), whole)


def test_a_hook_inside_is_called(taken: list[bool]) -> None:
    fast = small(5, torch.bfloat16)
    expected = fast(features())
    block = fast.module.blocks[2]
    for inside in (block.attn.proj, block.mlp, block.norm2, block.mlp.activation_fn):
        taken.clear()
        calls: list[int] = []
        handle = inside.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        assert torch.equal(fast(features()), expected)
        handle.remove()
        # norm2 is read by the fused op, never called.
        assert taken == [True, False, True]
        assert calls == ([] if inside is block.norm2 else [1])


def test_a_module_of_another_class_is_called(taken: list[bool]) -> None:
    class Louder(model.Mlp):
        def forward(self, y: Tensor) -> Tensor:
            return 2 * super().forward(y)

    fast = small(5, torch.bfloat16)
    expected = fast(features())
    taken.clear()
    fast.module.blocks[2].mlp.__class__ = Louder
    assert not torch.equal(fast(features()), expected)
    assert taken == [True, False, True]


def test_what_is_replaced_is_noticed(taken: list[bool]) -> None:
    """What the op is given of a block is kept from call to call."""

    def another_weight(block: model.Block) -> None:
        block.norm1.weight = nn.Parameter(block.norm1.weight.detach() * 2)

    def another_layer(block: model.Block) -> None:
        block.mlp.fc2 = linear.PackedLinear(block.mlp.fc2.weight * 2, block.mlp.fc2.bias)

    def another_mlp(block: model.Block) -> None:
        block.mlp = fast.module.blocks[1].mlp

    def another_eps(block: model.Block) -> None:
        block.norm2.eps = 0.5

    fast = small(5, torch.bfloat16)
    before = fast(features())
    for change in (another_weight, another_layer, another_mlp, another_eps):
        change(fast.module.blocks[2])
        taken.clear()
        whole = fast(features())
        assert taken == [True] * 3
        with use_backend("cpp"):
            assert torch.equal(fast(features()), whole)
        assert not torch.equal(whole, before)
        before = whole


def test_a_hook_of_the_block_is_called(taken: list[bool]) -> None:
    fast = small(5, torch.bfloat16)
    calls: list[int] = []
    fast.module.blocks[2].register_forward_hook(lambda *_: calls.append(1))
    fast(features())
    assert calls == [1] and taken == [True] * 3


def test_what_it_does_not_do(taken: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    fast = small(5, torch.bfloat16)
    expected = fast(features())

    def one_by_one() -> None:
        taken.clear()
        got = fast(features())
        assert taken == [False] * 3
        assert torch.equal(got, expected)

    fast.tome.trace = True
    one_by_one()
    assert fast.tome.source is not None
    fast.tome.trace = False
    monkeypatch.setitem(fastast.tome.POLICIES, "other", lambda *a: fastast.tome.bipartite_match(*a))
    fast.tome.policy = "other"
    one_by_one()
    fast.tome.policy = "tome"
    with torch.autocast("cpu", torch.bfloat16):
        one_by_one()
    taken.clear()
    result = fast.module(features(), return_hidden_states=True, return_attentions=True)
    assert taken == [] and len(result.attentions) == 5
    fast.module(features())  # with gradients
    assert taken == [False] * 3


def test_layers_that_are_not_in_tiles(taken: list[bool]) -> None:
    fast = small(5, torch.float32)
    fast(features())
    assert not any(taken)
    fast = small(5, torch.bfloat16)
    fast.module.blocks[1].mlp.fc2 = nn.Linear(768, 192, dtype=torch.bfloat16)
    fast(features())
    assert taken[-3:] == [False, True, True]
    fast = small(5, "int8")
    mixed = fast.module.blocks[1].attn.proj
    fast.module.blocks[1].attn.proj = linear.PackedLinear(mixed.weight, mixed.bias.bfloat16())
    fast(features())
    assert taken[-3:] == [False, True, True]


def test_copies(taken: list[bool]) -> None:
    fast = small(5, torch.bfloat16)
    expected = fast(features())
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        taken.clear()
        assert torch.equal(copied(features()), expected)
        assert taken == [True] * 3


def arguments(r: int, n: int = 20) -> tuple[Any, ...]:
    d = 64
    shapes = ((d, 3 * d), (d, d), (d, 2 * d), (2 * d, d))
    weights = [linear.to_tiles(torch.randn(o, i).bfloat16() / i**0.5) for i, o in shapes]
    biases = [torch.randn(o) for _, o in shapes]
    norms = [torch.randn(d).bfloat16() for _ in range(4)]
    x, pending = torch.randn(2, 2, n, d).bfloat16()
    size = torch.rand(2, n) + 1
    return x, pending, size, size.log(), norms, weights, biases, [], 2, 1e-6, 1e-5, r, True, True


@pytest.mark.parametrize("r", [0, 4])
def test_opcheck(r: int) -> None:
    result = torch.library.opcheck(torch.ops.fastast.block, arguments(r))
    assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.parametrize(
    "place, value, message",
    [
        (4, [], "two norms and four linear layers"),
        (5, [], "two norms and four linear layers"),
        (7, [torch.ones(192)], "two norms and four linear layers"),
        (8, 3, "heads must divide the width"),
        (8, 0, "heads must divide the width"),
        (5, [linear.to_tiles(torch.ones(64, 64).bfloat16())] * 4, "float32, one for each output"),
    ],
)
def test_errors(place: int, value: Any, message: str) -> None:
    given = list(arguments(0))
    given[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastast.block(*given)
