"""Packed and int8 linear layers: against fp64, inside models, and where the CPU has none."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import features, relative, tiny_ast, tiny_huggingface
from torch import Tensor, nn

import fastast
import fastast_kernels as kernels
from fastast import linear
from fastast.audio import find_audio, load_audio
from fastast.classify import asset, default_model
from fastast.demo import _features
from fastast.evaluate import front_end, time_rounds
from fastast.linear import Fused, Int8Linear, PackedLinear
from fastast_kernels.backends import COMPILED

needs_onednn = pytest.mark.skipif(not linear._has_onednn(), reason="needs oneDNN on x86")
needs_int8 = pytest.mark.skipif(linear.why_no_int8() is not None, reason="needs int8 products")
SHAPES = [(96,), (7, 96), (2, 5, 96), (0, 5, 96)]


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny fp32 models are packed too, whatever is faster."""
    monkeypatch.setattr(linear, "LEAST_ELEMENTS", 0)
    monkeypatch.setattr(linear, "packed_is_faster", lambda threads: True)


def dtype_here(dtype: torch.dtype) -> torch.dtype:
    if dtype != torch.float32 and not linear.packs(dtype):
        pytest.skip(f"oneDNN has no {dtype} on this CPU")
    return dtype


def layer(dtype: torch.dtype = torch.float32, out: int = 160, bias: bool = True) -> nn.Linear:
    made = nn.Linear(96, out, bias=bias)
    nn.init.normal_(made.weight, std=0.2)
    return made.to(dtype)


def kinds(model: nn.Module, kind: type) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


@needs_onednn
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("out", [160, 32], ids=["wider", "narrower"])
@pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_as_accurate_as_linear(dtype: torch.dtype, gelu: bool, out: int, bias: bool) -> None:
    plain = layer(dtype_here(dtype), out, bias)
    packed = PackedLinear(plain.weight, plain.bias, gelu)
    assert torch.equal(packed.weight, plain.weight)
    exact = copy.deepcopy(plain).double()
    for shape in SHAPES:
        x = torch.randn(shape).to(dtype)
        theirs, truth = plain(x), exact(x.double())
        if gelu:
            theirs, truth = F.gelu(theirs), F.gelu(truth)
        got = packed(x)
        assert got.shape == truth.shape and got.dtype == dtype
        if x.numel():
            assert relative(got, truth) < 1.5 * relative(theirs, truth) + 1e-7


@needs_onednn
@pytest.mark.parametrize("behind", [1.0, math.nan, 1e-40], ids=["numbers", "NaN", "subnormal"])
@torch.no_grad()
def test_rows_behind_the_last_are_taken_along(behind: float) -> None:
    """They make the product one of whole eights and leave no trace in the result."""
    plain = layer()
    packed = PackedLinear(plain.weight, plain.bias)
    memory = torch.randn(608, 96)
    memory[602:] = behind
    x = memory[:602].view(2, 301, 96)
    more = linear.with_spare_rows(x)
    assert more is not None and more.shape == (608, 96) and more.data_ptr() == x.data_ptr()
    truth = F.linear(x.double(), plain.weight.double(), plain.bias.double())
    got = packed(x)
    assert got.shape == (2, 301, 160) and got.is_contiguous()
    assert relative(got, truth) < 1e-6
    # What comes out has its spare rows, too; a copy, fewer rows and whole eights have none.
    assert linear.with_spare_rows(got) is not None
    for other in (x.clone(), memory[:594], memory, x.bfloat16(), memory[:602, :48]):
        assert linear.with_spare_rows(other) is None


@pytest.mark.skipif(not COMPILED, reason="needs the compiled extension")
@torch.no_grad()
def test_kernels_leave_room_for_spare_rows() -> None:
    """The inputs of all linear layers of a model but the first."""
    x = torch.randn(1, 602, 192)
    weight, bias = torch.ones(192), torch.zeros(192)
    q, k, v = x.view(1, 602, 3, 1, 64).permute(2, 0, 3, 1, 4)
    with kernels.use_backend("cpp"):
        _, y = kernels.add_layer_norm(x, x, weight, bias)
        out = kernels.attention(q, k, v).transpose(1, 2).flatten(2)
    for made in (y, out):
        more = linear.with_spare_rows(made)
        assert more is not None and (more[602:] == 0).all()


@needs_onednn
@torch.no_grad()
def test_the_gelu_is_the_exact_one() -> None:
    plain = nn.Linear(1, 1)
    plain.weight.fill_(1.0)
    plain.bias.zero_()
    x = torch.linspace(-4, 4, 801)[:, None]
    got = PackedLinear(plain.weight, plain.bias, gelu=True)(x)
    truth = F.gelu(x.double())
    assert (F.gelu(x, approximate="tanh") - truth).abs().max() > 1e-4
    assert (got - truth).abs().max() < 2e-6


@needs_onednn
@pytest.mark.parametrize("kind", ["packed", pytest.param("int8", marks=needs_int8)])
@torch.no_grad()
def test_a_part_of_the_outputs(kind: str) -> None:
    plain = layer()
    whole = (
        PackedLinear(plain.weight, plain.bias)
        if kind == "packed"
        else Int8Linear.of(plain, torch.float32)
    )
    x = torch.randn(2, 5, 96)
    expected = whole(x)
    for start, stop in ((0, 64), (64, 160)):
        torch.testing.assert_close(
            linear.linear_part(whole, x, start, stop), expected[..., start:stop]
        )
        assert whole.part(start, stop) is whole.part(start, stop)
        torch.testing.assert_close(
            linear.linear_part(plain, x, start, stop), plain(x)[..., start:stop]
        )


@needs_onednn
@pytest.mark.parametrize("kind", ["packed", pytest.param("int8", marks=needs_int8)])
@torch.no_grad()
def test_copied_pickled_and_saved(kind: str) -> None:
    plain = layer()
    packed = (
        PackedLinear(plain.weight, plain.bias, gelu=True)
        if kind == "packed"
        else Int8Linear.of(plain, torch.float32)
    )
    x = torch.randn(3, 96)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(other(x), packed(x)) and other is not packed
    state = packed.state_dict()
    assert list(state) == list(plain.state_dict()) == ["weight", "bias"]
    off = relative(state["weight"], plain.weight.double())
    assert off == 0 if kind == "packed" else 0 < off < 0.01
    assert torch.equal(state["bias"], plain.bias)


@needs_onednn
def test_what_a_packed_layer_refuses() -> None:
    packed = PackedLinear(layer().weight, None)
    assert packed.eval() is packed and packed.to("cpu", torch.float32) is packed
    with pytest.raises(RuntimeError, match=r"packed by fastast\.optimize, for inference only"):
        packed.train()
    with pytest.raises(RuntimeError, match=r"for torch\.float32 on a CPU: call it again"):
        packed.bfloat16()
    with pytest.raises(RuntimeError, match="copy a model before for another device"):
        packed.to("meta")


@needs_onednn
def test_a_packed_model(packing: None) -> None:
    model = fastast.patch(tiny_ast(), r=3)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x = features()
    expected = model(x).detach()
    optimized = fastast.optimize(model)
    assert len(kinds(model, PackedLinear)) == 3 * 4 + 1
    assert kinds(model, Fused) == [f"blocks.{i}.mlp.activation_fn" for i in range(3)]
    got = optimized(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not [name for name, _ in model.named_parameters() if name.endswith("fc1.weight")]
    saved = model.state_dict()
    assert list(saved) == list(state)
    for name, value in state.items():
        assert torch.equal(saved[name], value), name
    torch.testing.assert_close(fastast.optimize(copy.deepcopy(model))(x), got, rtol=0, atol=0)
    linear.unpack(model)
    assert not kinds(model, PackedLinear) and not kinds(model, Fused)
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == list(state)


@needs_onednn
@pytest.mark.parametrize("dtype", [None, pytest.param("int8", marks=needs_int8)])
def test_the_trimmed_last_block(packing: None, dtype: Any) -> None:
    model = fastast.optimize(tiny_ast(), dtype)
    x = features()
    whole = model(x, return_hidden_states=True).logits  # every query of the last block
    tolerance = 1e-4 if dtype is None else 0.05
    assert relative(model(x), whole.double()) < tolerance
    (last,) = [module for module in model.blocks[-1:].modules() if hasattr(module, "qkv")]
    assert sorted(last.qkv._parts) == [(0, 64), (64, 192)]


@needs_onednn
@pytest.mark.parametrize("dtype", [None, pytest.param("int8", marks=needs_int8)])
def test_compiled(packing: None, dtype: Any) -> None:
    optimized = fastast.optimize(fastast.patch(tiny_ast(), r=3), dtype)
    x = features()
    expected = optimized(x)
    with torch.no_grad():
        torch._dynamo.reset()
        got = torch.compile(optimized.module, backend="aot_eager", fullgraph=dtype is None)(x)
    torch.testing.assert_close(got, expected)


@needs_onednn
def test_optimized_again_in_another_dtype(packing: None) -> None:
    dtype_here(torch.bfloat16)
    model = tiny_ast()
    x = features()
    expected = model(x).detach()
    fastast.optimize(model)
    half = fastast.optimize(model, torch.bfloat16)
    assert half(x).dtype == torch.bfloat16
    assert {model.blocks[0].mlp.fc1.dtype, model.head.linear.dtype} == {torch.bfloat16}
    assert 0 < relative(half(x), expected.double()) < 0.05
    with pytest.raises(RuntimeError, match="for inference only"):
        model.train()


@needs_onednn
def test_hugging_face(packing: None) -> None:
    pytest.importorskip("transformers")
    model = fastast.patch(tiny_huggingface(), r=3)
    x = features()
    expected = model(input_values=x).logits.detach()
    optimized = fastast.optimize(model)
    layers = model.audio_spectrogram_transformer.layers
    assert len(kinds(layers, PackedLinear)) == 3 * 6 and len(kinds(layers, Fused)) == 3
    got = optimized(input_values=x).logits
    assert not torch.equal(got, expected)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    linear.unpack(model)
    assert torch.equal(model(input_values=x).logits, expected)


@needs_onednn
def test_other_activations_and_hooks_are_left_alone(packing: None) -> None:
    model = tiny_ast()
    model.blocks[0].mlp.activation_fn = nn.GELU(approximate="tanh")
    seen: list[Tensor] = []
    model.blocks[1].mlp.fc1.register_forward_hook(lambda *call: seen.append(call[2]))
    x = features()
    expected = model(x).detach()
    torch.testing.assert_close(fastast.optimize(model)(x), expected, rtol=1e-4, atol=1e-5)
    assert kinds(model, Fused) == ["blocks.2.mlp.activation_fn"]
    assert len(seen) == 2 and type(model.blocks[1].mlp.fc1) is nn.Linear


def test_small_fp32_layers_stay() -> None:
    model = tiny_ast()
    fastast.optimize(model)
    assert not kinds(model, PackedLinear)


def without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)


def without_avx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")


@pytest.mark.parametrize("missing", [without_onednn, without_avx])
def test_where_nothing_is_packed(
    packing: None, monkeypatch: pytest.MonkeyPatch, missing: Any
) -> None:
    missing(monkeypatch)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert not linear.packs(dtype)
    x = features()
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_ast().to(dtype)
        with torch.no_grad():
            expected = model(x)
        assert torch.equal(fastast.optimize(tiny_ast(), dtype)(x), expected)


def test_float64_is_not_packed(packing: None) -> None:
    model = tiny_ast()
    assert fastast.optimize(model, torch.float64)(features()).dtype == torch.float64
    assert not kinds(model, PackedLinear)


@needs_onednn
@pytest.mark.parametrize("plain, packed", [(2.0, 1.0), (1.0, 2.0)])
def test_the_faster_library_in_fp32(
    monkeypatch: pytest.MonkeyPatch, plain: float, packed: float
) -> None:
    steps = itertools.cycle([0.0, plain, 0.0, packed])
    clock = itertools.accumulate(steps)
    monkeypatch.setattr(linear.time, "perf_counter", lambda: next(clock))
    linear.packed_is_faster.cache_clear()
    try:
        assert linear.packed_is_faster(1) == (packed < plain)
        used = next(clock)
        assert linear.packed_is_faster(1) == (packed < plain)
        assert next(clock) <= used + max(plain, packed)  # not measured again
    finally:
        linear.packed_is_faster.cache_clear()


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = tiny_ast()
    model.train()
    before = dict(model.named_parameters())
    time_rounds(model, features(), [0, 4], 1, 1e-9)
    assert model.training and model.tome is None and type(model.blocks[0].mlp.fc1) is nn.Linear
    assert all(p is before[name] for name, p in model.named_parameters())


@needs_int8
@pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
@torch.no_grad()
def test_int8_is_the_rounded_product(gelu: bool) -> None:
    plain = layer()
    plain.weight[3] = 0
    ours = Int8Linear.of(plain, torch.float32)
    ours.gelu = gelu
    x = torch.randn(2, 5, 96)
    most = 127 if torch.cpu._is_vnni_supported() else 63
    scale = (plain.weight.abs().amax(1) / most).double()
    weight = (plain.weight.double() / scale.clamp_min(1e-30)[:, None]).round()
    assert torch.equal(ours.int8_weight.double(), weight)
    step = x.abs().max().double() / 127
    truth = (x.double() / step).round() @ weight.T * (step * scale) + plain.bias.double()
    truth = F.gelu(truth) if gelu else truth
    torch.testing.assert_close(ours(x).double(), truth, rtol=1e-5, atol=1e-5)
    exact = F.gelu(plain(x)) if gelu else plain(x)
    assert 1e-4 < relative(ours(x), exact.double()) < 0.02
    assert ours(x[:0]).shape == (0, 5, 160) and ours(x[0, 0]).shape == (160,)
    torch.testing.assert_close(ours(x.transpose(0, 1)).transpose(0, 1), ours(x))
    nothing = ours(torch.zeros(2, 96))
    expected = F.gelu(plain.bias) if gelu else plain.bias
    torch.testing.assert_close(nothing, expected.expand(2, -1))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("n", [0, 1, 37, 70_000])
def test_rounding_to_int8(n: int, dtype: torch.dtype) -> None:
    """The compiled op against plain PyTorch, over several runs of it and their tails."""
    if linear.cpu_isa() is None:
        pytest.skip("needs the compiled extension")
    x = (torch.randn(2, n) * 3).to(dtype)
    values, peak = torch.ops.fastast.round_to_int8(x)
    assert values.shape == x.shape and values.dtype == torch.int8 and peak.shape == ()
    if n == 0:
        return
    assert peak == x.abs().max()
    assert values.abs().max() == 127
    # Half of a step off at most, and what fp32 adds.
    off = (values.double() * float(peak) / 127 - x.double()).abs().max()
    assert off <= 0.5001 * float(peak) / 127
    plain, _ = linear._round_to_int8(x)
    assert (values.int() - plain.int()).abs().max() <= 1
    for bad in (math.nan, math.inf, -math.inf):
        for at in (0, -1):
            wrong = x.clone()
            wrong[1, at] = bad
            assert not math.isfinite(torch.ops.fastast.round_to_int8(wrong)[1].item())
    zeros, peak = torch.ops.fastast.round_to_int8(x * 0)
    assert peak == 0 and not zeros.any()


@needs_int8
@torch.no_grad()
def test_int8_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Int8Linear.of(layer(), torch.float32)
    x = torch.randn(3, 7, 96)
    expected = ours(x)
    monkeypatch.setattr(linear, "cpu_isa", lambda: None)
    torch.testing.assert_close(ours(x), expected, rtol=0.02, atol=0.02)


@needs_int8
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_int8_of_what_is_not_finite(bad: float) -> None:
    x = torch.randn(3, 96)
    x[1, 2] = bad
    assert Int8Linear.of(layer(), torch.float32)(x).isnan().all()


@needs_int8
def test_int8_without_vnni_leaves_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert Int8Linear.of(layer(), torch.float32).int8_weight.abs().max() == 63


@needs_int8
@pytest.mark.parametrize("rest", [torch.float32, torch.bfloat16], ids=str)
def test_an_int8_model(monkeypatch: pytest.MonkeyPatch, rest: torch.dtype) -> None:
    monkeypatch.setattr(linear, "fastest_dtype", lambda: rest)
    model = fastast.patch(tiny_ast(), r=3)
    x = features()
    expected = model(x).detach().double()
    optimized = fastast.optimize(model, "int8")
    names = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert kinds(model, Int8Linear) == [f"blocks.{i}.{name}" for i in range(3) for name in names]
    assert len(kinds(model, Fused)) == 3
    assert {p.dtype for p in model.parameters()} <= {rest} and linear.is_int8(model)
    got = optimized(x)
    assert got.dtype == rest and 0 < relative(got, expected) < 0.1
    for dtype in (None, "int8"):  # it is that already
        assert torch.equal(fastast.optimize(optimized, dtype)(x), got)
    with pytest.raises(ValueError, match=r'must be "int8" or None .* already, got torch.float32'):
        fastast.optimize(model, torch.float32)


@needs_int8
def test_int8_hugging_face() -> None:
    pytest.importorskip("transformers")
    model = fastast.patch(tiny_huggingface(), r=3)
    x = features()
    expected = model(input_values=x).logits.detach().double()
    got = fastast.optimize(model, "int8")(input_values=x.to(linear.fastest_dtype())).logits
    assert len(kinds(model, Int8Linear)) == 3 * 6 and len(kinds(model, Fused)) == 3
    assert 0 < relative(got, expected) < 0.1


def test_where_int8_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r'dtype "int8" is for a model on the CPU .* on meta'):
        fastast.optimize(tiny_ast().to("meta"), "int8")
    if linear.why_no_int8() is None:
        with pytest.raises(ValueError, match=r"without an nn\.ModuleList .* got a Linear"):
            fastast.optimize(nn.Linear(4, 4), "int8")
    model = tiny_ast()
    with monkeypatch.context() as patch:
        patch.setattr(type(torch.backends.quantized), "supported_engines", ["qnnpack"])
        with pytest.raises(RuntimeError, match="torch has no quantised engine 'onednn' here"):
            fastast.optimize(model, "int8")
    without_onednn(monkeypatch)
    with pytest.raises(RuntimeError, match='dtype "int8" cannot be used: torch has no oneDNN'):
        fastast.optimize(model, "int8")
    assert type(model.blocks[0].mlp.fc1) is nn.Linear


@needs_int8
@pytest.mark.parametrize("r", [0, 10])
def test_the_shipped_model_in_int8(r: int) -> None:
    """What int8 costs on the real clips: a hundredth of the logits, and no answer."""
    model = fastast.patch(fastast.AST.from_pretrained(default_model()), r=r)
    files = find_audio([asset("clips")])
    clips = [load_audio(path, model.config.sample_rate) for path in files]
    x = _features(front_end(model.config), clips)
    with torch.no_grad():
        expected = model(x)
    got = fastast.optimize(model, "int8")(x).float()
    assert kinds(model, Int8Linear)
    assert relative(got, expected.double()) < 0.03
    assert torch.equal(got.argmax(1), expected.argmax(1))
