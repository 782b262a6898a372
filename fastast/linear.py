"""The linear layers of a model that :func:`fastast.optimize` made ready for a CPU.

A weight that is packed once, in the order in which oneDNN's kernels read it, is not reordered at
every call, and bias and GELU ride on the product. The layers here take the place of ``nn.Linear``,
keep no second copy of its weight, and are for inference only. What that gains is in
docs/performance-log.md.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastast_kernels.backends import build_information

# Of fp32 weights. A smaller product is over before the call of torch's packed op is.
LEAST_ELEMENTS = 2**18
# From how many rows on oneDNN's fp32 product wants them in eights; below it is as fast without.
MANY_ROWS = 600
# Whose ``fc1`` is followed by ``activation_fn`` and by nothing in between.
FUSED_MLPS = (
    "fastast.model.Mlp",
    "transformers.models.audio_spectrogram_transformer.modeling_audio_spectrogram_transformer.ASTMLP",
    "transformers.models.vit.modeling_vit.ViTMLP",
)


class InferenceLinear(nn.Module):
    """A linear layer whose weight is no parameter any more: what the packed ones have in common.

    Args:
        bias: ``[out_features]``, or None.
        shape: ``(out_features, in_features)``.
        dtype: of what goes in and out.
        gelu: apply the exact GELU, too.
    """

    bias: Tensor | None

    def __init__(
        self, bias: Tensor | None, shape: tuple[int, int], dtype: torch.dtype, gelu: bool
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.bias = bias
        self.dtype = dtype
        self.gelu = gelu
        self.training = False
        self._parts: dict[tuple[int, int], InferenceLinear] = {}

    @property
    def weight(self) -> Tensor:
        """A plain copy of the weight, ``[out_features, in_features]``."""
        raise NotImplementedError

    def part(self, start: int, stop: int) -> InferenceLinear:
        """The layer of the outputs ``start`` to ``stop``, packed once, when it is first wanted."""
        if (start, stop) not in self._parts:
            self._parts[start, stop] = self._part(slice(start, stop))
        return self._parts[start, stop]

    def _part(self, outputs: slice) -> InferenceLinear:
        raise NotImplementedError

    def tiles(self) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        """Weight, bias and scale as csrc/linear.h wants them, or None where its kernel is not."""
        return None

    def with_gelu(self) -> InferenceLinear:
        """The layer with the exact GELU behind it."""
        self.gelu = True
        return self

    def train(self, mode: bool = True) -> InferenceLinear:
        """Only ``train(False)``.

        Raises:
            RuntimeError: ``mode`` is true.
        """
        if mode:
            raise RuntimeError(
                "the linear layers of this model were packed by fastast.optimize, for inference "
                "only: train a copy made before"
            )
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InferenceLinear:
        before = torch.empty(0, dtype=self.dtype)
        after = fn(before)
        if (after.dtype, after.device) != (before.dtype, before.device):
            raise RuntimeError(
                "the linear layers of this model were packed by fastast.optimize, for "
                f"{self.dtype} on a CPU: call it again for another dtype; copy a model before for "
                "another device"
            )
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # The keys of nn.Linear, so that a packed model can be saved.
        destination[prefix + "weight"] = self.weight
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias.to(self.dtype)

    def extra_repr(self) -> str:
        """What is printed of the layer."""
        gelu = ", gelu" if self.gelu else ""
        return f"{self.in_features}, {self.out_features}, {self.dtype}{gelu}"


class PackedLinear(InferenceLinear):
    """A linear layer with its weight packed, by oneDNN; as accurate as ``F.linear``.

    On a CPU with AMX the kernel of csrc/linear.h takes its place for bf16 layers whose sizes are
    multiples of 32: it is up to twice as fast where oneDNN's falls behind, and a little elsewhere.

    Args:
        weight: ``[out_features, in_features]``, fp32, bf16 or fp16.
        bias: ``[out_features]``, or None.
        gelu: apply the exact GELU, too.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> None:
        weight = weight.detach()
        out_features, in_features = weight.shape
        bias = None if bias is None else bias.detach()
        super().__init__(bias, (out_features, in_features), weight.dtype, gelu)
        bf16 = weight.dtype == torch.bfloat16
        self._in_tiles = bf16 and cpu_isa() == "amx" and in_features % 32 == out_features % 32 == 0
        if self._in_tiles:
            self._packed = to_tiles(weight)
            self._fp32_bias = None if bias is None else bias.float()
        else:
            # oneDNN's AMX kernel of many rows falls to half its speed where inputs are no fewer
            # than outputs, on 600 to 1,000 rows and two threads. The order that it wants for one
            # row costs a fifth of the best and never falls.
            rows = 1 if bf16 and in_features >= out_features else None
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)

    @property
    def weight(self) -> Tensor:
        """A plain copy of the weight, ``[out_features, in_features]``."""
        return from_tiles(self._packed) if self._in_tiles else self._packed.to_dense()

    def tiles(self) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        """The weight in bf16 and the bias in fp32, or None."""
        return (self._packed, self._fp32_bias, None) if self._in_tiles else None

    def _part(self, outputs: slice) -> PackedLinear:
        bias = None if self.bias is None else self.bias[outputs]
        return PackedLinear(self.weight[outputs], bias, self.gelu)

    def __reduce__(self) -> tuple[Any, ...]:  # of copies too: a packed tensor has no storage
        return PackedLinear, (self.weight, self.bias, self.gelu)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        if x.dtype != self.dtype:
            x = x.to(self.dtype)
        if self._in_tiles:
            return torch.ops.fastast.linear.default(x, self._packed, self._fp32_bias, self.gelu)
        more = with_spare_rows(x)
        attribute, algorithm = ("gelu", "none") if self.gelu else ("none", "")
        y = torch.ops.mkldnn._linear_pointwise(
            x if more is None else more, self._packed, self.bias, attribute, [], algorithm
        )
        return y if more is None else y[: x.numel() // x.shape[-1]].view(*x.shape[:-1], -1)


def with_spare_rows(x: Tensor) -> Tensor | None:
    """``x`` as rows, and what lies behind them in memory as more, to a multiple of eight.

    oneDNN's product of many rows in fp32 takes up to a tenth longer where their number is no
    multiple of eight. What comes out for the rows more is left out.

    Args:
        x: ``[..., D]``.

    Returns:
        ``[M, D]``, or None where that gains nothing or there is no room: the kernels that come
        before a linear layer leave some (csrc/cpu/common.h).
    """
    if torch.compiler.is_compiling() or x.dtype != torch.float32 or x.dim() < 2:
        return None
    width = x.shape[-1]
    rows = x.numel() // width
    spare = -rows % 8
    if rows < MANY_ROWS or not spare or not x.is_contiguous():
        return None
    room = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    more = (rows + spare, width)
    return x.as_strided(more, (width, 1)) if room >= math.prod(more) else None


def to_tiles(weight: Tensor) -> Tensor:
    """A weight ``[N, K]`` as csrc/linear.h wants it: int32 ``[N / 32, steps, 2, 16, 16]``.

    Args:
        weight: bf16 with ``K`` a multiple of 32, or int8 with one of 64; ``N`` one of 32.
    """
    n, k = weight.shape
    group = 4 // weight.element_size()
    tiles = weight.reshape(n // 32, 2, 16, k // (16 * group), 16, group)
    return tiles.permute(0, 3, 1, 4, 2, 5).contiguous().view(torch.int32).squeeze(-1)


def from_tiles(tiles: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The weight that :func:`to_tiles` packed."""
    parts = tiles[..., None].view(dtype)  # [N / 32, steps, 2, 16, 16, group]
    inputs = tiles.shape[1] * 16 * parts.shape[-1]
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(tiles.shape[0] * 32, inputs)


@functools.cache
def cpu_isa() -> str | None:
    """The instruction set that the compiled kernels run with, None without them."""
    return cast("str | None", build_information().get("cpu_isa"))


class Int8Linear(InferenceLinear):
    """A linear layer with int8 weights, whose input is rounded to int8 at every call.

    Symmetric both: one scale an output channel for the weight, and for the input one a row in tiles
    of AMX (csrc/linear.h), where a row that is not finite becomes NaN. With torch's op it is one
    for all of an input, so that a row's result depends, by the size of the rounding, on what else
    is in the batch, and an input that is not finite makes the whole output NaN.

    Args:
        weight: int8 ``[out_features, in_features]``.
        scale: fp32 ``[out_features]``, what 1 stands for.
        bias: ``[out_features]``, or None.
        dtype: of what goes in and out.
        gelu: apply the exact GELU, too.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        gelu: bool = False,
    ) -> None:
        out_features, in_features = weight.shape
        bias = None if bias is None else bias.detach().float()
        super().__init__(bias, (out_features, in_features), dtype, gelu)
        self.scale = scale
        self._in_tiles = (
            cpu_isa() == "amx"
            and dtype == torch.bfloat16
            and in_features % 64 == out_features % 32 == 0
        )
        if self._in_tiles:
            self._packed = to_tiles(weight)
        else:
            self._zero = torch.zeros(out_features, dtype=torch.int32)
            self._packed = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)

    @staticmethod
    def of(linear: nn.Linear, dtype: torch.dtype) -> Int8Linear:
        """``linear`` with its weight rounded to the nearest."""
        weight = linear.weight.detach().float()
        # Without VNNI the sum of two products saturates at 16 bits, which half the range keeps it
        # from.
        most = 127 if torch.cpu._is_vnni_supported() else 63
        scale = (weight.abs().amax(1) / most).clamp_min(torch.finfo(torch.float32).tiny)
        rounded = (weight / scale[:, None]).round_().to(torch.int8)
        return Int8Linear(rounded, scale, linear.bias, dtype)

    @property
    def int8_weight(self) -> Tensor:
        """A plain copy of the rounded weight, ``[out_features, in_features]``."""
        if self._in_tiles:
            return from_tiles(self._packed, torch.int8)
        return self._packed.to_dense().t()

    @property
    def weight(self) -> Tensor:
        """What the rounded weight stands for, ``[out_features, in_features]``."""
        return (self.int8_weight * self.scale[:, None]).to(self.dtype)

    def tiles(self) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        """The weight in int8, the bias in fp32 and what 1 stands for, or None."""
        return (self._packed, self.bias, self.scale) if self._in_tiles else None

    def _part(self, outputs: slice) -> Int8Linear:
        bias = None if self.bias is None else self.bias[outputs]
        return Int8Linear(
            self.int8_weight[outputs], self.scale[outputs], bias, self.dtype, self.gelu
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Int8Linear, (self.int8_weight, self.scale, self.bias, self.dtype, self.gelu)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        if self._in_tiles:
            return torch.ops.fastast.linear_int8.default(
                x, self._packed, self.scale, self.bias, self.gelu
            )
        return self._with_one_scale(x)

    @torch.compiler.disable  # it reads the largest input, by which a graph would be specialised
    def _with_one_scale(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x.new_empty(*x.shape[:-1], self.out_features, dtype=self.dtype)
        values, largest = (
            torch.ops.fastast.round_to_int8(x) if cpu_isa() is not None else _round_to_int8(x)
        )
        peak = largest.item()
        if not math.isfinite(peak):
            return x.new_full((*x.shape[:-1], self.out_features), math.nan, dtype=self.dtype)
        scale = max(peak / 127, torch.finfo(torch.float32).tiny)
        return torch.ops.onednn.qlinear_pointwise(
            values, scale, 0, self._packed, self.scale, self._zero, self.bias,
            1.0, 0, self.dtype, *(("gelu", [], "none") if self.gelu else ("none", [], "")),
        )  # fmt: skip


def _round_to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """What the compiled op does, in plain PyTorch: ``127 x / max|x|`` rounded, and ``max|x|``."""
    x = x.float()
    peak = x.abs().amax()
    factor = torch.where(peak.isfinite() & (peak >= 1e-30), 127 / peak, 0.0)
    return (x * factor).nan_to_num().round().to(torch.int8), peak


class Fused(nn.Module):
    """The identity in the place of an activation that the layer before applies.

    Args:
        activation: what was there.
    """

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """``x``."""
        return x


def linear_part(layer: nn.Module, x: Tensor, start: int, stop: int) -> Tensor:
    """Outputs ``start`` to ``stop`` of a linear layer, packed or not."""
    if isinstance(layer, InferenceLinear):
        return layer.part(start, stop)(x)
    weight, bias = cast(nn.Linear, layer).weight, cast(nn.Linear, layer).bias
    return F.linear(x, weight[start:stop], None if bias is None else bias[start:stop])


def packs(dtype: torch.dtype) -> bool:
    """Whether packed layers of that dtype are the faster ones on this CPU."""
    # Where nobody measured, on other processors than x86, F.linear stays.
    if not _has_onednn():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32 and packed_is_faster(torch.get_num_threads())


def _has_onednn() -> bool:
    x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return x86 and torch.backends.mkldnn.is_available()


@functools.cache
@torch.no_grad()
def packed_is_faster(threads: int) -> bool:
    """Whether oneDNN beats what ``F.linear`` calls in fp32, usually MKL: measured, in 0.1 s.

    MKL is three times slower than oneDNN on a processor of AMD, and as fast on one of Intel, where
    the GELU that oneDNN applies itself decides: so an MLP is what is timed.

    Args:
        threads: of this process: another number is another measurement.
    """
    x, up, down = torch.ones(256, 768), torch.ones(1536, 768), torch.ones(768, 1536)
    biases = torch.ones(1536), torch.ones(768)
    packed = PackedLinear(up, biases[0], gelu=True), PackedLinear(down, biases[1])

    def plain_mlp() -> Tensor:
        return F.linear(F.gelu(F.linear(x, up, biases[0])), down, biases[1])

    def packed_mlp() -> Tensor:
        return packed[1](packed[0](x))

    def seconds(call: Callable[[], Tensor]) -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    turns = [(seconds(plain_mlp), seconds(packed_mlp)) for _ in range(5)]
    plain, ours = (min(times[1:]) for times in zip(*turns, strict=True))
    return ours < plain


def why_no_int8() -> str | None:
    """What keeps int8 from running here, or None."""
    if not torch.backends.mkldnn.is_available():
        return "torch has no oneDNN here"
    if "onednn" not in torch.backends.quantized.supported_engines:
        return "torch has no quantised engine 'onednn' here"
    return None


def fastest_dtype() -> torch.dtype:
    """bf16 where the CPU multiplies it, else fp32."""
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def is_int8(model: nn.Module) -> bool:
    """Whether linear layers of ``model`` have int8 weights."""
    return any(isinstance(module, Int8Linear) for module in model.modules())


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Parents, names and layers, without those that somebody gave hooks or made a subclass."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            hooked = child._forward_hooks or child._forward_pre_hooks or "forward" in vars(child)
            if type(child) is nn.Linear and not hooked:
                yield parent, name, child


def _fuse(model: nn.Module) -> None:
    """Let each packed ``fc1`` of the MLPs we know apply the GELU behind it."""
    module: Any
    for module in model.modules():
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        if kind in FUSED_MLPS and isinstance(module.fc1, InferenceLinear):
            activation = module.activation_fn
            if _is_exact_gelu(activation):
                module.fc1 = module.fc1.with_gelu()
                module.activation_fn = Fused(activation)


def _is_exact_gelu(activation: Any) -> bool:
    if isinstance(activation, nn.GELU):
        return activation.approximate == "none"
    return type(activation).__name__ == "GELUActivation" and activation.act is F.gelu


def pack(model: nn.Module) -> None:
    """Put packed layers in the places of ``model``'s, in place, where they are faster."""
    for parent, name, linear in _linears(model):
        dtype = linear.weight.dtype
        small = dtype == torch.float32 and linear.weight.numel() < LEAST_ELEMENTS
        if not small and packs(dtype):
            setattr(parent, name, PackedLinear(linear.weight, linear.bias))
    _fuse(model)


def round_to_int8(model: nn.Module, dtype: torch.dtype) -> None:
    """Put int8 layers in the places of those in the blocks of ``model``, in place.

    Args:
        model: its blocks are what lies in an ``nn.ModuleList``.
        dtype: of what goes in and out of the layers.

    Raises:
        RuntimeError: torch cannot do it here.
        ValueError: there are no such layers.
    """
    reason = why_no_int8()
    if reason is not None:
        raise RuntimeError(f'dtype "int8" cannot be used: {reason}')
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList))
    blocks = {id(module) for of in lists for block in of for module in block.modules()}
    found = [found for found in _linears(model) if id(found[0]) in blocks]
    if not found and not is_int8(model):
        raise ValueError(
            'dtype must not be "int8" for a model without an nn.ModuleList of blocks with linear '
            f"layers, got a {type(model).__name__}"
        )
    for parent, name, linear in found:
        setattr(parent, name, Int8Linear.of(linear, dtype))
    _fuse(model)


def unpack(model: nn.Module) -> None:
    """Undo :func:`pack`, in place, bit for bit; int8 layers stay."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, PackedLinear):
                sizes = child.in_features, child.out_features
                linear = nn.Linear(*sizes, bias=child.bias is not None, device="meta").eval()
                linear.weight = nn.Parameter(child.weight)
                if child.bias is not None:
                    linear.bias = nn.Parameter(child.bias)
                setattr(parent, name, linear)
    module: Any
    for module in list(model.modules()):
        fused = getattr(module, "activation_fn", None)
        if isinstance(fused, Fused) and isinstance(module.fc1, nn.Linear):
            module.activation_fn = fused.activation
