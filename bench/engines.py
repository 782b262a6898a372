"""The engines that FastAST is timed against: what people run an AST in today.

All start from one Hugging Face model, whose weights and outputs stay as they are, and become a
``Forward``: fp32 features ``[B, T, F]`` to fp32 logits ``[B, classes]``. Casts into an engine's
dtype and back are inside, and nothing is left to compile at the first call.

Set ``torch.set_num_threads`` before building: PyTorch's engines follow it, and a compiled one is
compiled again when it changes. ``threads`` tells the others.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
import os
import shutil
import types
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import exported
import torch
import torch.nn.functional as F
from exported import Forward
from published import replace_layers
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import ASTForAudioClassification

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CPU_ENGINES: tuple[tuple[str, str], ...] = (
    ("hf_eager", "float32"),
    ("hf_eager", "bfloat16"),
    ("hf_sdpa", "float32"),
    ("hf_sdpa", "bfloat16"),
    ("hf_compile", "float32"),
    ("hf_compile", "bfloat16"),
    ("torch_int8", "int8"),
    ("onnxruntime", "float32"),
    ("onnxruntime", "int8"),
    ("openvino", "float32"),
    ("openvino", "bfloat16"),
    ("openvino", "int8"),
)
CUDA_ENGINES: tuple[tuple[str, str], ...] = (
    ("hf_eager", "float32"),
    ("hf_eager", "bfloat16"),
    ("hf_sdpa", "float32"),
    ("hf_sdpa", "bfloat16"),
    ("hf_compile", "float32"),
    ("hf_compile", "bfloat16"),
    ("hf_compile_max", "float32"),
    ("hf_compile_max", "bfloat16"),
)
NAMES = tuple(dict.fromkeys(name for name, _ in CPU_ENGINES + CUDA_ENGINES))
COUNT = itertools.count()


def why_not(name: str, dtype: str, device: str) -> str | None:
    """Why an engine cannot be built here, as a sentence; None if it can.

    Args:
        name: one of ``NAMES``, ``"published"`` or ``"stride16"``.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"int8"``.
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        ValueError: one of the three is none of these.
    """
    built_apart = ("published", "stride16")
    _one_of("engine", name, (*NAMES, *built_apart))
    _one_of("dtype", dtype, (*DTYPES, "int8"))
    _one_of("device", device, ("cpu", "cuda"))
    if importlib.util.find_spec("transformers") is None:
        return 'transformers not installed: pip install "fastast[hf]"'
    if device == "cuda" and not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    if name in ("onnxruntime", "openvino") and device == "cpu":
        return exported.why_not(name, dtype)
    here, there = CPU_ENGINES, CUDA_ENGINES
    if device == "cuda":
        here, there = there, here
    if name not in built_apart and (name, dtype) not in here:
        if (name, dtype) in there:
            return f"{name} in {dtype} is not an engine for {device}"
        return f"{name} does not run in {dtype}"
    if name in built_apart and dtype not in DTYPES:
        return f"{name} does not run in {dtype}"
    if name == "hf_compile" and device == "cpu" and not _cpp_compiler():
        return "torch.compile needs a C++ compiler: install g++ or set CXX"
    if dtype == "bfloat16" and not _has_bf16(device):
        return f"this {'processor' if device == 'cpu' else 'GPU'} has no bf16 instructions"
    return None


def build(
    name: str, dtype: str, model: ASTForAudioClassification, example: Tensor, threads: int
) -> Forward:
    """The engine ``name`` in ``dtype``, with the weights of ``model`` and on its device.

    Args:
        name: one of ``NAMES``.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"int8"``.
        model: fp32 and in eval mode; it stays as it is.
        example: features of the one shape ``[B, T, F]`` that will be run, on the model's device.
        threads: CPU threads.

    Raises:
        ValueError: there is no such engine or dtype.
        RuntimeError: there is, but not here; see :func:`why_not`.
    """
    _one_of("engine", name, NAMES)
    _require(name, dtype, example)
    if name.startswith("hf_"):
        attention = "eager" if name == "hf_eager" else "sdpa"
        copied = _copy(model, attention, DTYPES[dtype])
        mode = {"hf_compile": "default", "hf_compile_max": "max-autotune"}.get(name)
        return _torch_forward(copied, DTYPES[dtype], example, threads, mode)
    plain = _copy(model, "sdpa", torch.float32)
    if name == "torch_int8":
        return _torch_forward(_dynamic_int8(plain), torch.float32, example, threads, None)
    engine = exported.onnxruntime if name == "onnxruntime" else exported.openvino
    return engine(plain, dtype, example, threads)


def build_published(
    model: ASTForAudioClassification,
    schedule: Sequence[int],
    attention: str,
    dtype: str,
    example: Tensor,
    compiled: bool,
    threads: int,
) -> Forward:
    """Token merging as its authors run it, unfused; see :mod:`published`.

    Args:
        model: fp32 and in eval mode; it stays as it is.
        schedule: tokens to merge in each layer.
        attention: ``"materialised"``, as published, or ``"sdpa"``.
        dtype: ``"float32"`` or ``"bfloat16"``, also of the token sizes.
        example: features of the one shape ``[B, T, F]`` that will be run, on the model's device.
        compiled: run it through ``torch.compile``.
        threads: CPU threads.

    Raises:
        ValueError: an argument is none of these.
        RuntimeError: not in this dtype here; see :func:`why_not`.
    """
    _require("published", dtype, example)
    if compiled:
        _require("hf_compile", dtype, example)
    copied = replace_layers(_copy(model, "sdpa", DTYPES[dtype]), schedule, attention)
    mode = "default" if compiled else None
    return _torch_forward(copied, DTYPES[dtype], example, threads, mode)


def build_stride16(model: ASTForAudioClassification, dtype: str) -> ASTForAudioClassification:
    """``model`` with patches side by side instead of overlapping: fewer tokens without merging.

    Its weights are the same but for the position embeddings, interpolated to the smaller grid. It
    answers otherwise than ``model``: its errors are to be taken against itself.

    Args:
        model: fp32; it stays as it is.
        dtype: ``"float32"``, which :func:`build` wants, or ``"bfloat16"``.
    """
    _one_of("dtype", dtype, tuple(DTYPES))
    config: Any = copy.deepcopy(model.config)
    config.frequency_stride = config.time_stride = config.patch_size
    with torch.device("meta"):
        coarse = type(model)(config)
    state = model.state_dict()
    old = model.audio_spectrogram_transformer.embeddings
    new = coarse.audio_spectrogram_transformer.embeddings
    key = "audio_spectrogram_transformer.embeddings.position_embeddings"
    prefix, patches = state[key][:, :2], state[key][:, 2:]
    image = patches.transpose(1, 2).unflatten(2, old.get_shape(model.config))  # [1, D, f, t]
    grid = new.get_shape(config)
    image = F.interpolate(image, grid, mode="bilinear", align_corners=True)
    state[key] = torch.cat([prefix, image.flatten(2).transpose(1, 2)], dim=1)
    coarse.load_state_dict(state, assign=True)
    return coarse.eval().to(dtype=DTYPES[dtype])


def _one_of(what: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{what} must be one of {', '.join(known)}, got {value!r}")


def _require(name: str, dtype: str, example: Tensor) -> None:
    if reason := why_not(name, dtype, example.device.type):
        raise RuntimeError(f"{name} in {dtype} cannot be built: {reason}")


@functools.cache
def _has_bf16(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _cpp_compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def _copy(model: Any, attention: str, dtype: torch.dtype) -> Any:
    """``model`` with another attention and dtype; in fp32 it shares the weights."""
    shared = {id(p): p for p in model.parameters()} if dtype == torch.float32 else {}
    copied = copy.deepcopy(model, shared)
    copied.set_attn_implementation(attention)
    return copied.to(dtype) if dtype != torch.float32 else copied


def _torch_forward(
    model: nn.Module, dtype: torch.dtype, example: Tensor, threads: int, mode: str | None
) -> Forward:
    """``model`` as a Forward, compiled in ``mode`` for the shape of ``example`` unless None."""

    def logits(features: Tensor) -> Tensor:
        return model(features.to(dtype)).logits.float()

    if mode is None:
        return torch.inference_mode()(logits)

    compiled = torch.compile(_own_code(logits), fullgraph=True, dynamic=False, mode=mode)

    @torch.inference_mode()
    def forward(features: Tensor) -> Tensor:
        # CUDA graphs write the next call's logits into the same memory.
        out = compiled(features)
        return out.clone() if mode == "max-autotune" else out

    from torch._inductor import config as inductor

    with inductor.patch(_inductor_options(example.device.type, threads)):
        for _ in range(3 if mode == "max-autotune" else 1):  # the second call records the graph
            forward(example)
    return forward


def _inductor_options(device: str, threads: int) -> dict[str, Any]:
    """Settings while compiling. On a CPU, packing the weights ahead is about a tenth faster."""
    return {"cpp.threads": threads, "freezing": True} if device == "cpu" else {}


def _own_code(function: Any) -> Forward:
    """``function`` with a code object of its own.

    Dynamo files what it compiles under the code object, which all closures of one definition
    share: it would look through all engines at each call, and refuse the ninth.
    """
    code = function.__code__.replace(co_name=f"engine_{next(COUNT)}")
    return types.FunctionType(code, function.__globals__, closure=function.__closure__)


def _dynamic_int8(model: nn.Module) -> nn.Module:
    """``model`` with int8 weights, and activations quantised at run time, in its linear layers."""
    known = torch.backends.quantized.supported_engines
    before = torch.backends.quantized.engine
    # The packed weights remember their engine. onednn took two thirds of the time of the others.
    torch.backends.quantized.engine = "onednn" if "onednn" in known else before
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated in favour of torchao
            return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    finally:
        torch.backends.quantized.engine = before
