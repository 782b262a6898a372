"""Schemas, fake kernels, autograd, autocast, torch.compile and torch.export of every op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastast_kernels as fk
from fastast_kernels.backends import INTERPRETED, OPS, why_not

CPU_BACKEND = "triton" if INTERPRETED else "cpp"
needs_kernels = pytest.mark.skipif(
    why_not("merge", CPU_BACKEND, "cpu") is not None,
    reason=str(why_not("merge", CPU_BACKEND, "cpu")),
)


def samples() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of the registered ops, with and without the optional ones."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, requires_grad=True)

    rows = fk.bipartite_match(torch.randn(2, 12, 8), 3)
    size = torch.rand(2, 12) + 1
    sources = fk.reference.sources(rows, 9)
    return {
        "bipartite_match": [
            (torch.randn(2, 12, 8), 3, True, True),
            (torch.randn(1, 5, 8), 0, False, False),
        ],
        "bipartite_match_sources": [
            (torch.randn(2, 12, 8), 3, True, True),
            (torch.randn(1, 5, 8), 0, False, False),
        ],
        "key_metric": [(torch.randn(2, 3, 12, 8),)],
        "match_keys": [(torch.randn(2, 3, 12, 8), 3, True, True)],
        "match_keys_sources": [(torch.randn(2, 3, 12, 8), 3, True, True)],
        "merge": [
            (leaf(2, 12, 5), rows, 9, size),
            (leaf(2, 12, 5), rows, 9, None),
            (leaf(2, 12, 5), rows, 9, size, sources),
        ],
        "merge_backward": [(torch.randn(2, 9, 5), rows, size, torch.rand(2, 9) + 1)],
        "unmerge": [(leaf(2, 9, 5), rows)],
        "unmerge_backward": [(torch.randn(2, 12, 5), rows, 9)],
        "add_layer_norm": [(leaf(2, 12, 5), leaf(2, 12, 5), leaf(5), leaf(5), 1e-6)],
        "add_layer_norm_backward": [
            (*torch.randn(3, 2, 9, 5), torch.randn(5), torch.randn(2, 9), torch.rand(2, 9))
        ],
        "merge_add_layer_norm": [
            (leaf(2, 12, 5), leaf(2, 12, 5), rows, 9, size, leaf(5), leaf(5), 1e-6),
            (leaf(2, 12, 5), leaf(2, 12, 5), rows, 9, None, leaf(5), leaf(5), 1e-6),
            (leaf(2, 12, 5), leaf(2, 12, 5), rows, 9, size, leaf(5), leaf(5), 1e-6, sources),
        ],
        "merge_add_layer_norm_backward": [
            (
                *torch.randn(3, 2, 9, 5),
                torch.randn(5),
                torch.randn(2, 9),
                torch.rand(2, 9),
                rows,
                size,
                torch.rand(2, 9) + 1,
            )
        ],
        "attention": [
            (leaf(2, 3, 7, 16), leaf(2, 3, 12, 16), leaf(2, 3, 12, 16), size.log(), 0.25),
            (leaf(2, 3, 7, 16), leaf(2, 3, 12, 16), leaf(2, 3, 12, 16), None, 0.25),
        ],
        "attention_column_sums": [
            (*torch.randn(2, 2, 3, 12, 16), torch.rand(2, 3, 12), size.log(), 0.25, True),
            (*torch.randn(2, 2, 3, 12, 16), torch.rand(2, 3, 12), None, 0.25, False),
        ],
    }


@needs_kernels
@pytest.mark.parametrize("op", sorted(samples()))
def test_opcheck(op: str) -> None:
    for arguments in samples()[op]:
        result = torch.library.opcheck(getattr(torch.ops.fastast, op), arguments)
        assert set(result.values()) == {"SUCCESS"}, result


@needs_kernels
def test_opcheck_of_attention_backward() -> None:
    q, k, v, log_size, scale = samples()["attention"][0]
    q, k, v = q.detach(), k.detach(), v.detach()
    out, lse = torch.ops.fastast.attention(q, k, v, log_size, scale)
    arguments = (torch.randn_like(out), q, k, v, log_size, out, lse, scale)
    result = torch.library.opcheck(torch.ops.fastast.attention_backward, arguments)
    assert set(result.values()) == {"SUCCESS"}, result


def step(
    x: Tensor, residual: Tensor, qkv: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, ...]:
    """Every public op, as one transformer layer would use them."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    k_all = k
    rows = fk.bipartite_match(fk.key_metric(k), 4)
    n_out = x.shape[1] - fk.effective_r(x.shape[1], 4)
    h, size, y = fk.merge_add_layer_norm(x, residual, rows, n_out, None, weight, bias)
    k, v = (fk.merge(t[:, 0], rows, n_out)[0][:, None] for t in (k, v))
    a = fk.attention(q, k, v, size.log())
    _, lse = fk.attention_with_lse(q, k, v, size.log())
    received = fk.attention_column_sums(q, k, lse, size.log())
    h, y = fk.add_layer_norm(h, y, weight, bias)
    return fk.unmerge(y, rows), fk.unmerge(y, fk.match_keys(k_all, 4)), a, received


def step_inputs(requires_grad: bool = True) -> list[Tensor]:
    shapes = [(2, 20, 8), (2, 20, 8), (2, 20, 3, 1, 8), (8,), (8,)]
    return [torch.randn(s, requires_grad=requires_grad) for s in shapes]


def gradients(fn: Callable[..., tuple[Tensor, ...]], leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(sum(o.square().sum() for o in fn(*leaves)), leaves))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compile_fullgraph(compiler: str) -> None:
    leaves = step_inputs()
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for a, b in zip(compiled(*leaves), step(*leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for a, b in zip(gradients(compiled, leaves), gradients(step, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(*step_inputs())


def test_backend_change_is_seen_by_compiled_code() -> None:
    leaves = step_inputs(requires_grad=False)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    expected = step(*leaves)
    for name in ("reference", None):
        if name:
            with fk.use_backend(name):
                got = compiled(*leaves)
        else:
            got = compiled(*leaves)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def step_with_sources(x: Tensor, k: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Matches that also return their sources, merges that are given them."""
    n_out = x.shape[1] - 4
    rows, sources = fk.match_keys(k, 4, return_sources=True)
    h, size, y = fk.merge_add_layer_norm(x, x, rows, n_out, None, weight, bias, sources=sources)
    rows, sources = fk.bipartite_match(x, 4, return_sources=True)
    return h, y, size, sources, fk.merge(x, rows, n_out, None, sources)[0]


@needs_kernels
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_with_sources(compiler: str) -> None:
    x, qkv = torch.randn(2, 20, 8, requires_grad=True), torch.randn(2, 20, 3, 1, 8)
    leaves = (x, qkv.permute(2, 0, 3, 1, 4)[1], *torch.randn(2, 8))
    torch._dynamo.reset()
    compiled = torch.compile(step_with_sources, fullgraph=True, backend=compiler)
    for a, b in zip(compiled(*leaves), step_with_sources(*leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    gradients = []
    for function in (compiled, step_with_sources):
        h, y, _, _, merged = function(*leaves)
        total = h.square().sum() + (y * y.detach().cos()).sum() + merged.square().sum()
        gradients.append(torch.autograd.grad(total, x)[0])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@needs_kernels
def test_export_with_sources() -> None:
    class Step(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            return step_with_sources(*inputs)

    leaves = (torch.randn(2, 20, 8), torch.randn(2, 1, 20, 8), *torch.randn(2, 8))
    program = torch.export.export(Step(), leaves)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {f"fastast.{op}_sources.default" for op in ("match_keys", "bipartite_match")} <= names
    for a, b in zip(program.module()(*leaves), step_with_sources(*leaves), strict=True):
        torch.testing.assert_close(a, b)


@needs_kernels
def test_export_keeps_the_ops() -> None:
    class Step(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            return step(*inputs)

    leaves = step_inputs(requires_grad=False)
    program = torch.export.export(Step(), tuple(leaves))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {f"fastast.{op}.default" for op in OPS} <= names
    for a, b in zip(program.module()(*leaves), step(*leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("backend")
def test_autocast() -> None:
    x, residual = torch.randn(2, 10, 8, dtype=torch.bfloat16), torch.randn(2, 10, 8)
    weight, bias = torch.randn(2, 8)
    q = torch.randn(2, 1, 10, 8)
    rows = fk.bipartite_match(residual, 2)
    with pytest.raises(TypeError, match="residual must have the dtype of x"):
        fk.add_layer_norm(x, residual, weight, bias)
    with torch.autocast(x.device.type, torch.bfloat16):
        h, y = fk.add_layer_norm(x, residual, weight, bias)
        assert h.dtype == y.dtype == torch.float32
        h, size, y = fk.merge_add_layer_norm(x, residual, rows, 8, None, weight, bias)
        assert h.dtype == y.dtype == size.dtype == torch.float32
        assert fk.attention(q, q, q).dtype == torch.bfloat16
        assert fk.merge(x, rows, 8)[0].dtype == torch.bfloat16
    plain = fk.merge_add_layer_norm(x.float(), residual, rows, 8, None, weight, bias)
    torch.testing.assert_close(h, plain[0])


def test_every_op_has_a_schema_and_no_mutation() -> None:
    for op in OPS:
        schema = getattr(torch.ops.fastast, op).default._schema
        assert not schema.is_mutable, op
        assert all(a.alias_info is None for a in (*schema.arguments, *schema.returns)), op
