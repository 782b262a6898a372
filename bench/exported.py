"""AST in the engines that people export models to: ONNX Runtime and OpenVINO, on a CPU."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[Tensor], Tensor]

PACKAGES = {
    "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "openvino int8": ("openvino", "nncf"),
}
CALIBRATION_SAMPLES = 4


class Logits(nn.Module):
    """``ASTForAudioClassification`` that returns nothing but its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor) -> Tensor:
        """``[B, T, F]`` to ``[B, classes]``."""
        return self.model(features).logits


def why_not(name: str, dtype: str) -> str | None:
    """Why ``"onnxruntime"`` or ``"openvino"`` cannot run in ``dtype`` here; None if it can."""
    if name == "onnxruntime" and dtype == "bfloat16":
        return "ONNX Runtime has no bf16 kernels for CPUs"
    packages = PACKAGES.get(f"{name} {dtype}", PACKAGES[name])
    if missing := [p for p in packages if importlib.util.find_spec(p) is None]:
        return f'{", ".join(missing)} not installed: pip install "fastast[engines]"'
    if name == "openvino" and dtype == "bfloat16" and not _openvino_bf16():
        return "OpenVINO finds no bf16 instructions on this processor"
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings, log lines and progress bars of an export, which are no news here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def onnxruntime(model: nn.Module, dtype: str, example: Tensor, threads: int) -> Forward:
    """A session for the shape of ``example``, on ONNX Runtime's own CPU kernels.

    Args:
        model: Hugging Face's model with SDPA, fp32.
        dtype: ``"float32"`` or ``"int8"``.
        example: features ``[B, T, F]``.
        threads: threads of the session.
    """
    import onnx
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Idle workers would go on spinning into the turn of whatever is timed next: a product of two
    # matrices then took 15 to 40 % longer. ONNX Runtime itself was up to 20 % slower without
    # spinning on two quiet cores in one run, faster in another, and faster on busy ones.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, _quiet():
        path = Path(folder) / "model.onnx"
        # Opset 23 keeps attention and GELU whole. With 18 they fall apart, which is a fifth slower,
        # and ONNX Runtime's transformer optimiser found no attention there and gained nothing here.
        torch.onnx.export(
            Logits(model), (example,), path, dynamo=True, opset_version=23, external_data=False,
            verbose=False,
        )  # fmt: skip
        if dtype == "int8":
            from onnxruntime.quantization import QuantType, quantize_dynamic

            # Shapes of weights that the quantiser is about to transpose would stop it.
            graph = onnx.load(path)
            del graph.graph.value_info[:]
            onnx.save(graph, path)
            # Static QDQ was a tenth slower and needs calibration; unsigned weights took four times
            # as long, and one scale for a whole matrix added a third to the error.
            quantize_dynamic(
                path,
                path,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                weight_type=QuantType.QInt8,
            )
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def forward(features: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: features.contiguous().numpy()})[0])

    return forward


def _import_openvino() -> Any:
    """The module, told that its telemetry package is missing.

    With telemetry, importing, converting and quantising would each start processes that call home.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def _openvino_bf16() -> bool:
    core = _import_openvino().Core()
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def openvino(model: nn.Module, dtype: str, example: Tensor, threads: int) -> Forward:
    """One stream of OpenVINO, tuned for latency, for the shape of ``example``.

    Args:
        model: Hugging Face's model with SDPA, fp32.
        dtype: ``"float32"``, ``"bfloat16"``, or ``"int8"`` (the rest in bf16 where there is bf16).
        example: features ``[B, T, F]``.
        threads: threads of the stream.
    """
    ov = _import_openvino()
    shape = tuple(example.shape)
    with _quiet():
        # As fast as from a trace, which runs the model four times to check itself (25 s against 3
        # for a ten-second clip); through ONNX it was up to a tenth slower.
        with torch.no_grad():
            program = torch.export.export(Logits(model), (example,))
        graph = ov.convert_model(program)
        graph.reshape(shape)
        if dtype == "int8":
            graph = _quantised(graph, shape)
    bf16 = dtype == "bfloat16" or (dtype == "int8" and _openvino_bf16())
    compiled = ov.Core().compile_model(
        graph,
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
            # Pinned threads would not get out of the way of the other engines'.
            "ENABLE_CPU_PINNING": False,
        },
    )

    def forward(features: Tensor) -> Tensor:
        return torch.from_numpy(compiled(features.contiguous().numpy(), share_inputs=True)[0])

    return forward


def _quantised(graph: Any, shape: tuple[int, ...]) -> Any:
    """``graph`` with int8 weights and activations, calibrated on random features.

    The patch embedding stays as it is, as in PyTorch's int8. So does the scale of the activations:
    with random weights SmoothQuant makes the error six times larger and nothing faster.
    """
    import nncf

    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(shape, generator=generator).numpy() for _ in range(CALIBRATION_SAMPLES)]
    parameters = nncf.AdvancedQuantizationParameters(
        smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1)
    )
    return nncf.quantize(
        graph,
        nncf.Dataset(samples),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(samples),
        ignored_scope=nncf.IgnoredScope(types=["Convolution"]),
        advanced_parameters=parameters,
    )
